"""The text of our own templates: named ones, and strings with placeholders, as jinja source.

Every source is a chat template that transformers renders to the same text, so what was trained can
be exported as it stands. `message.input` is read where a record brought one and is simply absent
elsewhere. A template says where text goes; what of it is trained is derived in `template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxtune.config import ConfigError, nearest


class Setting(NamedTuple):
    """What a wording takes from the tokenizer and the configuration."""

    bos: str  # "" where the tokenizer puts none before plain text
    stop: str  # end of turn after an answer
    system: str  # for conversations that bring none; "" = none


class Named(NamedTuple):
    """A named template. `stop` None = the tokenizer's eos. `needs`: control tokens in its text."""

    source: Callable[[Setting], str]
    stop: str | None = None
    needs: tuple[str, ...] = ()


PLACEHOLDERS = ("instruction", "input", "output", "system")
_ALIASES = {"prompt": "instruction", "completion": "output"}
_CONTENT = "message['content']"
_WITH_INPUT = f"{_CONTENT} + ('\\n' + message.input if message.input else '')"


def _say(text: str) -> str:
    """Jinja that writes `text`, whatever is in it, and no white space of its own."""
    return "{{- " + _quoted(text) + " -}}" if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _alternating(
    setting: Setting,
    *,
    first: str,
    later: str,
    turn: str,
    lead: str = "",
    after: str = "",
    system: bool = True,
) -> str:
    """User and assistant by turns; the header of the answer belongs to the user's turn.

    Jinja in: `first` before the first turn, `later` before the others, `turn` up to the answer.
    Text in: `lead` between header and answer, `after` between end of turn and next turn.
    """
    refusal = "roles must go (system,) user, assistant, user, ...; got " if system else (
        "this template has no place for a system message; roles must go user, assistant, ...; got "
    )  # fmt: skip
    takes_system = "message['role'] == 'system' and loop.first" if system else "false"
    return "\n".join(
        line
        for line in (
            _say(setting.bos),
            "{%- set turn = namespace(system="
            + _quoted(setting.system)
            + ", count=0, open=false) -%}",
            "{%- for message in messages -%}",
            "{%- if " + takes_system + " -%}",
            "{%- set turn.system = " + _CONTENT + " -%}",
            "{%- elif message['role'] == 'user' and not turn.open -%}",
            "{%- if turn.count == 0 -%}",
            first,
            "{%- else -%}",
            later,
            "{%- endif -%}",
            turn,
            "{%- set turn.open = true -%}",
            "{%- set turn.count = turn.count + 1 -%}",
            "{%- elif message['role'] == 'assistant' and turn.open -%}",
            "{{- " + _quoted(lead) + " + " + _CONTENT + " + " + _quoted(setting.stop) + " -}}",
            _say(after),
            "{%- set turn.open = false -%}",
            "{%- else -%}",
            "{{- raise_exception(" + _quoted(refusal) + " + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        )
        if line
    )


def _headed(
    setting: Setting, *, before: str, after: str, end: str, gap: str = "", trim: bool = False
) -> str:
    """Every message under its role: `before` role `after` content `end` `gap`, in any order."""
    trimmed, system = (" | trim" if trim else ""), setting.system
    default = (
        "{%- if not (messages and messages[0]['role'] == 'system') -%}\n"
        + _say(before + "system" + after + (system.strip() if trim else system) + end + gap)
        + "\n{%- endif -%}"
    )
    return "\n".join(
        line
        for line in (
            _say(setting.bos),
            default if system else "",
            "{%- for message in messages -%}",
            "{{- " + _quoted(before) + " + message['role'] + " + _quoted(after) + " -}}",
            "{{- (" + _WITH_INPUT + ")" + trimmed + " -}}",
            "{%- if message['role'] == 'assistant' -%}",
            _say(setting.stop + gap),
            "{%- else -%}",
            _say(end + gap),
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            _say(before + "assistant" + after),
            "{%- endif -%}",
        )
        if line
    )


_TASK = "Below is an instruction that describes a task"
_PAIRED = ", paired with an input that provides further context"
_ASK = ". Write a response that appropriately completes the request.\n\n"


def _alpaca(response: str) -> Callable[[Setting], str]:
    """Stanford's prompt, with and without input; a system message takes the preamble's place."""
    first = "\n".join(
        (
            "{%- if turn.system -%}",
            '{{- turn.system + "\\n\\n" -}}',
            "{%- elif message.input -%}",
            _say(_TASK + _PAIRED + _ASK),
            "{%- else -%}",
            _say(_TASK + _ASK),
            "{%- endif -%}",
        )
    )
    turn = "\n".join(
        (
            '{{- "### Instruction:\\n" + ' + _CONTENT + " -}}",
            "{%- if message.input -%}",
            '{{- "\\n\\n### Input:\\n" + message.input -}}',
            "{%- endif -%}",
            _say("\n\n" + response),
        )
    )
    return lambda setting: _alternating(setting, first=first, later=_say("\n\n"), turn=turn)


def _llama2(setting: Setting) -> str:
    system = (
        "{%- if turn.system -%}\n"
        '{{- "<<SYS>>\\n" + turn.system + "\\n<</SYS>>\\n\\n" -}}\n'
        "{%- endif -%}"
    )
    return _alternating(
        setting,
        first=_say("[INST] ") + "\n" + system,
        later=_say(setting.bos + "[INST] "),
        turn="{{- " + _WITH_INPUT + ' + " [/INST]" -}}',
        lead=" ",
    )


NAMED: dict[str, Named] = {
    "alpaca": Named(_alpaca("### Response:\n")),
    "alpaca_original": Named(_alpaca("### Response:")),
    "chatml": Named(
        lambda s: _headed(s, before="<|im_start|>", after="\n", end="<|im_end|>", gap="\n"),
        stop="<|im_end|>",
        needs=("<|im_start|>", "<|im_end|>"),
    ),
    "llama2": Named(_llama2),
    "llama3": Named(
        lambda s: _headed(
            s,
            before="<|start_header_id|>",
            after="<|end_header_id|>\n\n",
            end="<|eot_id|>",
            trim=True,
        ),
        stop="<|eot_id|>",
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}


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


def from_placeholders(parts: Placeholders, setting: Setting, *, lead_out: str, rest: str) -> str:
    """Jinja for a template string; `lead_out` + stop end the answer, `rest` follows untrained.

    An empty {input} or {system} takes its whole line with it ({system} also the empty lines below),
    or, where the line holds another placeholder, the blanks before it. What stands before the last
    blank line (or {system}) ahead of {instruction} is said once, the rest with every turn.
    """
    start, turn = _split_preamble(parts.before)
    bos = "" if setting.bos and "".join(parts.before[:1]).startswith(setting.bos) else setting.bos
    return _alternating(
        setting._replace(bos=bos, stop=lead_out + setting.stop),
        first=_lines(start, parts.names),
        later="",
        turn=_lines(turn, parts.names),
        after=rest,
        system="system" in parts.names,
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
    """Jinja for literal and placeholder pieces, line by line (see `from_placeholders`)."""
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
        code += ["{{- " + value + " -}}" if is_name else _say(text) for text, is_name in line]
        code.append("{%- endif -%}")
        return "\n".join(filter(None, code))
    asked = _CONTENT if "input" in names else _WITH_INPUT
    for index, (text, is_name) in enumerate(line):
        follows = line[index + 1][0] if index + 1 < len(line) and line[index + 1][1] else ""
        if not is_name:
            code.append(_say(text.rstrip(" \t") if follows in _OPTIONAL else text))
        elif text == "instruction":
            code.append("{{- " + asked + " -}}")
        else:
            value = _OPTIONAL[text]
            blanks = line[index - 1][0] if index else ""
            blanks = blanks[len(blanks.rstrip(" \t")) :]
            code += ["{%- if " + value + " -%}", _say(blanks), "{{- " + value + " -}}"]
            code.append("{%- endif -%}")
    return "\n".join(filter(None, code))
