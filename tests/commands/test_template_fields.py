"""The config's fields about templates, as every door reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxtune import cli
from jaxtune.config import Config, dump, load
from jaxtune.data.open import open_template, open_tokenizer, stop_ids
from jaxtune.data.schema import Conversation, Message
from jaxtune.data.templating.masking import render

TOKENIZER = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model")
DATED = (
    "{{ strftime_now('%Y/%m/%d') }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ASKED = Conversation((Message("user", "Q"), Message("assistant", "A")))


def text(config: Config) -> str:
    template = open_template(
        config, open_tokenizer(config, TOKENIZER, note=cli.note), note=cli.note
    )
    (row,) = render(template, ASKED)
    return "".join(span.text for span in row)  # type: ignore[union-attr]


def test_the_date_is_shown_recorded_and_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(overrides={"template": DATED})
    assert text(config).startswith("2024/07/26")
    assert "writes today's date: 2024-07-26 (template_date)" in capsys.readouterr().err
    later = load(overrides={"template": DATED, "template_date": "2031-01-02"})
    assert text(later).startswith("2031/01/02")
    (tmp_path / "config.yaml").write_text(dump(later))
    assert load(tmp_path / "config.yaml") == later
    capsys.readouterr()
    text(load(overrides={"template": "alpaca"}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--add_tokens", "true"], True),
        (["--add_tokens"], True),
        (["--add_tokens", "false"], False),
        (["--add_tokens", "<a>", "<b>"], ("<a>", "<b>")),
        (["--add_tokens", '["<a>"]'], ("<a>",)),
    ],
)
def test_add_tokens_as_a_flag(given: list[str], expected: bool | tuple[str, ...]) -> None:
    config, _ = cli.parse(given, "preview", "", cli.Options)
    assert config.add_tokens == expected


def test_every_dataset_brings_its_tokens_and_its_stop(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = [{"path": "a.jsonl", "template": "phi3"}, {"path": "b.jsonl"}]
    config = load(overrides={"template": "alpaca", "add_tokens": True, "datasets": datasets})
    tokenizer = open_tokenizer(config, TOKENIZER, note=cli.note)
    assert list(tokenizer.added) == ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert "add_tokens: <|system|> = " in capsys.readouterr().err
    template = open_template(config, tokenizer, note=cli.note)
    assert stop_ids(config, tokenizer, template) == [
        tokenizer.eos_id,
        tokenizer.added["<|end|>"],
    ]


def test_no_input_has_words_of_its_own() -> None:
    config = load(
        overrides={
            "template": "{instruction} with {input}: {output}",
            "template_no_input": "{instruction} alone: {output}",
        }
    )
    assert text(config).startswith("Q alone: A")
