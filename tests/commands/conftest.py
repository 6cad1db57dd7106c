"""A model whose every answer is known: it has learnt by heart which token follows which."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf.export import WeightFormat, export_model
from jaxtune.hf.load import open_model
from jaxtune.model import decoder
from jaxtune.tree import map_named

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024,
    "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "eos_token_id": 2, "bos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip


class Parrot:
    """A folder with a model that answers every prompt with the same text, `begun` by what the
    template puts last in front of it.

    Its blocks add nothing, so the logits of a token are norm(table[token]) @ head: a table of what
    follows what, which `logits` gives in f64 for the tests to compare with.
    """

    def __init__(
        self, folder: Path, says: str, *, template: str = "auto", begun: str = "\n"
    ) -> None:
        self.folder = folder
        tokenizer = load_tokenizer(str(TOKENIZER))
        rng = np.random.default_rng(7)
        self.table = rng.normal(size=(1024, 64)).astype(np.float32)
        self.head = rng.normal(size=(64, 1024), scale=0.1).astype(np.float32)
        resolved = resolve(template, tokenizer)
        chain = tokenizer.encode(f"{begun}{says}{resolved.stop}")
        assert len(set(chain)) == len(chain), "a token can have one successor only"
        for token, successor in itertools.pairwise(chain):
            self.head[:, successor] += self.table[token]
        source = folder.parent / f"{folder.name}-source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(CONFIG))
        model = open_model(source, weights=False)
        export_model(
            folder, model=model, params=map_named(self._leaf, decoder.abstract(model.spec, "f4")),
            weights=WeightFormat("float32"), tokenizer=tokenizer, template=resolved,
            stop_ids=[resolved.stop_id], card="# parrot\n",
        )  # fmt: skip

    def _leaf(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        known: Mapping[str, np.ndarray] = {"embed/table": self.table, "head/kernel": self.head}
        fill = 1.0 if name.endswith("scale") else 0.0
        return jnp.asarray(known.get(name, np.full(leaf.shape, fill, np.float32)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        hidden = self.table[tokens].astype(np.float64)
        hidden /= np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-5)
        return hidden @ self.head.astype(np.float64)


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Parrot:
    return Parrot(tmp_path_factory.mktemp("parrot") / "hf", "Yes, you can")


@pytest.fixture(scope="session")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Parrot:
    """Another one, to put beside the first."""
    return Parrot(tmp_path_factory.mktemp("contrary") / "hf", "Sorry")


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Parrot:
    """One whose template puts a blank before its answers."""
    folder = tmp_path_factory.mktemp("vicuna") / "hf"
    return Parrot(folder, " Yes, you can", template="vicuna", begun=":")


@pytest.fixture
def copy_without(tmp_path: Path) -> Callable[..., Path]:
    """A model folder copied without some of its files."""

    def copy(source: Path, *names: str) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*names))
        return target

    return copy
