"""What is written about a run: metrics.jsonl always, TensorBoard where asked for.

The meter is the only clock. Peaks are those of `chips`: published, dense, bfloat16.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.chips import peak_flops
from jaxtune.config import ConfigError


class MetricsWriter:
    """Appends to OUT/metrics.jsonl; on resume the rows after the restored step are dropped, so
    that the file is what an uninterrupted run would have written.
    """

    def __init__(self, run_dir: Path, *, resumed_at: int, report_to: tuple[str, ...] = ()) -> None:
        self.path = run_dir / "metrics.jsonl"
        _keep_rows_up_to(self.path, resumed_at)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = _tensorboard(run_dir, resumed_at) if "tensorboard" in report_to else None

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_rows_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(run_dir: Path, resumed_at: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "report_to: tensorboard needs tensorboardX. Run: pip install 'jaxtune[tensorboard]'"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)


class Meter:
    """Tokens per second and MFU since the last reading; compilation is not counted."""

    def __init__(self, *, flops_per_token: float, device_kind: str, devices: int) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(device_kind)
        self._devices = devices
        self._since: float | None = None
        self._tokens = 0

    def step(self, tokens: int) -> None:
        """Once per finished step; the first call starts the clock."""
        if self._since is None:
            self._since = time.monotonic()
        else:
            self._tokens += tokens

    def pause(self) -> None:
        """What follows (an evaluation, a save) is not training: the next step restarts the clock
        and forgets the tokens since the last reading."""
        self._since, self._tokens = None, 0

    def read(self) -> tuple[float | None, float | None]:
        """(tokens per second, MFU), None where unknown: first reading, or no known peak."""
        now = time.monotonic()
        if self._since is None or self._tokens == 0 or now == self._since:
            return None, None
        rate = self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        peak = None if self._peak is None else self._peak * self._devices
        return rate, None if peak is None else rate * self._flops_per_token / peak
