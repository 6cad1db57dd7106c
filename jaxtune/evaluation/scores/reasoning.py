"""The part of an answer that is compared: all that follows its thinking, `<think> ... </think>`."""

from __future__ import annotations

_BEGIN, _END = "<think>", "</think>"


def spoken(text: str, reference: str = "") -> str:
    """Return all behind the last end of a reasoning, and nothing of one that never ends.

    A `reference` with an end and no beginning says that the prompt has begun it.

    >>> spoken("<think>\\n2 + 2\\n</think>\\n\\n4"), spoken("4"), spoken("<think>\\n2 + 2 + 2 + 2")
    ('4', '4', '')
    >>> spoken("2 + 2 + 2", reference="2 + 2\\n</think>\\n\\n4")
    ''
    """
    _, end, rest = text.rpartition(_END)
    before, reference_end, _ = reference.partition(_END)
    begun_by_prompt = not end and bool(reference_end) and _BEGIN not in before
    if begun_by_prompt or rest.lstrip().startswith(_BEGIN):
        return ""
    return rest.lstrip() if end else text
