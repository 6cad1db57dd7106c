"""Rows and answers that are lost: how many may be, and what keeps them, tried on some of them.

A run that loses most of its data teaches something else than its data says. What is advised was
tried on the very rows, so that it is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtune.config import ConfigError, DataError
from jaxtune.data.cache import CachedSource
from jaxtune.data.preprocess import (
    Entry,
    PreprocessConfig,
    PreprocessedRow,
    format_of,
    preprocess_chunk,
    read,
)
from jaxtune.data.schema import Dropped
from jaxtune.data.templating import jinja
from jaxtune.data.templating.builtin_templates import BUILTIN
from jaxtune.data.templating.template import Template, resolve

_TRIED = 200  # dropped records
_ADVISED = 3  # settings, those that keep most of them
_REASONS = 4  # in a message
_OF = {"dropped": "rows", "untrained": "answers"}


class LostShare(NamedTuple):
    """A count of what is lost, among all that there was."""

    lost: int
    of_all: int

    @property
    def share(self) -> float:
        return self.lost / max(1, self.of_all)

    @classmethod
    def of(cls, stored: Sequence[CachedSource], what: Literal["dropped", "untrained"]) -> LostShare:
        """Count rows that are dropped, or answers of the others that are only context."""
        lost = sum(reason["count"] for s in stored for reason in s.summary[what].values())
        if what == "dropped":
            return cls(lost, lost + sum(len(s.arrays["rows"]) for s in stored))
        return cls(lost, lost + sum(s.summary["counts"].get("answers", 0) for s in stored))


def refuse_lost(
    entry: Entry,
    config: PreprocessConfig,
    stored: CachedSource,
    *,
    where: Callable[[Mapping[str, Any]], str],
    max_dropped: float,
) -> None:
    """Raise `DataError` if more than `max_dropped` of rows or answers is lost, or all rows are.

    `where` names the place of a row, as `first` in the summary has it.
    """
    rows, answers = (LostShare.of([stored], what) for what in ("dropped", "untrained"))
    what, count = ("dropped", rows) if rows.share > max_dropped else ("untrained", answers)
    head, after = f"{count.lost:,} of {count.of_all:,} {_OF[what]} are {what}", ""
    if rows.lost == rows.of_all:
        what, head = "dropped", f"nothing to train: all {rows.lost:,} rows are dropped"
    elif count.share > max_dropped:
        head += f" ({count.share:.1%}), more than max_dropped ({max_dropped:g})"
        after = f" Or set max_dropped {math.ceil(count.share * 100) / 100:g} to go on without them."
    else:
        return
    (reason, commonest), *others = stored.summary[what].items()
    first = commonest["first"][0]
    reasons = [Dropped(reason, first["detail"]).text, *(name for name, _ in others)]
    counts = [commonest["count"], *(lost["count"] for _, lost in others)]
    named = [f"{n:,} because: {text}" for n, text in zip(counts, reasons, strict=True)]
    raise DataError(
        f"{where(first)}: {head}, {'; '.join(named[:_REASONS])}."
        f"{_advice(entry, config, _numbers(stored, what))}{after} `preview` shows every row."
    )


def _advice(entry: Entry, config: PreprocessConfig, numbers: set[int]) -> str:
    """Try settings on those of the records that lose something; name those that keep most."""
    name = format_of(entry)
    records = [numbered for numbered in read(entry) if numbered[0] in numbers]
    rows = list(preprocess_chunk(records, name, entry, config))
    lost = _losing(rows)
    records = [numbered for numbered in records if numbered[0] in lost]
    saved: dict[str, int] = {}  # records that a setting loses nothing of
    for setting, other in _settings(config, rows):
        still_lost = _losing(preprocess_chunk(records, name, entry, other))
        saved[setting] = len(lost) - len(still_lost)
    best = sorted(filter(saved.get, saved), key=lambda setting: -saved[setting])[:_ADVISED]
    if not best:
        return (
            f" No built-in template and no other setting keeps any of the {len(lost)} that were "
            "tried: mend the data."
        )
    advised = ", ".join(f"{setting} keeps {saved[setting]}" for setting in best)
    return f" Tried on {len(lost)} of them: {advised}."


def _losing(rows: Iterable[PreprocessedRow]) -> set[int]:
    """Number the records of which anything is lost."""
    return {row.row for row in rows if row.dropped or row.untrained}


def _numbers(stored: CachedSource, what: str) -> set[int]:
    """Choose records to try, spread over the source: of those dropped whole, if there are any."""
    every = np.arange(stored.summary["counts"]["records"])
    dropped = np.setdiff1d(every, stored.arrays["rows"])
    numbers = dropped if what == "dropped" and len(dropped) else every
    places = np.linspace(0, len(numbers) - 1, min(_TRIED, len(numbers))).astype(np.int64)
    return set(numbers[places].tolist())


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
