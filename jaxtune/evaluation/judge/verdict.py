"""The question to a judge, and its reply, which is read strictly and never guessed."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Literal

from jaxtune.config import ConfigError

Verdict = Literal["A", "B", "TIE"]
NEEDED = ("question", "answer_a", "answer_b")
_FIELD = re.compile(r"\{(question|reference|answer_a|answer_b)\}")
_LINE = re.compile(r"[*`]*VERDICT: (A|B|TIE)[*`]*")


def rubric(file: str | None) -> str:
    """Read the text of `file`, else `judge/rubric.txt`. Raises `ConfigError`."""
    if file is None:
        return (
            importlib.resources.files("jaxtune.evaluation.judge")
            .joinpath("rubric.txt")
            .read_text("utf-8")
        )
    try:
        text = Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"judge_prompt {file}: cannot be read: {why}.") from None
    there = set(_FIELD.findall(text))
    missing = ["{" + name + "}" for name in NEEDED if name not in there]
    if missing:
        raise ConfigError(
            f"judge_prompt {file}: has no {', '.join(missing)}, where those texts are to stand. "
            "{reference} is the expected answer, and may be left out."
        )
    return text


def filled(rubric: str, *, question: str, reference: str, answer_a: str, answer_b: str) -> str:
    """Fill a rubric in one pass: a text that holds `{answer_b}` itself stays as it is."""
    fields = {"question": question, "reference": reference, "answer_a": answer_a,
              "answer_b": answer_b}  # fmt: skip
    return _FIELD.sub(lambda match: fields[match[1]], rubric)


def parse(reply: str) -> Verdict | None:
    """Read the verdict in the last line of a reply that has exactly one; else None.

    >>> parse("A is right.\\nVERDICT: A\\n"), parse("VERDICT: A or B"), parse("I prefer A.")
    ('A', None, None)
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    verdicts = [match[1] for line in lines if (match := _LINE.fullmatch(line))]
    if len(verdicts) != 1 or not _LINE.fullmatch(lines[-1]):
        return None
    return verdicts[0]  # type: ignore[return-value]
