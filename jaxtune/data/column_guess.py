"""A guess at which columns of a record hold what, for the line to type in an error message.

Guesses from names that data sets use, then from near names, then from the longest texts; nothing is
read by a guess.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.data.messages import parsed

# Standard name -> names of other data sets for it, the likeliest first.
_OFTEN: dict[str, tuple[str, ...]] = {
    "instruction": (
        *("instruction", "question", "prompt", "query", "problem", "task", "request", "user"),
        *("human", "source", "input", "inputs"),
    ),
    "output": (
        *("output", "answer", "response", "completion", "solution", "reply", "assistant", "gpt"),
        *("target", "targets", "answers", "chosen", "label"),
    ),
    "input": ("input", "context", "passage", "document", "article"),
}
_SAME = {"prompt": "instruction", "completion": "output"}  # in another format


def columns_hint(record: Mapping[str, Any], required: tuple[str, ...] = ()) -> str:
    """Write the flags that map a record's columns to `required`, else to a format that fits.

    "" where nothing can be guessed.

    >>> columns_hint({"question": "Why?", "answer": "So."})
    ' Try --columns.instruction question --columns.output answer'
    """
    for column, value in record.items():
        of_objects = isinstance(value, list) and value and isinstance(value[0], dict)
        if of_objects and not _is_conversation(value):
            return (
                f" '{column}' holds a list of {len(value):,} objects: if those are the records, "
                "save that list as a file of its own"
            )
    mapping = _guess(record, required)
    if not mapping:
        return ""
    flags = " ".join(f"--columns.{name} {shlex.quote(column)}" for name, column in mapping.items())
    return f" Try {flags}"


def _guess(record: Mapping[str, Any], required: tuple[str, ...]) -> dict[str, str]:
    """Map standard names to columns, without those that are called so already."""
    conversations = [column for column, value in record.items() if _is_conversation(value)]
    texts = [column for column, value in record.items() if column and isinstance(value, str)]
    for name in ("messages", "conversations"):
        if required in ((), (name,)) and conversations and "prompt" not in record:
            return {name: conversations[0]}
    if "prompt" in record and (answers := _named("output", [*conversations, *texts])):
        required = required or ("prompt", "completion")
        conversations = [column for column in (answers, "prompt") if column in conversations]
    required = required or (("instruction", "output") if len(texts) > 1 else ("text",))
    if required == ("text",):
        longest = max(texts, key=lambda column: len(record[column]), default=None)
        return {} if longest is None else {"text": longest}
    return _pair(record, required, [*conversations, *texts])


def _pair(
    record: Mapping[str, Any], required: tuple[str, ...], columns: list[str]
) -> dict[str, str]:
    """Guess the question and the answer among `columns`; {} where one of them is not there."""
    free = [column for column in columns if column not in required]
    found: dict[str, str] = {}
    for name in required:
        column = name if name in record else _named(_SAME.get(name, name), free)
        if column:
            found[name] = column
            free = [other for other in free if other != column]
    missing = [name for name in required if name not in found]
    longest = sorted(free, key=lambda column: -len(str(record[column])))[: len(missing)]
    in_order = [column for column in record if column in longest]
    found |= dict(zip(missing, in_order, strict=False))
    if len(found) < len(required):
        return {}
    if "instruction" in required and (column := _named("input", free)):
        found["input"] = column
    return {name: column for name, column in found.items() if name != column}


def _named(standard: str, columns: Iterable[str]) -> str | None:
    """Find the column whose name says that it is `standard`."""
    by_name = {column.lower(): column for column in columns}
    often = _OFTEN.get(standard, (standard,))
    near = difflib.get_close_matches(standard, by_name, n=1, cutoff=0.75)
    return next((by_name[name] for name in (*often, *near) if name in by_name), None)


def _is_conversation(value: Any) -> bool:
    value = parsed(value, "[")
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())
