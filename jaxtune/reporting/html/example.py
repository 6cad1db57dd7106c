"""An example token by token, as a card of a page: trained tokens are coloured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
