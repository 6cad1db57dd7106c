"""The terminal's view of the data: text with its trained part marked, and the report as a table.

Takes plain values only. Text of a data set is hostile: control characters are shown, never sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import IO, Any

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
    """Text of (piece, weight): trained pieces in green, or as `[[piece]]` without colour.

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


def show_report(
    report: Mapping[str, Any], *, short: bool = False, file: IO[str] | None = None
) -> None:
    """Prints `report_text`, by default to stderr: stdout is for results."""
    print(report_text(report, short=short), file=file or sys.stderr, flush=True)


def report_text(report: Mapping[str, Any], *, short: bool = False) -> str:
    """The data report of `data_report` as aligned lines; what is zero and unremarkable is left out.

    `report["flags"]` explains the counts that are shown only when they are not zero. `short` shows
    one dropped row of each reason instead of three.
    """
    lines = [
        *(f"  {printable(text)}" for text in report["notes"]),
        f"  {report['records']:,} records -> {report['examples']:,} examples, "
        f"{report['tokens_total']:,} tokens, {report['tokens_trained']:,} trained "
        f"({report['trained_share']:.1%})",
        *_table(
            ("tokens", "p50", "p90", "p99", "max"),
            [("per example", report["lengths"]), ("trained", report["trained_lengths"])],
        ),
    ]
    if len(report["by_dataset"]) > 1:
        lines += [
            f"  {printable(name)} ({part['format']}): {part['examples']:,} examples, "
            f"{part['tokens_trained']:,} of {part['tokens_total']:,} tokens trained"
            for name, part in report["by_dataset"].items()
        ]
    for part in report.get("mixture", ()):
        name = part["dataset"] + ("" if part["value"] is None else f", {part['value']}")
        lines.append(
            f"  {printable(name)}: {part['share_before']:.1%} of the examples, "
            f"{part['share_after']:.1%} of an epoch ({part['per_epoch']:,} drawn of "
            f"{part['examples']:,})"
        )
    for column, values in report.get("columns", {}).items():
        lines.append(f"  {printable(column)}:")
        lines += [
            f"    {printable(value)}: {part['examples']:,} examples "
            f"({part['examples'] / max(1, report['examples']):.1%})"
            for value, part in values.items()
        ]
    packing = report.get("packing")
    if packing:
        lines.append(
            f"  {packing['rows']:,} rows of {packing['row_length']:,} tokens, "
            f"{packing['fill']:.1%} full: {packing['steps_per_epoch']:,} steps an epoch with "
            f"{packing['batch_size']:,} rows a step"
            + (f", {packing['total_steps']:,} in all" if "total_steps" in packing else "")
        )
    evaluation = report.get("evaluation")
    if evaluation:
        lines.append(
            f"  evaluation: {evaluation['examples']:,} examples, {evaluation['also_trained']:,} "
            f"also trained, {evaluation['nearly_trained']:,} records nearly so"
        )
    if report["stop_trained_share"] < 1:
        lines.append(f"  {report['stop_trained_share']:.1%} of the rows teach where to stop")
    lines += [
        f"  {report[flag]:,} {meaning}" for flag, meaning in report["flags"].items() if report[flag]
    ]
    for reason, found in report["dropped_by_reason"].items():
        lines.append(f"  dropped {found['count']:,}: {printable(reason)}")
        for first in found["first"][: 1 if short else 3]:
            detail = f": {first['detail']}" if first["detail"] else ""
            lines.append(f"    {printable(first['where'] + detail)}")
    return "\n".join(["data", *lines])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, Mapping[str, int]]]) -> list[str]:
    names, *columns = header
    found = [("  " + names.ljust(12), *columns)]
    found += [("  " + name.ljust(12), *(f"{v.get(c, 0):,}" for c in columns)) for name, v in rows]
    return [row[0] + "".join(cell.rjust(9) for cell in row[1:]) for row in found]
