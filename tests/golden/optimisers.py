"""Writes `optimisers.npz`: where other people's optimisers take a small stacked problem.

    python tests/golden/optimisers.py     needs torch, transformers, schedulefree and lion-pytorch

Torch has one parameter for each layer (and expert), as its models do; the values stored are those
of all layers, stacked as jaxtune stacks them. Matrices are `[columns rows]` there, as in a Linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).with_name("optimisers.npz")
STEPS = 6
MAX_GRAD_NORM = 1.0
DECAY = 0.1

LAYER = "stack_0/layer_0"
# Shape, logical axes, and how many leading dimensions count separate weights.
LEAVES: dict[str, tuple[tuple[int, ...], tuple[str | None, ...], int]] = {
    "embed/table": ((7, 6), ("vocab", "embed"), 0),
    f"{LAYER}/norm/scale": ((2, 6), ("layers", "norm"), 1),
    f"{LAYER}/attention/q/kernel": ((2, 6, 2, 4), ("layers", "embed", "heads", "head_dim"), 1),
    f"{LAYER}/attention/q/bias": ((2, 2, 4), ("layers", "heads", "head_dim"), 1),
    f"{LAYER}/attention/o/kernel": ((2, 2, 4, 6), ("layers", "heads", "head_dim", "embed"), 1),
    f"{LAYER}/experts/up/kernel": ((2, 3, 6, 4), ("layers", "expert", "embed", "mlp"), 2),
    "head/kernel": ((6, 7), ("embed", "vocab"), 0),
}
# Dimensions, after the stacked ones, that are the rows of the matrix; None of a vector.
ROWS = {"table": 1, "q/kernel": 1, "o/kernel": 2, "up/kernel": 1, "head/kernel": 1}


class Case(NamedTuple):
    method: str
    rate: float
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "adamw": Case("adamw", 0.01),
    "lion": Case("lion", 0.003),
    "sgd": Case("sgd", 0.1),
    "sgd_momentum": Case("sgd", 0.1, {"momentum": 0.9}),
    "adafactor": Case("adafactor", 0.02),
    "muon": Case("muon", 0.02, {"momentum": 0.95, "adjust": "match_rms_adamw"}),
    "muon_original": Case("muon", 0.02, {"momentum": 0.95, "adjust": "original"}),
    "schedule_free": Case("schedule_free", 0.05),
}
BETAS = {"lion": (0.9, 0.99)}  # others: (0.8, 0.95)
EPSILON = 1e-6


def rate(case: Case, step: int) -> float:
    """A warmup that begins at 0, then constant."""
    return case.rate * min(step / 2, 1.0)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=leaf[0]).astype(np.float32) for name, leaf in LEAVES.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of very different sizes between leaves and steps, so that clipping takes part."""
    rng = np.random.default_rng(100 + step)
    size = (0.02, 1.0, 3.0)[step % 3]
    return {name: rng.normal(size=leaf[0]).astype(np.float32) * size
            for name, leaf in LEAVES.items()}  # fmt: skip


def rows_of(name: str) -> int | None:
    return next((rows for end, rows in ROWS.items() if name.endswith(end)), None)


def parts(name: str) -> Iterator[tuple[int, ...]]:
    shape, _, stacked = LEAVES[name]
    return np.ndindex(*shape[:stacked])


def as_torch(name: str, value: np.ndarray) -> np.ndarray:
    """One weight as torch holds it: `[columns rows]`, or as it is."""
    rows = rows_of(name)
    if rows is None:
        return value.reshape(-1)
    return value.reshape(int(np.prod(value.shape[:rows])), -1).T.copy()


def from_torch(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (value if rows_of(name) is None else value.T).reshape(shape)


def optimisers(key: str, weights: dict[tuple[str, tuple[int, ...]], Any]) -> list[Any]:
    """The optimisers that together hold every weight."""
    import torch

    case = CASES[key]
    betas = BETAS.get(case.method, (0.8, 0.95))
    decayed = [p for (name, _), p in weights.items() if rows_of(name) is not None]
    plain = [p for (name, _), p in weights.items() if rows_of(name) is None]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    if case.method == "adamw":
        return [torch.optim.AdamW(groups, lr=case.rate, betas=betas, eps=EPSILON)]
    if case.method == "sgd":
        return [torch.optim.SGD(groups, lr=case.rate, momentum=case.options.get("momentum", 0.0))]
    if case.method == "lion":
        from lion_pytorch import Lion

        return [Lion(groups, lr=case.rate, betas=betas)]
    if case.method == "adafactor":
        from transformers.optimization import Adafactor

        options = {"scale_parameter": False, "relative_step": False}
        return [Adafactor(groups, lr=case.rate, **options)]
    if case.method == "schedule_free":
        from schedulefree import AdamWScheduleFree

        found = AdamWScheduleFree(groups, lr=case.rate, betas=betas, eps=EPSILON)
        found.train()
        return [found]
    assert case.method == "muon"
    hidden = [p for (name, _), p in weights.items() if rows_of(name) and LAYER in name]
    ids = {id(p) for p in hidden}
    others = [{**g, "params": [p for p in g["params"] if id(p) not in ids]} for g in groups]
    return [
        torch.optim.Muon(
            hidden, lr=case.rate, weight_decay=DECAY, momentum=case.options["momentum"],
            adjust_lr_fn=case.options["adjust"],
        ),
        torch.optim.AdamW(others, lr=case.rate, betas=betas, eps=EPSILON),
    ]  # fmt: skip


def reference(key: str) -> dict[str, np.ndarray]:
    """Parameters after `STEPS` steps; of schedule_free the average."""
    import torch

    case, begin = CASES[key], start()
    weights = {
        (name, part): torch.nn.Parameter(torch.tensor(as_torch(name, begin[name][part])))
        for name in LEAVES for part in parts(name)
    }  # fmt: skip
    found = optimisers(key, weights)
    # Muon's Newton-Schulz runs in bfloat16 there; in float32 the comparison is sharp.
    as_it_is = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self.clone()
    try:
        for step in range(STEPS):
            grads = gradients(step)
            for (name, part), p in weights.items():
                p.grad = torch.tensor(as_torch(name, grads[name][part]))
            torch.nn.utils.clip_grad_norm_(list(weights.values()), MAX_GRAD_NORM)
            for optimiser in found:
                for group in optimiser.param_groups:
                    group["lr"] = rate(case, step)
                optimiser.step()
    finally:
        torch.Tensor.bfloat16 = as_it_is
    if case.method == "schedule_free":
        found[0].eval()
    ended = {name: np.empty_like(value) for name, value in begin.items()}
    for (name, part), p in weights.items():
        shape = begin[name][part].shape
        ended[name][part] = from_torch(name, p.detach().numpy(), shape)
    return ended


def main() -> None:
    found = {f"{key}:{name}": value for key in CASES for name, value in reference(key).items()}
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
