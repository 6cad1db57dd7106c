"""`evaluate` against closed forms: a model whose logits and answers are known beforehand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxtune import evaluate, train
from jaxtune.config import load
from jaxtune.evaluate import EvaluateOptions

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "quickstart" / "model"
SAID = "Yes, you can"  # by the parrot, to everything


def dialogue(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


ROWS = [
    dialogue("Can I return it?", SAID),
    dialogue("Is it late?", "Sorry, we cannot take the Wren laptop back, 45 days have passed."),
    dialogue("Hello.", "Yes", "And?", "No"),
    dialogue("May I?", f"{SAID} "),  # a blank more is no other answer
    dialogue("A question that is longer than the others. Is it? " * 3, "12"),
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "desk.jsonl", ROWS)


def scores(model: Any, data: Path | None = None, options: dict[str, Any] | None = None,
           **more: Any) -> dict[str, Any]:  # fmt: skip
    values = {"model_name_or_path": str(getattr(model, "folder", model)), "max_length": 128, **more}
    if data is not None:
        values["dataset"] = str(data)
    return dict(evaluate.run(load(overrides=values), EvaluateOptions(**(options or {}))).scores)


def expected(parrot: Any, rows: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
    """(mean loss, accuracy, tokens) of the trained tokens, from transformers' text and f64."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    losses, hits = [], []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        trained, at = [], 0
        for message in row["messages"]:
            body = text.index(message["content"] + "<|im_end|>", at)
            at = body + len(message["content"] + "<|im_end|>")
            if message["role"] == "assistant":
                trained.append(range(body, at))
        ids = np.array(encoding["input_ids"])
        logits = parrot.logits(ids[:-1])
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, (start, _) in enumerate(encoding["offset_mapping"][1:]):
            if any(start in span for span in trained):
                losses.append(-logs[i, ids[i + 1]])
                hits.append(logs[i].argmax() == ids[i + 1])
    return float(np.mean(losses)), float(np.mean(hits)), len(losses)


def test_loss_is_the_token_weighted_mean(parrot: Any, data: Path) -> None:
    found = scores(parrot, data)
    loss, accuracy, tokens = expected(parrot, ROWS)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert found["eval_token_accuracy"] == pytest.approx(accuracy)
    assert found["eval_tokens_trained"] == tokens
    assert found["examples"] == len(ROWS)
    assert set(found) == {"eval_loss", "eval_perplexity", "eval_token_accuracy",
                          "eval_tokens_trained", "examples", "by_dataset"}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 3},
        {"packing": False},
        {"max_length": 256},
        {"mesh.tensor": 2, "mesh.fsdp": 1, "mesh.data": 4},
    ],
    ids=str,
)
def test_batches_padding_and_devices_change_nothing(
    parrot: Any, data: Path, more: dict[str, Any]
) -> None:
    loss, accuracy, tokens = expected(parrot, ROWS)
    found = scores(parrot, data, **more)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_token_accuracy"] == pytest.approx(accuracy)
    assert found["eval_tokens_trained"] == tokens


def test_each_data_set_and_all_together(parrot: Any, tmp_path: Path) -> None:
    entries = [
        {"path": str(write(tmp_path / "a.jsonl", ROWS[:2])), "name": "desk"},
        {"path": str(write(tmp_path / "b.jsonl", ROWS[2:]))},
    ]
    found = scores(parrot, eval_datasets=entries, options={"generate": 2})
    whole = expected(parrot, ROWS)
    assert found["eval_loss"] == pytest.approx(whole[0], rel=1e-5)
    for name, rows in (("desk", ROWS[:2]), ("b", ROWS[2:])):
        loss, _, tokens = expected(parrot, rows)
        assert found["by_dataset"][name]["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert found["by_dataset"][name]["eval_tokens_trained"] == tokens
        assert found["by_dataset"][name]["examples"] == len(rows)
    asked = [row["dataset"] for row in found["generations"]]
    assert asked == ["desk", "desk", "b", "b"]


def test_answers(parrot: Any, data: Path) -> None:
    found = scores(parrot, data, options={"generate": 5})
    assert [row["response"] for row in found["generations"]] == [SAID] * 5
    assert all(row["stopped"] for row in found["generations"])
    assert found["stop_rate"] == 1.0
    assert found["exact_match"] == pytest.approx(2 / 5)
    last = found["generations"][2]
    assert last["reference"] == "No"  # the last turn is asked for, with those before as context
    assert last["prompt"] == (
        "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_that_does_not_end_is_cut(parrot: Any, data: Path) -> None:
    found = scores(parrot, data, options={"generate": 1, "max_new_tokens": 2})
    assert found["stop_rate"] == 0.0
    assert found["generations"][0]["response"] == "Yes,"
    assert found["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("reference", "response", "exact", "rouge"),
    [
        ("a b c d", "a b c d", 1.0, 1.0),
        ("a b c d", " a b c d\n", 1.0, 1.0),
        ("a b c d", "a c", 0.0, 2 / 3),  # precision 1, recall 1/2
        ("a b c d", "d c b a", 0.0, 1 / 4),
        ("a b c d", "x", 0.0, 0.0),
        ("a b c d", "", 0.0, 0.0),
    ],
)
def test_comparison(reference: str, response: str, exact: float, rouge: float) -> None:
    found = evaluate.compare([reference], [response])
    assert found == {"exact_match": exact, "rougeL": pytest.approx(rouge)}
    both = evaluate.compare([reference, "q"], [response, "q"])
    assert both["rougeL"] == pytest.approx((rouge + 1) / 2)


def test_base_and_tuned_side_by_side(
    parrot: Any, contrary: Any, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"generate": 1, "base": str(contrary.folder)}
    found = scores(parrot, data, options=options)
    assert found["eval_loss"] == pytest.approx(expected(parrot, ROWS)[0], rel=1e-5)
    assert found["base"]["eval_loss"] == pytest.approx(expected(contrary, ROWS)[0], rel=1e-5)
    assert found["base"]["exact_match"] == 0.0
    shown = capsys.readouterr().out
    assert "base      Sorry\n" in shown
    assert f"tuned     {SAID} (right)\n" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["base", "tuned"] in lines
    assert ["exact", "match", "0.0%", "100.0%"] in lines
    assert f"model: {parrot.folder}" in shown


def test_random_base_is_what_training_began_with(parrot: Any, data: Path, tmp_path: Path) -> None:
    """Trained with learning rate 0, the exported model is the base."""
    base = parrot.folder.parent / "hf-source"  # config.json alone
    values = {"model_name_or_path": str(base), "tokenizer_name": str(TOKENIZER), "init": "random",
              "dataset": str(data), "max_length": 64, "seed": 5, "max_steps": 1,
              "learning_rate": 0.0, "per_device_train_batch_size": 1,
              "output_dir": str(tmp_path / "out")}  # fmt: skip
    done = train.run(load(overrides=values))
    config = tmp_path / "out" / "config.yaml"
    options = EvaluateOptions(base=str(base))
    found = evaluate.run(
        load(config, overrides={"model_name_or_path": str(done.model_dir)}), options
    ).scores
    assert found["eval_loss"] == found["base"]["eval_loss"]
    other = evaluate.run(
        load(config, overrides={"model_name_or_path": str(done.model_dir), "seed": 6}), options
    ).scores
    assert other["eval_loss"] == found["eval_loss"]
    assert other["base"]["eval_loss"] != found["base"]["eval_loss"]


def test_held_out_part_of_a_split(parrot: Any, data: Path) -> None:
    found = scores(parrot, data, eval_split=0.4, options={"generate": 9})
    assert found["examples"] == 2
    assert len(found["generations"]) == 2  # of the held-out rows, no more than there are


def test_one_process_one_device_one_object(parrot: Any, data: Path, tmp_path: Path) -> None:
    """The command itself: only JSON on stdout, the same numbers on one device."""
    ignored = write(tmp_path / "ignored.jsonl", [dialogue("a", "b")])
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {parrot.folder}\neval_datasets: {ignored}\n")
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune.evaluate", "--config", str(config), "--dataset", str(data),
         "--generate", "5", "--json"],
        capture_output=True, text=True, timeout=240, check=False, cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = scores(parrot, data, options={"generate": 5})
    assert found["eval_loss"] == pytest.approx(here["eval_loss"], rel=1e-5)
    assert found["generations"] == here["generations"]
    assert list(found["by_dataset"]) == ["desk"]


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert evaluate.main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_refusals(parrot: Any, data: Path, tmp_path: Path, copy_without: Callable[..., Path],
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = ("--model_name_or_path", parrot.folder)
    assert "model_name_or_path is not set" in refusal(capsys, "--dataset", data)
    assert "dataset is not set" in refusal(capsys, *model)
    assert "no such file" in refusal(capsys, *model, "--dataset", tmp_path / "nothing.jsonl")
    absent = refusal(capsys, "--model_name_or_path", tmp_path / "nothing", "--dataset", data)
    assert str(tmp_path / "nothing") in absent
    unknown = write(tmp_path / "odd.jsonl", [{"messages": []}, {"question": "?"}])
    assert f"{unknown}:2" in refusal(capsys, *model, "--dataset", unknown)
    plain = write(tmp_path / "plain.jsonl", [{"text": "Some text."}])
    said = refusal(capsys, *model, "--dataset", plain, "--generate", 1)
    assert f"{plain}: has no question to answer" in said
    assert "generate" in refusal(capsys, *model, "--dataset", data, "--generate", -1)
    weightless = copy_without(parrot.folder, "*.safetensors")
    said = refusal(capsys, "--model_name_or_path", weightless, "--dataset", data)
    assert "safetensors" in said


def test_a_base_of_another_kind(parrot: Any, data: Path, copy_without: Callable[..., Path],
                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    base = copy_without(parrot.folder)
    argv = ("--model_name_or_path", parrot.folder, "--dataset", data, "--base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    said = refusal(capsys, *argv, "--init", "random")
    assert "tensors" in said  # the folder has weights, and they do not fit
    (base / "model.safetensors").unlink()
    said = refusal(capsys, *argv, "--init", "random")
    assert "has 500 embedding rows, but meets token id" in said
    other = json.loads((base / "tokenizer.json").read_text())
    ids = other["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (base / "tokenizer.json").write_text(json.dumps(other))
    assert "its tokenizer has other ids than" in refusal(capsys, *argv, "--init", "random")
