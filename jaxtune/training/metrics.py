"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases where configured.

The meter is the only clock. Peaks are those of `chips`: published, dense, bfloat16.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune.config import ConfigError
from jaxtune.parallel.chips import peak_flops
from jaxtune.storage.atomic_write import write_whole
from jaxtune.storage.jsonl import as_json, keep_rows_up_to


class MetricsWriter:
    """Appends to OUT/metrics.jsonl; on resume the rows after the restored step are dropped, so
    that the file is what an uninterrupted run would have written; with `due` also those of that
    step's evaluation, which is made again. `quiet` writes nothing: of many hosts only the first
    does. `settings` are what Weights & Biases shows of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resumed_at: int,
        due: bool = False,
        report_to: tuple[str, ...] = (),
        quiet: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._boards: list[_TensorBoard | _Wandb] = []
        self._file = None
        if quiet:
            return
        keep_rows_up_to(self.path, resumed_at, due=due)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if "tensorboard" in report_to:
            self._boards.append(_TensorBoard(run_dir, resumed_at))
        if "wandb" in report_to:
            self._boards.append(_Wandb(run_dir, settings or {}))

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(as_json(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written: {error.strerror}. Free some space, then run the "
                "same command: it goes on from the last checkpoint."
            ) from None
        kind, step = row["kind"], row["step"]
        numbers = {
            f"{kind}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        for board in self._boards:
            board.add(numbers, step)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk refused is said by `write`
                self._file.close()
        for board in self._boards:
            board.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "report_to: tensorboard needs tensorboardX. Run: pip install 'jaxtune[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases for one run directory.

    Its id is stored there, so that a resumed run goes on in the same one. WANDB_MODE=offline writes
    into OUT/wandb alone.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "report_to: wandb needs the package of that name. Run: pip install 'jaxtune[wandb]'"
            ) from None
        known = run_dir / "wandb-run-id.txt"
        name = known.read_text(encoding="utf-8").strip() if known.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxtune"),
            dir=str(run_dir),
            id=name,
            resume="allow",
            config=dict(settings),
        )
        # Steps are ours, of each row: rows of a kind need not come in the order of wandb's own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_whole(known, self._run.id)

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Reading(NamedTuple):
    """Means since the last reading, None where unknown: at the first reading, or without a
    published peak. `data_wait` is the share of the time that devices waited for a batch."""

    tokens_per_second: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    data_wait: float | None = None


class Meter:
    """Tokens per second and MFU since the last reading; compilation is not counted."""

    def __init__(self, *, flops_per_token: float, device_kind: str, devices: int) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(device_kind)
        self._devices = devices
        self._since: float | None = None
        self._tokens = self._steps = 0
        self._waited = 0.0

    def step(self, tokens: int) -> None:
        """Once per finished step; the first call starts the clock."""
        if self._since is None:
            self._since, self._waited = time.monotonic(), 0.0
        else:
            self._tokens += tokens
            self._steps += 1

    def waited(self, seconds: float) -> None:
        """The run had no batch for so long."""
        self._waited += seconds

    def pause(self) -> None:
        """Leave out of the rates what follows, an evaluation or a save, which is not training.

        The next step restarts the clock and forgets the tokens since the last reading.
        """
        self._since, self._tokens, self._steps, self._waited = None, 0, 0, 0.0

    def read(self) -> Reading:
        now = time.monotonic()
        if self._since is None or self._steps == 0 or now == self._since:
            return Reading()
        seconds, tokens, steps = now - self._since, self._tokens, self._steps
        waited = min(1.0, self._waited / seconds)
        self.pause()
        self._since = now
        rate = tokens / seconds
        peak = None if self._peak is None else self._peak * self._devices
        mfu = None if peak is None else rate * self._flops_per_token / peak
        return Reading(rate, mfu, seconds / steps, waited)


def memory_peak_bytes() -> int | None:
    """Of the fullest device of this host since the start; None where devices do not say (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return max(peaks, default=None)


class Spikes:
    """Notices a loss far above those before it: eight median deviations, a fifth, and 0.1 above the
    median of the last 50 (a model that knows its data by heart has losses near zero, and any batch
    stands out). Says so once in 20 steps."""

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=50)
        self._quiet = 0

    def notice(self, loss: float) -> float | None:
        """The median that `loss` stands out from, or None."""
        recent, self._quiet = list(self._recent), max(0, self._quiet - 1)
        self._recent.append(loss)
        if len(recent) < 10 or self._quiet or not math.isfinite(loss):
            return None
        median = statistics.median(recent)
        deviation = statistics.median(abs(value - median) for value in recent)
        if loss <= median + max(8 * deviation, 0.2 * abs(median), 0.1):
            return None
        self._quiet = 20
        return median
