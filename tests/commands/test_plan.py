"""`plan` as a user runs it: by arithmetic, and with the TPU compiler where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtune import plan
from jaxtune.config import load

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
QUICKSTART = ROOT / "configs" / "quickstart"
# The contract of interface.md.
KEYS = {
    "topology", "chips", "fits", "hbm_bytes", "hbm_limit_bytes", "hbm_by_kind", "flops",
    "collective_bytes", "step_seconds", "tokens_per_second_per_chip", "mfu", "notes",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for the compiler ends with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def planned(capsys: pytest.CaptureFixture[str], *words: str, model: str = "Qwen3-0.6B") -> Any:
    flags = ["--model_name_or_path", str(MODELS / model), "--compile", "false", "--json", *words]
    assert plan.main(flags) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert plan.main(["--compile", "false", *words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_one_object_with_the_keys_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--topology", "v5e-16")
    assert set(found) >= KEYS
    assert (found["topology"], found["chips"], found["fits"]) == ("v5e-16", 16, True)
    assert found["hbm_bytes"] == sum(found["hbm_by_kind"].values())
    assert found["hbm_limit_bytes"] == int(15.75 * 2**30)
    tokens = found["tokens_per_step"] / found["step_seconds"] / 16
    assert found["tokens_per_second_per_chip"] == pytest.approx(tokens)
    assert 0.2 < found["mfu"] < 0.7
    assert found["flops"] > found["flops_without_recomputation"]
    assert found["run"] is None


def test_what_does_not_fit_is_said_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--topology", "v5e-4", "--model_name_or_path", str(MODELS / "Llama-3.1-8B"))
    found = planned(capsys, "--topology", "v5e-4", model="Llama-3.1-8B")
    assert not found["fits"]
    assert "parameters and optimiser state alone are" in found["reason"]
    assert found["ways"]
    for way in found["ways"]:
        assert way["hbm_bytes"] <= found["hbm_limit_bytes"]
        assert way["verified"] == "arithmetic"
    # What is proposed is what one types.
    lora = next(way for way in found["ways"] if "--lora.r" in way["change"])
    again = planned(capsys, "--topology", "v5e-4", *lora["change"].split(), model="Llama-3.1-8B")
    assert again["fits"]
    assert again["hbm_bytes"] == lora["hbm_bytes"]
    assert plan.main([*flags, "--compile", "false"]) == 0, "not fitting is an answer"
    page = capsys.readouterr().out
    assert "DOES NOT FIT" in page
    assert found["ways"][0]["change"] in page


def test_a_run_of_real_data_has_a_length_and_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--topology", "h100-2", "--price_per_chip_hour", "2.5", "--dataset",
        str(QUICKSTART / "train.jsonl"), "--model_name_or_path", str(QUICKSTART / "model"),
        "--max_length", "256", "--per_device_train_batch_size", "4", "--num_train_epochs", "2",
    )  # fmt: skip
    assert plan.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = found["run"]
    assert run["seconds"] == pytest.approx(run["steps"] * found["step_seconds"])
    assert run["chip_hours"] == pytest.approx(2 * run["seconds"] / 3600)
    assert run["price"] == pytest.approx(2.5 * run["chip_hours"])
    # As `train` would count them.
    rows = int(found["notes"][0].split(" in ")[1].split(" rows")[0].replace(",", ""))
    assert run["steps"] == 2 * -(-rows // 8)
    assert found["method"] == "arithmetic"


def test_adapters_and_quantised_bases_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        planned(capsys, "--topology", "v5e-4", *more)["hbm_by_kind"]
        for more in ((), ("--lora.r", "8"), ("--lora.r", "8", "--lora.base", "nf4"))
    ]
    assert sizes[0]["parameters"] > 1.9 * sizes[1]["parameters"]
    assert sizes[1]["parameters"] > sizes[2]["parameters"]
    assert sizes[0]["optimiser"] > 10 * sizes[1]["optimiser"]


def test_a_search_writes_a_config_that_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "chosen.yaml"
    words = ("--topology", "v5e-8", "--search", "--search_output", str(file))
    found = planned(capsys, *words, "--per_device_train_batch_size", "8")
    assert found["fits"]
    speeds = [other["tokens_per_second_per_chip"] for other in found["frontier"]]
    assert speeds == sorted(speeds, reverse=True)
    config = load(file)
    assert config.gradient_checkpointing == found["remat"]
    assert config.mesh.fsdp == found["mesh"]["fsdp"]
    shards = found["mesh"]["data"] * found["mesh"]["fsdp"]
    assert found["microbatches"] * found["rows_per_device"] * shards == 64
    assert plan.main(["--config", str(file), "--topology", "v5e-8", "--compile", "false"]) == 0
    assert "on v5e-8, found by plan --search:\n" in file.read_text()
    assert yaml.safe_load(file.read_text())["model_name_or_path"] == str(MODELS / "Qwen3-0.6B")


@pytest.mark.parametrize("words", [("--packing", "false"), ("--max_length", "8191")])
def test_a_search_chooses_what_train_accepts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """One row over two chips: only with `mesh.context` could each have its own part of it."""
    words = ("--topology", "h100-2", "--search", "--search_output", str(tmp_path / "plan.yaml"),
             "--mesh.tensor", "2", "--per_device_train_batch_size", "1", *words)  # fmt: skip
    found = planned(capsys, *words)
    assert found["mesh"]["context"] == 1
    assert all("--mesh.context 1" in other["settings"] for other in found["frontier"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "topology is not set"),
        (("--topology", "v9-8"), "'v9-8' is not known"),
        (("--topology", "v5e-8", "--mesh.fsdp", "3"), "mesh: 8 devices cannot be"),
        (("--topology", "v5e-8", "--global_batch_size", "7"), "7 rows do not divide"),
        (("--topology", "cpu", "--search"), "the speed of cpu is not known"),
        (("--topology", "v5e-²"), "there is no 'v5e-²'"),
        (("--topology", "v5e:9999999x9999999"), "the largest slice of v5e has 256"),
        (("--topology", "v5e-8", "--price_per_chip_hour", "inf"), "should be a finite number"),
        (("--topology", "v5e-8", "--price_per_chip_hour", "1e308"), "less than or equal to"),
        (
            ("--topology", "v5e-8", "--mesh.context", "8", "--packing", "false"),
            "mesh.context: 8 devices share a row of max_length tokens, but packing is off",
        ),
        (
            ("--topology", "v5e-8", "--mesh.context", "8", "--max_length", "100"),
            "max_length: 100 tokens cannot be cut over mesh.context=8",
        ),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "--model_name_or_path", str(MODELS / "Qwen3-0.6B"), *words)


def test_a_model_is_needed_and_its_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "model_name_or_path is not set" in refused(capsys, "--topology", "v5e-8")
    said = refused(capsys, "--topology", "v5e-8", "--model_name_or_path", str(tmp_path))
    assert "config.json" in said


def test_without_the_compiler_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["--topology", "v5e-8", "--model_name_or_path", str(MODELS / "Qwen3-0.6B")]
    assert plan.main(words) == 2
    assert "pip install 'jaxtune[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e-4", "v4-8"])
def test_the_real_step_is_compiled_for_a_slice(tmp_path: Path, topology: str) -> None:
    """In a process of its own, as JAX here has been imported for eight CPU devices."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing was compiled for a TPU (pip install .[tpu])")
    config = json.loads((QUICKSTART / "model" / "config.json").read_text())
    config |= {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--topology", topology, "--model_name_or_path", str(tmp_path), "--json",
             "--max_length", "256", "--per_device_train_batch_size", "2")  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune.plan", *words],
        capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "JAXTUNE_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["method"] == "compiled"
    assert found["fits"]
    assert found["mesh"]["fsdp"] == found["chips"] == 4
    assert found["hbm_by_kind"]["program"] > 0
    assert set(found["collective_bytes_by_axis"]) == {"fsdp"}
    assert found["collective_bytes"] == pytest.approx(
        sum(found["collective_bytes_by_kind"].values())
    )
    assert list((tmp_path / "cache" / "plan").glob("*.json"))
