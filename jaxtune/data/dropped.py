"""Rows that are dropped: how many may be, and what would keep them, tried on some of them.

A run that loses most of its data teaches something else than its data says. What is advised was
tried on the very rows, so that it is true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigError, DataError
from jaxtune.data.cache import CachedSource
from jaxtune.data.preprocess import (
    Entry,
    Numbered,
    PreprocessConfig,
    PreprocessedRow,
    format_of,
    preprocess_chunk,
    read,
)
from jaxtune.data.templating import jinja
from jaxtune.data.templating.builtin_templates import BUILTIN
from jaxtune.data.templating.template import Template, resolve

_TRIED = 200  # dropped records
_ADVISED = 3  # settings, those that keep most of them
_REASONS = 4  # in a message


class DroppedShare(NamedTuple):
    """A count of a source's rows that are dropped, among all that its records made."""

    dropped: int
    rows: int

    @property
    def share(self) -> float:
        return self.dropped / max(1, self.rows)


def dropped_share(stored: CachedSource) -> DroppedShare:
    dropped = sum(reason["count"] for reason in stored.summary["dropped"].values())
    return DroppedShare(dropped, dropped + len(stored.arrays["rows"]))


def refuse_dropped(
    entry: Entry, config: PreprocessConfig, stored: CachedSource, *, where: str, max_dropped: float
) -> None:
    """Raise `DataError` if more than `max_dropped` of the rows are dropped, or all of them.

    `where` is the first of those that are dropped for the commonest reason.
    """
    count = dropped_share(stored)
    if count.dropped < count.rows and count.share <= max_dropped:
        return
    head, ways_on = f"nothing to train: all {count.rows:,} rows are dropped", ""
    if count.dropped < count.rows:
        head = (
            f"{count.dropped:,} of {count.rows:,} rows are dropped ({count.share:.1%}), more than "
            f"max_dropped ({max_dropped:g})"
        )
        enough = min(1.0, np.ceil(count.share * 100) / 100)
        ways_on = f" Or set max_dropped {enough:g} to go on without them."
    reasons = [(name, item["count"]) for name, item in stored.summary["dropped"].items()]
    (reason, number), *others = reasons
    detail = stored.summary["dropped"][reason]["first"][0]["detail"]
    raise DataError(
        f"{where}: {head}, {number:,} because: {': '.join(filter(None, (reason, detail)))}"
        + "".join(f"; {number:,} because: {reason}" for reason, number in others[: _REASONS - 1])
        + f".{_advice(entry, config, stored)}{ways_on} `preview` shows every row."
    )


def _advice(entry: Entry, config: PreprocessConfig, stored: CachedSource) -> str:
    """Try settings on a sample of the dropped records, and name those that keep most."""
    name = format_of(entry)
    records = _sample(entry, stored)
    rows = list(preprocess_chunk(records, name, entry, config))
    lost = {row.row for row in rows if row.dropped}
    records = [numbered for numbered in records if numbered[0] in lost]
    kept: dict[str, int] = {}
    for setting, other in _settings(config, rows):
        dropped = {r.row for r in preprocess_chunk(records, name, entry, other) if r.dropped}
        kept[setting] = len(lost) - len(dropped)
    best = sorted(filter(kept.get, kept), key=lambda setting: -kept[setting])[:_ADVISED]
    if not best:
        return (
            f" No built-in template and no other setting keeps any of the {len(lost)} that were "
            "tried: mend the data."
        )
    advised = ", ".join(f"{setting} keeps {kept[setting]}" for setting in best)
    return f" Tried on {len(lost)} of them: {advised}."


def _sample(entry: Entry, stored: CachedSource) -> list[Numbered]:
    """Read some of the records that are dropped whole, spread over all of them."""
    numbers = np.arange(stored.summary["counts"]["records"])
    dropped = np.setdiff1d(numbers, stored.arrays["rows"])
    dropped = dropped if len(dropped) else numbers
    places = np.linspace(0, len(dropped) - 1, min(_TRIED, len(dropped))).astype(np.int64)
    chosen = set(dropped[places].tolist())
    return [numbered for numbered in read(entry) if numbered[0] in chosen]


def _settings(
    config: PreprocessConfig, rows: Sequence[PreprocessedRow]
) -> Iterator[tuple[str, PreprocessConfig]]:
    """Yield what could be set otherwise, by name: lengths, the template's fields, templates."""
    lengths = [len(row.tokens.ids) for row in rows if row.dropped and row.tokens is not None]
    if lengths:
        longest = int(np.percentile(lengths, 90, method="higher"))
        enough = 1 << (longest - 1).bit_length()
        yield f"max_length {enough}", config._replace(max_length=enough)
        yield "truncation truncate", config._replace(truncation="truncate")
    for setting, changes in _template_fields(config.template):
        try:
            template = _resolved(config, **changes)
        except ConfigError:  # this tokenizer lacks what it needs
            continue
        yield setting, config._replace(template=template)


def _template_fields(template: Template) -> Iterator[tuple[str, dict[str, Any]]]:
    if template.system_prompt:
        yield "system_prompt none", {"system_prompt": None}
    if template.kwargs:
        yield "chat_template_kwargs {}", {"kwargs": {}}
    if "enable_thinking" in jinja.arguments(template.jinja):
        for value in (True, False):
            kwargs = {**template.kwargs, "enable_thinking": value}
            yield f"chat_template_kwargs.enable_thinking {str(value).lower()}", {"kwargs": kwargs}
    for name in ("chat", *BUILTIN):
        if name != template.name:
            yield f"template {name}", {"template": name, "no_input": None}


def _resolved(config: PreprocessConfig, **changes: Any) -> Template:
    """Resolve the template again with some of its fields changed."""
    template, request = config.template, config.template.request
    fields = {
        **request._asdict(),
        "date": template.date,
        "kwargs": template.kwargs,
        **changes,
    }
    return resolve(fields.pop("template"), config.tokenizer, **fields)
