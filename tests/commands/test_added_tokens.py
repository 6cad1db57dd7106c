"""A template whose special tokens the base model lacks, from `add_tokens` to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtune import convert, train
from jaxtune.config import Config, ConfigError, load
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf.load import load_params, open_model
from jaxtune.tree import named

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
NEW = ("<start_of_turn>", "<end_of_turn>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.jsonl and OUT/hf, a model with exactly one row per token."""
    folder = tmp_path_factory.mktemp("base")
    rows = [{"instruction": f"Where is {i}?", "output": f"In Rome, {i}."} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(TOKENIZER, folder / "start")
    for added in ("chat_template.jinja", "model.safetensors"):
        (folder / "start" / added).unlink(missing_ok=True)
    size = load_tokenizer(str(folder / "start")).size
    config = {
        "model_type": "llama", "vocab_size": size, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "start" / "config.json").write_text(json.dumps(config))
    train.run(settings(folder, "start", folder / "OUT", template="alpaca", init="random"))
    return folder


def settings(base: Path, model: str, out: Path, **more: object) -> Config:
    return load(
        overrides={
            "model_name_or_path": str(base / model), "dataset": str(base / "data.jsonl"),
            "output_dir": str(out), "max_length": 256, "max_steps": 1, "learning_rate": 0.0,
            "mesh.fsdp": 1, "mesh.data": -1, "per_device_train_batch_size": 1,
            "packing": False, "gradient_checkpointing": "none", **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    train.run(settings(base, "OUT/hf", out, template="gemma", add_tokens=True))
    return out


def test_without_add_tokens_the_error_offers_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lacks: <start_of_turn>, .*Set add_tokens: true to add them"
    ):
        train.run(settings(base, "OUT/hf", tmp_path / "out", template="gemma"))


def test_tables_grow_by_the_new_tokens_which_begin_as_the_mean(base: Path, tuned: Path) -> None:
    before, after = (
        named(load_params(open_model(folder / "hf"), None, np.float32))
        for folder in (base / "OUT", tuned)
    )
    size = load_tokenizer(str(base / "OUT" / "hf")).size
    for name, axis in (("embed/table", 0), ("head/kernel", 1)):
        old, new = np.asarray(before[name]), np.asarray(after[name])
        assert new.shape[axis] == size + 2
        if axis:
            old, new = old.T, new.T
        np.testing.assert_array_equal(new[:size], old)
        # float32: a sum of hundreds of rows in another order
        np.testing.assert_allclose(new[size:], np.tile(old.mean(axis=0), (2, 1)), atol=1e-6)


@pytest.mark.torch
def test_transformers_loads_what_was_exported(base: Path, tuned: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned / "hf")
    size = load_tokenizer(str(base / "OUT" / "hf")).size
    assert [tokenizer.convert_tokens_to_ids(token) for token in NEW] == [size, size + 1]
    assert set(NEW) <= set(tokenizer.all_special_tokens)
    chat = [{"role": "user", "content": "Where is 3?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[0] == size
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nWhere is 3?\nmodel\n"
    model = AutoModelForCausalLM.from_pretrained(tuned / "hf", dtype=torch.float32)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == size + 2
    stops = model.generation_config.eos_token_id
    assert size + 1 in stops
    assert tokenizer.eos_token_id in stops
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_ours_loads_it_without_adding_again(base: Path, tuned: Path, tmp_path: Path) -> None:
    found = load_tokenizer(str(tuned / "hf"), add=NEW)
    assert found.added == {}
    assert found.changed_files == {}
    assert set(NEW) <= found.special_tokens.keys()
    config = json.loads((tuned / "hf" / "config.json").read_text())
    assert config["vocab_size"] == found.size
    written = load(tuned / "config.yaml")
    assert written.add_tokens is True
    assert str(written.template_date) == "2024-07-26"
    convert.main([str(tuned), str(tmp_path / "again")])
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tuned / "hf" / name).read_bytes()
