"""The data report as tiles, tables and bars of a page. Takes plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.reporting.html.bars import ShareBar, bar, histogram
from jaxtune.reporting.html.markup import Number, Table

_HELD_OUT = ("examples", "also_trained", "nearly_trained")


class DataView(NamedTuple):
    """A data report for a page: numbers of its head, drawings, tables wide and narrow, notes."""

    tiles: Sequence[tuple[str, str]]
    histograms: Sequence[Markup]
    wide: Sequence[Table]
    narrow: Sequence[Table]
    dropped: Table
    notes: Sequence[str]


def data_view(report: Mapping[str, Any]) -> DataView:
    """Lay out a data report; `histograms` and the targets of the mixture may be absent."""
    wide = [_mixture(report.get("mixture", ()))]
    wide += [_column(column, values) for column, values in report.get("columns", {}).items()]
    drawings = [histogram(name, bins) for name, bins in report.get("histograms", {}).items()]
    return DataView(
        _tiles(report), drawings, wide, _narrow_tables(report), _dropped(report), report["notes"]
    )


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        (f"{report['examples']:,}", "examples"),
        (f"{report['tokens_total']:,}", "tokens"),
        (f"{report['trained_share']:.1%}", "trained"),
        (f"{report['dropped']:,}", "dropped"),
    ]
    packing = report.get("packing")
    if packing:
        tiles.append((f"{packing['fill']:.1%}", "of each row filled"))
        if "total_steps" in packing:
            tiles.append((f"{packing['total_steps']:,}", "steps"))
    return tiles


def _narrow_tables(report: Mapping[str, Any]) -> list[Table]:
    quantiles = ("p50", "p90", "p99", "max")
    lengths = [
        (name, *(report[key].get(q, 0) for q in quantiles))
        for name, key in (("example", "lengths"), ("trained", "trained_lengths"))
    ]
    sources = [
        (
            *(name, part["format"], part["examples"], part["tokens_total"]),
            *(part["tokens_trained"], _percent(part["dropped_share"])),
            _percent(part["untrained_share"]),
        )
        for name, part in report["by_dataset"].items()
    ]
    flags = [(text, report[flag]) for flag, text in report["flags"].items() if report[flag]]
    held_out = report.get("evaluation") or {}
    header = ("", "format", "examples", "tokens", "trained", "rows dropped", "answers untrained")
    return [
        Table("Lengths in tokens", ("", *quantiles), lengths),
        Table("Sources", header, sources),
        Table("Found", ("", "count"), flags),
        Table(
            "Held out for evaluation",
            ("", "count"),
            [(n.replace("_", " "), held_out[n]) for n in _HELD_OUT if n in held_out],
        ),
    ]


def _dropped(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            reason,
            dropped["count"],
            "\n".join(
                ": ".join(filter(None, (row["where"], row["detail"])))
                for row in dropped["first"][:3]
            ),
        )
        for reason, dropped in report["dropped_by_reason"].items()
    ]
    return Table("Dropped", ("reason", "count", "first"), rows)


def _mixture(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Compare what is drawn of each part with its share before mixing and with its target."""
    has_targets = any(part.get("target") is not None for part in rows)
    header = ("", "value", "", "share after", "share before", "drawn in an epoch", "examples")
    return Table(
        "Mixture",
        (*header[:4], *(("target",) if has_targets else ()), *header[4:]),
        [
            (
                part["dataset"],
                "" if part["value"] is None else part["value"],
                bar(ShareBar(part["share_after"], part["share_before"], part.get("target"))),
                Number(f"{part['share_after']:.1%}"),
                *((_percent(part.get("target")),) if has_targets else ()),
                Number(f"{part['share_before']:.1%}"),
                part["per_epoch"],
                part["examples"],
            )
            for part in rows
        ],
    )


def _column(column: str, values: Mapping[str, Mapping[str, int]]) -> Table:
    total = max(1, sum(part["examples"] for part in values.values()))
    return Table(
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
