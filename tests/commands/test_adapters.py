"""Adapters as a user meets them: trained, resumed, exported, merged, asked, gone on from."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from jaxtune import chat, convert, evaluate, train
from jaxtune.config import Config, ConfigError, load
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf.export import WeightFormat, export_model
from jaxtune.hf.load import load_params, open_model
from jaxtune.inference import generate
from jaxtune.inference import load as inference
from jaxtune.model import decoder
from jaxtune.server import run as server_run
from jaxtune.server import scheduler
from jaxtune.terminal.text import printable
from jaxtune.tree import named

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
TEMPLATE = "Q: {instruction}\nA: {output}"
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "architectures": ["LlamaForCausalLM"], "initializer_range": 0.2,
}  # fmt: skip


def write_base(folder: Path, seed: int, **keys: object) -> Path:
    """A model folder of random weights with exactly one row per token of its tokenizer; `keys`
    change its config."""
    start = folder.parent / f"{folder.name}-start"
    start.mkdir()
    tokenizer = load_tokenizer(str(TOKENIZER))
    (start / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": tokenizer.size, **keys}))
    model = open_model(start, weights=False)
    params = decoder.init(model.spec, jax.random.key(seed), np.float32)
    export_model(
        folder, model=model, params=params, weights=WeightFormat("float32"), tokenizer=tokenizer,
        template=None, card="# base\n",
    )  # fmt: skip
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def write_root(folder: Path, **keys: object) -> Path:
    """`folder` with data.jsonl and base/, whose config `keys` change."""
    rows = [{"instruction": f"Where is {i}?", "output": f"In Rome, {i}."} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_base(folder / "base", 1, **keys)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("lora"))


def run_settings(root: Path, out: Path, **more: object) -> Config:
    """Four steps on `write_root`, a checkpoint at every second one."""
    return load(
        overrides={
            "model_name_or_path": str(root / "base"), "dataset": str(root / "data.jsonl"),
            "output_dir": str(out), "max_length": 64, "max_steps": 4, "learning_rate": 1e-2,
            "mesh.fsdp": 2, "mesh.data": -1, "per_device_train_batch_size": 1, "packing": False,
            "template": TEMPLATE, "save_steps": 2, "save_total_limit": 5, "logging_steps": 1,
            **more,
        }
    )  # fmt: skip


def settings(root: Path, out: Path, **more: object) -> Config:
    adapters = {"gradient_checkpointing": "full", "lora.r": 4, "lora.dropout": 0.1}
    return run_settings(root, out, **{**adapters, **more})


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    """A whole run: four steps of DoRA with two new tokens."""
    more = {"lora.dora": True, "add_tokens": ["<one>", "<two>"]}
    result = train.run(settings(root, root / "run", **more))
    assert result.adapter_dir == root / "run" / "adapter"
    return root / "run"


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def params_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in named(load_params(open_model(folder), None, "f4")).items()}


def evaluated(name: Path, root: Path) -> float:
    config = load(overrides={
        "model_name_or_path": str(name), "template": TEMPLATE, "max_length": 64,
    })  # fmt: skip
    options = evaluate.EvaluateOptions(dataset=str(root / "data.jsonl"))
    return evaluate.run(config, options).scores["eval_loss"]


def test_a_run_trains_adapters_alone_and_writes_both_folders(root: Path, tuned: Path) -> None:
    found = losses(tuned)
    assert found[-1] < found[0]
    base, merged = params_of(root / "base"), params_of(tuned / "hf")
    size = len(base["embed/table"])
    for name, before in base.items():
        after = merged[name]
        if name == "embed/table":
            np.testing.assert_array_equal(after[:size], before)
            assert len(after) == size + 2
        elif name == "head/kernel":
            np.testing.assert_array_equal(after[:, :size], before)
        else:
            assert (after != before).any() == name.endswith("kernel"), name
    head = merged["head/kernel"][:, size:]
    mean = base["head/kernel"].mean(axis=1)
    assert (np.abs(head - mean[:, None]) > 1e-4).any(), "rows of new tokens are trained"
    stored = sum(f.stat().st_size for f in (tuned / "checkpoints" / "4").rglob("*") if f.is_file())
    assert stored < 400_000  # the base alone has 1024 x 16 x 2 x 4 bytes, with moments 390 kB
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "base")
    assert config["trainable_token_indices"] == {
        "embed_tokens": [size, size + 1], "lm_head": [size, size + 1],
    }  # fmt: skip
    card = (tuned / "adapter" / "README.md").read_text()
    assert "model.safetensors" in card
    assert "library_name: peft" in card


def test_a_killed_run_goes_on_bit_for_bit(root: Path, tuned: Path, tmp_path: Path) -> None:
    """Dropout included: its masks are of seed, step and microbatch."""
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    for gone in ("hf", "adapter", "checkpoints/4"):
        shutil.rmtree(again / gone)
    more = {"lora.dora": True, "add_tokens": ["<one>", "<two>"], "resume": "must"}
    train.run(settings(root, again, **more))
    assert losses(again) == losses(tuned)
    for folder, file in (("adapter", "adapter_model.safetensors"), ("hf", "model.safetensors")):
        assert (again / folder / file).read_bytes() == (tuned / folder / file).read_bytes()


def test_another_base_or_other_adapters_are_refused(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    write_base(other, 2)
    more: dict[str, object] = {"lora.dora": True, "add_tokens": ["<one>", "<two>"]}
    with pytest.raises(ConfigError, match=r"with other adapters \(lora.r, lora.alpha\)"):
        train.run(settings(root, tuned, **{**more, "lora.r": 2}))
    with pytest.raises(ConfigError, match=r"with other adapters \(none now\)"):
        train.run(settings(root, tuned, **{**more, "lora.r": 0}))
    with pytest.raises(ConfigError, match=r"whose weights are not those of .* now"):
        train.run(settings(root, tuned, **more, model_name_or_path=str(other)))


def test_convert_goes_both_ways(tuned: Path, tmp_path: Path) -> None:
    for source, flags, file, expected in [
        (tuned, [], "model.safetensors", tuned / "hf"),
        (tuned / "checkpoints" / "4", ["--merge_lora", "false"], "adapter_model.safetensors",
         tuned / "adapter"),
        (tuned / "adapter", [], "model.safetensors", tuned / "hf"),
        (tuned / "adapter", ["--merge_lora", "false"], "adapter_model.safetensors",
         tuned / "adapter"),
    ]:  # fmt: skip
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert convert.main([str(source), str(out), *flags]) == 0
        assert (out / file).read_bytes() == (expected / file).read_bytes(), (source, flags)
        assert (out / "tokenizer.json").read_bytes() == (
            tuned / "hf" / "tokenizer.json"
        ).read_bytes()


def test_a_run_a_checkpoint_and_an_adapter_are_evaluated_alike(root: Path, tuned: Path) -> None:
    merged = evaluated(tuned, root)
    assert evaluated(tuned / "adapter", root) == pytest.approx(merged, abs=1e-6)
    assert evaluated(tuned / "checkpoints" / "4", root) == pytest.approx(merged, abs=1e-6)
    assert evaluated(root / "base", root) > merged + 0.01


def test_answers_end_as_any_data_set_was_trained(root: Path, tuned: Path) -> None:
    """Whatever its template is: of a base, an adapter, a checkpoint."""
    own = {"path": str(root / "data.jsonl"), "template": f"{TEMPLATE}<|endoftext|>"}
    for name in (root / "base", tuned / "adapter", tuned / "checkpoints" / "4"):
        asked = {"model_name_or_path": str(name), "template": TEMPLATE}
        ends = []
        for more in ({}, {"datasets": [own]}):
            config = inference.resolved(load(overrides={**asked, **more}))
            words, mesh = inference.open_codec(config), inference.open_mesh(config)
            ends.append(inference.load_model(str(name), config, words, mesh).stop_ids)
        assert ends[1] == {*ends[0], *words.tokenizer.encode("<|endoftext|>")}, name
        assert ends[1] != ends[0]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["adapter", "checkpoints/4"])
def test_adapters_beside_the_weights_answer_as_merged(root: Path, tuned: Path, source: str) -> None:
    """And are taken away without loading anything: then the base answers."""
    config = load(overrides={
        "model_name_or_path": str(tuned / source), "template": TEMPLATE,
    })  # fmt: skip
    config = inference.resolved(config)
    words, mesh = inference.open_codec(config), inference.open_mesh(config)
    merged, beside = (
        inference.load_model(str(tuned / source), config, words, mesh, merge=merge)
        for merge in (True, False)
    )
    prompts = [words.tokenizer.encode(f"Q: Where is {i}?\nA: ") for i in (3, 12)]

    def asked(model: inference.GenerationModel) -> list[generate.Generation]:
        return generate.generate(model, words, prompts, max_new_tokens=12)

    base = inference.load_model(str(root / "base"), config, words, mesh)
    found = asked(beside)
    assert found == asked(merged)
    off = beside.without_adapters()
    assert off.params is beside.params
    assert "lora" not in off.variables
    assert asked(off) == asked(base)
    assert found != asked(base)


def test_training_goes_on_from_an_adapter(root: Path, tuned: Path, tmp_path: Path) -> None:
    config = settings(
        root, tmp_path / "on", adapter_name_or_path=str(tuned / "adapter"), max_steps=1,
        tokenizer_name=str(tuned / "adapter"), learning_rate=0.0, **{"lora.r": 0},
    )  # fmt: skip
    train.run(config)
    file = "adapter_model.safetensors"
    written = (tmp_path / "on" / "adapter" / file).read_bytes()
    assert written == (tuned / "adapter" / file).read_bytes()
    with pytest.raises(ConfigError, match=r"lora.r: 2, but adapter .* has rank 4"):
        train.run(settings(
            root, tmp_path / "no", adapter_name_or_path=str(tuned / "adapter"),
            tokenizer_name=str(tuned / "adapter"), **{"lora.r": 2},
        ))  # fmt: skip


def test_an_adapter_as_the_model_to_train_is_told_where_it_goes(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    """Before the run directory is made: with and without a tokenizer beside it."""
    adapter = shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    for _ in range(2):
        again = settings(root, tmp_path / "out", model_name_or_path=str(adapter))
        with pytest.raises(ConfigError, match="is an adapter, not a model") as error:
            train.run(again)
        assert "set adapter_name_or_path to it" in str(error.value)
        assert f"model_name_or_path to its base, {root / 'base'}." in str(error.value)
        for file in adapter.glob("tokenizer*"):
            file.unlink()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_is_trained_beside_and_never_merged_into(
    root: Path, tmp_path: Path, base: str
) -> None:
    """At learning rate 0 the adapters add nothing: what is exported is the base, byte for byte."""
    out = tmp_path / "out"
    more = {"lora.base": base, "lora.double_quant": base == "nf4", "lora.dropout": 0.0}
    train.run(settings(root, out, max_steps=1, learning_rate=0.0, **more))
    exported, source = (folder / "model.safetensors" for folder in (out / "hf", root / "base"))
    assert exported.read_bytes() == source.read_bytes()
    (quantised,) = losses(out)
    train.run(settings(root, tmp_path / "plain", max_steps=1, learning_rate=0.0))
    (plain,) = losses(tmp_path / "plain")
    assert plain != quantised
    assert quantised == pytest.approx(plain, rel=0.02)


def test_a_conversation_turns_the_adapter_off_and_on(
    root: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On it answers as the merged model, off as the base does; nothing is loaded twice."""
    question = "Where is 3?"
    words = ["--template", TEMPLATE, "--max_new_tokens", "12"]
    ask = [*words, "--prompt", question]
    assert chat.main(["--model_name_or_path", str(tuned / "hf"), *ask]) == 0
    merged = capsys.readouterr().out
    tokenizer = ["--tokenizer_name", str(tuned / "adapter")]
    assert chat.main(["--model_name_or_path", str(root / "base"), *ask]) == 0
    base = capsys.readouterr().out
    assert merged != base
    typed = f"{question}\n/adapter off\n/reset\n{question}\n/adapter on\n/reset\n{question}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    adapter = ["--model_name_or_path", str(tuned / "adapter"), *tokenizer, *words]
    assert chat.main(adapter) == 0
    assert capsys.readouterr().out == merged + base + merged

    served: dict[str, str] = {}

    async def ask_each(app: Any, names: list[str]) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for name in names:
                body = {"model": name, "messages": [{"role": "user", "content": question}]}
                said = (await client.post("/v1/chat/completions", json=body, timeout=300)).json()
                served[name] = printable(said["choices"][0]["message"]["content"]) + "\n"

    def serve(app: Any, scheduler: scheduler.Scheduler, taken: Any, models: str) -> None:
        thread = threading.Thread(target=scheduler.run)
        thread.start()
        asyncio.run(ask_each(app, models.split(", ")))
        scheduler.close()
        thread.join()

    monkeypatch.setattr(server_run, "serve", serve)
    assert chat.main([*adapter, "--serve", ":0"]) == 0
    assert served == {"base": base, "adapter": merged}
