"""What is remembered, undone, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxtune.config import DataError, JaxtuneError
from jaxtune.repl.history import Talk, answered, last_question, load, messages, save, undone

BOTH = ("base", "tuned")


def contents(talk: Talk, label: str, question: str | None = None) -> list[str]:
    return [message.content for message in messages(talk, label, question)]


def two_turns() -> Talk:
    talk = answered(Talk(system="Be short."), "one", {"base": "b1", "tuned": "t1"})
    return answered(talk, "two", {"tuned": "t2"})  # the base had no answer


def test_each_model_remembers_its_own() -> None:
    talk = two_turns()
    assert contents(talk, "base", "three") == ["Be short.", "one", "b1", "three"]
    assert contents(talk, "tuned", "three") == ["Be short.", "one", "t1", "two", "t2", "three"]


def test_undo_and_retry() -> None:
    talk = two_turns()
    assert contents(undone(talk), "tuned") == ["Be short.", "one", "t1"]
    assert undone(Talk()) == Talk()
    assert last_question(talk) == (undone(talk), "two")
    assert last_question(Talk()) is None
    unanswered = answered(talk, "three", {})
    assert unanswered.turns == talk.turns
    assert last_question(unanswered) == (talk, "three")
    assert undone(unanswered) == talk


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_what_is_saved_comes_back(tmp_path: Path, name: str) -> None:
    talk = two_turns()
    file = tmp_path / name
    save(talk, BOTH, str(file), overwrite=False)
    back = load(BOTH, str(file))
    for label in BOTH:
        assert messages(back, label) == messages(talk, label)
    assert contents(undone(back), "tuned") == ["Be short.", "one", "t1"]
    assert contents(undone(back), "base") == ["Be short.", "one", "b1"]
    alone = load(("model",), str(file))
    assert contents(alone, "model") == contents(talk, "tuned")
    row = json.loads(file.read_text())
    assert row["messages"][0] == {"role": "system", "content": "Be short."}
    assert list(row) == ["messages", "base"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("precious")
    with pytest.raises(DataError, match="is there already"):
        save(two_turns(), BOTH, str(file), overwrite=False)
    assert file.read_text() == "precious"
    save(two_turns(), BOTH, str(file), overwrite=True)
    assert "precious" not in file.read_text()
    with pytest.raises(DataError, match=r"ends in \.json or \.jsonl"):
        save(two_turns(), BOTH, str(tmp_path / "talk.txt"), overwrite=False)
    with pytest.raises(DataError, match="cannot be written"):
        save(two_turns(), BOTH, str(tmp_path / "no" / "talk.json"), overwrite=False)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with a question"),
        ({"messages": [{"role": "me", "content": "a"}]}, "role 'me'"),
        ({"messages": []}, "not a list of messages"),
        ({"text": "a"}, "needs 'messages'"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, row: Any, said: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(JaxtuneError, match=said):
        load(BOTH, str(file))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(BOTH, str(tmp_path / "nothing.json"))
    with pytest.raises(DataError, match="no such file"):
        load(BOTH, str(tmp_path))
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        load(BOTH, str(tmp_path / "empty.json"))


def test_two_models_that_were_asked_other_things(tmp_path: Path) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": t}
                for i, t in enumerate(texts)]  # fmt: skip

    file = tmp_path / "talk.json"
    row = {"messages": said("a", "1", "b", "2", "c", "3"), "base": said("x", "4", "c", "5")}
    file.write_text(json.dumps(row))
    back = load(BOTH, str(file))
    assert contents(back, "tuned") == ["a", "1", "b", "2", "c", "3"]
    assert contents(back, "base") == ["x", "4", "c", "5"]
    assert contents(undone(back), "base") == ["x", "4"]
