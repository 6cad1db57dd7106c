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
    """A named template. `stop` None = the tokenizer's eos. `needs`: control tokens in its text.

    Where the tokenizer lacks one of them, `add_tokens` can bring it.
    """

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
    setting: Setting, *, before: str, after: str, end: str = "", gap: str = "", trim: bool = False
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


def _preamble(text: str, with_input: str | None = None) -> str:
    """Jinja for what stands before the first turn; a system message takes its place."""
    return "\n".join(
        (
            "{%- if turn.system -%}",
            '{{- turn.system + "\\n\\n" -}}',
            *(("{%- elif message.input -%}", _say(with_input)) if with_input else ()),
            "{%- else -%}",
            _say(text),
            "{%- endif -%}",
        )
    )


def _instruction(before_input: str, response: str) -> str:
    """Jinja for a turn in the manner of Alpaca."""
    return "\n".join(
        (
            '{{- "### Instruction:\\n" + ' + _CONTENT + " -}}",
            "{%- if message.input -%}",
            "{{- " + _quoted("\n\n" + before_input) + " + message.input -}}",
            "{%- endif -%}",
            _say("\n\n" + response),
        )
    )


def _alpaca(response: str) -> Callable[[Setting], str]:
    """Stanford's prompt, with and without input; a system message takes the preamble's place."""
    first = _preamble(_TASK + _ASK, _TASK + _PAIRED + _ASK)
    turn = _instruction("### Input:\n", response)
    return lambda setting: _alternating(setting, first=first, later=_say("\n\n"), turn=turn)


def _dolly(setting: Setting) -> str:
    """Databricks' prompt, whose answers end with a control token of its own, after a blank line."""
    return _alternating(
        setting._replace(stop="\n\n" + setting.stop),
        first=_preamble(_TASK + _ASK),
        later=_say("\n\n"),
        turn=_instruction("Input:\n", "### Response:\n"),
    )


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


_MERGED_SYSTEM = '{%- if turn.system -%}{{- turn.system + "\\n\\n" -}}{%- endif -%}'


def _gemma(setting: Setting) -> str:
    """The answers' role is called model; a system message begins the first turn (Gemma 3)."""
    opening = _say("<start_of_turn>user\n")
    return _alternating(
        setting,
        first=opening + "\n" + _MERGED_SYSTEM.replace("turn.system +", "turn.system | trim +"),
        later=opening,
        turn="{{- (" + _WITH_INPUT + ") | trim -}}\n"
        + _say("<end_of_turn>\n<start_of_turn>model\n"),
        after="\n",
    )  # fmt: skip


def _vicuna(setting: Setting) -> str:
    preamble = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    return _alternating(
        setting,
        first=_preamble(preamble).replace('"\\n\\n"', '" "'),
        later="",
        turn='{{- "USER: " + ' + _WITH_INPUT + ' + " ASSISTANT:" -}}',
        lead=" ",
    )


def _plain(setting: Setting) -> str:
    """Question and answer one behind the other, nothing added but the end of turn."""
    return _alternating(setting, first=_MERGED_SYSTEM, later="", turn="{{- " + _WITH_INPUT + " -}}")


def _mistral(setting: Setting) -> str:
    """Mistral 7B v0.3. Its own template puts system message and tools before the last question,
    and so rewrites history with every turn; here they stand before the first.
    """
    return "\n".join(
        (
            _say(setting.bos),
            "{%- set turn = namespace(system=" + _quoted(setting.system) + ", open=false) -%}",
            '{%- if tools -%}{{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" -}}'
            "{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'system' and loop.first -%}",
            "{%- set turn.system = " + _CONTENT + " -%}",
            "{%- elif message['role'] == 'user' and not turn.open -%}",
            '{{- "[INST] " -}}',
            _MERGED_SYSTEM,
            "{{- " + _WITH_INPUT + ' + "[/INST]" -}}',
            '{%- set turn.system = "" -%}',
            "{%- set turn.open = true -%}",
            "{%- elif message['role'] == 'tool' -%}",
            '{{- "[TOOL_RESULTS] " + ({"content": ' + _CONTENT + "} | tojson)",
            ' + "[/TOOL_RESULTS]" -}}',
            "{%- set turn.open = true -%}",
            "{%- elif message['role'] == 'assistant' and turn.open -%}",
            "{%- if message.tool_calls -%}",
            "{%- set calls = namespace(all=[]) -%}",
            "{%- for call in message.tool_calls -%}",
            "{%- set calls.all = calls.all + [call.function or call] -%}",
            "{%- endfor -%}",
            "{%- if " + _CONTENT + " -%}{{- " + '" " + ' + _CONTENT + " -}}{%- endif -%}",
            '{{- "[TOOL_CALLS] [" -}}',
            "{%- for call in calls.all -%}",
            "{{- '{\"name\": ' + (call.name | tojson) + ', \"arguments\": ' -}}",
            _ARGUMENTS,
            '{{- "}" + ("" if loop.last else ", ") -}}',
            "{%- endfor -%}",
            "{{- " + _quoted("]" + setting.stop) + " -}}",
            "{%- else -%}",
            '{{- " " + ' + _CONTENT + " + " + _quoted(setting.stop) + " -}}",
            "{%- endif -%}",
            "{%- set turn.open = false -%}",
            "{%- else -%}",
            '{{- raise_exception("roles must go (system,) user, assistant (, tool, assistant), '
            "user, ...; got \" + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        )
    )


_ARGUMENTS = "{{- call.arguments if call.arguments is string else (call.arguments | tojson) -}}"
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_QWEN_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_QWEN_CALLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def _qwen(setting: Setting) -> str:
    """Qwen 2.5: ChatML with a system message of its own and Hermes' way of calling tools."""
    return "\n".join(
        (
            _say(setting.bos),
            "{%- set given = messages and messages[0]['role'] == 'system' -%}",
            '{{- "<|im_start|>system\\n" -}}',
            "{{- messages[0]['content'] if given else "
            + _quoted(setting.system or _QWEN_SYSTEM) + " -}}",
            "{%- if tools -%}",
            _say(_QWEN_TOOLS),
            '{%- for tool in tools -%}{{- "\\n" + (tool | tojson) -}}{%- endfor -%}',
            _say(_QWEN_CALLS),
            "{%- endif -%}",
            '{{- "<|im_end|>\\n" -}}',
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'tool' -%}",
            "{%- if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'tool' -%}",
            '{{- "<|im_start|>user" -}}',
            "{%- endif -%}",
            '{{- "\\n<tool_response>\\n" + ' + _CONTENT + ' + "\\n</tool_response>" -}}',
            "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}",
            '{{- "<|im_end|>\\n" -}}',
            "{%- endif -%}",
            "{%- elif not (given and loop.first) -%}",
            '{{- "<|im_start|>" + message[\'role\'] -}}',
            "{%- if message.tool_calls -%}",
            "{%- if " + _CONTENT + " -%}{{- " + '"\\n" + ' + _CONTENT + " -}}{%- endif -%}",
            "{%- for each in message.tool_calls -%}",
            "{%- set call = each.function or each -%}",
            '{{- \'\\n<tool_call>\\n{"name": \' + (call.name | tojson) + \', "arguments": \' -}}',
            _ARGUMENTS,
            '{{- "}\\n</tool_call>" -}}',
            "{%- endfor -%}",
            "{%- else -%}",
            '{{- "\\n" + ' + _WITH_INPUT + " -}}",
            "{%- endif -%}",
            "{%- if message['role'] == 'assistant' -%}",
            _say(setting.stop + "\n"),
            "{%- else -%}",
            '{{- "<|im_end|>\\n" -}}',
            "{%- endif -%}",
            "{%- endif -%}",
            "{%- endfor -%}",
            '{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}',
        )
    )  # fmt: skip


_CHATML = ("<|im_start|>", "<|im_end|>")
NAMED: dict[str, Named] = {
    "alpaca": Named(_alpaca("### Response:\n")),
    "alpaca_original": Named(_alpaca("### Response:")),
    "dolly": Named(_dolly, stop="### End"),
    "chatml": Named(
        lambda s: _headed(s, before="<|im_start|>", after="\n", end="<|im_end|>", gap="\n"),
        stop="<|im_end|>",
        needs=_CHATML,
    ),
    "gemma": Named(_gemma, stop="<end_of_turn>", needs=("<start_of_turn>", "<end_of_turn>")),
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
    "mistral": Named(_mistral),
    "phi3": Named(
        lambda s: _headed(s, before="<|", after="|>\n", end="<|end|>", gap="\n"),
        stop="<|end|>",
        needs=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "plain": Named(_plain),
    "qwen": Named(_qwen, stop="<|im_end|>", needs=_CHATML),
    "vicuna": Named(_vicuna),
    "zephyr": Named(
        lambda s: _headed(s, before="<|", after="|>\n", end=s.stop, gap="\n"),
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


def from_placeholders(
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
    return _alternating(
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
