"""Arguments of a chat template: from the config and from rows, against `apply_chat_template`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.made import byte_level_backend, save

from jaxtune.config import Config, ConfigError
from jaxtune.data.formats import to_noun
from jaxtune.data.preprocess import PreprocessConfig, cache_key, preprocess
from jaxtune.data.schema import Conversation, Dropped
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import Template, resolve
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.data.tokenizer import Tokenizer

# Reads an argument at the top, one in a macro, one in a loop, and documents.
ARGUMENTS = """{%- set level = level if level is defined else 'low' -%}
{%- macro tail() -%}{{- shout if shout is defined else '.' -}}{%- endmacro -%}
{{- 'level ' + level + '\n' -}}
{%- for document in documents or [] -%}{{- 'doc ' + document.text + '\n' -}}{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + (mood | default('')) + '\n' -}}
{{- message['content'] + '<|im_end|>' + tail() + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' + (mood | default('')) + '\n' -}}
{%- endif -%}"""
MESSAGES = [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Two."}]
EOS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("arguments")
    save(place, byte_level_backend(), **EOS, chat_template=ARGUMENTS)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    from jaxtune.data.tokenizer import load_tokenizer

    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def row_of(template: Template, kwargs: Any) -> str | Dropped:
    record = {"messages": MESSAGES, "chat_template_kwargs": kwargs}
    noun = to_noun("messages", record, {}, "f.jsonl:1")
    if isinstance(noun, Dropped):
        return noun
    (row,) = render(template, noun)
    return row if isinstance(row, Dropped) else "".join(span.text for span in row)


@pytest.mark.parametrize(
    ("of_run", "of_row"),
    [
        ({}, {"level": "high"}),
        ({"level": "high", "mood": "!"}, {}),
        ({"level": "high", "mood": "!"}, {"mood": "?", "shout": 3}),
        ({"shout": "SHOUT"}, {"documents": [{"title": "t", "text": "Primes."}]}),
        ({"unread": [1, {"a": None}]}, {"level": "mid"}),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_reach_the_template_as_transformers_hands_them(
    tokenizer: Tokenizer, reference: Any, of_run: Any, of_row: Any, as_text: bool
) -> None:
    """The row wins for each name; an object or its JSON text; nulls of a table are not there."""
    template = resolve("chat", tokenizer, kwargs=of_run)
    merged = {**of_run, **of_row}
    whole = reference.apply_chat_template(MESSAGES, tokenize=False, **merged)
    column = json.dumps(of_row) if as_text else {**of_row, "level2": None}
    assert row_of(template, column) == whole
    noun = to_noun("messages", {"messages": MESSAGES[:1], "chat_template_kwargs": column}, {}, "f")
    assert isinstance(noun, Conversation)
    fed = tokenize_prompt(template, tokenizer, noun.messages, kwargs=noun.template_kwargs)
    prompt = reference.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, **merged)
    assert fed == prompt["input_ids"]


@pytest.mark.parametrize(
    ("column", "reason", "detail"),
    [
        (3, "chat_template_kwargs is not an object", "int 3"),
        ("[1]", "chat_template_kwargs is not an object", "str '[1]'"),
        ({"tools": []}, "chat_template_kwargs cannot be used", "tools is set by jaxtune itself"),
        ({"a b": 1}, "chat_template_kwargs cannot be used", "'a b' is no name of a variable"),
        ({"mood": "<|im_end|>"}, "chat_template_kwargs holds a special token", "'<|im_end|>'"),
    ],
)
def test_a_row_with_other_arguments_is_dropped(
    tokenizer: Tokenizer, column: Any, reason: str, detail: str
) -> None:
    found = row_of(resolve("chat", tokenizer), column)
    assert isinstance(found, Dropped)
    assert found.reason == reason
    assert detail in found.detail


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_the_config_refuses_what_is_set_otherwise(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set by jaxtune itself; leave it out"):
        Config(chat_template_kwargs={name: 1})


def test_the_config_refuses_what_json_cannot_hold() -> None:
    import datetime

    with pytest.raises(
        ConfigError, match=r"day is 2024-07-26 \(date\), which JSON cannot hold; quote"
    ):
        Config(chat_template_kwargs={"day": datetime.date(2024, 7, 26)})
    with pytest.raises(ConfigError, match="JSON cannot hold"):
        Config(chat_template_kwargs={"x": float("nan")})


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_every_format_of_conversations_has_the_column(record: dict[str, Any]) -> None:
    from jaxtune.data.formats import detect

    name = detect(record)
    assert name is not None
    noun = to_noun(name, {**record, "chat_template_kwargs": {"level": "high"}}, {}, "f")
    assert isinstance(noun, Conversation)
    assert noun.template_kwargs == {"level": "high"}
    mapped = to_noun(name, {**record, "how": '{"level": 1}'}, {"chat_template_kwargs": "how"}, "f")
    assert isinstance(mapped, Conversation)
    assert mapped.template_kwargs == {"level": 1}


def test_the_cache_and_the_fingerprint_know_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from jaxtune.config import DatasetConfig

    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}))
    entry = DatasetConfig(path=str(file))
    plain, high = (resolve("chat", tokenizer, kwargs=k) for k in ({}, {"level": "high"}))
    assert plain.fingerprint != high.fingerprint
    keys = {cache_key(entry, PreprocessConfig(tokenizer, each)) for each in (plain, high)}
    assert len(keys) == 2
    (row,) = preprocess(entry, PreprocessConfig(tokenizer, high))
    assert row.text.startswith("level high\n")
