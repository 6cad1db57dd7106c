"""The loop of a run: steps, and what happens between them.

Metrics, evaluation, checkpoints, signals. Knows no files of models and no templates: batches and a
program come in, a trained state goes out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune.cli import Stopped, note
from jaxtune.config import Config, Diverged
from jaxtune.data.dataset import Batches, Dataset, eval_batches, prefetch
from jaxtune.data.progress import counts_before, counts_of, epoch_at
from jaxtune.parallel import processes
from jaxtune.parallel.chips import peak_flops
from jaxtune.parallel.heartbeat import Heartbeat, Notice, stop_notices
from jaxtune.parallel.mesh import put_batch, row_shards
from jaxtune.terminal.progress import TrainProgress
from jaxtune.training import debug_step
from jaxtune.training.checkpoint.checkpoints import Checkpoints
from jaxtune.training.evaluation import Totals, evaluate
from jaxtune.training.metrics import Meter, MetricsWriter, Spikes, memory_peak_bytes
from jaxtune.training.profiling import Tracing
from jaxtune.training.program import Program
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics
from jaxtune.tree import named


class Plan(NamedTuple):
    """What a run goes through: batches by step, and what it is evaluated on. `meta` is what every
    checkpoint says of the run. `answer(trained, frozen, step, between)` answers the sample prompts
    and calls `between` as it goes, which may end it.
    """

    batches: Batches
    meta: Mapping[str, Any]
    total_steps: int
    held_out: Dataset | None
    flops_per_token: float
    answer: Callable[[Any, Any, int, Callable[[], None]], None] | None = None


class Standing(NamedTuple):
    """What a resumed run has to know of its past, kept in every checkpoint: the lowest eval_loss,
    the step it was at, evaluations since then, steps that were skipped, and whether this step's
    evaluation is `due`: the run was left before it had ended."""

    best_step: int | None = None
    best_loss: float | None = None
    since_best: int = 0
    skipped: int = 0
    due: bool = False

    @classmethod
    def of(cls, past: Mapping[str, Any]) -> Standing:
        """As a checkpoint's meta says; a lowest loss that is not finite is none."""
        found = cls(**past.get("standing", {}))
        if found.best_loss is not None and not math.isfinite(found.best_loss):
            found = found._replace(best_step=None, best_loss=None)
        return found

    def after(self, eval_loss: float, step: int) -> Standing:
        """Once the step is evaluated; a loss that is not finite is no improvement."""
        known = self._replace(due=False)
        lower = self.best_loss is None or eval_loss < self.best_loss
        if math.isfinite(eval_loss) and lower:
            return known._replace(best_step=step, best_loss=eval_loss, since_best=0)
        return known._replace(since_best=self.since_best + 1)


class _Left(Exception):
    """An evaluation was left for the signal that its text names."""


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
        watch: Heartbeat,
        *,
        run_dir: Path,
        start: int,
        past: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.program = program
        self.plan = plan
        self.checkpoints = checkpoints
        self.writer = writer
        self.watch = watch
        self.run_dir = run_dir
        self.start = start
        self.last: dict[str, dict[str, Any]] = {}
        self.standing = Standing.of(past)
        if plan.held_out is None:
            self.standing = self.standing._replace(due=False)
        self._seen = counts_before(plan.batches, start)
        self._progress = TrainProgress(start, plan.total_steps, quiet=not processes.is_first())
        self._pending: tuple[int, StepMetrics] | None = None  # a step still on the device
        self._asked: Notice = lambda: None
        self._spikes = Spikes()
        kind = jax.devices()[0].device_kind
        self._meter = Meter(
            flops_per_token=plan.flops_per_token, device_kind=kind, devices=jax.device_count()
        )
        if peak := peak_flops(kind):
            note(f"mfu: of {peak / 1e12:g} TFLOP/s a {kind} device, its published dense bfloat16")

    def run(self, state: TrainState, frozen: Any) -> tuple[TrainState, int]:
        """The state after the last step, and which step that was."""
        batches, end = self.plan.batches, self.plan.total_steps
        size = {"batch_size": batches.batch_size, "length": batches.row_length}

        def on_device(step: int) -> Any:
            rows = functools.partial(batches.batch_rows, step)
            return put_batch(rows, **size, mesh=self.program.mesh)

        done = self.start
        if self._ended(done):
            return state, done
        with contextlib.ExitStack() as using:
            using.enter_context(self._progress)
            self._asked = using.enter_context(stop_notices(note))
            tracing = using.enter_context(Tracing(self.run_dir, self.config.profile_steps))
            if self.standing.due:
                self._conclude(state, frozen, done)
            feed = using.enter_context(contextlib.closing(prefetch(on_device, done, end)))
            while not self._ended(done):
                batch = self._next(feed, done + 1)
                tracing.before(done + 1)
                state, metrics = self.program.train_step(state, frozen, batch)
                self._read()
                self._pending = done, metrics
                done += 1
                tracing.after(done, metrics)
                self.standing = self.standing._replace(due=self._evaluates_after(done))
                self._conclude(state, frozen, done)
        if done < end:
            note(f"early stopping: {self._waited_for()}; training ends at step {done} of {end}")
        return state, done

    def _conclude(self, state: TrainState, frozen: Any, done: int) -> None:
        """What follows a step: its evaluation where one is due, its checkpoint where one is. Raises
        `Stopped` where that was asked for."""
        asking, improved = self._asked(), False
        if self.standing.due and not asking:
            self._read()
            try:
                improved = self._evaluate(state.trained, frozen, done)
                asking = self._asked()
            except _Left as left:
                asking = str(left)
        ended = self._ended(done)
        if asking or ended or improved or done % self.config.save_steps == 0:
            self._read()
            self._save(state, done)
        if asking and not ended:
            self.checkpoints.wait()
            first = " with its evaluation" if self.standing.due else ""
            raise Stopped(
                f"stopped by {asking} after step {done}, which is saved in "
                f"{self.checkpoints.where}. The same command goes on from there{first}."
            )

    def _stay(self) -> None:
        """Asked between parts of an evaluation. Raises `_Left`."""
        if asking := self._asked():
            raise _Left(asking)

    def _next(self, feed: Any, step: int) -> Any:
        self.watch.at(step, "waiting for data")
        began = time.monotonic()
        batch = next(feed)
        self._meter.waited(time.monotonic() - began)
        self.watch.at(step, "in the step")
        return batch

    def _ended(self, done: int) -> bool:
        """Whether nothing follows step `done`, not its own evaluation either."""
        patience, standing = self.config.early_stopping_patience, self.standing
        waited = patience is not None and standing.since_best >= patience
        return not standing.due and (waited or done == self.plan.total_steps)

    def _waited_for(self) -> str:
        standing = self.standing
        below = "that is finite" if standing.best_loss is None else (
            f"below {standing.best_loss:.4f} of step {standing.best_step}"
        )  # fmt: skip
        return f"{standing.since_best} evaluations without an eval_loss {below}"

    def _read(self) -> None:
        """Takes the pending step's metrics off the device; non-finite ones end the run."""
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        metrics = jax.device_get(on_device)
        done = step + 1
        counts = counts_of(self.plan.batches, step)
        self._seen = self._seen.plus(counts)
        self._meter.step(counts.tokens)
        if not metrics.finite:
            self._not_finite(done, metrics)
            return
        if metrics.weight == 0:
            note(f"step {done}: no token of this batch is trained; nothing changed")
        loss = float(metrics.loss)
        if (usual := self._spikes.notice(loss)) is not None:
            note(
                f"step {done}: the loss jumped to {loss:.4f}; it was about {usual:.4f}. To look at "
                f"that step: {debug_step.command_for(self.run_dir, done)}"
            )
        self._progress.advance(loss)
        if done % self.config.logging_steps and done != self.plan.total_steps:
            return
        reading = self._meter.read()
        added = "penalty" if self.config.z_loss else "router_loss"
        self._record(
            {
                "kind": "train",
                "step": done,
                "epoch": round(epoch_at(self.plan.batches, done), 4),
                "loss": loss,
                "token_accuracy": float(metrics.token_accuracy),
                **({added: float(metrics.penalty)} if metrics.penalty else {}),
                "grad_norm": float(metrics.grad_norm),
                "learning_rate": float(metrics.learning_rate),
                "tokens_total": self._seen.tokens,
                "tokens_trained": self._seen.trained,
                "examples_seen": self._seen.examples,
                "tokens_per_second": _rounded(reading.tokens_per_second, 1),
                "mfu": _rounded(reading.mfu, 4),
                "step_seconds": _rounded(reading.step_seconds, 4),
                "data_wait": _rounded(reading.data_wait, 4),
                "memory_peak_bytes": memory_peak_bytes(),
            }
        )

    def _not_finite(self, done: int, metrics: StepMetrics) -> None:
        """The step changed nothing. Writes down what is known of it; ends the run, or skips it."""
        self.checkpoints.wait()  # so that the one being written counts too
        kept = self.checkpoints.latest()
        path = debug_step.path_of(self.run_dir, done)
        if processes.is_first():
            names = list(named(self.program.abstract.trained))
            found = debug_step.describe(self.run_dir, done, metrics, names, self.plan.batches, kept)
            debug_step.write(path, found)
        skipped = self.standing.skipped + 1
        what = f"step {done}: the loss is {metrics.loss:g} and the gradient norm " + (
            f"{metrics.grad_norm:g}. "
        )
        if skipped <= self.config.max_skipped_steps:
            self.standing = self.standing._replace(skipped=skipped)
            note(
                f"{what}Skipped, {skipped} of max_skipped_steps "
                f"{self.config.max_skipped_steps}; parameters are as before. See {path}."
            )
            self._progress.advance(float("nan"))
            return
        raise Diverged(
            f"{what}It changed nothing; "
            + (f"the newest checkpoint is step {kept}. " if kept else "none was saved before it. ")
            + "The batch's rows and the gradient norm of each parameter are in "
            f"{path}. To look at that step: {debug_step.command_for(self.run_dir, done)}. Lower "
            f"learning_rate (now {metrics.learning_rate:g}), mend the rows, or allow "
            "max_skipped_steps."
        )

    def _evaluates_after(self, done: int) -> bool:
        if self.plan.held_out is None:
            return False
        if self.config.eval_steps:
            due = done % self.config.eval_steps == 0
        else:
            due = self.plan.batches.locate(done)[1] == 0
        return due or done == self.plan.total_steps

    def _evaluate(self, trained: Any, frozen: Any, done: int) -> bool:
        """Whether this step is to be kept as the best so far. Raises `_Left`."""
        data = self.plan.held_out
        assert data is not None
        self.watch.at(done, "evaluating")
        rows = self.config.per_device_eval_batch_size * row_shards(self.program.mesh)

        def batches(name: str) -> Iterator[Any]:
            for batch in eval_batches(data.only(name), rows, packing=self.config.packing):
                self.watch.at(done, "evaluating")
                yield batch
                self._stay()

        parts = {
            name: evaluate(
                self.program.eval_step,
                trained,
                frozen,
                batches(name),
                mesh=self.program.mesh,
            )
            for name in dict.fromkeys(data.names)
        }
        row = sum(parts.values(), Totals()).row()
        by_dataset = {name: part.row() for name, part in parts.items()}
        self._record({"kind": "eval", "step": done, **row, "by_dataset": by_dataset})
        if self.plan.answer is not None:
            self.watch.at(done, "answering the sample prompts")
            self.plan.answer(trained, frozen, done, self._stay)
        self.standing = self.standing.after(row["eval_loss"], done)
        self._meter.pause()
        return self.config.load_best_model_at_end and self.standing.best_step == done

    def _save(self, state: TrainState, done: int) -> None:
        if done == self.checkpoints.latest():
            return
        self.watch.at(done, "saving")
        best = self.standing.best_step if self.config.load_best_model_at_end else None
        meta = {**self.plan.meta, "standing": self.standing._asdict()}
        self.checkpoints.save(state, meta, step=done, best=best)
        self._meter.pause()

    def _record(self, row: dict[str, Any]) -> None:
        self.last[row["kind"]] = row
        self.writer.write(row)
        self._progress.show(row)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
