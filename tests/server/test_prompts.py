"""What a template does not show of a request is refused, not left out in silence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxtune.config import DataError
from jaxtune.server import prompts
from jaxtune.server.prompts import chat_prompt

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
PLAIN = [{"role": "user", "content": "1 + 2"}]
HISTORY = [
    *PLAIN,
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


def ids(
    monkeypatch: pytest.MonkeyPatch, reads: set[str], messages: Any, tools: Any = ()
) -> list[int]:
    """By a template that reads some of the fields, of which it needs `needs`."""

    def prompt_ids(_: Any, __: Any, asked: Any) -> list[int]:
        text = repr([(m.role, m.content) for m in asked.messages])
        if "calls" in reads:
            text += repr([m.extra.get("tool_calls") for m in asked.messages])
        if "tools" in reads:
            text += repr(asked.tools)
        if "needs calls" in reads and not all(
            m.content or m.extra.get("tool_calls") for m in asked.messages
        ):
            raise DataError("an empty answer")
        return [*map(ord, text)]

    monkeypatch.setattr(prompts, "prompt_ids", prompt_ids)
    nothing: Any = None
    codec: Any = SimpleNamespace(template=SimpleNamespace(for_conversation=lambda noun: None))
    return chat_prompt(nothing, codec, messages, tools, {}).ids


def test_calls_that_the_template_does_not_show_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DataError, match="shows no tool calls"):
        ids(monkeypatch, {"tools"}, HISTORY, [TOOL])
    assert ids(monkeypatch, {"calls", "tools"}, HISTORY, [TOOL])
    assert ids(monkeypatch, {"calls"}, HISTORY)
    assert ids(monkeypatch, set(), PLAIN)


def test_a_template_that_cannot_do_without_calls_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ids(monkeypatch, {"needs calls"}, HISTORY)


def test_tools_that_the_template_does_not_show_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DataError, match="reads no tools"):
        ids(monkeypatch, {"calls"}, PLAIN, [TOOL])
    assert ids(monkeypatch, {"tools"}, PLAIN, [TOOL])
