"""A part of the parameters as a user trains it: printed, saved, resumed, converted, exported; with
schedule-free averages and NEFTune's noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from test_adapters import losses, params_of, run_settings, write_root

from jaxtune import convert, train
from jaxtune.config import Config, ConfigError, load
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training import build as assemble
from jaxtune.training import program
from jaxtune.training.optim.optim import Hyper
from jaxtune.training.subject import Subject
from jaxtune.tree import named

# Two layers: the second alone is stack_1 then.
TRAINED = {"final_norm/scale", *(f"stack_1/layer_0/{leaf}" for leaf in (
    "attention_norm/scale", "attention/q/kernel", "attention/k/kernel", "attention/v/kernel",
    "attention/o/kernel", "mlp_norm/scale", "mlp/gate/kernel", "mlp/up/kernel", "mlp/down/kernel",
))}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("part"))


def settings(root: Path, out: Path, **more: object) -> Config:
    part = {
        "gradient_checkpointing": "none", "warmup_steps": 1, "optim": "schedule_free",
        "neftune_noise_alpha": 5, "weight_decay": 0.1, "train_last_layers": 1,
        "trainable": "^final_norm",
    }  # fmt: skip
    return run_settings(root, out, **{**part, **more})


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    train.run(settings(root, root / "run"))
    return root / "run"


def test_what_is_frozen_keeps_every_byte_and_the_rest_is_trained(root: Path, tuned: Path) -> None:
    before, after = params_of(root / "base"), params_of(tuned / "hf")
    layers = {name for name in before if name.startswith("stack_0")}
    for name, value in before.items():
        now = after[name]
        if name in layers:  # the export is one stack again: its first layer was frozen
            assert now[0].tobytes() == value[0].tobytes(), name
            assert (now[1] != value[1]).any(), name
        else:
            assert (now.tobytes() == value.tobytes()) == (name != "final_norm/scale"), name


def test_the_checkpoint_holds_the_trained_part_alone(tuned: Path) -> None:
    folder = tuned / "checkpoints" / "4"
    stored = ocp.StandardCheckpointer().metadata(folder / "trained").item_metadata.tree
    assert set(named(stored["params"])) == TRAINED
    moments = ocp.StandardCheckpointer().metadata(folder / "opt").item_metadata.tree
    for part in ("z", "nu"):
        assert set(named(moments[part]["params"])) == TRAINED


def test_the_run_says_how_much_it_trains(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(root, tmp_path / "out", max_steps=1, export=False))
    params = params_of(root / "base")
    layer = sum(v[0].size for name, v in params.items() if name.startswith("stack_0"))
    n, total = layer + 16, sum(value.size for value in params.values())
    said = capsys.readouterr().err
    assert f"trained: {n:,} of {total:,} parameters ({100 * n / total:.3g}%)" in said


def test_a_run_cut_in_two_and_a_converted_checkpoint_are_the_run(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    for gone in ("hf", "checkpoints/4"):
        shutil.rmtree(again / gone)
    train.run(settings(root, again, resume="must"))
    assert losses(again) == losses(tuned)
    expected = (tuned / "hf" / "model.safetensors").read_bytes()
    assert (again / "hf" / "model.safetensors").read_bytes() == expected
    options = convert.ConvertOptions(
        run_or_checkpoint=str(tuned / "checkpoints" / "4"), out_dir=str(tmp_path / "converted")
    )
    convert.run(Config(), options)
    assert (tmp_path / "converted" / "model.safetensors").read_bytes() == expected


def test_another_part_does_not_go_on_from_a_checkpoint(root: Path, tuned: Path) -> None:
    told = r"was trained with trainable '\^final_norm' and train_last_layers 1. Restore"
    for other in ({"train_last_layers": 2}, {"trainable": None}, {"trainable": "norm"}):
        with pytest.raises(ConfigError, match=told):
            train.run(settings(root, tuned, **other))


def test_new_tokens_need_a_trained_embedding(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows of 1 new tokens would stay as they begin"):
        train.run(settings(root, tmp_path / "out", add_tokens=["<one>"]))


def test_every_field_of_the_optimiser_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "build", lambda spec, mesh, config: config._asdict())
    config = load(overrides={
        "optim": "muon", "momentum": 0.8, "muon_adjust_lr": "original", "adam_beta1": 0.7,
        "adam_beta2": 0.6, "adam_epsilon": 1e-5, "weight_decay": 0.3, "max_grad_norm": 2,
        "optim_state_dtype": "bfloat16", "neftune_noise_alpha": 7, "learning_rate": 0.5,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.25},
        "warmup_steps": 2,
    })  # fmt: skip
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    mesh = make_mesh(sizes, jax.devices()[:1])
    model: Any = SimpleNamespace(spec=SimpleNamespace(experts=0))
    given: Any = assemble.build(config, Subject(model), mesh, 10)
    assert given["hyper"] == Hyper(
        "muon", 0.7, 0.6, epsilon=1e-5, weight_decay=0.3, momentum=0.8, adjust="original",
        state_dtype="bfloat16",
    )  # fmt: skip
    assert (given["noise_alpha"], given["max_grad_norm"], given["is_trained"]) == (7, 2, None)
    rates = [float(given["learning_rate"](step)) for step in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.375, 0.25])
