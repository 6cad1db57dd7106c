"""Template strings, `USER: {instruction}\\n{input}\\nASSISTANT: {output}`, as jinja."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.config import ConfigError, nearest
from jaxtune.data.turns import CONTENT, WITH_INPUT, Setting, alternating, say

PLACEHOLDERS = ("instruction", "input", "output", "system")
_ALIASES = {"prompt": "instruction", "completion": "output"}


class Placeholders(NamedTuple):
    """A template string, taken apart: literal text and `{name}`s, around the answer."""

    before: tuple[str, ...]  # literal, name, literal, name, ..., literal: up to {output}
    after: str  # literal text behind {output}
    names: frozenset[str]


def parse(text: str) -> Placeholders:
    """Takes a template string apart; a typed backslash-n or backslash-t is the character itself.

    Raises `ConfigError` naming what is wrong and the placeholders there are. Braces around anything
    that is not a plain name are literal text.
    """
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    parts = re.split(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", text)
    known = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
    for position in range(1, len(parts), 2):
        name = _ALIASES.get(parts[position], parts[position])
        if name not in PLACEHOLDERS:
            raise ConfigError(
                f"template: unknown placeholder {{{name}}}.{nearest(name, PLACEHOLDERS)} "
                f"There are: {known}."
            )
        parts[position] = name
    names = parts[1::2]
    for needed in ("instruction", "output"):
        if names.count(needed) != 1:
            raise ConfigError(
                f"template: {text!r} must hold {{{needed}}} once; it does "
                f"{names.count(needed)} times."
            )
    at = 2 * names.index("output") + 1
    if names[-1] != "output":
        raise ConfigError(
            f"template: {{{names[-1]}}} stands after {{output}}; the model would have to answer "
            "before it is asked. Put {output} last."
        )
    return Placeholders(tuple(parts[:at]), parts[at + 1], frozenset(names))


def source(
    parts: Placeholders,
    setting: Setting,
    *,
    lead_out: str,
    rest: str,
    without_input: Placeholders | None = None,
) -> str:
    """Jinja for a template string; `lead_out` + stop end the answer, `rest` follows untrained.

    An empty {input} or {system} takes its whole line with it ({system} also the empty lines below),
    or, where the line holds another placeholder, the blanks before it; `without_input` is said
    instead where there is one. What stands before the last blank line (or {system}) ahead of
    {instruction} is said once, the rest with every turn.
    """
    bos = "" if setting.bos and "".join(parts.before[:1]).startswith(setting.bos) else setting.bos
    start, turn = (_lines(part, parts.names) for part in _split_preamble(parts.before))
    names = parts.names
    if without_input is not None:
        other = _split_preamble(without_input.before)
        start, turn = (
            "{%- if message.input -%}\n" + one + "\n{%- else -%}\n"
            + _lines(two, names | without_input.names) + "\n{%- endif -%}"
            for one, two in zip((start, turn), other, strict=True)
        )  # fmt: skip
        names |= without_input.names
    return alternating(
        setting._replace(bos=bos, stop=lead_out + setting.stop),
        first=start,
        later="",
        turn=turn,
        after=rest,
        system="system" in names,
    )


def _split_preamble(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(literal, name, ..., literal) -> the same in two, cut ahead of the turn that repeats."""
    asks = next(i for i in range(1, len(parts), 2) if parts[i] in ("instruction", "input"))
    for position in range(asks - 1, -1, -2):
        text = parts[position]
        blank = [match.end() for match in re.finditer(r"\n\s*\n", text)]
        after_system = position > 0  # only {system} can stand before the first question
        if blank or after_system:
            cut = blank[-1] if blank else len(text) - len(text.lstrip())
            return (*parts[:position], text[:cut]), (text[cut:], *parts[position + 1 :])
    return ("",), parts


def _lines(parts: tuple[str, ...], names: frozenset[str]) -> str:
    """Jinja for literal and placeholder pieces, line by line (see `source`)."""
    lines: list[list[tuple[str, bool]]] = [[]]  # each piece: text or name, is it a name
    for position, part in enumerate(parts):
        if position % 2:
            lines[-1].append((part, True))
            continue
        for text in re.split(r"(?<=\n)", part):
            if text == "\n" and not lines[-1] and len(lines) > 1 and _held(lines[-2]) == ["system"]:
                lines[-2].append((text, False))
                continue
            lines[-1].append((text, False))
            if text.endswith("\n"):
                lines.append([])
    return "\n".join(code for line in lines if (code := _line(line, names)))


_OPTIONAL = {"input": "message.input", "system": "turn.system"}


def _held(line: list[tuple[str, bool]]) -> list[str]:
    return [name for name, is_name in line if is_name]


def _line(line: list[tuple[str, bool]], names: frozenset[str]) -> str:
    held = _held(line)
    code: list[str] = []
    if len(held) == 1 and held[0] in _OPTIONAL:
        value = _OPTIONAL[held[0]]
        code.append("{%- if " + value + " -%}")
        code += ["{{- " + value + " -}}" if is_name else say(text) for text, is_name in line]
        code.append("{%- endif -%}")
        return "\n".join(filter(None, code))
    asked = CONTENT if "input" in names else WITH_INPUT
    for index, (text, is_name) in enumerate(line):
        follows = line[index + 1][0] if index + 1 < len(line) and line[index + 1][1] else ""
        if not is_name:
            code.append(say(text.rstrip(" \t") if follows in _OPTIONAL else text))
        elif text == "instruction":
            code.append("{{- " + asked + " -}}")
        else:
            value = _OPTIONAL[text]
            blanks = line[index - 1][0] if index else ""
            blanks = blanks[len(blanks.rstrip(" \t")) :]
            code += ["{%- if " + value + " -%}", say(blanks), "{{- " + value + " -}}"]
            code.append("{%- endif -%}")
    return "\n".join(filter(None, code))
