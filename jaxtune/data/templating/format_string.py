"""Template strings, `USER: {instruction}\\n{input}\\nASSISTANT: {output}`, as jinja."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.config import ConfigError, nearest
from jaxtune.data.templating import builtin_templates
from jaxtune.data.templating.builtin_templates import Code, TemplateStrings, quoted

PLACEHOLDERS = ("instruction", "input", "output", "system")
_ALIASES = {"prompt": "instruction", "completion": "output"}
_CONTENT = "message['content']"
_WITH_INPUT = f"{_CONTENT} + ('\\n' + message.input if message.input else '')"


class Placeholders(NamedTuple):
    """A template string, taken apart: literal text and `{name}`s, around the answer."""

    before: tuple[str, ...]  # literal, name, literal, name, ..., literal: up to {output}
    after: str  # literal text behind {output}
    names: frozenset[str]


def parse(text: str) -> Placeholders:
    """Take a template string apart; a typed backslash-n or backslash-t is the character itself.

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
    strings: TemplateStrings,
    *,
    lead_out: str,
    rest: str,
    special: re.Pattern[str],
    without_input: Placeholders | None = None,
) -> str:
    """Write jinja for a template string; `lead_out` + stop end the answer, `rest` follows
    untrained.

    An empty {input} or {system} takes its whole line with it ({system} also the empty lines below).
    Where the line holds another placeholder it takes the blanks before it alone; where the line
    goes on to the answer, or holds a `special` token, its label and the line ends before it.
    `without_input` is written instead if there is one. What stands before the last blank line (or
    {system}) ahead of {instruction} is written once, the rest with every turn.
    """
    writes_bos = strings.bos and "".join(parts.before[:1]).startswith(strings.bos)
    names = parts.names
    start, turn = (_jinja(part, names, special) for part in _split_preamble(parts.before))
    if without_input is not None:
        other = _split_preamble(without_input.before)
        start, turn = (
            "{%- if message.input -%}\n" + one + "\n{%- else -%}\n"
            + _jinja(two, names | without_input.names, special) + "\n{%- endif -%}"
            for one, two in zip((start, turn), other, strict=True)
        )  # fmt: skip
        names |= without_input.names
    bos = "" if writes_bos else strings.bos
    return builtin_templates.source(
        "format_string",
        strings._replace(bos=bos, stop=lead_out + strings.stop),
        first_turn=Code(start),
        turn=Code(turn),
        after=rest,
        takes_system="system" in names,
    )


def preamble(text: str) -> str:
    """Return what of a template string stands before the first question alone, else ""."""
    once, _ = _split_preamble(parse(text).before)
    written = (f"{{{part}}}" if at % 2 else part for at, part in enumerate(once))
    return "".join(written).strip()


def _split_preamble(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cut (literal, name, ..., literal) in two, ahead of the turn that repeats."""
    asks = next(i for i in range(1, len(parts), 2) if parts[i] in ("instruction", "input"))
    for position in range(asks - 1, -1, -2):
        text = parts[position]
        blank = [match.end() for match in re.finditer(r"\n\s*\n", text)]
        after_system = position > 0  # only {system} can stand before the first question
        if blank or after_system:
            cut = blank[-1] if blank else len(text) - len(text.lstrip())
            return (*parts[:position], text[:cut]), (text[cut:], *parts[position + 1 :])
    return ("",), parts


class _FormatPart(NamedTuple):
    """A literal text, or the value of `name` between `lead` and `trail`, which are written only
    with it.
    """

    name: str
    lead: str
    trail: str = ""


_OPTIONAL = {"input": "message.input", "system": "turn.system"}


def _jinja(parts: tuple[str, ...], names: frozenset[str], special: re.Pattern[str]) -> str:
    """Write jinja for (literal, name, ..., literal), line by line (see `source`)."""
    pieces: list[_FormatPart] = []
    for line in _lines(parts):
        held = [name for name, _ in line if name]
        if len(held) == 1 and held[0] in _OPTIONAL:
            _append(pieces, *_alone(line, pieces, special))
            continue
        for name, text in line:
            lead = _taken(pieces, r"[ \t]*$") if name in _OPTIONAL else text
            _append(pieces, _FormatPart(name, lead))
    question = _CONTENT if "input" in names else _WITH_INPUT
    code: list[str] = []
    for name, lead, trail in pieces:
        if name == "instruction":
            code.append("{{- " + question + " -}}")
        elif name:
            value = _OPTIONAL[name]
            code += ["{%- if " + value + " -%}", _say(lead), "{{- " + value + " -}}", _say(trail)]
            code.append("{%- endif -%}")
        else:
            code.append(_say(lead))
    return "\n".join(filter(None, code))


def _say(text: str) -> str:
    """Write jinja that writes `text`, and no white space of its own."""
    return "{{- " + quoted(text) + " -}}" if text else ""


def _lines(parts: tuple[str, ...]) -> list[list[tuple[str, str]]]:
    """Split into lines of (name, "") and ("", literal); an empty one below {system} belongs to its
    line.
    """
    lines: list[list[tuple[str, str]]] = [[]]
    for position, part in enumerate(parts):
        if position % 2:
            lines[-1].append((part, ""))
            continue
        for text in re.split(r"(?<=\n)", part):
            above = [name for name, _ in lines[-2] if name] if len(lines) > 1 else []
            if text == "\n" and not lines[-1] and above == ["system"]:
                lines[-2].append(("", text))
                continue
            lines[-1].append(("", text))
            if text.endswith("\n"):
                lines.append([])
    return lines


def _alone(
    line: list[tuple[str, str]], above: list[_FormatPart], special: re.Pattern[str]
) -> list[_FormatPart]:
    """Read a line whose only placeholder may be empty; of what is `above`, the line ends may go
    too.
    """
    at = next(i for i, (name, _) in enumerate(line) if name)
    before, behind = ("".join(text for _, text in part) for part in (line[:at], line[at + 1 :]))
    name = line[at][0]
    steers = [found.end() for found in special.finditer(before)]
    to_answer = bool(behind.strip()) and not behind.endswith("\n")
    if not (steers or to_answer or special.search(behind)):
        return [_FormatPart(name, before, behind)]
    cut = steers[-1] if steers else 0
    head, label = before[:cut], before[cut:]
    if not head and [piece.name for piece in above[-2:]] == ["instruction", ""]:
        label = _taken(above, r"\n+$") + label
    return [_FormatPart("", head), _FormatPart(name, label), _FormatPart("", behind)]


def _append(pieces: list[_FormatPart], *more: _FormatPart) -> None:
    """Append parts; literal text behind literal text becomes one part with it."""
    for piece in more:
        if piece.name or not pieces or pieces[-1].name:
            pieces.append(piece)
        else:
            pieces[-1] = _FormatPart("", pieces[-1].lead + piece.lead)


def _taken(pieces: list[_FormatPart], end: str) -> str:
    """Cut what matches `end` off the literal that came last, and return it."""
    if not pieces or pieces[-1].name:
        return ""
    text = pieces[-1].lead
    found = re.search(end, text)
    start = found.start() if found else len(text)
    pieces[-1] = pieces[-1]._replace(lead=text[:start])
    return text[start:]
