"""The data report of `data.doctor` as tiles, tables and bars of a page. Takes plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.reporting.html.bars import ShareBar, bar, histogram
from jaxtune.reporting.html.markup import Number, escaped, table


def tiles(report: Mapping[str, Any]) -> str:
    found = [
        (f"{report['examples']:,}", "examples"),
        (f"{report['tokens_total']:,}", "tokens"),
        (f"{report['trained_share']:.1%}", "trained"),
        (f"{report['dropped']:,}", "dropped"),
    ]
    packing = report.get("packing")
    if packing:
        found.append((f"{packing['fill']:.1%}", "of each row filled"))
        if "total_steps" in packing:
            found.append((f"{packing['total_steps']:,}", "steps"))
    return "".join(f"<span><b>{value}</b> {name}</span>" for value, name in found)


def data_tables(report: Mapping[str, Any]) -> str:
    """`histograms` (of `data.doctor`) and a `target` in the rows of the mixture may be absent."""
    quantiles = ("p50", "p90", "p99", "max")
    drawn = "".join(histogram(name, found) for name, found in report.get("histograms", {}).items())
    tables = [
        table(
            "Lengths in tokens",
            ("", *quantiles),
            [
                (name, *(report[key].get(q, 0) for q in quantiles))
                for name, key in (("example", "lengths"), ("trained", "trained_lengths"))
            ],
        ),
        table(
            "Sources",
            ("", "format", "examples", "tokens", "trained"),
            [
                (name, part["format"], part["examples"], part["tokens_total"],
                 part["tokens_trained"])
                for name, part in report["by_dataset"].items()
            ],
        ),
        table(
            "Found",
            ("", "count"),
            [(meaning, report[flag]) for flag, meaning in report["flags"].items() if report[flag]],
        ),
    ]  # fmt: skip
    if report.get("evaluation"):
        held = report["evaluation"]
        rows = [(name.replace("_", " "), count) for name, count in held.items()]
        tables.append(table("Held out for evaluation", ("", "count"), rows))
    parts = [
        f'<div class="two">{drawn}</div>' if drawn else "",
        _mixture(report.get("mixture", ())),
        *(_column(column, values) for column, values in report.get("columns", {}).items()),
        f'<div class="two">{"".join(tables)}</div>',
    ]
    dropped = [
        (reason, found["count"], "\n".join(
            f"{first['where']}{': ' if first['detail'] else ''}{first['detail']}"
            for first in found["first"][:3]))
        for reason, found in report["dropped_by_reason"].items()
    ]  # fmt: skip
    if dropped:
        parts.append(table("Dropped", ("reason", "count", "first"), dropped))
    notes = "".join(f"<li>{escaped(note)}</li>" for note in report["notes"])
    return "\n".join(parts) + (f"<ul>{notes}</ul>" if notes else "")


def _mixture(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is drawn of each part, beside what there is and what was asked for."""
    aimed = any(part.get("target") is not None for part in rows)
    header = ("", "value", "", "share after", "share before", "drawn in an epoch", "examples")
    return table(
        "Mixture",
        (*header[:4], *(("target",) if aimed else ()), *header[4:]),
        [
            (
                part["dataset"],
                "" if part["value"] is None else part["value"],
                bar(ShareBar(part["share_after"], part["share_before"], part.get("target"))),
                Number(f"{part['share_after']:.1%}"),
                *((_percent(part.get("target")),) if aimed else ()),
                Number(f"{part['share_before']:.1%}"),
                part["per_epoch"],
                part["examples"],
            )
            for part in rows
        ],
    )


def _column(column: str, values: Mapping[str, Mapping[str, int]]) -> str:
    total = max(1, sum(part["examples"] for part in values.values()))
    return table(
        f"By {column}",
        ("", "", "share", "examples", "records"),
        [
            (
                value,
                bar(ShareBar(part["examples"] / total)),
                Number(f"{part['examples'] / total:.1%}"),
                part["examples"],
                part["records"],
            )
            for value, part in values.items()
        ],
    )


def _percent(share: float | None) -> Number:
    return Number("" if share is None else f"{share:.1%}")
