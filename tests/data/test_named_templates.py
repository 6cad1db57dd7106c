"""A tokenizer's named chat templates, chosen as transformers chooses them, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.made import byte_level_backend, save

from jaxtune.config import ConfigError
from jaxtune.data.formats import to_noun
from jaxtune.data.schema import Conversation, Dropped
from jaxtune.data.templating.masking import render, render_prompt
from jaxtune.data.templating.template import Template, resolve
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer
from jaxtune.hf.export import write_tokenizer


def _turns(mark: str, before: str = "") -> str:
    return f"""{before}{{%- for message in messages -%}}
{{{{- '<|im_start|>{mark} ' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>{mark} assistant\\n' -}}}}{{%- endif -%}}"""


NAMES_TOOLS = "{%- for tool in tools -%}{{- tool.function.name + '\\n' -}}{%- endfor -%}"
PLAIN, TOOL_USE, RAG = _turns("plain"), _turns("tools", NAMES_TOOLS), _turns("rag")
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "Name a prime."}]
MESSAGES = [*ASKED, {"role": "assistant", "content": "Two."}]
EOS = {"bos_token": "<s>", "eos_token": "</s>"}


def tokenizer_with(folder: Path, templates: dict[str, str], *, as_files: bool) -> Tokenizer:
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    save(folder, byte_level_backend(), **EOS, **({} if as_files else {"chat_template": listed}))
    more = folder / "additional_chat_templates"
    for name, text in templates.items() if as_files else ():
        more.mkdir(exist_ok=True)
        (
            folder / "chat_template.jinja" if name == "default" else more / f"{name}.jinja"
        ).write_text(text)
    return load_tokenizer(str(folder))


def rendered(template: Template, tools: Any) -> tuple[str | Dropped, str | None]:
    """The text trained, and the prompt of the same conversation; None where it is refused."""
    noun = to_noun("messages", {"messages": MESSAGES, "tools": tools}, {}, "f")
    assert isinstance(noun, Conversation)
    (row,) = render(template, noun)
    if isinstance(row, Dropped):
        return row, None
    prompt = render_prompt(template, noun.messages[:1], tools=noun.tools)
    return "".join(s.text for s in row), "".join(s.text for s in prompt)


@pytest.mark.parametrize("as_files", [False, True])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize(
    "templates",
    [
        {"default": PLAIN, "tool_use": TOOL_USE, "rag": RAG},
        {"default": PLAIN, "rag": RAG},
        {"tool_use": TOOL_USE},
        {"default": PLAIN},
    ],
    ids=",".join,
)
def test_a_row_has_the_template_that_transformers_takes(
    tmp_path: Path, templates: dict[str, str], tools: Any, as_files: bool
) -> None:
    """`default` here reads no tools: such a row is dropped and not trained without them."""
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with(tmp_path, templates, as_files=as_files)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    text, prompt = rendered(resolve("auto", tokenizer), tools)
    options = {"tools": tools, "tokenize": False}
    try:
        whole = reference.apply_chat_template(MESSAGES, **options)
    except ValueError:
        assert isinstance(text, Dropped)
        assert "no default chat template" in text.detail
        assert "Set template to one of: chat:tool_use" in text.detail
        return
    if tools and "tool_use" not in templates:
        assert isinstance(text, Dropped)
        assert text.reason == "the template does not show the tools"
        return
    assert text == whole
    assert prompt == reference.apply_chat_template(ASKED, add_generation_prompt=True, **options)


def test_one_is_chosen_by_its_name(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, {"default": PLAIN, "rag": RAG}, as_files=True)
    text, _ = rendered(resolve("chat:rag", tokenizer), None)
    assert isinstance(text, str)
    assert text.startswith("<|im_start|>rag user")
    with pytest.raises(ConfigError, match=r"no chat template of that name. Did you mean 'rag'\?"):
        resolve("chat:rga", tokenizer)


def test_none_is_the_default(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, {"rag": RAG, "other": PLAIN}, as_files=False)
    with pytest.raises(ConfigError, match="Set template to one of: chat:rag, chat:other"):
        resolve("auto", tokenizer)


def test_a_tool_template_that_cannot_be_used_costs_only_rows_with_tools(tmp_path: Path) -> None:
    broken = {"default": PLAIN, "tool_use": "{{ raise_exception('no tools today') }}"}
    template = resolve("chat", tokenizer_with(tmp_path, broken, as_files=True))
    assert isinstance(rendered(template, None)[0], str)
    dropped, _ = rendered(template, [TOOL])
    assert isinstance(dropped, Dropped)
    assert "no tools today" in dropped.detail


@pytest.mark.parametrize(
    ("chosen", "exported"),
    [
        ("chat", {"default": PLAIN, "tool_use": TOOL_USE, "rag": RAG}),
        ("chat:rag", {"default": RAG, "rag": RAG}),
    ],
)
def test_an_export_has_them_all(tmp_path: Path, chosen: str, exported: dict[str, str]) -> None:
    """With one chosen by name that one is the default, and no `tool_use` comes before it."""
    from transformers import AutoTokenizer

    every = {"default": PLAIN, "tool_use": TOOL_USE, "rag": RAG}
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer = tokenizer_with(source, every, as_files=False)
    out.mkdir()
    write_tokenizer(out, None, tokenizer, resolve(chosen, tokenizer))  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(out).chat_template == exported
    assert load_tokenizer(str(out)).chat_templates == exported
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())


def test_an_export_has_the_arguments_of_the_run_as_defaults(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    asks = "{%- if loud -%}{{- 'LOUD ' + (more or ['none'])[0] -}}{%- endif -%}" + PLAIN
    tokenizer = tokenizer_with(tmp_path / "source", {"default": asks}, as_files=True)
    out = tmp_path / "out"
    out.mkdir()
    kwargs = {"loud": True, "more": ["a\"'\n%}", None, {"b": 1.5}], "unread": 1}
    template = resolve("chat", tokenizer, kwargs=kwargs, system_prompt="Be brief.")
    write_tokenizer(out, None, tokenizer, template)  # type: ignore[arg-type]
    exported = AutoTokenizer.from_pretrained(out)
    text, prompt = rendered(template, None)
    assert "LOUD a\"'\n%}" in str(text)
    assert exported.apply_chat_template(MESSAGES, tokenize=False) == text
    options = {"tokenize": False, "add_generation_prompt": True}
    assert exported.apply_chat_template(ASKED, **options) == prompt
    assert "LOUD" not in exported.apply_chat_template(ASKED, loud=False, **options)
