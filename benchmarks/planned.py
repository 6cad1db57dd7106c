"""`python -m jaxtune.plan --json` in a process of its own, for the tables of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def planned(*arguments: str, **environment: str) -> dict[str, Any]:
    """What it says; exits with its last line where it fails."""
    done = subprocess.run(
        (sys.executable, "-m", "jaxtune.plan", "--json", *arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    if done.returncode:
        raise SystemExit(f"plan {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
