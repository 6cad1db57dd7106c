"""The self-contained HTML page of a data set: examples token by token, and the data report.

Takes plain values only. The page has no script, and its policy forbids the browser to load or run
anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.reporting.html.data_tables import data_view
from jaxtune.reporting.html.example import ExampleView
from jaxtune.reporting.html.markup import render

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def data_page(title: str, examples: Iterable[ExampleView], report: Mapping[str, Any]) -> str:
    """Write the whole document; `report` is the data report."""
    return render(
        "data.html.jinja",
        title=title,
        policy=_POLICY,
        examples=list(examples),
        report=data_view(report),
    )
