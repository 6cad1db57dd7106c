"""Arguments, roles and thinking parts on real chat templates, against `apply_chat_template`.

The templates are those of the trl package; what is rendered is held to the letter.
"""

from __future__ import annotations

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from data.made import NAMES, byte_level_backend, save

from jaxtune.data.formats import to_noun
from jaxtune.data.schema import Conversation, Dropped
from jaxtune.data.templating.masking import render, render_prompt
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

TRL = find_spec("trl")
pytestmark = pytest.mark.skipif(TRL is None, reason="needs pip install --no-deps trl==1.16.0")
_SPECIAL = r"<\|[\w|]+\|?>|<[a-z_]+\|>|<｜[^｜<>]+｜>|\[gMASK\]|<sop>"
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "description": "of the earth"}},
            "required": ["zone"],
        },
    },
}
PLAIN = [
    {"role": "user", "content": "Which bird cannot fly?"},
    {"role": "assistant", "content": "The ostrich."},
]
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Open (our tokenizer, transformers' one) with the template called so."""
    from transformers import AutoTokenizer

    assert TRL is not None
    assert TRL.submodule_search_locations
    sources = Path(TRL.submodule_search_locations[0]) / "chat_templates"

    def of(name: str) -> tuple[Tokenizer, Any]:
        text = (sources / f"{name}.jinja").read_text(encoding="utf-8")
        # transformers writes the day of today, which moves
        text = text.replace('strftime_now("%Y-%m-%d")', "'2024-07-26'")
        backend = byte_level_backend()
        backend.add_special_tokens(
            [
                tokenizers.AddedToken(t, special=True)
                for t in sorted(set(re.findall(_SPECIAL, text)))
            ]
        )
        folder = tmp_path_factory.mktemp(name)
        save(folder, backend, **NAMES, chat_template=text)
        return load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)

    return of


@pytest.mark.parametrize(
    ("name", "of_run", "of_row", "more"),
    [
        ("qwen3", {}, {"enable_thinking": False}, {}),
        ("qwen3", {"enable_thinking": False}, {"enable_thinking": True}, {}),
        ("qwen3", {"enable_thinking": False}, {}, {"tools": [TOOL]}),
        ("nemotron_3_nano", {"enable_thinking": False}, {}, {}),
        ("nemotron_3_nano", {}, {"enable_thinking": False, "truncate_history_thinking": True}, {}),
        ("gptoss", {"reasoning_effort": "high"}, {"model_identity": "You are a bird."}, {}),
        ("gptoss", {}, {"builtin_tools": ["python", "browser"]}, {"tools": [TOOL]}),
        ("cohere", {"unread": 1}, {"documents": [{"title": "a", "text": "b"}]}, {}),
        ("llama3_1", {"date_string": "1 May 2026"}, {"tools_in_user_message": False},
         {"tools": [TOOL]}),
    ],
)  # fmt: skip
def test_arguments(opened: Any, name: str, of_run: Any, of_row: Any, more: Any) -> None:
    ours, reference = opened(name)
    template = resolve("chat", ours, kwargs=of_run)
    messages = [BRIEF, *PLAIN]
    record = {"messages": messages, "chat_template_kwargs": json.dumps(of_row), **more}
    noun = to_noun("messages", record, {}, "f")
    assert isinstance(noun, Conversation)
    options = {**of_run, **of_row, **more, "tokenize": False}
    prompt = render_prompt(template, noun.messages[:-1], tools=noun.tools, kwargs=of_row)
    asked = reference.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert "".join(span.text for span in prompt) == asked
    (row,) = render(template, noun)
    assert not isinstance(row, Dropped)
    assert "".join(span.text for span in row) == reference.apply_chat_template(messages, **options)
    before = itertools.takewhile(lambda span: not span.weight, row)
    assert "".join(span.text for span in before) == asked


@pytest.mark.parametrize(
    ("name", "role", "read_as"),
    [
        ("gptoss", "developer", "developer"),
        ("gemma4_v5", "developer", "developer"),
        ("qwen3", "developer", "system"),
        ("llama3_1", "ipython", "ipython"),
        ("gptoss", "ipython", "tool"),
        ("glm4moe", "function", "tool"),
        ("nemotron_3_nano", "tool_response", "tool"),
    ],
)
def test_roles(opened: Any, name: str, role: str, read_as: str) -> None:
    ours, reference = opened(name)
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}

    def messages(role: str) -> list[dict[str, Any]]:
        if role in ("developer", "system"):
            return [{"role": role, "content": "Be brief."}, PLAIN[0]]
        asks = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [PLAIN[0], asks, {"role": role, "name": "clock", "content": "noon"}]

    noun = to_noun("messages", {"messages": messages(role), "tools": [TOOL]}, {}, "f")
    assert isinstance(noun, Conversation)
    prompt = render_prompt(resolve("chat", ours), noun.messages, tools=noun.tools)
    asked = reference.apply_chat_template(
        messages(read_as), tools=[TOOL], add_generation_prompt=True, tokenize=False
    )
    assert "".join(span.text for span in prompt) == asked


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe"])
def test_thinking_parts(opened: Any, name: str) -> None:
    ours, reference = opened(name)
    parts = [{"type": "thinking", "thinking": "They run."}, {"type": "text", "text": "The emu."}]
    as_parts = [PLAIN[0], {"role": "assistant", "content": parts}]
    as_field = [PLAIN[0], {"role": "assistant", "content": "The emu.", "reasoning": "They run."}]
    whole = reference.apply_chat_template(as_field, tokenize=False)
    assert "They run." in whole
    for messages in (as_parts, as_field):
        noun = to_noun("messages", {"messages": messages}, {}, "f")
        assert isinstance(noun, Conversation)
        (row,) = render(resolve("chat", ours), noun)
        assert not isinstance(row, Dropped)
        assert "".join(span.text for span in row).startswith(whole)  # GLM's stop is behind it
