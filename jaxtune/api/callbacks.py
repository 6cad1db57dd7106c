"""A user's own code beside a run: callbacks that watch it and may stop it, and their errors.

They run on the first host. Each gets copies, so that nothing it does changes a number.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from jaxtune.api.results import TrainResult
from jaxtune.config import Config, ConfigError, JaxtuneError, nearest
from jaxtune.parallel import processes
from jaxtune.training.evaluation import Totals

FAILED: Final = "error in "  # how `Callbacks.stop_reason` begins after an exception
STOP: Final = True  # what `on_step` and `on_evaluation` return to end the run


Metric = Callable[[list[str], list[str], list[str]], float]  # of prompts, references, responses
_COLUMNS = {"kind", "step", "by_dataset", *Totals().row()}  # of an eval row


class CallbackError(JaxtuneError):
    """An exception of a callback or a metric, which is its cause; the run was saved."""


class RunInfo(NamedTuple):
    """A run that begins or goes on: steps `start` + 1 to `total_steps`."""

    config: Config
    output_dir: Path
    start: int
    total_steps: int


class Callback:
    """A base for callbacks, whose methods do nothing; override those that are of use.

    `row` is a row of metrics.jsonl. A run that is stopped saves, exports and ends as if done.
    """

    def on_start(self, run: RunInfo) -> None:
        """Called before the first step of this process."""

    def on_step(self, row: dict[str, Any]) -> bool | None:
        """Called for every train row, each `logging_steps`; return `STOP` to end the run."""

    def on_evaluation(self, row: dict[str, Any]) -> bool | None:
        """Called for every eval row; return `STOP` to end the run."""

    def on_save(self, step: int, folder: Path) -> None:
        """Called once the checkpoint in `folder` is whole."""

    def on_end(self, result: TrainResult) -> None:
        """Called after the export."""


_METHODS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """The callbacks of a run, called in order on the first host.

    `stop_reason` says why the run is to end; after an exception `error` holds it.
    """

    def __init__(
        self, callbacks: Sequence[Callback] = (), metrics: Mapping[str, Metric] | None = None
    ) -> None:
        if not isinstance(callbacks, Sequence) or not all(
            isinstance(each, Callback) for each in callbacks
        ):
            raise ConfigError(
                "callbacks: expected a list of objects whose classes derive from jt.Callback; "
                f"got {callbacks!r:.200}."
            )
        for each in callbacks:
            for name in dir(each):
                if name.startswith("on_") and name not in _METHODS:
                    raise ConfigError(
                        f"callbacks: {type(each).__name__}.{name} is no method of jt.Callback."
                        f"{nearest(name, _METHODS)} There are: {', '.join(_METHODS)}."
                    )
        metrics = {} if metrics is None else metrics
        if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
            raise ConfigError(
                "metrics: expected a dict of functions of (prompts, references, responses) by "
                f"name; got {metrics!r:.200}."
            )
        self._callbacks = tuple(callbacks)
        self.metrics = dict(metrics)
        if doubled := _COLUMNS & self.metrics.keys():
            raise ConfigError(
                f"metrics: {', '.join(sorted(doubled))}: eval rows have that already."
            )
        self.stop_reason = ""
        self.error: CallbackError | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks or self.metrics)

    @property
    def watches_saves(self) -> bool:
        return any(type(each).on_save is not Callback.on_save for each in self._callbacks)

    def start(self, run: RunInfo) -> None:
        self._call_all("on_start", run)

    def row(self, row: Mapping[str, Any]) -> None:
        self._call_all("on_step" if row["kind"] == "train" else "on_evaluation", row)

    def saved(self, step: int, folder: Path) -> None:
        self._call_all("on_save", step, folder)

    def end(self, result: TrainResult) -> None:
        self._call_all("on_end", result)

    def measure(
        self, prompts: list[str], references: list[str], responses: list[str]
    ) -> dict[str, float]:
        """Compute the metrics, on the first host."""
        values: dict[str, float] = {}
        for name, metric in self.metrics.items() if processes.is_first() else ():
            call = functools.partial(_as_float, metric, [*prompts], [*references], [*responses])
            value = self.guard(f"metric {name}", call)
            if value is not None:
                values[name] = value
        return values

    def guard(self, name: str, call: Callable[[], Any]) -> Any:
        """Call a user's function; what it raises becomes `error` and ends the run after a save."""
        try:
            return call()
        except Exception as error:
            self.stop_reason = f"{FAILED}{name}: {type(error).__name__}: {error}"
            self.error = CallbackError(self.stop_reason)
            self.error.__cause__ = error
            return None

    def _call_all(self, method: str, *args: Any) -> None:
        if not processes.is_first():
            return
        for each in self._callbacks:
            if self.error is not None:
                return
            name = f"callback {type(each).__name__}.{method}"
            call = functools.partial(getattr(each, method), *copy.deepcopy(args))
            wants_stop = self.guard(name, call)
            if isinstance(wants_stop, bool | np.bool_) and wants_stop and not self.stop_reason:
                self.stop_reason = f"{name} asked to stop"


def _as_float(metric: Metric, *texts: list[str]) -> float:
    value = metric(*texts)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"expected a number; got {value!r:.200}") from None
