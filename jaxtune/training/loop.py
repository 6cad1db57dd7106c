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

from jaxtune.cli import Stopped, note, shows_notes
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


class RunPlan(NamedTuple):
    """A run's batches by step, its held-out data, and the step it starts from.

    `meta` goes into every checkpoint; `past` is the meta of the checkpoint of `start`.
    """

    batches: Batches
    held_out: Dataset | None
    total_steps: int
    meta: Mapping[str, Any]
    flops_per_token: float
    run_dir: Path
    start: int = 0
    past: Mapping[str, Any] = {}


class Outputs(NamedTuple):
    """The places that a loop writes to, and the thread that watches it."""

    checkpoints: Checkpoints
    writer: MetricsWriter
    watch: Heartbeat


Sample = Callable[[Any, Any, int, Callable[[], None]], None]
Measure = Callable[[Any, Any, int, Callable[[], None]], dict[str, float]]


class Hooks(NamedTuple):
    """Functions that the loop calls, on every host.

    `sample(trained, frozen, step, between)` answers the sample prompts; `measure`, called alike,
    returns more columns of an eval row. Both call `between` as they go, which may raise.
    `row(row)` sees every row that is written, `saved(step, folder)` every checkpoint once it is
    whole. After these the run ends, as if done, if `stop_reason()` is not empty on one host.
    """

    sample: Sample | None = None
    measure: Measure | None = None
    row: Callable[[dict[str, Any]], None] = lambda row: None
    saved: Callable[[int, Path], None] | None = None
    stop_reason: Callable[[], str] | None = None


class EvalHistory(NamedTuple):
    """A record of evaluations, kept in every checkpoint: the lowest eval_loss, its step, and the
    number of evaluations since; and of the steps that were skipped.

    `due`: the evaluation of this step is not done, since the run was left before it had ended.
    """

    best_step: int | None = None
    best_loss: float | None = None
    since_best: int = 0
    skipped: int = 0
    due: bool = False

    @classmethod
    def of(cls, past: Mapping[str, Any]) -> EvalHistory:
        """As a checkpoint's meta says; a lowest loss that is not finite is none."""
        history = cls(**past.get("standing", {}))
        if history.best_loss is not None and not math.isfinite(history.best_loss):
            history = history._replace(best_step=None, best_loss=None)
        return history

    def after(self, eval_loss: float, step: int) -> EvalHistory:
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
        plan: RunPlan,
        outputs: Outputs,
        hooks: Hooks | None = None,
    ) -> None:
        self.config = config
        self.program = program
        self.plan = plan
        self.checkpoints, self.writer, self.watch = outputs
        self.hooks = hooks or Hooks()
        self.last: dict[str, dict[str, Any]] = {}
        self.history = EvalHistory.of(plan.past)
        self.stop_reason = ""
        if plan.held_out is None:
            self.history = self.history._replace(due=False)
        self._seen = counts_before(plan.batches, plan.start)
        self._progress = TrainProgress(plan.start, plan.total_steps, quiet=not shows_notes())
        self._hooks_called = False  # since hosts have compared their `stop_reason`
        self._pending: tuple[int, StepMetrics] | None = None  # a step still on the device
        self._notice: Notice = lambda: None
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

        done = self.plan.start
        if self._ended(done):
            return state, done
        with contextlib.ExitStack() as using:
            using.enter_context(self._progress)
            self._notice = using.enter_context(stop_notices(note))
            tracing = using.enter_context(Tracing(self.plan.run_dir, self.config.profile_steps))
            if self.history.due:
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
                self.history = self.history._replace(due=self._evaluates_after(done))
                self._conclude(state, frozen, done)
        if done < end:
            reason = self.stop_reason or f"early stopping: {self._waited_for()}"
            note(f"{reason}; training ends at step {done} of {end}")
        return state, done

    def _conclude(self, state: TrainState, frozen: Any, done: int) -> None:
        """Conclude a step: its evaluation where one is due, its checkpoint where one is.

        Raises `Stopped` if a signal asked for that.
        """
        signal, improved = self._signal(), False
        if self.history.due and not signal:
            self._read()
            try:
                improved = self._evaluate(state.trained, frozen, done)
                signal = self._signal()
            except _Left as left:
                signal = str(left)
        ended = self._ended(done)
        if signal or ended or improved or done % self.config.save_steps == 0:
            self._read()
            self._save(state, done)
        if signal and not ended:
            self.checkpoints.wait()
            first = " with its evaluation" if self.history.due else ""
            raise Stopped(
                f"stopped by {signal} after step {done}, which is saved in "
                f"{self.checkpoints.where}. The same command goes on from there{first}."
            )

    def _signal(self) -> str | None:
        """Return the signal for which all hosts are to save and leave; none if one of them has a
        `stop_reason`, since the run then ends as if done. All hosts call."""
        if self._hooks_called and self.hooks.stop_reason is not None and not self.stop_reason:
            self.stop_reason = max(processes.gather_texts(self.hooks.stop_reason()))
        self._hooks_called = False
        return None if self.stop_reason else self._notice()

    def _leave_if_signalled(self) -> None:
        """Called between parts of an evaluation. Raises: _Left."""
        if signal := self._signal():
            raise _Left(signal)

    def _next(self, feed: Any, step: int) -> Any:
        self.watch.at(step, "waiting for data")
        began = time.monotonic()
        batch = next(feed)
        self._meter.waited(time.monotonic() - began)
        self.watch.at(step, "in the step")
        return batch

    def _ended(self, done: int) -> bool:
        """Tell whether nothing follows step `done`, not its own evaluation either."""
        patience, history = self.config.early_stopping_patience, self.history
        waited = patience is not None and history.since_best >= patience
        ended = waited or done == self.plan.total_steps or bool(self.stop_reason)
        return ended and not history.due

    def _waited_for(self) -> str:
        history = self.history
        below = "that is finite" if history.best_loss is None else (
            f"below {history.best_loss:.4f} of step {history.best_step}"
        )  # fmt: skip
        return f"{history.since_best} evaluations without an eval_loss {below}"

    def _read(self) -> None:
        """Take the pending step's metrics off the device; non-finite ones end the run."""
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
                f"that step: {debug_step.command_for(self.plan.run_dir, done)}"
            )
        self._progress.advance(loss)
        if done % self.config.logging_steps and done != self.plan.total_steps:
            return
        reading = self._meter.read()
        self._record(
            {
                "kind": "train",
                "step": done,
                "epoch": round(epoch_at(self.plan.batches, done), 4),
                **self._scalars(metrics),
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

    def _scalars(self, metrics: StepMetrics) -> dict[str, float]:
        """Name the step's own numbers, `nll` where the loss is another."""
        added = "penalty" if self.config.z_loss else "router_loss"
        return {
            "loss": float(metrics.loss),
            **({"nll": float(metrics.nll)} if self.config.loss_type != "nll" else {}),
            "token_accuracy": float(metrics.token_accuracy),
            **({added: float(metrics.auxiliary)} if metrics.auxiliary else {}),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
        }

    def _not_finite(self, done: int, metrics: StepMetrics) -> None:
        """The step changed nothing. Writes down what is known of it; ends the run, or skips it."""
        self.checkpoints.wait()  # so that the one being written counts too
        saved, run_dir = self.checkpoints.latest(), self.plan.run_dir
        path = debug_step.path_of(run_dir, done)
        if processes.is_first():
            names = list(named(self.program.abstract.trained))
            facts = debug_step.describe(run_dir, done, metrics, names, self.plan.batches, saved)
            debug_step.write(path, facts)
        skipped = self.history.skipped + 1
        what = f"step {done}: the loss is {metrics.loss:g} and the gradient norm " + (
            f"{metrics.grad_norm:g}. "
        )
        if skipped <= self.config.max_skipped_steps:
            self.history = self.history._replace(skipped=skipped)
            note(
                f"{what}Skipped, {skipped} of max_skipped_steps "
                f"{self.config.max_skipped_steps}; parameters are as before. See {path}."
            )
            self._progress.advance(float("nan"))
            return
        raise Diverged(
            f"{what}It changed nothing; "
            + (
                f"the newest checkpoint is step {saved}. "
                if saved
                else "none was saved before it. "
            )
            + "The batch's rows and the gradient norm of each parameter are in "
            f"{path}. To look at that step: {debug_step.command_for(run_dir, done)}. Lower "
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
        """Evaluate, and return True if this step is to be saved as the best so far.

        Raises `_Left`.
        """
        data = self.plan.held_out
        assert data is not None
        self.watch.at(done, "evaluating")
        rows = self.config.per_device_eval_batch_size * row_shards(self.program.mesh)

        def batches(name: str) -> Iterator[Any]:
            for batch in eval_batches(data.only(name), rows, packing=self.config.packing):
                self.watch.at(done, "evaluating")
                yield batch
                self._leave_if_signalled()

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
        own: dict[str, float] = {}
        if self.hooks.measure is not None:
            self.watch.at(done, "generating answers to measure")
            own = self.hooks.measure(trained, frozen, done, self._leave_if_signalled)
        self._record({"kind": "eval", "step": done, **row, **own, "by_dataset": by_dataset})
        if self.hooks.sample is not None:
            self.watch.at(done, "answering the sample prompts")
            self.hooks.sample(trained, frozen, done, self._leave_if_signalled)
        self.history = self.history.after(row["eval_loss"], done)
        self._meter.pause()
        return self.config.load_best_model_at_end and self.history.best_step == done

    def _save(self, state: TrainState, done: int) -> None:
        if done == self.checkpoints.latest():
            return
        self.watch.at(done, "saving")
        best = self.history.best_step if self.config.load_best_model_at_end else None
        meta = {**self.plan.meta, "standing": self.history._asdict()}
        self.checkpoints.save(state, meta, step=done, best=best)
        if self.hooks.saved is not None:
            self.checkpoints.wait()
            self.hooks.saved(done, self.checkpoints.folder / str(done))
            self._hooks_called = True
        self._meter.pause()

    def _record(self, row: dict[str, Any]) -> None:
        self.last[row["kind"]] = row
        self.writer.write(row)
        self._progress.show(row)
        self.hooks.row(row)
        self._hooks_called = True


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
