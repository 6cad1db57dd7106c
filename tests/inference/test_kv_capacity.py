"""How long a text may become: what is given, or what all slots have memory for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune.config import ConfigError
from jaxtune.hf.load import open_model
from jaxtune.inference.kv_capacity import longest_text
from jaxtune.parallel import memory
from jaxtune.parallel.mesh import make_mesh

MODEL = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"


def model(positions: int) -> Any:
    spec = dataclasses.replace(open_model(MODEL, weights=False).spec, max_positions=positions)
    mesh = make_mesh({}, jax.devices()[:1])
    return SimpleNamespace(spec=spec, dtype=np.dtype(np.float32), mesh=mesh)


def test_a_model_that_fits_has_all_its_positions(capsys: pytest.CaptureFixture[str]) -> None:
    assert longest_text([model(256)], 8, None) == 256
    assert longest_text([model(256), model(2000)], 8, None) == 2000
    assert capsys.readouterr().err == ""


def test_else_a_third_of_free_memory_holds_all_slots_of_all_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = model(100_000_000)
    position = 0  # bytes of one, in one slot
    for stack in large.spec.stacks:
        for layer in stack.pattern:
            position += stack.repeats * layer.kv_heads * layer.head_dim * 2 * 4
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 8 * position * 10 * 1024)
    assert longest_text([large], 8, None) == 10 * 1024
    assert "at most 10240 tokens of the model's 100000000" in capsys.readouterr().err
    assert longest_text([large], 16, None) == 5 * 1024
    assert longest_text([large, large], 8, None) == 5 * 1024
    assert longest_text([large], 8000, None) == 1024  # of which some must wait for memory


def test_what_is_given_holds() -> None:
    assert longest_text([model(256)], 8, 100) == 100
    with pytest.raises(ConfigError, match="serve_length is 257; the model has 256 positions"):
        longest_text([model(256)], 8, 257)
