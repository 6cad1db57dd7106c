"""The named templates, as jinja source.

Every source is a chat template that transformers renders to the same text, so what was trained can
be exported as it stands. A template says where text goes; what of it is trained is derived in
`spans`. Those that differ from the others in more than their words are files of jinja beside this
one, with `$bos`, `$stop` and `$system` where a string of the `Setting` goes.
"""

from __future__ import annotations

import functools
import importlib.resources
import string
from collections.abc import Callable
from typing import NamedTuple

from jaxtune.data.templating.jinja_builder import (
    CONTENT,
    WITH_INPUT,
    Setting,
    alternating,
    headed,
    quoted,
    say,
)


class Named(NamedTuple):
    """A named template. `stop` None = the tokenizer's eos. `needs`: control tokens in its text.

    Where the tokenizer lacks one of them, `add_tokens` can bring it.
    """

    source: Callable[[Setting], str]
    stop: str | None = None
    needs: tuple[str, ...] = ()


def _written(name: str, setting: Setting, **instead: str) -> str:
    """The jinja file `name`; `instead` are words of the setting, or others, that stand in it."""
    strings = {**setting._asdict(), **instead}
    return string.Template(_file(name)).substitute(
        {key: quoted(value) for key, value in strings.items()}
    )


@functools.cache
def _file(name: str) -> str:
    return (
        importlib.resources.files("jaxtune.data.templating.builtin")
        .joinpath(f"{name}.jinja")
        .read_text("utf-8")
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
            *(("{%- elif message.input -%}", say(with_input)) if with_input else ()),
            "{%- else -%}",
            say(text),
            "{%- endif -%}",
        )
    )


def _instruction(before_input: str, response: str) -> str:
    """Jinja for a turn in the manner of Alpaca."""
    return "\n".join(
        (
            '{{- "### Instruction:\\n" + ' + CONTENT + " -}}",
            "{%- if message.input -%}",
            "{{- " + quoted("\n\n" + before_input) + " + message.input -}}",
            "{%- endif -%}",
            say("\n\n" + response),
        )
    )


def _alpaca(response: str) -> Callable[[Setting], str]:
    """Stanford's prompt, with and without input; a system message takes the preamble's place."""
    first = _preamble(_TASK + _ASK, _TASK + _PAIRED + _ASK)
    turn = _instruction("### Input:\n", response)
    return lambda setting: alternating(setting, first=first, later=say("\n\n"), turn=turn)


def _dolly(setting: Setting) -> str:
    """Databricks' prompt, whose answers end with a control token of its own, after a blank line."""
    return alternating(
        setting._replace(stop="\n\n" + setting.stop),
        first=_preamble(_TASK + _ASK),
        later=say("\n\n"),
        turn=_instruction("Input:\n", "### Response:\n"),
    )


def _llama2(setting: Setting) -> str:
    system = (
        "{%- if turn.system -%}\n"
        '{{- "<<SYS>>\\n" + turn.system + "\\n<</SYS>>\\n\\n" -}}\n'
        "{%- endif -%}"
    )
    return alternating(
        setting,
        first=say("[INST] ") + "\n" + system,
        later=say(setting.bos + "[INST] "),
        turn="{{- " + WITH_INPUT + ' + " [/INST]" -}}',
        lead=" ",
    )


MERGED_SYSTEM = '{%- if turn.system -%}{{- turn.system + "\\n\\n" -}}{%- endif -%}'


def _gemma(setting: Setting) -> str:
    """The answers' role is called model; a system message begins the first turn (Gemma 3)."""
    opening = say("<start_of_turn>user\n")
    return alternating(
        setting,
        first=opening + "\n" + MERGED_SYSTEM.replace("turn.system +", "turn.system | trim +"),
        later=opening,
        turn="{{- (" + WITH_INPUT + ") | trim -}}\n"
        + say("<end_of_turn>\n<start_of_turn>model\n"),
        after="\n",
    )  # fmt: skip


def _vicuna(setting: Setting) -> str:
    preamble = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    return alternating(
        setting,
        first=_preamble(preamble).replace('"\\n\\n"', '" "'),
        later="",
        turn='{{- "USER: " + ' + WITH_INPUT + ' + " ASSISTANT:" -}}',
        lead=" ",
    )


def _plain(setting: Setting) -> str:
    """Question and answer one behind the other, nothing added but the end of turn."""
    return alternating(setting, first=MERGED_SYSTEM, later="", turn="{{- " + WITH_INPUT + " -}}")


def _mistral(setting: Setting) -> str:
    """Mistral 7B v0.3. Its own template puts system message and tools before the last question,
    and so rewrites history with every turn; here they stand before the first."""
    return _written("mistral", setting)


def _qwen(setting: Setting) -> str:
    """Qwen 2.5: ChatML with a system message of its own and Hermes' way of calling tools."""
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    return _written("qwen", setting, system=setting.system or own)


_CHATML = ("<|im_start|>", "<|im_end|>")
NAMED: dict[str, Named] = {
    "alpaca": Named(_alpaca("### Response:\n")),
    "alpaca_original": Named(_alpaca("### Response:")),
    "dolly": Named(_dolly, stop="### End"),
    "chatml": Named(
        lambda s: headed(s, before="<|im_start|>", after="\n", end="<|im_end|>", gap="\n"),
        stop="<|im_end|>",
        needs=_CHATML,
    ),
    "gemma": Named(_gemma, stop="<end_of_turn>", needs=("<start_of_turn>", "<end_of_turn>")),
    "llama2": Named(_llama2),
    "llama3": Named(
        lambda s: headed(
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
        lambda s: headed(s, before="<|", after="|>\n", end="<|end|>", gap="\n"),
        stop="<|end|>",
        needs=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "plain": Named(_plain),
    "qwen": Named(_qwen, stop="<|im_end|>", needs=_CHATML),
    "vicuna": Named(_vicuna),
    "zephyr": Named(
        lambda s: headed(s, before="<|", after="|>\n", end=s.stop, gap="\n"),
    ),
}
