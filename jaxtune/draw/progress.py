"""Training as seen from a terminal: a bar where there is one, plain lines where there is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A context manager over steps [start, total); everything goes to stderr."""

    def __init__(self, start: int, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
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

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, loss: float) -> None:
        self._bar.update(self._task, advance=1, loss=f"{loss:.4f}")

    def show(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl as one line above the bar."""
        if row.get("tokens_per_second"):
            self._bar.update(self._task, rate=f"{row['tokens_per_second']:,.0f} tok/s")
        self._console.print(line(row, self._total), soft_wrap=True)


def line(row: Mapping[str, Any], total: int) -> str:
    """
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
    return (
        f"{head}  loss {row['loss']:.4f}  token accuracy {row['token_accuracy']:.1%}  "
        f"grad norm {row['grad_norm']:.3g}  lr {row['learning_rate']:.3g}"
        + (f"  {rate:,.0f} tok/s" if rate else "")
        + (f"  mfu {row['mfu']:.1%}" if row["mfu"] else "")
    )
