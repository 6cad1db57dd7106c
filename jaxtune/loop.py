"""The loop of a run: steps, and what happens between them.

Metrics, evaluation, checkpoints, signals. Knows no files of models and no templates: batches and a
program come in, a trained state goes out.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxtune.command import Stopped, note
from jaxtune.config import Config, Diverged
from jaxtune.data.pipeline import Batches, Dataset, eval_batches, prefetch
from jaxtune.data.position import counts_before, counts_of, epoch_at
from jaxtune.draw.progress import Progress
from jaxtune.learn.checkpoint import Checkpoints
from jaxtune.learn.evaluation import Totals, evaluate
from jaxtune.learn.metrics import Meter, MetricsWriter
from jaxtune.learn.program import Program
from jaxtune.learn.state import TrainState
from jaxtune.learn.step import StepMetrics
from jaxtune.mesh import put_batch, row_shards


class Plan(NamedTuple):
    """What a run goes through: batches by step, and what it is evaluated on. `meta` is what every
    checkpoint says of the run."""

    batches: Batches
    meta: Mapping[str, Any]
    total_steps: int
    held_out: Dataset | None
    flops_per_token: float


class Loop:
    """Steps, and what happens between them. Metrics are read one step late, so that the device
    never waits for the host; before anything is saved or evaluated they are read at once.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        plan: Plan,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        start: int,
    ) -> None:
        self.config = config
        self.program = program
        self.plan = plan
        self.checkpoints = checkpoints
        self.writer = writer
        self.start = start
        self.last: dict[str, dict[str, Any]] = {}
        self._seen = counts_before(plan.batches, start)
        self._progress = Progress(start, plan.total_steps)
        self._pending: tuple[int, StepMetrics] | None = None  # a step still on the device
        self._meter = Meter(
            flops_per_token=plan.flops_per_token,
            device_kind=jax.devices()[0].device_kind,
            devices=jax.device_count(),
        )

    def run(self, state: TrainState, frozen: Any) -> TrainState:
        batches, end = self.plan.batches, self.plan.total_steps
        size = {"batch_size": batches.batch_size, "length": batches.row_length}

        def on_device(step: int) -> Any:
            rows = functools.partial(batches.batch_rows, step)
            return put_batch(rows, **size, mesh=self.program.mesh)

        with self._progress, asked_to_stop() as asked:
            for step, batch in enumerate(prefetch(on_device, self.start, end), self.start):
                state, metrics = self.program.train_step(state, frozen, batch)
                self._read()
                self._pending = step, metrics
                done = step + 1
                if self._evaluates_after(done):
                    self._read()
                    self._evaluate(state.trained, frozen, done)
                if asked or done == end or done % self.config.save_steps == 0:
                    self._read()
                    self._save(state, done)
                if asked and done < end:
                    self.checkpoints.wait()
                    raise Stopped(
                        f"stopped by {asked[0]} after step {done}, which is saved in "
                        f"{self.checkpoints.folder}. The same command goes on from there."
                    )
        return state

    def _read(self) -> None:
        """Takes the pending step's metrics off the device; non-finite ones end the run."""
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        metrics = jax.device_get(on_device)
        done = step + 1
        if not metrics.finite:
            raise Diverged(
                f"step {done}: the loss is {metrics.loss:g} and the gradient norm "
                f"{metrics.grad_norm:g}. The parameters before this step are kept; the newest "
                f"checkpoint is step {self.checkpoints.latest() or 'none'}. Lower learning_rate "
                f"(now {metrics.learning_rate:g}) or look at this step's rows with preview."
            )
        if metrics.weight == 0:
            note(f"step {done}: no token of this batch is trained; nothing changed")
        counts = counts_of(self.plan.batches, step)
        self._seen = self._seen.plus(counts)
        self._meter.step(counts.tokens)
        self._progress.advance(float(metrics.loss))
        if done % self.config.logging_steps and done != self.plan.total_steps:
            return
        rate, mfu = self._meter.read()
        added = "penalty" if self.config.z_loss else "router_loss"
        self._record(
            {
                "kind": "train",
                "step": done,
                "epoch": round(epoch_at(self.plan.batches, done), 4),
                "loss": float(metrics.loss),
                "token_accuracy": float(metrics.token_accuracy),
                **({added: float(metrics.penalty)} if metrics.penalty else {}),
                "grad_norm": float(metrics.grad_norm),
                "learning_rate": float(metrics.learning_rate),
                "tokens_total": self._seen.tokens,
                "tokens_trained": self._seen.trained,
                "examples_seen": self._seen.examples,
                "tokens_per_second": None if rate is None else round(rate, 1),
                "mfu": None if mfu is None else round(mfu, 4),
            }
        )

    def _evaluates_after(self, done: int) -> bool:
        if self.plan.held_out is None:
            return False
        if self.config.eval_steps:
            due = done % self.config.eval_steps == 0
        else:
            due = self.plan.batches.locate(done)[1] == 0
        return due or done == self.plan.total_steps

    def _evaluate(self, trained: Any, frozen: Any, done: int) -> None:
        data = self.plan.held_out
        assert data is not None
        rows = self.config.per_device_eval_batch_size * row_shards(self.program.mesh)
        parts = {
            name: evaluate(
                self.program.eval_step,
                trained,
                frozen,
                eval_batches(data.only(name), rows, packing=self.config.packing),
                mesh=self.program.mesh,
            )
            for name in dict.fromkeys(data.names)
        }
        row = sum(parts.values(), Totals()).row()
        by_dataset = {name: part.row() for name, part in parts.items()}
        self._record({"kind": "eval", "step": done, **row, "by_dataset": by_dataset})
        self._meter.pause()

    def _save(self, state: TrainState, done: int) -> None:
        if done == self.checkpoints.latest():
            return
        self.checkpoints.save(state, self.plan.meta, step=done)

    def _record(self, row: dict[str, Any]) -> None:
        self.last[row["kind"]] = row
        self.writer.write(row)
        self._progress.show(row)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[str]]:
    """Fills the list on SIGTERM or SIGINT; a second SIGINT interrupts as usual."""
    asked: list[str] = []

    def remember(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        note(f"{asked[0]}: finishing this step, then saving")

    try:
        before = {n: signal.signal(n, remember) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker): signals are not ours
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
