"""Work as seen from a terminal: a bar where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jaxtune.terminal.text import printable


class TokenizeProgress:
    """A context manager, called with (path, records so far); silent where all is done in seconds.

    Everything goes to stderr, nothing if `quiet`: on a terminal a moving bar, elsewhere a line now
    and then.
    """

    def __init__(
        self, *, quiet: bool = False, after_seconds: float = 2.0, every_seconds: float = 30.0
    ) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Bar(
            TextColumn("[bold]tokenising"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            console=self._console,
            transient=True,
        )
        self._after, self._every = after_seconds, every_seconds
        self._path, self._began, self._shown = "", time.monotonic(), 0.0

    def __enter__(self) -> TokenizeProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:  # stopping what never began writes a line
            self._bar.stop()

    def __call__(self, path: str, records: int) -> None:
        now = time.monotonic()
        if path != self._path:
            self._path, self._began, self._shown = path, now, now
        seconds = now - self._began
        if seconds < self._after:
            return
        name = printable(path.rsplit("/", 1)[-1])
        done = f"{records:,} records, {records / max(seconds, 1e-3):,.0f}/s"
        if self._console.is_terminal:
            self._bar.start()
            task = self._bar.task_ids[0] if self._bar.task_ids else self._bar.add_task("", done="")
            self._bar.update(task, total=None, description=name, done=done)
        elif now - self._shown >= self._every:
            self._shown = now
            self._console.print(f"tokenising {name}: {done}", markup=False, soft_wrap=True)


class SearchProgress:
    """A context manager, called with (settings compiled, of how many, the fastest so far in words)
    of a search that may take `minutes`.

    Everything goes to stderr, nothing if `quiet`: on a terminal a bar of the time, elsewhere a
    line for every answer.
    """

    def __init__(self, minutes: float, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Bar(
            TextColumn("[bold]compiling"),
            BarColumn(),
            TextColumn("{task.fields[clock]}"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=minutes, clock="")
        self._minutes, self._began, self._shown = minutes, time.monotonic(), 0

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, best: str) -> None:
        spent = (time.monotonic() - self._began) / 60
        state = f"{done} of {total} settings" + (f"; fastest {best}" if best else "")
        clock = f"{spent:.0f} of {self._minutes:g} min"
        self._bar.update(self._task, completed=spent, clock=clock, description=state)
        if done > self._shown and not self._console.is_terminal:
            self._shown = done
            self._console.print(f"search: {clock}, {state}", markup=False, soft_wrap=True)


class TrainProgress:
    """A context manager over steps [start, total); all goes to stderr, nothing if `quiet`."""

    def __init__(self, start: int, total: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._total = total
        self._bar = Bar(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, loss="-", rate="")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, loss: float) -> None:
        self._bar.update(self._task, advance=1, loss=f"{loss:.4f}")

    def show(self, row: Mapping[str, Any]) -> None:
        """Print a row of metrics.jsonl as one line above the bar."""
        if row.get("tokens_per_second"):
            self._bar.update(self._task, rate=f"{row['tokens_per_second']:,.0f} tok/s")
        self._console.print(line(row, self._total), soft_wrap=True)


def line(row: Mapping[str, Any], total: int) -> str:
    """Write a row of metrics.jsonl for the terminal.

    >>> line({"kind": "eval", "step": 5, "eval_loss": 1.5, "eval_perplexity": 4.48169,
    ...       "eval_token_accuracy": 0.5, "eval_tokens_trained": 20}, 10)
    'step 5/10  eval loss 1.5000  perplexity 4.482  token accuracy 50.0%  over 20 tokens'
    """
    head = f"step {row['step']}/{total}"
    if row["kind"] == "eval":
        return (
            f"{head}  eval loss {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.4g}  "
            f"token accuracy {row['eval_token_accuracy']:.1%}  "
            f"over {row['eval_tokens_trained']:,} tokens"
        )
    rate = row["tokens_per_second"]
    nll = f"  nll {row['nll']:.4f}" if "nll" in row else ""
    return (
        f"{head}  loss {row['loss']:.4f}{nll}  token accuracy {row['token_accuracy']:.1%}  "
        f"grad norm {row['grad_norm']:.3g}  lr {row['learning_rate']:.3g}"
        + (f"  {rate:,.0f} tok/s" if rate else "")
        + (f"  mfu {row['mfu']:.1%}" if row["mfu"] else "")
    )
