"""The dry runs in docs/tpu.md: `python tests/tpu_scripts/guide.py` writes them anew.

A block begins with a command that ends in --dry_run (lines that end in a backslash go on); what
follows, up to the end of the block, is what the script prints.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "tpu.md"
_BLOCK = re.compile(r"(?<=```console\n)\$ ((?:.*\\\n)*.*)\n((?:(?!```).*\n)*)(?=```)")


def blocks(text: str) -> list[tuple[str, str]]:
    """(command, printed) of every block."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(text)]


def printed(command: str) -> str:
    """What the command prints, run at the root of the checkout, where no gcloud is to be found."""
    # Nothing else: what `make` exports (PYTHON) would change what is printed.
    environment = {"PATH": "/usr/bin:/bin", "HF_TOKEN": "hf_never_shown"}
    done = subprocess.run(
        ["bash", "-c", f"gcloud() {{ exit 99; }}; export -f gcloud; {command}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def rewritten(text: str) -> str:
    return _BLOCK.sub(lambda found: f"$ {found[1]}\n{printed(found[1])}", text)


if __name__ == "__main__":
    GUIDE.write_text(rewritten(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
