"""`jaxtune.load_model` on a model whose every answer is known, beside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands.conftest import Parrot, contrary, parrot

import jaxtune as jt
from jaxtune import chat, evaluate

__all__ = ["contrary", "parrot"]

SAID = "Yes, you can"
ROWS = [
    {"instruction": "Can I?", "output": SAID},
    {"instruction": "Can I go?", "input": "Now.", "output": "Yes, you go"},
]


@pytest.fixture(scope="module")
def model(parrot: Parrot) -> Any:
    return jt.load_model(parrot.folder)


def test_answers_are_those_of_chat(
    parrot: Parrot, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hm?"}]
    prompts = ["Can I?", messages, "Or not?"]
    drawn = {"temperature": 20.0, "top_k": 500, "max_new_tokens": 8, "seed": 3}
    greedy, hot = model.generate(prompts), model.generate(prompts, **drawn)
    assert [answer.text for answer in greedy] == [SAID] * 3
    assert model.generate("Can I?") == greedy[0]  # one prompt, one result
    assert model.generate(messages) == greedy[1]
    assert model.generate("Can I?", stop=["you"]).text == "Yes, "
    assert model.generate("Can I?", stop="you").text == "Yes, "  # one string, not its letters
    assert model.generate(iter(prompts)) == greedy
    assert model.generate([]) == []
    assert capsys.readouterr() == ("", "")

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    argv = ["--model_name_or_path", str(parrot.folder), "--prompts", str(file)]
    for answers, flags in (
        (greedy, []),
        (
            hot,
            [
                "--temperature",
                "20",
                "--top_k",
                "500",
                "--max_new_tokens",
                "8",
                "--sample_seed",
                "3",
            ],
        ),
    ):
        assert chat.main([*argv, *flags]) == 0
        rows = map(json.loads, capsys.readouterr().out.splitlines())
        assert [(row["response"], row["stopped"], row["tokens"]) for row in rows] == answers


def test_a_conversation_is_kept_until_reset(model: Any) -> None:
    model.reset(system="Be short.")
    assert [model.chat("Can I?"), model.chat("Sure?")] == [SAID, SAID]
    assert [message["role"] for message in model.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert model.messages[2]["content"] == SAID
    with pytest.raises(jt.DataError, match="the model has 256 positions"):
        model.chat("laptop " * 300)
    assert len(model.messages) == 5  # a message without an answer is not kept
    model.reset()
    assert model.messages == []


def test_loss_is_that_of_evaluate(
    parrot: Parrot,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    loss = model.loss(ROWS)
    assert capsys.readouterr() == ("", "")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["--model_name_or_path", str(parrot.folder), "--dataset", str(file), "--json"]
    assert evaluate.main(argv) == 0
    scores = json.loads(capsys.readouterr().out)
    names = ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_tokens_trained")
    assert loss[:4] == pytest.approx([scores[name] for name in names])
    alone = [model.loss([row]) for row in ROWS]
    assert (loss.examples, loss.tokens) == (2, sum(each.tokens for each in alone))
    weighted = sum(each.loss * each.tokens for each in alone)
    assert loss.loss == pytest.approx(weighted / loss.tokens)
    assert alone[0].accuracy == 1 > alone[1].accuracy  # the parrot does not say "go"


def test_folders_of_a_run_and_configs(parrot: Parrot) -> None:
    run = jt.load_model(str(parrot.folder.parent), jt.load_config(dtype="float32"), max_length=64)
    assert run.generate("Hm?").text == SAID
    assert (run.config.dtype, run.config.max_length) == ("float32", 64)


def test_refusals(parrot: Parrot, model: Any, tmp_path: Path) -> None:
    with pytest.raises(jt.ConfigError, match="generate: no such argument: heat; there are max_new"):
        model.generate("Hm?", heat=1.0)
    with pytest.raises(jt.DataError, match=r"prompts\[1\]: 'prompt' is a number"):
        model.generate(["Hm?", 3])
    with pytest.raises(jt.DataError, match=r"prompts\[0\]: ends with an answer"):
        model.generate([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    for prompts, came in (({"role": "user", "content": "a"}, "dict"), (None, "NoneType")):
        with pytest.raises(jt.DataError, match=f"prompts: expected a text, .* got {came}"):
            model.generate(prompts)
    with pytest.raises(jt.ConfigError, match="temperature is -1"):
        model.generate("Hm?", temperature=-1)
    with pytest.raises(jt.DataError, match="rows"):
        model.loss([])
    with pytest.raises(jt.DataError, match=r"^data\[0\]: no known format .*: question"):
        model.loss([{"question": "Hm?"}])
    with pytest.raises(jt.JaxtuneError, match="nothing-there"):
        jt.load_model(tmp_path / "nothing-there")
