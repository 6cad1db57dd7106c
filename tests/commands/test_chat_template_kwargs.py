"""`chat_template_kwargs` in every command: a model that answers only if an argument arrives."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import jaxtune as jt
from jaxtune import chat, evaluate, preview
from jaxtune.config import ConfigError, DataError, load
from jaxtune.inference import load as inference
from jaxtune.server.prompts import chat_prompt

SAID = "Yes, you can"
# The parrot says its sentence behind a line end alone.
TEMPLATE = """{%- macro end() -%}{{- '\n' if mode | default('no') == 'loud'
    else ':' -}}{%- endmacro -%}
{%- for message in messages -%}{%- if message.role == 'assistant' -%}
{{- end() + message.content + eos_token -}}{%- else -%}{{- message.content -}}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{- end() -}}{%- endif -%}"""
LOUD = {"mode": "loud"}
ASKED = [{"role": "user", "content": "Can I?"}]


@pytest.fixture(scope="module")
def model(parrot: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reads_mode") / "hf"
    shutil.copytree(parrot.folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chat_takes_them_from_a_flag_and_from_each_prompt(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_name_or_path", model, "--max_new_tokens", "8"]
    assert chat.main([*argv, "--prompt", "Can I?", "--chat_template_kwargs.mode", "loud"]) == 0
    assert capsys.readouterr().out == f"{SAID}\n"
    rows = [
        {"prompt": "Can I?"},
        {"prompt": "Can I?", "chat_template_kwargs": LOUD},
        {"messages": ASKED, "chat_template_kwargs": json.dumps({**LOUD, "moed": 1})},
    ]
    assert chat.main([*argv, "--prompts", write(tmp_path / "prompts.jsonl", rows)]) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line)["response"] for line in out.splitlines()]
    assert answers[0] != SAID
    assert answers[1:] == [SAID, SAID]
    assert "never reads moed (1 prompt); it reads mode. Did you mean 'mode'?" in err
    refused = write(tmp_path / "refused.jsonl", [{**rows[1], "chat_template_kwargs": {"tools": 1}}])
    assert chat.main([*argv, "--prompts", refused]) == 2
    assert "refused.jsonl:1: chat_template_kwargs cannot be used, tools is set by" in (
        capsys.readouterr().err
    )


def test_a_misspelt_argument_and_a_reserved_one(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_name_or_path", model, "--max_new_tokens", "1", "--prompt", "Can I?"]
    assert chat.main([*argv, "--chat_template_kwargs", "{moode: loud}"]) == 0
    note = "chat_template_kwargs: template 'chat' never reads moode; it reads mode"
    assert note in capsys.readouterr().err
    assert chat.main([*argv, "--chat_template_kwargs", "{messages: []}"]) == 2
    assert "messages is set by jaxtune itself; leave it out" in capsys.readouterr().err


def test_python_takes_them_when_loading_and_with_each_call(model: str) -> None:
    loaded = jt.load_model(model)
    answer = partial(loaded.generate, max_new_tokens=8)
    assert answer("Can I?").text != SAID
    assert answer("Can I?", chat_template_kwargs=LOUD).text == SAID
    assert [a.text for a in answer(["A", ASKED], chat_template_kwargs=LOUD)] == [SAID, SAID]
    assert loaded.chat("Can I?", max_new_tokens=8, chat_template_kwargs=LOUD) == SAID
    assert len(loaded.messages) == 2
    with pytest.raises(DataError, match=r"prompts\[0\]: chat_template_kwargs cannot be used"):
        answer("Can I?", chat_template_kwargs={"bos_token": ""})
    always = jt.load_model(model, chat_template_kwargs=LOUD)
    assert always.generate("Can I?", max_new_tokens=8).text == SAID
    assert always.generate("?", max_new_tokens=8, chat_template_kwargs={"mode": 0}).text != SAID


def test_a_request_brings_its_own(model: str) -> None:
    config = load(overrides={"model_name_or_path": model})
    codec = inference.open_codec(config)
    served = inference.load_model(model, config, codec, inference.open_mesh(config))
    plain = chat_prompt(served, codec, ASKED, [], {})
    own = chat_prompt(served, codec, ASKED, [], LOUD)
    assert plain.ids != own.ids
    assert codec.tokenizer.decode(own.ids) == "Can I?\n"
    assert own.template is not None
    assert own.template.kwargs == LOUD
    with pytest.raises(ConfigError, match="chat_template_kwargs holds a special token"):
        chat_prompt(served, codec, ASKED, [], {"mode": codec.tokenizer.eos_token})


def test_evaluate_and_preview_read_the_column(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [*ASKED, {"role": "assistant", "content": SAID}], "chat_template_kwargs": own}
        for own in ({}, {"mode": "no", "moed": 1}, {"moed": 2})
    ]
    data = ["--model_name_or_path", model, "--dataset", write(tmp_path / "a.jsonl", rows)]
    data += ["--chat_template_kwargs.mode", "loud"]
    assert evaluate.main([*data, "--generate", "3", "--max_new_tokens", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    answers = [g["response"] for g in json.loads(out)["generations"]]
    assert [answer == SAID for answer in answers] == [True, False, True]
    assert "a.jsonl: chat_template_kwargs: template 'chat' never reads moed (2 rows)" in err
    assert preview.main([*data, "--json"]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert [text.partition("Yes")[0] for text in texts] == ["Can I?\n", "Can I?:", "Can I?\n"]
