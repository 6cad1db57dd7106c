"""Traces of chosen steps by `jax.profiler`, to be opened in TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Tracing:
    """A context manager; steps `first` to `last`, counted from 1, go into OUT/profile."""

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None) -> None:
        self.folder = run_dir / "profile"
        self._steps = steps
        self._running = False

    def __enter__(self) -> Tracing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        chosen = self._steps is not None and self._steps[0] <= step <= self._steps[1]
        if chosen and not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """`result` is of the step: the trace ends when the device has finished it."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
