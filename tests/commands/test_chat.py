"""`chat` with a model whose every answer is known."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from jaxtune import chat
from jaxtune.api.chat import ChatResult
from jaxtune.config import load
from jaxtune.data.templating.answer_text import Affixes
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.inference import generate
from jaxtune.repl import models as repl_models
from jaxtune.terminal.text import printable

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
SAID = "Yes, you can"
BEHIND = 2  # an id to decode behind


def test_one_prompt(parrot: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", str(parrot.folder), "--prompt", "Can I?"]
    assert chat.main(argv) == 0
    assert capsys.readouterr().out == f"{SAID}\n"


def test_a_run_directory_is_its_model(parrot: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["--model_name_or_path", str(parrot.folder.parent), "--prompt", "Hi"]) == 0
    assert capsys.readouterr().out == f"{SAID}\n"


def test_base_beside_tuned(parrot: Any, contrary: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", str(parrot.folder), "--base", str(contrary.folder)]
    assert chat.main([*argv, "--prompt", "Can I?"]) == 0
    assert capsys.readouterr().out == f"base: Sorry\ntuned: {SAID}\n"


def test_a_file_of_prompts(parrot: Any, contrary: Any, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hm?"}]
    rows = [{"prompt": "Can I?"}, {"messages": messages}, {"prompt": messages[1:]}]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model_name_or_path", str(parrot.folder), "--prompts", str(prompts)]
    assert chat.main([*argv, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    answer = {"response": SAID, "stopped": True, "tokens": 4}  # "Yes" "," " you" " can"
    given = ["Can I?", messages, messages[1:]]
    assert found == [{"prompt": prompt, **answer} for prompt in given]

    both = [*argv, "--output", str(output), "--base", str(contrary.folder)]
    assert chat.main([*both, "--max_new_tokens", "1"]) == 0
    first = json.loads(output.read_text().splitlines()[0])
    assert first == {
        "prompt": "Can I?", "response": "Yes", "stopped": False, "tokens": 1,
        "base": {"response": "Sorry", "stopped": False, "tokens": 1},
    }  # fmt: skip


def test_answers_without_an_output_file_are_json_lines(
    parrot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Can I?"}\n')
    assert chat.main(["--model_name_or_path", str(parrot.folder), "--prompts", str(prompts)]) == 0
    assert json.loads(capsys.readouterr().out)["response"] == SAID


def test_drawn_answers_repeat_with_their_seed(
    parrot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the answer to a prompt does not depend on what else is asked with it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Can I?"}\n{"prompt": "Can I?"}\n{"prompt": "Or not?"}\n')
    argv = ["--model_name_or_path", str(parrot.folder), "--max_new_tokens", "8"]
    argv += ["--temperature", "20", "--top_k", "500", "--top_p", "0.99"]

    def said(*more: str) -> list[str]:
        assert chat.main([*argv, *more]) == 0
        return capsys.readouterr().out.splitlines()

    file = ("--prompts", str(prompts))
    drawn = said(*file, "--sample_seed", "3")
    assert said(*file, "--sample_seed", "3") == drawn
    assert said(*file, "--sample_seed", "4") != drawn
    answers = [json.loads(line)["response"] for line in drawn]
    assert answers[0] != answers[1]  # a second draw for the same prompt
    alone = said("--prompt", "Can I?", "--sample_seed", "3")
    assert "\n".join(alone) == printable(answers[0])


def conversation(monkeypatch: pytest.MonkeyPatch, text: str, *models: Any) -> list[list[str]]:
    """Types `text`; gives what each answer was asked with, one list of contents per answer."""
    asked: list[list[str]] = []
    stream = repl_models.stream

    def remember(model: Any, words: Any, messages: Any, **more: Any) -> Any:
        asked.append([message.content for message in messages])
        return stream(model, words, messages, **more)

    monkeypatch.setattr(repl_models, "stream", remember)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    options = chat.ChatOptions(base=str(models[1].folder) if len(models) > 1 else None)
    config = load(overrides={"model_name_or_path": str(models[0].folder)})
    assert chat.run(config, options) == ChatResult([])
    return asked


def test_a_conversation_remembers_until_reset(
    parrot: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = conversation(monkeypatch, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", parrot)
    assert asked == [["one"], ["one", SAID, "two"], ["three"]]
    assert capsys.readouterr().out == f"{SAID}\n" * 3


def test_a_blank_of_the_template_is_no_part_of_an_answer(
    vicuna: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversation(monkeypatch, "one\ntwo\n", vicuna) == [["one"], ["one", SAID, "two"]]
    assert capsys.readouterr().out == f"{SAID}\n" * 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Can I?"}\n')
    assert chat.main(["--model_name_or_path", str(vicuna.folder), "--prompts", str(prompts)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"prompt": "Can I?", "response": SAID, "stopped": True, "tokens": 5}


def test_each_model_has_its_own_conversation(
    parrot: Any, contrary: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = conversation(monkeypatch, "one\ntwo\n", parrot, contrary)
    assert asked[2:] == [["one", "Sorry", "two"], ["one", SAID, "two"]]
    assert capsys.readouterr().out == f"base: Sorry\ntuned: {SAID}\n" * 2


def test_too_long_a_conversation_is_said_and_survived(
    parrot: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = conversation(monkeypatch, f"{'laptop ' * 300}\nshort\n", parrot)
    assert asked[1] == ["short"]
    said = capsys.readouterr()
    assert "the model has 256 positions" in said.err
    assert "/reset begins a new conversation" in said.err
    assert said.out == f"{SAID}\n"


def test_streamed_text_never_shows_half_a_character() -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    text = "né 12 € 日本"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # some characters are several tokens

    answers: list[generate.Generation] = []

    def text_of(ids: Iterable[int]) -> Generator[str, None, None]:
        text = generate.Detokenizer(tokenizer, BEHIND, (), Affixes())
        for i in ids:
            yield text.add([i], None)[0]
        last, answer = text.add([], "stop")
        assert answer is not None
        answers.append(answer)
        yield last

    pieces = list(filter(None, text_of(ids)))
    assert answers == [generate.Generation(text, True, len(ids))]
    assert "".join(pieces) == text
    assert len(pieces) > 4
    cut = list(text_of(ids[:-1]))
    assert "".join(cut) == tokenizer.decode(ids[:-1])  # what is left broken is shown at the end


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert chat.main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_refusals(parrot: Any, tmp_path: Path, copy_without: Callable[..., Path],
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = ("--model_name_or_path", parrot.folder)
    prompts = tmp_path / "prompts.jsonl"

    def of_file(text: str, *more: object) -> str:
        prompts.write_text(text)
        return refusal(capsys, *model, "--prompts", prompts, *more)

    assert "model_name_or_path is not set" in refusal(capsys, "--prompt", "Hi")
    assert "prompt: is empty" in refusal(capsys, *model, "--prompt", " ")
    both = ("--prompt", "Hi", "--prompts", prompts)
    assert "prompt and prompts exclude each other" in refusal(capsys, *model, *both)
    assert "is for the answers to --prompts" in refusal(capsys, *model, "--output", "out.jsonl")
    assert "no such file" in refusal(capsys, *model, "--prompts", tmp_path / "nothing.jsonl")
    assert f"{prompts}: there is no prompt in it" in of_file("\n")
    assert "there is no prompt in it" in of_file("")
    assert f"{prompts}:2: expected 'prompt'" in of_file('{"prompt": "Hi"}\n{"text": "Hi"}\n')
    said = of_file('{"prompt": 3}\n')
    assert f"{prompts}:1: 'prompt' is a number; expected text, or a list of messages" in said
    assert "'prompt' is true or false" in of_file('{"prompt": false, "id": 3}\n')
    assert "'prompt' is an object" in of_file('{"prompt": {}}\n')
    assert "prompt empty" in of_file('{"prompt": " "}\n')
    assert "prompt empty" in of_file('{"prompt": ""}\n')
    assert f"{prompts}:1: role 'me'" in of_file('{"messages": [{"role": "me", "content": "a"}]}\n')
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "ends with an answer" in of_file(json.dumps({"messages": answered}))
    assert "temperature" in refusal(capsys, *model, "--prompt", "Hi", "--temperature", "-1")
    assert "top_p" in refusal(capsys, *model, "--prompt", "Hi", "--top_p", "0")
    assert "sample_seed" in refusal(capsys, *model, "--prompt", "Hi", "--sample_seed", "-1")
    fine = '{"prompt": "Hi"}\n'
    assert "there is no folder" in of_file(fine, "--output", tmp_path / "no" / "out.jsonl")
    assert "is a folder" in of_file(fine, "--output", tmp_path)
    silent = copy_without(parrot.folder, "tokenizer.json")
    said = refusal(capsys, "--model_name_or_path", silent, "--prompt", "Hi")
    assert "no tokenizer.json" in said
