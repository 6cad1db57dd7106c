"""Check that rendered text has a message's text, blanks aside, as it is or as JSON writes it."""

from __future__ import annotations

import json


def squeeze(text: str) -> str:
    """Take out white space: templates trim and join, and only what else is lost counts."""
    return "".join(text.split())


def appears(text: str, words: str) -> bool:
    """Tell whether squeezed `words` have `text`, as it is or as JSON writes it."""
    return squeeze(text) in words or any(
        squeeze(json.dumps(text, ensure_ascii=ascii)[1:-1]) in words for ascii in (False, True)
    )
