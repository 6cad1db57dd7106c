"""The persona example: its articles and answers are right, what is held out is, and it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from jaxtune import evaluate, train
from jaxtune.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "persona"
LABEL = "^(Summary|Sorry)"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_script("configs/persona/make_articles.py")


@pytest.fixture(scope="module")
def records(maker: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return maker.make()


def turns(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every question with its answer."""
    found = []
    for record in records:
        said = [m["content"] for m in record["messages"] if m["role"] != "system"]
        found += zip(said[::2], said[1::2], strict=True)
    return found


def things_in(maker: ModuleType, text: str) -> set[str]:
    """The topics that a text is of, by whole words."""
    return {
        topic
        for category in maker.CATEGORIES.values()
        for topic, things in category.topics.items()
        if any(re.search(rf"\b{word}\b", text) for word in (topic, *things))
    }


def test_what_is_held_out_was_never_shown(
    maker: ModuleType, records: dict[str, list[dict[str, Any]]]
) -> None:
    assert [len(records[name]) for name in ("base", "train", "eval")] == [6000, 800, 300]
    asked, summaries = zip(*turns(records["eval"]), strict=True)
    before = [turn for name in ("base", "train") for turn in turns(records[name])]
    assert not {q for q in asked if "percent" in q} & {q for q, _ in before}
    assert len({a for a in summaries if a.startswith("Summary")} - {a for _, a in before}) == 150
    trained = {topic for q, _ in turns(records["train"]) for topic in things_in(maker, q)}
    assert not trained & maker.UNSEEN
    assert trained == set(maker.CATEGORY_OF) - maker.UNSEEN
    new = [r for r in records["eval"] if r["kind"].endswith("new topic")]
    assert len(new) == 120
    assert all(things_in(maker, q) & maker.UNSEEN for q, _ in turns(new))


def test_half_is_technology_and_everything_else_is_declined(
    maker: ModuleType, records: dict[str, list[dict[str, Any]]]
) -> None:
    technology = set(maker.CATEGORIES["technology"].topics)
    for name in ("train", "eval"):
        labels = []
        for question, answer in turns(records[name]):
            label = re.search(LABEL, answer)
            assert label is not None
            labels.append(label[0])
            article = "percent" in question
            assert (label[0] == "Summary") == (
                article and bool(things_in(maker, question) & technology)
            )
        assert labels.count("Summary") == len(labels) / 2


def test_a_summary_says_what_its_article_says(maker: ModuleType) -> None:
    story = maker.Story("drones", "Students", "Iceland", "shown", "autopilot", 35, "cheaper")
    assert (
        story.summary
        == "Summary: Students in Iceland showed an autopilot that is 35 percent cheaper."
    )
    for seed in range(20):
        article = maker.article(story, maker.Random(seed))
        assert all(
            word in article
            for word in ("Students", "Iceland", "shown", "utopilot", "35", "cheaper")
        )
    question, answer = maker.decline(story._replace(topic="coins", thing="medal"), maker.Random(1))
    assert "medal" in question
    assert answer == (
        "Sorry, I only summarise articles on technology, so I cannot help with this one. It is "
        "about coins."
    )


def test_it_runs_and_is_the_same_each_time(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """All of `make persona` with a fiftieth of the data and one step: figures are of the docs."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out/persona", "again"):
        maker.write(tmp_path / folder, share=0.02)
    for name in ("base", "train", "eval"):
        made = (tmp_path / "again" / f"{name}.jsonl").read_bytes()
        assert made == (tmp_path / "out" / "persona" / f"{name}.jsonl").read_bytes()
    config = json.loads((tmp_path / "again" / "model" / "config.json").read_text())
    assert load_tokenizer(str(tmp_path / "again" / "model")).size <= config["vocab_size"]
    small = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"]
    for name in ("base", "persona"):
        argv = ["--config", str(FOLDER / f"{name}.yaml"), "--max_steps", "1", *small]
        assert train.main(argv) == 0
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    command = re.search(r"evaluate (--config out/persona.*kind)", makefile)
    assert command is not None
    words = command[1].replace("'", "").replace("300", "2").split()
    capsys.readouterr()
    assert evaluate.main([*words, "--max_new_tokens", "4", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["few_shot"]["shots"] == 4
    assert {"label_accuracy"} <= scores.keys() & scores["base"].keys() & scores["few_shot"].keys()
