"""Roles that few templates know, and content parts, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.made import byte_level_backend, save

from jaxtune.config import Config, ConfigError
from jaxtune.data.formats import to_noun
from jaxtune.data.schema import Conversation, Dropped, Message
from jaxtune.data.templating.masking import render, render_prompt
from jaxtune.data.templating.template import Template, resolve
from jaxtune.data.tokenizer import load_tokenizer

_SAY = "{{- '<|im_start|>' + role + '\\n' + message.content + '<|im_end|>' -}}"
_CALLS = """{%- for call in message.tool_calls or [] -%}
{{- 'CALL ' + call.function.name + (call.function.arguments | tojson) -}}{%- endfor -%}"""
_ASKS = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"


def _template(known: str, others: str = "{{- raise_exception('role ' + message.role) -}}") -> str:
    """A template that writes the roles of `known`, an expression, and refuses others."""
    return f"""{{%- for message in messages -%}}{{%- set role = message['role'] -%}}
{{%- if {known} -%}}{{{{- '<|im_start|>' + role + '\\n' + message.content -}}}}
{_CALLS}{{{{- '<|im_end|>' -}}}}{{%- else -%}}{others}{{%- endif -%}}{{%- endfor -%}}{_ASKS}"""


FOUR = _template("message.role in ['system', 'user', 'assistant', 'tool']")
MORE = _template(
    "role == 'developer' or message['role'] in ('user', 'assistant') or role in "
    "['ipython', 'function', 'tool_response']"
)
# Writes thinking that comes as a part of the content, as Mistral's do, and as a field.
PARTS = (
    """{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part['type'] == 'thinking' -%}{{- '[THINK]' + part['thinking'] + '[/THINK]' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}{{- '<|im_end|>' -}}{%- endfor -%}"""
    + _ASKS
)
FIELD = (
    """{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.reasoning_content -%}{{- '[THINK]' + message.reasoning_content + '[/THINK]' -}}
{%- endif -%}{{- message.content + '<|im_end|>' -}}{%- endfor -%}"""
    + _ASKS
)
U, A = "user", "assistant"
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}


def opened(folder: Path, template: str) -> tuple[Template, Any]:
    """The template for us, and a tokenizer of transformers with it."""
    from transformers import AutoTokenizer

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    save(folder, byte_level_backend(), **tokens, chat_template=template)
    return resolve("chat", load_tokenizer(str(folder))), AutoTokenizer.from_pretrained(folder)


def trained(template: Template, messages: list[dict[str, Any]]) -> str | Dropped:
    noun = to_noun("messages", {"messages": messages}, {}, "f.jsonl:1")
    if isinstance(noun, Dropped):
        return noun
    (row,) = render(template, noun)
    return row if isinstance(row, Dropped) else "".join(span.text for span in row)


@pytest.mark.parametrize("role", ["function", "ipython", "tool_response"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_role_is_passed_on_where_the_template_reads_it_else_mapped(
    tmp_path: Path, role: str, reads: bool
) -> None:
    template, reference = opened(tmp_path, MORE if reads else FOUR)

    def messages(first: str, result: str) -> list[dict[str, Any]]:
        return [
            {"role": first, "content": "Be brief."},
            {"role": U, "content": "2+0?"},
            {"role": A, "content": "", "tool_calls": [CALL]},
            {"role": result, "name": "sum", "content": "2"},
            {"role": A, "content": "Two."},
        ]

    as_known = messages("developer", role) if reads else messages("system", "tool")
    whole = reference.apply_chat_template(as_known, tokenize=False)
    assert trained(template, messages("developer", role)) == whole
    asked = to_noun("messages", {"messages": messages("Developer", role)[:4]}, {}, "f")
    assert isinstance(asked, Conversation)
    prompt = "".join(span.text for span in render_prompt(template, asked.messages))
    options = {"tokenize": False, "add_generation_prompt": True}
    assert prompt == reference.apply_chat_template(as_known[:4], **options)


def test_a_developer_message_is_the_system_prompt(tmp_path: Path) -> None:
    template, _ = opened(tmp_path, FOUR)
    base = resolve("chat", load_tokenizer(str(tmp_path)), system_prompt="Be long.")
    brings = [Message("developer", "Be brief."), Message(U, "q")]
    assert "Be long." not in "".join(span.text for span in render_prompt(base, brings))
    assert "Be long." in "".join(span.text for span in render_prompt(base, brings[1:]))
    exported = resolve(base.exported["default"], load_tokenizer(str(tmp_path)))
    assert render_prompt(exported, brings) == render_prompt(template, brings)
    assert render_prompt(exported, brings[1:]) == render_prompt(base, brings[1:])


def test_calls_told_by_a_role_are_one_turn_of_the_assistant() -> None:
    said = '{"name": "sum", "arguments": {"a": 2}}'
    messages = [
        {"role": U, "content": "2+0?"},
        {"role": A, "content": "Let me see."},
        {"role": "tool_call", "content": said},
        {"role": "tool_call", "content": said},
        {"role": "tool_response", "content": "2"},
        {"role": "tool_call", "content": said, "weight": 0},
    ]
    noun = to_noun("messages", {"messages": messages}, {}, "f")
    assert isinstance(noun, Conversation)
    assert noun.messages[1:] == (
        Message(A, "Let me see.", extra={"tool_calls": [CALL, CALL]}),
        Message("tool_response", "2"),
        Message(A, "", weight=0, extra={"tool_calls": [CALL]}),
    )


def test_other_roles_are_mapped_by_the_config(tmp_path: Path) -> None:
    messages = [{"role": "Narrator", "content": "n"}, {"role": "npc", "content": "a"}]
    found = to_noun("messages", {"messages": messages}, {}, "f")
    assert isinstance(found, Dropped)
    assert found.reason == "role 'Narrator' is not known"
    assert found.detail.startswith("map it with --roles.Narrator user, or another of user, human,")
    config = Config(
        roles={"narrator": "system", "npc": "gpt"},
        datasets=[{"path": "a", "roles": {"npc": "user"}}, {"path": "b"}],
    )
    assert [entry.roles["npc"] for entry in config.datasets] == ["user", "gpt"]
    for column, name in (("messages", "messages"), ("conversations", "sharegpt")):
        noun = to_noun(name, {column: messages}, {}, "f", config.datasets[1].roles)
        assert isinstance(noun, Conversation)
        assert [message.role for message in noun.messages] == ["system", A]
    with pytest.raises(ConfigError, match=r"npc is mapped to 'usr', .* Did you mean 'user'\?"):
        Config(roles={"npc": "usr"})


@pytest.mark.parametrize("thinking", ["Hm.", [{"type": "text", "text": "Hm."}]])
def test_thinking_parts_reach_templates_of_both_kinds(tmp_path: Path, thinking: Any) -> None:
    """As a part where the template reads parts, else as the field; the text is the same."""
    parts = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": "Two."}]
    as_parts = [{"role": U, "content": "q"}, {"role": A, "content": parts}]
    as_field = [as_parts[0], {"role": A, "content": "Two.", "reasoning_content": "Hm."}]
    of_parts, reference = opened(tmp_path / "parts", PARTS)
    of_field, other = opened(tmp_path / "field", FIELD)
    plain = [{"type": "thinking", "thinking": "Hm."}, parts[1]]
    whole = reference.apply_chat_template([as_parts[0], {"role": A, "content": plain}],
                                          tokenize=False)  # fmt: skip
    assert whole.endswith("assistant\n[THINK]Hm.[/THINK]Two.<|im_end|>")
    assert other.apply_chat_template(as_field, tokenize=False) == whole
    for template in (of_parts, of_field):
        assert trained(template, as_parts) == trained(template, as_field) == whole


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Name "}, {"text": "a prime."}]
    found = to_noun("messages", {"messages": [{"role": U, "content": parts}]}, {}, "f")
    assert isinstance(found, Conversation)
    assert found.messages == (Message(U, "Name a prime."),)
