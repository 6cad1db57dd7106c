"""One self-contained HTML page of a data set: examples token by token, and the data report.

Takes plain values only. The page has no script, and its policy forbids the browser to load or run
anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.reporting.html.data_tables import data_tables, tiles
from jaxtune.reporting.html.example import KEY, ExampleView, example_card
from jaxtune.reporting.html.markup import STYLE, escaped


def data_page(title: str, examples: Iterable[ExampleView], report: Mapping[str, Any]) -> str:
    """Write the whole document; `report` is the data report."""
    cards = "\n".join(example_card(example) for example in examples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escaped(title)}</h1>
<p class="tiles">{tiles(report)}</p>
</header>
<main>
<section>
<h2>Data</h2>
{data_tables(report)}
</section>
<section>
<h2>Examples</h2>
{KEY}
{cards or "<p>none asked for</p>"}
</section>
</main>
</body>
</html>
"""
