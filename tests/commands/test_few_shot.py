"""`evaluate --few_shot` and `--label`: what a model is shown, what is compared, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jaxtune import evaluate
from jaxtune.config import load
from jaxtune.evaluate import EvaluateOptions

TOKENIZER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
SYSTEM = {"role": "system", "content": "Answer."}


def asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TRAIN = [asked(f"Example {i}?", f"No, {i}.") for i in range(8)]
EVAL = [
    [SYSTEM, *asked("Can I return it?", "Yes, you can")],
    [SYSTEM, *asked("Is it late?", "Sorry, it is.")],
    asked("May I?", "Yes, of course."),
]


def write(path: Path, conversations: list[list[dict[str, str]]]) -> str:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    train, held_out = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "eval.jsonl", EVAL)
    return {"dataset": train, "eval_datasets": held_out}


def measured(model: Path, fields: dict[str, Any], **options: Any) -> tuple[dict[str, Any], str]:
    values = {"model_name_or_path": str(model), "max_length": 64, **fields}
    result = evaluate.run(load(overrides=values), EvaluateOptions(**options))
    return dict(result.scores), str(result)


def test_the_same_examples_stand_before_every_question(
    parrot: Any, contrary: Any, data: dict[str, str]
) -> None:
    """Its logits follow from the last token alone, so examples change no score of a parrot: what is
    counted are the answers of the data, and not those of the examples."""
    options = {"base": str(contrary.folder), "generate": 9, "label": "^(Yes|Sorry)"}
    plain, _ = measured(parrot.folder, data, **options)
    found, shown = measured(parrot.folder, data, few_shot=2, **options)
    few = found.pop("few_shot")
    assert found == plain
    assert few["shots"] == 2
    assert [row["dataset"] for row in few["shot_rows"]] == ["train"] * 3
    examples = [turn for row in few["shot_rows"][:2] for turn in TRAIN[row["row"]]]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for row, turns in zip(few["generations"], EVAL, strict=True):
        lead = turns[:-2]
        assert row["prompt"] == tokenizer.apply_chat_template(
            [*lead, *examples, turns[-2]], tokenize=False, add_generation_prompt=True
        )
    same = ("eval_tokens_trained", "examples", "questions", "exact_match", "label_accuracy")
    assert [few[name] for name in same] == [plain["base"][name] for name in same]
    assert few["eval_loss"] == pytest.approx(plain["base"]["eval_loss"], rel=1e-6)
    change = few["difference"]["eval_loss"]["value"]
    assert change == pytest.approx(plain["difference"]["eval_loss"]["value"], rel=1e-5)
    assert "with 2 examples in each prompt of base" in shown
    assert "base, 2-shot" in shown


def test_examples_have_the_roles_that_the_config_maps(
    parrot: Any, data: dict[str, str], tmp_path: Path
) -> None:
    turns = [[{**turn, "role": {"user": "pupil"}.get(turn["role"], turn["role"])} for turn in each]
             for each in TRAIN]  # fmt: skip
    fields = {**data, "dataset": write(tmp_path / "pupils.jsonl", turns), "roles.pupil": "user"}
    found, _ = measured(parrot.folder, fields, few_shot=1, generate=1)
    (row, _) = found["few_shot"]["shot_rows"]
    assert f"Example {row['row']}?" in found["few_shot"]["generations"][0]["prompt"]


def test_without_a_base_it_is_the_model_itself(parrot: Any, data: dict[str, str]) -> None:
    found, shown = measured(parrot.folder, data, few_shot=1)
    assert found["few_shot"]["difference"]["eval_loss"]["value"] == pytest.approx(0, abs=1e-6)
    assert "model, 1-shot" in shown
    other, _ = measured(parrot.folder, {**data, "seed": 1}, few_shot=1)
    assert other["few_shot"]["shot_rows"] != found["few_shot"]["shot_rows"]


def test_a_row_is_no_example_of_itself(parrot: Any, tmp_path: Path) -> None:
    """Without training data the examples are of what is evaluated."""
    one = write(tmp_path / "all.jsonl", TRAIN[:3])
    found, _ = measured(parrot.folder, {"datasets": [{"path": one}]}, few_shot=2, generate=3)
    for row, turns in zip(found["few_shot"]["generations"], TRAIN, strict=False):
        question = turns[0]["content"]
        assert row["prompt"].count("<|im_start|>user") == 3
        assert row["prompt"].count(question) == 1
        assert row["prompt"].endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")


def test_label_accuracy_is_of_the_answers_that_have_one(parrot: Any, tmp_path: Path) -> None:
    """The parrot says "Yes, you can" to everything."""
    said = ("Yes.", "yes, but", "No.", "Yes, you can", "No one knows.", "Perhaps.")
    rows = write(tmp_path / "rows.jsonl", [asked(f"Q {i}?", text) for i, text in enumerate(said)])
    options = {"generate": 9, "dataset": rows}
    found, shown = measured(parrot.folder, {}, label="(?i)^(yes|no)\\b", **options)
    assert found["label_accuracy"] == pytest.approx(2 / 5)  # "yes" is not "Yes"; "Perhaps" has none
    low, high = found["intervals"]["label_accuracy"]
    assert low < 2 / 5 < high
    assert "label accuracy" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--few_shot", "12"], "few_shot: 12 examples need 13 different conversations"),
        (["--few_shot", "7", "--max_length", "300"], "few_shot: with 7 examples before them"),
        (["--few_shot", "1", "--train_on", "all"], "the loss would be of the examples too"),
        (["--few_shot", "-1"], "few_shot: Input should be greater than or equal to 0"),
        (["--label", "^(Yes"], "label: is no regular expression"),
        (["--label", "^Yes"], "label: is of generated answers. Give --generate N as well."),
        (["--label", "^Never", "--generate", "3"], "label: no answer of the data matches '^Never'"),
    ],
)
def test_refusals(
    parrot: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """The parrot has 256 positions."""
    long = [asked(f"{i} " + "is it so? " * 12, "No.") for i in range(9)]
    train, held_out = write(tmp_path / "t.jsonl", long), write(tmp_path / "e.jsonl", EVAL)
    argv = ["--model_name_or_path", str(parrot.folder), "--dataset", held_out]
    argv = [*argv[:2], "--datasets", f"[{{path: {train}}}]", "--eval_datasets", held_out, *flags]
    assert evaluate.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    if "before them" in message:
        assert "do not fit the 256 positions of the model" in error
        assert "Set a smaller few_shot" in error
