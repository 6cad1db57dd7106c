"""The page: hostile text stays text, and nothing on it can load or run."""

from __future__ import annotations

import html.parser
from typing import Any

import pytest

from jaxtune.reporting.html.data_page import ExampleView, TokenText
from jaxtune.reporting.html.data_page import data_page as page

HOSTILE = [
    "<script>alert(1)</script>",
    "</div></article><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "&lt;b&gt; &amp; &#60;script&#62;",
    "<!-- --><style>*{display:none}</style>",
    "\x1b[2J\x00\x07\x9b\x7f",
    "right \u202eto left\u202c \u2066x\u2069 \u200f",
    "half a pair \ud800",
    "]]>\u2028 {{ 7*7 }} ${x}",
]
REPORT: dict[str, Any] = {
    "examples": 2, "records": 3, "tokens_total": 1234, "trained_share": 0.5, "dropped": 1,
    "lengths": {"p50": 1, "p90": 2, "p99": 3, "max": 4},
    "trained_lengths": {"p50": 1, "p90": 1, "p99": 2, "max": 2},
    "by_dataset": {}, "flags": {}, "notes": [],
    "dropped_by_reason": {},
}  # fmt: skip
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "div",
    "span", "p", "b", "i", "h1", "h2", "h3", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "ul", "li", "figure", "figcaption", "svg", "g", "rect", "line", "text",
}  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text as a browser's parser splits them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def report_with(text: str) -> dict[str, Any]:
    """A report in which every place that data can reach holds `text`."""
    part = {"format": text, "examples": 1, "tokens_total": 2, "tokens_trained": 1,
            "dropped_share": 0.125, "untrained_share": 0.375}  # fmt: skip
    dropped = {"count": 1, "first": [{"where": text, "detail": text}]}
    return {
        **REPORT,
        "by_dataset": {text: part},
        "flags": {"odd": text},
        "odd": 7,
        "notes": [text],
        "mixture": [
            {"dataset": text, "value": text, "examples": 9, "share_before": 0.9, "per_epoch": 8,
             "share_after": 0.8, "target": 0.75}
        ],
        "histograms": {text: {"edges": [1, 3, 4], "counts": [5, 1]}},
        "columns": {text: {text: {"records": 1, "examples": 1}}},
        "dropped_by_reason": {text: dropped},
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_comes_from(text: str) -> None:
    pieces = [TokenText(text, [1, 2], 0.5), TokenText("plain", [3], 1.0)]
    made = page(
        text,
        [ExampleView(text, pieces), ExampleView(text, pieces, dropped=text)],
        report_with(text),
    )
    harmless = read(
        page("t", [ExampleView("t", pieces[1:]), ExampleView("t", pieces[1:])], report_with("t"))
    )
    found = read(made)
    assert set(found.tags) <= ALLOWED
    assert {name for name, _ in found.attributes} <= {
        "lang", "charset", "name", "content", "http-equiv", "class", "dir", "title",
        "scope", "role", "aria-label", "tabindex", "x", "y", "width", "height", "viewbox", "x1",
        "x2", "y1", "y2", "text-anchor", "preserveaspectratio",
    }  # fmt: skip
    assert found.tags.count("td") == harmless.tags.count("td")
    assert found.tags.count("article") == 2
    for character in "\x00\x07\x1b\x7f\x9b\u202e\u202c\u2066\u2069\u200f\ud800":
        assert character not in made
    if text.isprintable():
        assert found.text.count(text) >= 10
    made.encode("utf-8")


def test_nothing_is_loaded_and_nothing_runs() -> None:
    made = page("t", [], REPORT)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read(made).attributes
    for word in ("http:", "https:", "<script", "<link", "url(", "@import", "src="):
        assert word not in made


def test_tokens_are_marked_by_weight() -> None:
    pieces = [
        TokenText("Q: <b>", [5], 0.0), TokenText("A", [6], 1.0), TokenText("\u00e9", [7, 8], 0.5),
        TokenText("x\n", [9], 0.5),
    ]  # fmt: skip
    made = page("t", [ExampleView("row 0", pieces)], REPORT)
    assert '<span class="t" title="5, weight 0">Q: &lt;b&gt;</span>' in made
    assert '<span class="t y" title="6, weight 1">A</span>' in made
    assert '<span class="t y" title="7 8, weight 0.5">\u00e9</span>' in made
    assert made.count("&times;0.5") == 1  # where the weight begins, not at every token
    assert "x<i>\u21b5</i>\n" in made


def test_a_dropped_row_is_not_shown_as_trained() -> None:
    made = page("t", [ExampleView("row 0", [TokenText("A", [6], 1.0)], dropped="too long")], REPORT)
    assert '<p class="d">too long</p>' in made
    assert "t y" not in made


def test_the_report_as_tables() -> None:
    made = read(page("t", [], report_with("category")))
    for text in (
        "1,234",
        "50.0%",
        "Lengths in tokens",
        "By category",
        "Dropped",
        "7",
        "80.0%",
        "12.5%",
    ):
        assert text in made.text
