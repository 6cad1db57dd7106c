"""Commands change what is asked: with voices that remember it, and no terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxtune.config import DataError
from jaxtune.data.schema import Message
from jaxtune.inference.generate import Generation
from jaxtune.repl.models import ChatModel, ChatSettings
from jaxtune.repl.repl import run_conversation


class Asked(NamedTuple):
    who: str
    contents: list[str]
    settings: ChatSettings


class Scene:
    """What was asked, and what was shown, when `text` was typed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capsys = monkeypatch, capsys
        self.asked: list[Asked] = []
        self.labels = ["model"]
        self.adapter = False

    def _say(self, who: str) -> Any:
        def say(
            messages: Sequence[Message], settings: ChatSettings
        ) -> Generator[str, None, Generation]:
            contents = [message.content for message in messages]
            again = any(asked.contents == contents for asked in self.asked)
            if "too long" in contents[-1] or (again and contents[-1] == "once only"):
                raise DataError("the model has 256 positions.")
            self.asked.append(Asked(who, contents, settings))
            yield f"{who} "
            yield str(len(self.asked))
            most = settings.max_new_tokens
            tokens = most - 1 if contents[-1] == "cut full" else most
            return Generation(f"{who} {len(self.asked)}", "cut" not in contents[-1], tokens)

        return say

    def __call__(self, *lines: str) -> tuple[str, str]:
        self.asked.clear()
        self.patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        voices = [
            ChatModel(name, self._say(name), self._say("bare") if self.adapter else None)
            for name in self.labels
        ]
        run_conversation(voices, ChatSettings(seed=5))
        found = self.capsys.readouterr()
        return found.out, found.err

    @property
    def contents(self) -> list[list[str]]:
        return [asked.contents for asked in self.asked]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scene:
    return Scene(monkeypatch, capsys)


def test_system(scene: Scene) -> None:
    _, said = scene("one", "/system Be short.", "two", "/system", "/system -", "three", "/system")
    assert scene.contents == [
        ["one"],
        ["Be short.", "one", "model 1", "two"],
        ["one", "model 1", "two", "model 2", "three"],
    ]
    assert "system: Be short." in said
    assert said.endswith("system: none\n")


def test_reset_keeps_the_system_prompt(scene: Scene) -> None:
    scene("/system Be short.", "one", "/reset", "two")
    assert scene.contents[-1] == ["Be short.", "two"]


def test_undo_and_retry(scene: Scene) -> None:
    _, said = scene("one", "two", "/undo", "three", "/retry", "/undo", "/undo", "/undo", "/retry")
    assert scene.contents == [
        ["one"],
        ["one", "model 1", "two"],
        ["one", "model 1", "three"],
        ["one", "model 1", "three"],
    ]
    assert "a greedy answer comes out the same" in said
    assert "there is nothing to take back" in said
    assert "there is no question to ask again" in said


def test_every_draw_has_a_seed_of_its_own(scene: Scene) -> None:
    scene("/temperature 0.7", "one", "/retry", "two", "/seed 40", "three", "four")
    assert [asked.settings.seed for asked in scene.asked] == [5, 6, 7, 40, 41]
    assert {asked.settings.temperature for asked in scene.asked} == {0.7}


def test_settings(scene: Scene) -> None:
    lines = ("/temperature", "/top_p 0.9", "/top_k 3", "/repetition_penalty 1.1")
    _, said = scene(*lines, "/max_new_tokens 7", "/top_p 2", "/top_k x", "/seed 1.5", "one")
    assert scene.asked[0].settings == ChatSettings(0.0, 3, 0.9, 1.1, 5, 7)
    assert "temperature: 0.0 (greedy)" in said
    assert "top_p is 2.0; expected more than 0, at most 1" in said
    assert "/top_k: expected a whole number; got 'x'" in said
    assert "/seed: expected a whole number; got '1.5'" in said
    assert "max_new_tokens is 0" in scene("/max_new_tokens 0")[1]


def test_save_and_load(scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    _, said = scene("/save x.json", "one", f"/save {file}", "two", f"/save {file}", "/save")
    assert "there is nothing said yet" in said
    assert said.count(f"saved: {file}") == 2  # its own file it may write again
    assert "/save needs FILE behind it" in said
    assert len(json.loads(file.read_text())["messages"]) == 4
    _, said = scene(f"/load {file}", "three", f"/save {file}", "/load nothing.json")
    assert scene.contents == [["one", "model 1", "two", "model 2", "three"]]
    assert "is there already" in said
    assert "nothing.json: no such file" in said


def test_adapter(scene: Scene) -> None:
    assert "/adapter: this model has no adapter" in scene("/adapter off")[1]
    scene.adapter = True
    out, said = scene(
        "one", "/adapter off", "two", "/adapter", "/adapter on", "three", "/adapter x"
    )
    assert [asked.who for asked in scene.asked] == ["model", "bare", "model"]
    assert out == "model 1\nbare 2\nmodel 3\n"
    assert "expected on or off; got 'x'" in said
    assert "/adapter on|off" in scene("/help")[1]


def test_two_models_are_labelled(scene: Scene) -> None:
    scene.labels = ["base", "tuned"]
    out, _ = scene("one", "two")
    assert out == "base: base 1\ntuned: tuned 2\nbase: base 3\ntuned: tuned 4\n"
    assert scene.contents[-1] == ["one", "tuned 2", "two"]
    assert scene.asked[0].settings.seed == scene.asked[1].settings.seed


def test_too_long_is_said_and_survived(scene: Scene) -> None:
    out, said = scene("too long", "short", "/undo", "/retry")
    assert scene.contents == [["short"]]
    assert "256 positions. /reset begins a new conversation, /undo" in said
    assert "there is no question" in said
    assert "Traceback" not in said + out


def test_a_retry_that_fails_loses_nothing(scene: Scene) -> None:
    scene("one", "/retry", "two")
    assert scene.contents[-1] == ["one", "model 2", "two"]
    _, said = scene("once only", "/retry", "two")
    assert "256 positions" in said
    assert scene.contents[-1] == ["once only", "model 1", "two"]
    scene("one", "too long", "/retry", "two")
    assert scene.contents[-1] == ["one", "model 1", "two"]


def test_a_cut_answer_says_why(scene: Scene) -> None:
    _, said = scene("cut", "cut full")
    assert "cut after 512 tokens: /max_new_tokens N allows more" in said
    assert "the model has no position left. /reset begins" in said


def test_wrong_words(scene: Scene) -> None:
    _, said = scene("/reset now", "/rset", "\x1b[2Jhello", "/\x1b[2J")
    assert "/reset takes nothing behind it; got 'now'" in said
    assert "Did you mean '/reset'?" in said
    assert "\x1b" not in said
