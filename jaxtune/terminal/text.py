"""The terminal's view of the data: text with its trained part marked, and the report as a table.

Takes plain values only. Text of a data set is hostile: control characters are shown, never sent.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

_MOST_REASONS = 5  # named in a line
_GREEN, _DIM, _PLAIN = "\033[32m", "\033[2m", "\033[0m"
# C0 controls but newline and tab, DEL, and C1: as their pictures, so no escape sequence gets out.
_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    # What turns the direction of the text around it; letters of any script keep their own.
    **{
        code: f"<U+{code:04X}>"
        for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
    # Half a pair is no letter and cannot be written.
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


def marked(runs: Iterable[tuple[str, float]], *, color: bool) -> str:
    """Mark text of (piece, weight): trained pieces in green, or as `[[piece]]` without colour.

    A weight other than 0 and 1 is written behind its piece.

    >>> marked([("Q: ", 0.0), ("Yes.</s>", 1.0)], color=False)
    'Q: [[Yes.</s>]]'
    """
    parts = []
    for piece, weight in runs:
        text = printable(piece)
        if weight == 0:
            parts.append(f"{_DIM}{text}{_PLAIN}" if color else text)
            continue
        scale = "" if weight == 1 else f"(x{weight:g})"
        parts.append(f"{_GREEN}{text}{_PLAIN}{scale}" if color else f"[[{text}]]{scale}")
    return "".join(parts)


def printable(text: str) -> str:
    return text.translate(_VISIBLE)


def aligned(rows: Sequence[Sequence[str]], *, numbers: range) -> str:
    """Write a table, columns two blanks apart, those of `numbers` to the right.

    The first row is the longest. Nothing is wrapped; letters of double width count as two.
    """
    table = Table.grid(padding=(0, 2))
    for column in range(len(rows[0])):
        side: JustifyMethod = "right" if column in numbers else "left"
        least = 15 if column == 0 and side == "left" else None  # tables in a row look alike
        table.add_column(justify=side, min_width=least, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=2**16, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(f"  {line.rstrip()}" for line in capture.get().splitlines())


def show_report(
    report: Mapping[str, Any], *, short: bool = False, file: IO[str] | None = None
) -> None:
    """Print `report_text`, by default to stderr: stdout is for results."""
    print(report_text(report, short=short), file=file or sys.stderr, flush=True)


def report_text(report: Mapping[str, Any], *, short: bool = False) -> str:
    """Write the data report as aligned lines, without zeros that are unremarkable.

    `report["flags"]` explains the counts that are shown only when they are not zero. `short` shows
    one dropped row of each reason instead of three.
    """
    return "\n".join(
        [
            "data",
            *(f"  {printable(text)}" for text in report["notes"]),
            f"  {report['records']:,} records -> {report['examples']:,} examples, "
            f"{report['tokens_total']:,} tokens, {report['tokens_trained']:,} trained "
            f"({report['trained_share']:.1%})",
            *(f"  {line}" for line in lost_lines(report["by_dataset"])),
            _lengths(report),
            *_parts(report),
            *_batches(report),
            *_remarks(report, shown_rows=1 if short else 3),
        ]
    )


def lost_lines(datasets: Mapping[str, Mapping[str, Any]], kind: str = "dataset") -> Iterator[str]:
    """Write a line for each dataset of `by_dataset` that loses something: which share, and why."""
    for name, part in datasets.items():
        losses = [
            f"{part[share]:.1%} of {part[of_all]:,} {of_all} {lost}: {_reasons(part[reasons])}"
            for lost, share, of_all, reasons in _LOST
            if part[lost]
        ]
        if losses:
            yield f"{kind} {printable(name)}: {'; '.join(losses)}"


# What is lost, its share, of what, why: keys of a dataset's part of the report.
_LOST = (
    ("dropped", "dropped_share", "rows", "dropped_by_reason"),
    ("untrained", "untrained_share", "answers", "untrained_by_reason"),
)


def _reasons(counts: Mapping[str, int]) -> str:
    named = [f"{count:,} {printable(reason)}" for reason, count in counts.items()]
    more = [f"{len(named) - _MOST_REASONS} other reasons"] * (len(named) > _MOST_REASONS)
    return ", ".join([*named[:_MOST_REASONS], *more])


def _lengths(report: Mapping[str, Any]) -> str:
    quantiles = ("p50", "p90", "p99", "max")
    of_each = {"per example": report["lengths"], "trained": report["trained_lengths"]}
    rows = [(name, *(f"{sizes.get(q, 0):,}" for q in quantiles)) for name, sizes in of_each.items()]
    return aligned([("tokens", *quantiles), *rows], numbers=range(1, 5))


def _parts(report: Mapping[str, Any]) -> Iterator[str]:
    """Write the data sets, their shares of an epoch, and the values of columns."""
    if len(report["by_dataset"]) > 1:
        for name, part in report["by_dataset"].items():
            yield (
                f"  {printable(name)} ({part['format']}): {part['examples']:,} examples, "
                f"{part['tokens_trained']:,} of {part['tokens_total']:,} tokens trained"
            )
    for part in report.get("mixture", ()):
        name = part["dataset"] + ("" if part["value"] is None else f", {part['value']}")
        yield (
            f"  {printable(name)}: {part['share_before']:.1%} of the examples, "
            f"{part['share_after']:.1%} of an epoch ({part['per_epoch']:,} drawn of "
            f"{part['examples']:,})"
        )
    for column, values in report.get("columns", {}).items():
        yield f"  {printable(column)}:"
        for value, part in values.items():
            share = part["examples"] / max(1, report["examples"])
            yield f"    {printable(value)}: {part['examples']:,} examples ({share:.1%})"


def _batches(report: Mapping[str, Any]) -> Iterator[str]:
    packing, evaluation = report.get("packing"), report.get("evaluation")
    if packing:
        yield (
            f"  {packing['rows']:,} rows of {packing['row_length']:,} tokens, "
            f"{packing['fill']:.1%} full: {packing['steps_per_epoch']:,} steps an epoch with "
            f"{packing['batch_size']:,} rows a step"
            + (f", {packing['total_steps']:,} in all" if "total_steps" in packing else "")
        )
    if evaluation:
        for line in lost_lines(evaluation.get("by_dataset", {}), "evaluation dataset"):
            yield f"  {line}"
        yield (
            f"  evaluation: {evaluation['examples']:,} examples, {evaluation['also_trained']:,} "
            f"also trained, {evaluation['nearly_trained']:,} records nearly so"
        )


def _remarks(report: Mapping[str, Any], *, shown_rows: int) -> Iterator[str]:
    if report["stop_trained_share"] < 1:
        yield f"  {report['stop_trained_share']:.1%} of the rows teach where to stop"
    for flag, meaning in report["flags"].items():
        if report[flag]:
            yield f"  {report[flag]:,} {meaning}"
    for reason, dropped in report["dropped_by_reason"].items():
        yield f"  dropped {dropped['count']:,}: {printable(reason)}"
        for row in dropped["first"][:shown_rows]:
            yield f"    {printable(': '.join(filter(None, (row['where'], row['detail']))))}"
