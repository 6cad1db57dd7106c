"""The quickstart's data: checked in is what the script makes, and the policies are right."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from jaxtune.data.tokenizer import load_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "quickstart"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_script("configs/quickstart/make_data.py")


def rows(name: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def cases_in_text(maker: ModuleType, messages: list[dict[str, str]]) -> set[tuple[str, str]]:
    """(product, detail) of each question, read from its words alone."""
    subjects = [*maker.PRODUCTS, *maker.ERRANDS]
    details = {detail for topic in maker.TOPICS.values() for _, detail in topic.cases}
    found, subject = set(), ""
    for message in messages:
        if message["role"] == "user":
            text = message["content"]
            subject = next((s for s in subjects if s in text), subject)
            found.add((subject, max((d for d in details if d in text), key=len)))
    return found


def test_the_script_makes_what_is_checked_in(maker: ModuleType, tmp_path: Path) -> None:
    maker.write(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "model/tokenizer_config.json",
                 "model/chat_template.jinja"):  # fmt: skip
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    # Versions of the tokenizers library may lay the file out differently; the tokenizer is its
    # vocabulary, merges and word pattern.
    made, kept = (json.loads((f / "model/tokenizer.json").read_text()) for f in (tmp_path, FOLDER))
    assert made["model"]["vocab"] == kept["model"]["vocab"]
    assert made["model"]["merges"] == kept["model"]["merges"]
    assert made["pre_tokenizer"] == kept["pre_tokenizer"]


def test_no_held_out_case_is_trained(maker: ModuleType) -> None:
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    assert (len(train), len(held_out)) == (2000, 200)
    trained = set.union(*(cases_in_text(maker, messages) for messages in train))
    asked = set.union(*(cases_in_text(maker, messages) for messages in held_out))
    assert len(asked) > 180
    assert not asked & trained
    # Each half of a held-out case is trained: what is new is their combination.
    assert {subject for subject, _ in asked} <= {subject for subject, _ in trained}
    assert {detail for _, detail in asked} <= {detail for _, detail in trained}


def test_no_question_is_repeated_in_evaluation(maker: ModuleType) -> None:
    def asked(messages: list[dict[str, str]]) -> tuple[str, ...]:
        return tuple(m["content"] for m in messages if m["role"] == "user")

    held_out = [asked(messages) for messages in rows("eval.jsonl")]
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & {asked(messages) for messages in rows("train.jsonl")}


@pytest.mark.parametrize(
    ("topic", "subject", "detail", "expected"),
    [
        ("returns", "Wren laptop", "12 days", "Yes, you can return the Wren laptop. Returns are "
         "open for 30 days and 12 have passed, so you have 18 days left."),
        ("returns", "Wren laptop", "1 day", "1 has passed, so you have 29 days left."),
        ("returns", "Wren laptop", "29 days", "so you have 1 day left."),
        ("returns", "Wren laptop", "30 days", "so today is the last day."),
        ("returns", "Wren laptop", "31 days", "Sorry, we cannot take the Wren laptop back."),
        ("returns", "Heron camera", "45 days", "Returns are open for 30 days and 45 have passed."),
        ("warranty claims", "Finch headset", "12 months", "Yes, we repair the Finch headset"),
        ("warranty claims", "Finch headset", "13 months", "Sorry, the repair of the Finch headset"),
        ("warranty claims", "Finch monitor", "13 months", "Yes, we repair the Finch monitor"),
        ("warranty ends", "Kestrel television", "2021", "60 months. From 2021, that is until 2026"),
        ("shipping", "Plover phone", "Norway", "takes 5 days and costs 9 euros."),
        ("shipping", "Plover printer", "Norway", "takes 5 days and costs 32 euros."),
        ("faults", "Heron phone", "does not turn on", "Please charge it for 30 minutes"),
        ("faults", "Heron router", "does not turn on", "Please unplug it for 1 minute"),
        ("errands", "sell me fresh bread", "today", "so I cannot help with bread."),
    ],
)  # fmt: skip
def test_policies(maker: ModuleType, topic: str, subject: str, detail: str, expected: str) -> None:
    assert (subject, detail) in maker.TOPICS[topic].cases
    assert expected in maker.TOPICS[topic].answer(subject, detail)


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_dialogues_fit_the_model(name: str) -> None:
    config = json.loads((FOLDER / "model" / "config.json").read_text())
    tokenizer = load_tokenizer(str(FOLDER / "model"))
    assert tokenizer.size == config["vocab_size"]
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["pad_token_id"] == tokenizer.pad_id
    for messages in rows(name):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        assert len(tokenizer.encode(text)) <= 128
        assert all(len(m["content"].split()) <= 35 for m in messages)


def test_the_folder_is_small_and_plain() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 3_000_000
    assert {p.suffix for p in files} == {".py", ".jsonl", ".json", ".jinja", ".yaml"}
