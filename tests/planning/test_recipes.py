"""Every recipe of configs/: by arithmetic it fits its hardware, and with `-m tpu` by the compiler.

python -m pytest -m tpu tests/planning/test_recipes.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from jaxtune.config import load
from jaxtune.hf.load import open_model
from jaxtune.parallel.chips import CHIPS, parse_slice
from jaxtune.planning.evaluate_config import PlannedRun, evaluate_config, figures
from jaxtune.planning.hardware import make_hardware

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipes  # noqa: E402

ALL = recipes.recipes([])
MODELS = sorted(folder.name for folder in (ROOT / "configs" / "models").iterdir())


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.file.stem)
def test_by_arithmetic_it_fits_where_its_head_says(recipe: recipes.Recipe) -> None:
    config = load(recipe.file)
    subject = PlannedRun(open_model(recipe.model, weights=False), config.max_length)
    found = evaluate_config(
        config, subject, make_hardware(parse_slice(recipe.topology), compiles=False)
    )
    assert found.fits
    assert figures(found)["mfu"] > 0.2


RENTED = {
    *("v5e-4", "v5e-16", "v5e-64", "v5e-256"),
    *("v6e-8", "v6e-16"),
    *("v5p-8", "v5p-64", "v5p-128"),
}


def test_recipes_cover_the_models_and_the_slices() -> None:
    assert {recipe.model.name for recipe in ALL} == set(MODELS)
    assert {recipe.topology for recipe in ALL} >= RENTED
    assert (
        {parse_slice(recipe.topology).kind for recipe in ALL} == {"v5e", "v5p", "v6e"} <= {*CHIPS}
    )


def test_a_head_is_rewritten_in_its_place() -> None:
    text = "# Title.\n# Plan       old\n#            older\n# Measured   x\nkey: 1\n"
    assert recipes.written(text, ["one", "two"]) == (
        "# Title.\n# Plan       one\n#            two\n# Measured   x\nkey: 1\n"
    )
    for recipe in ALL:
        assert len(re.findall(r"^# Plan ", recipe.file.read_text(), re.MULTILINE)) == 1


@pytest.mark.tpu
@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.file.stem)
def test_it_compiles_and_fits(recipe: recipes.Recipe) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no recipe was compiled (pip install .[tpu])")
    found = recipes.plan(recipe, compiled=True)
    assert found["method"] == "compiled"
    assert found["fits"], found["reason"]
