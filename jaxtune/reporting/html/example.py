"""An example token by token, as a card of a page: what is trained is coloured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtune.reporting.html.markup import escaped


class TokenText(NamedTuple):
    """The text of one token, or of several that share a letter; `weight` is that in the loss."""

    text: str
    ids: Sequence[int]
    weight: float


class ExampleView(NamedTuple):
    """An example with its heading; `dropped` says why it is not trained, None if it is."""

    title: str
    pieces: Sequence[TokenText]
    dropped: str | None = None


def example_card(example: ExampleView) -> str:
    dropped = "" if example.dropped is None else f'<p class="d">{escaped(example.dropped)}</p>'
    parts: list[str] = []
    before = None
    for piece in example.pieces:
        trained = piece.weight != 0 and example.dropped is None
        if trained and piece.weight not in (1, before):
            parts.append(f'<b class="w">&times;{piece.weight:g}</b>')
        before = piece.weight
        ids = " ".join(map(str, piece.ids))
        shown = escaped(piece.text).replace("\n", "<i>\u21b5</i>\n")
        parts.append(
            f'<span class="t{" y" if trained else ""}" title="{ids}, weight {piece.weight:g}">'
            f"{shown}</span>"
        )
    body = f'<div class="tokens" dir="auto">{"".join(parts)}</div>' if parts else ""
    return f"<article><h3>{escaped(example.title)}</h3>{dropped}{body}</article>"


# What the colours mean; stands above the cards.
KEY = """<p class="key"><span class="k y">trained</span> <span class="k">context</span>
a token's ids and weight appear when the pointer rests on it</p>"""
