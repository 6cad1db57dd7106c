"""Writes docs/parity.md: every case here and in transformers, computed now, side by side.

    python tests/golden/parity.py        needs torch and transformers; some minutes on two cores

Exit code 1 if a figure is beyond its tolerance; the table then says which.
"""

import datetime
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden.cases import BASE, CASES, NEW_TOKENS, TEXTS, write_folder
from golden.make import reference
from golden.ours import ALONE, GRADIENT, LOSS, PACKED, greedy, logits_tolerance, ours

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
PACKED_LOGITS = 1e-5
_NOT_SWITCHES = {"model_type", "dtype", "torch_dtype", "num_hidden_layers"}


class Row(NamedTuple):
    family: str
    case: str
    switches: str
    logits: float  # largest difference
    size: float  # largest logit
    allowed: float  # of `logits`
    loss: float
    gradient: float  # largest difference of a tensor over its largest gradient, worst tensor
    same_tokens: bool
    packed: float  # largest difference of logits, packed and alone

    @property
    def holds(self) -> bool:
        return (
            self.logits <= self.allowed
            and self.loss <= LOSS
            and self.gradient <= GRADIENT
            and self.same_tokens
            and self.packed <= PACKED_LOGITS
        )


def compare(name: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        expected = reference(write_folder(name, Path(folder)))
    found, alone = ours(name, PACKED), ours(name, ALONE)
    gradients = [
        np.abs(found.gradients[key] - gradient).max() / np.abs(gradient).max()
        for key, gradient in expected.gradients.items()
    ]
    config = CASES[name]
    changed = (key for key, value in config.items() if BASE.get(key) != value)
    return Row(
        family=config["model_type"],
        case=name,
        switches=", ".join(f"`{key}`" for key in changed if key not in _NOT_SWITCHES),
        logits=_distance(found.logits, expected.logits),
        size=max(float(np.abs(text).max()) for text in expected.logits),
        allowed=logits_tolerance(name),
        loss=abs(found.loss - expected.loss),
        gradient=float(max(gradients)),
        same_tokens=greedy(name) == [tokens.tolist() for tokens in expected.generated],
        packed=_distance(found.logits, alone.logits),
    )


def _distance(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def page(rows: list[Row]) -> str:
    packages = ("jax", "flax", "transformers", "torch")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    lengths = ", ".join(str(len(text)) for text in TEXTS)
    lines = [
        "# Parity with transformers",
        "",
        "Made by `python tests/golden/parity.py`; do not edit. "
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, CPU, float32, "
        "eager attention.",
        "",
        "Each case is a tiny random model that turns on the named switches of its config. Both "
        f"sides read the same folder and the same texts of {lengths} tokens, with weights between "
        "0 and 1 on the targets. Columns:",
        "",
        "- **logits**: largest difference; the largest logit is beside it. At most 2e-5 (5e-5 for "
        "mixtures of experts).",
        f"- **loss**: difference of the weighted mean. At most {LOSS:.0e}.",
        "- **gradient**: of each tensor the largest difference over its largest gradient; the "
        f"worst tensor. At most {GRADIENT:.0e}.",
        f"- **greedy**: {NEW_TOKENS} tokens after each of three prompts of unequal length, decoded "
        "in one batch with the key-value cache, are those of `generate` for each prompt alone.",
        "- **packed**: largest difference of logits between texts in one row and each alone. At "
        f"most {PACKED_LOGITS:.0e}.",
        "",
        "| family | case | logits (of) | loss | gradient | greedy | packed | switches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = "" if row.holds else " **beyond tolerance**"
        lines.append(
            f"| {row.family} | {row.case}{mark} | {row.logits:.1e} ({row.size:.1f}) "
            f"| {row.loss:.1e} | {row.gradient:.1e} | {'same' if row.same_tokens else 'DIFFERENT'} "
            f"| {row.packed:.1e} | {row.switches} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    rows = []
    for name in CASES:
        rows.append(compare(name))
        print(*rows[-1], flush=True)
    PAGE.write_text(page(sorted(rows, key=lambda row: row.family)))
    failed = [row.case for row in rows if not row.holds]
    print(f"{PAGE}: {len(rows)} cases, beyond tolerance: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
