"""Jinja for conversations, put together from their parts: what our templates are made of.

`message.input` is read where a record brought one and is simply absent elsewhere.
"""

from __future__ import annotations

import json
from typing import NamedTuple

CONTENT = "message['content']"
WITH_INPUT = f"{CONTENT} + ('\\n' + message.input if message.input else '')"


class Setting(NamedTuple):
    """What a wording takes from the tokenizer and the configuration."""

    bos: str  # "" where the tokenizer puts none before plain text
    stop: str  # end of turn after an answer
    system: str  # for conversations that bring none; "" = none


def say(text: str) -> str:
    """Jinja that writes `text`, whatever is in it, and no white space of its own."""
    return "{{- " + quoted(text) + " -}}" if text else ""


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def alternating(
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
            say(setting.bos),
            "{%- set turn = namespace(system="
            + quoted(setting.system)
            + ", count=0, open=false) -%}",
            "{%- for message in messages -%}",
            "{%- if " + takes_system + " -%}",
            "{%- set turn.system = " + CONTENT + " -%}",
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
            "{{- " + quoted(lead) + " + " + CONTENT + " + " + quoted(setting.stop) + " -}}",
            say(after),
            "{%- set turn.open = false -%}",
            "{%- else -%}",
            "{{- raise_exception(" + quoted(refusal) + " + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        )
        if line
    )


def headed(
    setting: Setting, *, before: str, after: str, end: str = "", gap: str = "", trim: bool = False
) -> str:
    """Every message under its role: `before` role `after` content `end` `gap`, in any order."""
    trimmed, system = (" | trim" if trim else ""), setting.system
    default = (
        "{%- if not (messages and messages[0]['role'] == 'system') -%}\n"
        + say(before + "system" + after + (system.strip() if trim else system) + end + gap)
        + "\n{%- endif -%}"
    )
    return "\n".join(
        line
        for line in (
            say(setting.bos),
            default if system else "",
            "{%- for message in messages -%}",
            "{{- " + quoted(before) + " + message['role'] + " + quoted(after) + " -}}",
            "{{- (" + WITH_INPUT + ")" + trimmed + " -}}",
            "{%- if message['role'] == 'assistant' -%}",
            say(setting.stop + gap),
            "{%- else -%}",
            say(end + gap),
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            say(before + "assistant" + after),
            "{%- endif -%}",
        )
        if line
    )
