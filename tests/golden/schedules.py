"""Writes `schedules.json`: the learning rates of transformers' schedules, step by step.

python tests/golden/schedules.py     needs torch and transformers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schedules.json")
PEAK = 0.2
LENGTHS = ((0, 13), (5, 20), (20, 20))  # warmup, all
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine, a wave and a half": ("cosine", {"num_cycles": 1.5}),
    "restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "min_lr": ("cosine_with_min_lr", {"min_lr": 0.05}),
    "min_lr_rate": ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.5}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "inverse_sqrt, timescale": ("inverse_sqrt", {"timescale": 7}),
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant_with_warmup", {}),
}
FALLING: dict[str, tuple[str, dict[str, Any]]] = {  # only where steps are left after the warmup
    "polynomial": ("polynomial", {}),
    "polynomial, squared": ("polynomial", {"power": 2.0, "lr_end": 0.01}),
    "stable": ("warmup_stable_decay", {"num_decay_steps": 6}),
    "stable, short": ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 2}),
    "stable, linear": (
        "warmup_stable_decay",
        {"num_decay_steps": 6, "decay_type": "linear", "warmup_type": "cosine",
         "min_lr_ratio": 0.25},
    ),
    "stable, root": (
        "warmup_stable_decay",
        {"num_decay_steps": 6, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"},
    ),
}  # fmt: skip


def cases() -> list[tuple[str, str, dict[str, Any], int, int]]:
    """(name, kind, options, warmup, all)"""
    return [
        (f"{name} {warmup}/{total}", kind, options, warmup, total)
        for names, lengths in ((KINDS, LENGTHS), (FALLING, LENGTHS[:2]))
        for name, (kind, options) in names.items()
        for warmup, total in lengths
    ]


def reference(kind: str, options: dict[str, Any], warmup: int, total: int) -> list[float]:
    import torch
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_scheduler(
        kind, optimiser, num_warmup_steps=warmup, num_training_steps=total,
        scheduler_specific_kwargs=dict(options),
    )  # fmt: skip
    rates = []
    for _ in range(total):  # after the last step some differ: a cosine rises again
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    return rates


def main() -> None:
    found = {name: reference(*case) for name, *case in cases()}
    FILE.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
