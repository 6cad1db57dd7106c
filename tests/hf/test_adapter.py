"""Adapters in PEFT's format: its folders give its logits here, ours give our logits there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import TEXTS, write_folder
from safetensors.numpy import load_file, save_file

from jaxtune.config import ConfigError, ModelError
from jaxtune.hf import load
from jaxtune.hf.export import export_model
from jaxtune.hf.load import HfModel, load_params, open_model
from jaxtune.hf.peft import base_identity, merge, names, write
from jaxtune.hf.peft import read as adapter_read
from jaxtune.hf.peft.targets import resolve_targets
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training.initial_weights import param_shardings
from jaxtune.tree import map_named, named

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "adapters"
LOGITS = np.load(GOLDEN / "logits.npz")
INPUTS = TEXTS[0][None]


def logits(model: HfModel, params: Any, collection: Any = None, lora: Lora | None = None) -> Any:
    variables = {"params": params} if collection is None else {"params": params, "lora": collection}
    found = decoder.logits(
        model.spec, variables, INPUTS, lora=lora, dtype=jnp.float32,
        segment_ids=np.ones_like(INPUTS), positions=np.arange(INPUTS.shape[1])[None],
    )  # fmt: skip
    return np.asarray(found)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return open_model(write_folder("llama", tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def params(base: HfModel) -> Any:
    return load_params(base, None, jnp.float32)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_of_peft_gives_its_logits_beside_and_merged(
    kind: str, base: HfModel, params: Any, tmp_path: Path
) -> None:
    """Stored by golden/make_adapters.py: patterns of ranks and scales and rows of tokens too."""
    adapter = adapter_read.open_adapter(str(GOLDEN / kind))
    lora, collection = adapter_read.read_adapter(adapter, base)
    assert (lora.dora, lora.rslora, lora.dropout) == (kind == "dora", kind == "rslora", 0.1)
    beside = logits(base, params, collection, lora)
    np.testing.assert_allclose(beside, LOGITS[kind], atol=1e-4)
    assert np.abs(beside - logits(base, params)).max() > 0.1
    merged = merge.merged(base, lora, collection)
    out = tmp_path / "merged"
    export_model(out, model=base, params=merged, tokenizer=None, template=None, card="#\n")
    again = open_model(out)
    whole = logits(again, load_params(again, None, jnp.float32))
    np.testing.assert_allclose(whole, beside, atol=1e-5)
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    loaded = merge.merged_params(base, lora, collection, placed, np.float32)
    np.testing.assert_allclose(logits(base, loaded), beside, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_slices_are_read_once_and_lie_on_a_device_once(
    kind: str, base: HfModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_read.open_adapter(str(GOLDEN / kind))
    lora, collection = adapter_read.read_adapter(adapter, base)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 1}, jax.devices()[:4])
    placed = param_shardings(base.spec, mesh, jnp.bfloat16)
    whole = named(merge.merged(base, lora, collection))
    before, most, read = sum(x.nbytes for x in jax.live_arrays()), [0], [0]

    def counted(tensor: Any, index: Any) -> np.ndarray:
        most[0] = max(most[0], sum(x.nbytes for x in jax.live_arrays()) - before)
        values = fetch(tensor, index)
        read[0] += values.size
        return values

    fetch = load.fetch
    monkeypatch.setattr(load, "fetch", counted)
    params = merge.merged_params(base, lora, collection, placed, jnp.bfloat16)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert most[0] < 2 * total  # bytes
    if kind == "lora":
        assert read[0] == total
    monkeypatch.setattr(load, "fetch", fetch)
    for name, leaf in named(params).items():
        # A stack's layers are given one by one.
        layers = range(leaf.shape[0]) if base.placed[name].row.spread else None
        part = whole[name]
        expected = part({}) if layers is None else np.stack([part({0: n}) for n in layers])
        np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16), err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_was_read_is_written_as_peft_wrote_it(
    kind: str, base: HfModel, tmp_path: Path
) -> None:
    adapter = adapter_read.open_adapter(str(GOLDEN / kind))
    lora, collection = adapter_read.read_adapter(adapter, base)
    write.write_adapter(
        tmp_path / "out", model=base, lora=lora, adapters=collection, tokenizer=None, template=None
    )
    ours, theirs = (
        load_file(folder / names.WEIGHTS) for folder in (tmp_path / "out", GOLDEN / kind)
    )
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    said = json.loads((tmp_path / "out" / names.CONFIG).read_text())
    stored = json.loads((GOLDEN / kind / names.CONFIG).read_text())
    for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "peft_type"):
        assert said[key] == stored[key], key
    assert said["trainable_token_indices"] == stored["trainable_token_indices"]
    short = {name.rpartition(".")[2] for name in stored["target_modules"]}
    assert set(said["target_modules"]) == short


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "lora"),
    [
        ("llama", Lora(r=3, alpha=6.0)),
        ("llama", Lora(r=4, alpha=6.0, rslora=True, dora=True, tokens=(9, 60))),
        ("qwen2-tied", Lora(r=3, alpha=6.0, dora=True, tokens=(60,))),
        ("phi3", Lora(r=2, alpha=3.0)),
        ("phi3", Lora(r=2, alpha=3.0, rslora=True, dora=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_loads_ours_and_gives_our_logits(case: str, lora: Lora, tmp_path: Path) -> None:
    """phi3's q, k and v are one tensor, as are its gate and up: one module of PEFT each."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    folder = write_folder(case, tmp_path / "base")
    model = open_model(folder)
    params = load_params(model, None, jnp.float32)
    fresh = decoder.init_adapters(model.spec, lora, params, jax.random.key(0))
    moved = map_named(_moved, fresh)
    out = tmp_path / "adapter"
    write.write_adapter(out, model=model, lora=lora, adapters=moved, tokenizer=None, template=None)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    adapted = peft.PeftModel.from_pretrained(theirs, out).eval()
    with torch.no_grad():
        found = adapted(torch.tensor(INPUTS)).logits[0].numpy()
    ours = logits(model, params, moved, lora)
    np.testing.assert_allclose(found, ours, atol=1e-4)
    assert np.abs(ours - logits(model, params)).max() > 0.1
    again, collection = adapter_read.read_adapter(adapter_read.open_adapter(str(out)), model)
    assert again.r == lora.r
    for name, values in named(collection).items():
        np.testing.assert_array_equal(values, named(moved)[name], err_msg=name)


def _moved(name: str, leaf: jax.Array) -> jax.Array:
    random = np.random.RandomState(sum(map(ord, name)))
    return leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32)


# What is changed -> how much of each projection's adapter is left.
NOUGHT: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "everywhere": ({}, {"q": 0.0, "v": 0.0, "down": 0.0}),
    "but one": ({"alpha_pattern": {"v_proj": 5}}, {"q": 0.0, "v": 5 / 6, "down": 0.0}),
}


@pytest.mark.parametrize("case", NOUGHT)
def test_an_alpha_of_nought(case: str, base: HfModel, params: Any, tmp_path: Path) -> None:
    config, expected = NOUGHT[case]
    folder = _changed(tmp_path, {"lora_alpha": 0, **config})
    lora, found = adapter_read.read_adapter(adapter_read.open_adapter(str(folder)), base)
    golden = adapter_read.open_adapter(str(GOLDEN / "lora"))
    plainly, before = adapter_read.read_adapter(golden, base)
    for name, values in named(found).items():
        if name.endswith("/b"):
            times = expected[name.split("/")[-2]]
            before_b = plainly.scale * named(before)[name]
            np.testing.assert_allclose(lora.scale * values, times * before_b, atol=1e-6)
    assert np.isfinite(logits(base, params, found, lora)).all()
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    merged = merge.merged_params(base, lora, found, placed, np.float32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(merged))


@pytest.mark.torch
@pytest.mark.parametrize("case", NOUGHT)
def test_an_alpha_of_nought_in_peft(case: str, base: HfModel, params: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = _changed(tmp_path, {"lora_alpha": 0, **NOUGHT[case][0]})
    theirs = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(INPUTS)).logits[0].numpy()
    lora, found = adapter_read.read_adapter(adapter_read.open_adapter(str(folder)), base)
    np.testing.assert_allclose(logits(base, params, found, lora), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("q_proj, v_proj", {"q", "v"}),
        (("self_attn.o_proj", "mlp.up_proj"), {"o", "up"}),
        (r"model\.layers\.\d+\.mlp\..*", {"gate", "up", "down"}),
        (("all-linear",), {"q", "k", "v", "o", "gate", "up", "down"}),
        (("q_proj,v_proj",), {"q", "v"}),
        ((r".*\.mlp\..*", "q_proj"), {"q", "gate", "up", "down"}),
    ],
)
def test_targets(base: HfModel, targets: Any, expected: set[str]) -> None:
    found = resolve_targets(base, targets)
    assert {name.rpartition("/")[2] for name in found} == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "matches none of .* There are: down_proj, .*v_proj; or all-linear. Did you mean"),
        ("lm_head", "'lm_head' matches none"),
        ("q_proj,gate", "'gate' matches none"),
        (r".*layers\.1\..*q_proj", "matches 1 of the 2 layers that are repeated"),
        ("q_proj|(", "is no regex: missing"),
    ],
)
def test_targets_that_match_nothing_or_some_layers(
    base: HfModel, targets: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_targets(base, targets)


def _changed(tmp_path: Path, config: dict[str, Any], drop: str = "", add: str = "") -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(GOLDEN / "lora", folder)
    file = folder / names.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = load_file(folder / names.WEIGHTS)
    tensors = {name: values for name, values in tensors.items() if not drop or drop not in name}
    if add:
        tensors[add] = np.zeros((3, 32), np.float32)
    save_file(tensors, folder / names.WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("config", "drop", "add", "message"),
    [
        ({"peft_type": "LOHA"}, "", "", "peft_type is LOHA, which is not supported"),
        ({"bias": "all"}, "", "", "bias is all, which is not supported"),
        ({"init_lora_weights": "pissa"}, "", "", "init_lora_weights is pissa"),
        ({"modules_to_save": ["lm_head"]}, "", "", "Merge it with peft"),
        ({"base_model_name_or_path": None}, "", "", "no base_model_name_or_path"),
        ({}, "layers.1.self_attn.q_proj", "", "adapts 1 of 2 layers"),
        ({}, "layers.1.self_attn.q_proj.lora_B", "", "q_proj.lora_B.weight is missing"),
        ({"use_dora": True}, "", "", "lora_magnitude_vector is missing"),
        ({}, "", "base_model.model.lm_head.lora_A.weight", "have no place in"),
    ],
)
def test_adapters_that_would_be_misread_are_refused(
    base: HfModel, tmp_path: Path, config: dict, drop: str, add: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        adapter_read.read_adapter(
            adapter_read.open_adapter(str(_changed(tmp_path, config, drop, add))), base
        )


def test_another_models_adapter_and_a_pickle_are_refused(base: HfModel, tmp_path: Path) -> None:
    other = open_model(write_folder("llama-head-dim", tmp_path / "other"))
    golden = adapter_read.open_adapter(str(GOLDEN / "lora"))
    with pytest.raises(ModelError, match="It is another model's adapter"):
        adapter_read.read_adapter(golden, other)
    folder = _changed(tmp_path, {})
    (folder / names.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"Pickled adapters .* are never read"):
        adapter_read.open_adapter(str(folder))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("")
    with pytest.raises(ConfigError, match="holds files that are no adapter"):
        write.check_adapter_target(tmp_path / "thesis")


def test_digests_tell_two_trainings_of_one_architecture_apart(tmp_path: Path) -> None:
    folder = write_folder("llama", tmp_path / "a")
    first = base_identity.digests(open_model(folder))
    assert first == base_identity.digests(open_model(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: values * np.float32(1.001) for name, values in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert base_identity.digests(open_model(folder)) != first


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": "8"}, "r is '8'; expected a number from 1 to 65536"),
        ({"r": 2.5}, "r is '2.5'; expected a whole number"),
        ({"r": 0}, "r is '0'; expected a number from 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'; expected a number"),
        ({"lora_dropout": None}, "lora_dropout is 'None'; expected a number from 0 to 1"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is .*; expected numbers by module"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern is .*; expected numbers by module"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern is .*; expected patterns of module names"),
        (
            {"alpha_pattern": {"([a-z.]+)+!": 4}},
            "alpha_pattern is .*no repeated group",
        ),
        (
            {"rank_pattern": {".*" * 5: 4}},
            "rank_pattern is .*with at most four",
        ),
        ({"trainable_token_indices": [10**12]}, "expected token ids below 10,000,000"),
        ({"trainable_token_indices": {"embed_tokens": ["a"]}}, "expected token ids below"),
    ],
)
def test_configs_of_adapters_with_values_of_another_kind(
    tmp_path: Path, config: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        adapter_read.open_adapter(str(_changed(tmp_path, config)))
