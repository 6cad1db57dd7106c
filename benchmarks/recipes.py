"""What `plan` says of each recipe in configs/, written into its head.

    python benchmarks/recipes.py [NAME ...] [--arithmetic] [--check]

Compiles the step of every recipe for the hardware that its head names (a minute or two each on an
idle core, answers are cached), rewrites the lines after "# Plan", prints a table. `--arithmetic`
compiles nothing. `--check` writes nothing and fails where a head differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from planned import planned  # noqa: E402

from jaxtune.planning.text import header  # noqa: E402

_INDENT = "#" + " " * 12


class Recipe(NamedTuple):
    """A file of configs/ with the topology and the folder of the architecture its head names."""

    file: Path
    topology: str
    model: Path


def recipes(names: list[str]) -> list[Recipe]:
    """Those with a line "# Hardware   TOPOLOGY" and one that names configs/models/NAME."""
    found = []
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        hardware = re.search(r"^# Hardware +(\S+)$", text, re.MULTILINE)
        model = re.search(r"configs/models/(\S+)", text)
        if hardware and model and (not names or file.stem in names):
            found.append(Recipe(file, hardware[1], ROOT / "configs" / "models" / model[1]))
    return found


def plan(recipe: Recipe, *, compiled: bool) -> dict[str, Any]:
    """The object of `plan --json`."""
    return planned(
        *("--config", str(recipe.file)),
        *("--topology", recipe.topology, "--model_name_or_path", str(recipe.model)),
        *("--compile", str(compiled).lower()),
    )


def written(text: str, lines: list[str]) -> str:
    """The recipe with `lines` for its plan."""
    block = f"# Plan       {lines[0]}\n" + "".join(f"{_INDENT}{line}\n" for line in lines[1:])
    return re.sub(rf"^# Plan .*\n(?:{_INDENT}.*\n)*", block, text, count=1, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--arithmetic", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    print("| recipe | topology | fits | GiB a chip | tokens/s a chip | MFU | how |")
    print("|---|---|---|---|---|---|---|")
    differ = []
    for recipe in recipes(asked.names):
        found = plan(recipe, compiled=not asked.arithmetic)
        speed = found["tokens_per_second_per_chip"] or 0.0
        print(
            f"| {recipe.file.stem} | {recipe.topology} | {'yes' if found['fits'] else 'no'} "
            f"| {found['hbm_bytes'] / 2**30:.2f} of {found['hbm_limit_bytes'] / 2**30:.2f} "
            f"| {speed:,.0f} | {found['mfu'] or 0.0:.0%} | {found['method']} |",
            flush=True,
        )
        before = recipe.file.read_text(encoding="utf-8")
        after = written(before, header(found))
        differ += [recipe.file.name] if after != before else []
        if not asked.check:
            recipe.file.write_text(after, encoding="utf-8")
    if asked.check and differ:
        print(f"heads that say something else: {', '.join(differ)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
