"""The history of a conversation: state in, state out; and its file.

Every model has its own answers, so its own conversation. A saved one is a row of format
`messages`, with that of a second model beside it under its label.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import DataError
from jaxtune.data import sources
from jaxtune.data.formats import to_conversation
from jaxtune.data.schema import Dropped, Message

_KINDS = (".json", ".jsonl")

# label of a model -> its messages from a question up to the next; none where it had no answer
Turn = Mapping[str, tuple[Message, ...]]


class Talk(NamedTuple):
    """A conversation so far; `open` is a question without an answer, for /retry."""

    system: str | None = None
    turns: tuple[Turn, ...] = ()
    open: str | None = None


def messages(talk: Talk, label: str, question: str | None = None) -> tuple[Message, ...]:
    """Return the messages for a model: the system prompt, its turns, and a new question."""
    conversation = itertools.chain.from_iterable(turn.get(label, ()) for turn in talk.turns)
    first = () if talk.system is None else (Message("system", talk.system),)
    return (*first, *conversation, *(() if question is None else (Message("user", question),)))


def answered(talk: Talk, question: str, answers: Mapping[str, str]) -> Talk:
    """Add a question with the answer of each model; without any answer it stays open."""
    if not answers:
        return talk._replace(open=question)
    prompt = Message("user", question)
    turn = {label: (prompt, Message("assistant", text)) for label, text in answers.items()}
    return talk._replace(turns=(*talk.turns, turn), open=None)


def undone(talk: Talk) -> Talk:
    """Drop the last question, answered or not."""
    if talk.open is not None:
        return talk._replace(open=None)
    return talk._replace(turns=talk.turns[:-1])


def last_question(talk: Talk) -> tuple[Talk, str] | None:
    """Return the history before its last question, and that question; None if there is none."""
    if talk.open is not None:
        return undone(talk), talk.open
    if not talk.turns:
        return None
    question = next(message.content for turn in talk.turns[-1].values() for message in turn)
    return undone(talk), question


def save(talk: Talk, labels: Sequence[str], path: str, *, overwrite: bool) -> Path:
    """Write one line of JSON; the last label is the model the conversation is with.

    Raises: DataError for a name that `load` could not read, a file that is there already unless
    `overwrite`, and one that cannot be written.
    """
    file = Path(path).expanduser()
    if file.suffix not in _KINDS:
        raise DataError(f"{path}: expected a name that ends in {' or '.join(_KINDS)}.")
    *beside, main = labels
    row = {"messages": _written(talk, main), **{name: _written(talk, name) for name in beside}}
    try:
        with file.open("w" if overwrite else "x", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise DataError(f"{path}: is there already. Give another name.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}.") from None
    return file


def _written(talk: Talk, label: str) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content, **m.extra} for m in messages(talk, label)]


def load(labels: Sequence[str], path: str) -> Talk:
    """Read the first row of a file. A model without messages of its own takes the main ones.

    Raises: DataError and ConfigError for a file that is missing or holds no conversation.
    """
    if not Path(path).expanduser().is_file():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()}).")
    record = next(iter(sources.read(sources.find(path))), None)
    if record is None:
        raise DataError(f"{path}: the file is empty.")
    *beside, main = labels
    by_label = {main: _read(record.fields, "messages", record.where)}
    for label in beside:
        by_label[label] = _read(record.fields, label if label in record.fields else "messages",
                             record.where)  # fmt: skip
    system, turns = None, {}
    for label, conversation in by_label.items():
        if conversation and conversation[0].role == "system":
            system, conversation = conversation[0].content, conversation[1:]
        turns[label] = _turns(conversation)
    longest = max(turns.values(), key=len)
    columns = {label: _beside(longest, each) for label, each in turns.items()}
    rows = zip(*columns.values(), strict=True)
    return Talk(
        system,
        tuple({n: turn for n, turn in zip(columns, row, strict=True) if turn} for row in rows),
    )


def _beside(
    longest: Sequence[tuple[Message, ...]], turns: Sequence[tuple[Message, ...]]
) -> list[tuple[Message, ...]]:
    """Put `turns` beside the same questions; at the end if these are not the same."""
    placed: list[tuple[Message, ...]] = []
    left = list(turns)
    for turn in longest:
        placed.append(left.pop(0) if left and left[0][0] == turn[0] else ())
    return [()] * (len(longest) - len(turns)) + list(turns) if left else placed


def _read(fields: Mapping[str, Any], column: str, where: str) -> tuple[Message, ...]:
    record = {"messages": fields[column]} if column in fields else fields
    noun = to_conversation(record, where)
    if isinstance(noun, Dropped):
        raise DataError(f"{where}: {noun.text}.")
    if noun.messages[-1].role == "user":
        raise DataError(f"{where}: ends with a question. Expected an answer at the end.")
    return noun.messages


def _turns(conversation: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Split before every question; what stands before the first belongs to it."""
    turns: list[list[Message]] = []
    for message in conversation:
        if not turns or (message.role == "user" and any(m.role == "user" for m in turns[-1])):
            turns.append([])
        turns[-1].append(message)
    return [tuple(turn) for turn in turns]
