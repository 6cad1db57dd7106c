"""Does the arithmetic of `plan` agree with the TPU compiler on what fits?

    python benchmarks/plan_fit.py [--model configs/models/Llama-3.1-8B] [--small]

For each of ten settings (slice, mesh, policy, optimiser, adapters) two batches are compiled: the
most rows a device, by powers of two, that arithmetic says fit, and twice as many. The table has
the bytes of both and whether the verdicts agree. `--small` takes a narrow model of many layers: its
memory is filled alike, and it compiles a little faster. Answers are cached as those of `plan` are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxtune.planning.environment import set_environment  # noqa: E402

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("v5e-16", {}),
    ("v5e-16", {"gradient_checkpointing": "dots"}),
    ("v5e-16", {"mesh.tensor": 4}),
    ("v5e-16", {"gradient_accumulation_steps": 4}),
    ("v5e-16", {"max_length": 8192}),
    ("v5e-16", {"lora.r": 16}),
    ("v5e-64", {"mesh.data": 4, "mesh.fsdp": 16}),
    ("v6e-8", {}),
    ("v5p-8", {"gradient_checkpointing": "none"}),
    ("v5p-8", {"optim_state_dtype": "bfloat16"}),
)
# 8 heads of 64, a vocabulary of 32 Ki; 256 layers have 0.8 billion parameters.
SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32768,
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 256,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
_GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=str(ROOT / "configs" / "models" / "Llama-3.1-8B"))
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    set_environment()
    with tempfile.TemporaryDirectory() as folder:
        if asked.small:
            (Path(folder) / "config.json").write_text(json.dumps(SMALL))
        _table(folder if asked.small else asked.model)


def _table(model: str) -> None:
    from jaxtune.hf.load import open_model

    opened = open_model(model, weights=False)
    print("| slice | settings | rows a device | arithmetic GiB | compiler GiB | ratio | agree |")
    print("|---|---|---|---|---|---|---|")
    agreed, compared = 0, 0
    for topology, fields in SETTINGS:
        settings = " ".join(f"{name} {value}" for name, value in fields.items()) or "as they are"
        for rows in _around(opened, topology, fields):
            counted, compiled = _both(opened, topology, fields, rows)
            agree = counted.fits == compiled.fits
            agreed, compared = agreed + agree, compared + 1
            print(
                f"| {topology} | {settings} | {rows} | {_said(counted)} | {_said(compiled)} "
                f"| {counted.needed / compiled.needed:.2f} | {'yes' if agree else 'NO'} |",
                flush=True,
            )
    print(f"\n{agreed} of {compared} verdicts agree")


def _around(opened: Any, topology: str, fields: dict[str, Any]) -> tuple[int, int]:
    """The most rows that fit by arithmetic, at least one, and twice as many."""
    rows = 1
    while _study(opened, topology, fields, 2 * rows).fits:
        rows *= 2
    return rows, 2 * rows


def _both(opened: Any, topology: str, fields: dict[str, Any], rows: int) -> tuple[Any, Any]:
    counted = _study(opened, topology, fields, rows)
    return counted, _study(opened, topology, fields, rows, compiles=True)


def _study(
    opened: Any, topology: str, fields: dict[str, Any], rows: int, *, compiles: bool = False
) -> Any:
    from jaxtune.config import load
    from jaxtune.parallel.chips import parse_slice
    from jaxtune.planning.evaluate_config import PlannedRun, evaluate_config
    from jaxtune.planning.hardware import make_hardware
    from jaxtune.storage.object_store import default_folder

    batch = {"per_device_train_batch_size": rows}
    config = load(overrides={"model_name_or_path": opened.name, **fields, **batch})
    there = make_hardware(parse_slice(topology), compiles=compiles)
    return evaluate_config(
        config, PlannedRun(opened, config.max_length), there, folder=default_folder() / "plan"
    )


def _said(found: Any) -> str:
    return f"{found.needed / _GIB:.2f}{'' if found.fits else ' (too large)'}"


if __name__ == "__main__":
    main()
