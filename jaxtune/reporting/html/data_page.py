"""The self-contained HTML page of a data set: examples token by token, and the data report.

Takes plain values only. The page has no script, and its policy forbids the browser to load or run
anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.reporting.html.data_tables import data_view
from jaxtune.reporting.html.markup import render

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class TokenText(NamedTuple):
    """A text of one token, or of several that share a letter; `weight` is that in the loss."""

    text: str
    ids: Sequence[int]
    weight: float


class ExampleView(NamedTuple):
    """An example with its heading; `dropped` is the reason why it is not trained, if it is not."""

    title: str
    pieces: Sequence[TokenText]
    dropped: str | None = None


def data_page(title: str, examples: Iterable[ExampleView], report: Mapping[str, Any]) -> str:
    """Write the whole document; `report` is the data report."""
    return render(
        "data.html.jinja",
        title=title,
        policy=_POLICY,
        examples=list(examples),
        report=data_view(report),
    )
