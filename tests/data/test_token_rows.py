"""Rows that come as token ids: what is trained of them, what is refused, HF's loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune import preview
from jaxtune.config import DatasetConfig
from jaxtune.data.dataset import open_dataset
from jaxtune.data.preprocess import PreprocessConfig, cache_key
from jaxtune.data.report.data_report import report
from jaxtune.data.schema import Dropped, WeightedTokens
from jaxtune.data.templating.template import resolve
from jaxtune.data.token_rows import token_row
from jaxtune.data.tokenizer import load_tokenizer

IDS = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("columns", "ids", "weights"),
    [
        ({}, IDS, [0, 1, 1, 1, 1]),  # nothing predicts the first
        ({"labels": [-100, -100, 7, 8, 9]}, IDS, [0, 0, 1, 1, 1]),
        ({"labels": None, "loss_mask": [0, 0, 1, 0.5, True]}, IDS, [0, 0, 1, 0.5, 1]),
        ({"assistant_masks": [False, False, True, True, False]}, IDS, [0, 0, 1, 1, 0]),
        ({"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [0, 1, 1, 0, 1]},
         IDS, [0, 0, 1, 0, 1]),  # as TRL: the product
        ({"labels": [-100, 6, 7, 8, 9], "loss_mask": [1, 1, 1, 0, 2]}, IDS, [0, 1, 1, 0, 2]),
        ({"attention_mask": [0, 1, 1, 1, 0], "labels": [-100, 6, 7, 8, -100]},
         [6, 7, 8], [0, 1, 1]),
        ({"position_ids": [0, 1, 2, 3, 4], "attention_mask": [1] * 5}, IDS, [0, 1, 1, 1, 1]),
        ({"position_ids": [0, 0, 1, 2, 3], "attention_mask": [0, 1, 1, 1, 1]},
         IDS[1:], [0, 1, 1, 1]),  # padded on the left
    ],
)  # fmt: skip
def test_what_is_trained(columns: dict[str, Any], ids: list[int], weights: list[float]) -> None:
    row = token_row({"input_ids": IDS, **columns})
    assert isinstance(row, WeightedTokens)
    assert (row.ids.tolist(), row.weights.tolist()) == (ids, weights)
    assert (row.ids.dtype, row.weights.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"input_ids": None}, "input_ids is not a list of whole numbers: got null"),
        ({"input_ids": "text"}, "input_ids is not a list of whole numbers: got text"),
        ({"input_ids": [1, 2.5]}, "input_ids is not a list of whole numbers: got [1, 2.5]"),
        ({"input_ids": [[1], [2]]}, "input_ids is not a list of whole numbers: got [[1], [2]]"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids is not a list of whole numbers"),
        ({"input_ids": [1, 10**30]}, "input_ids is not a list of whole numbers"),
        ({"input_ids": [1, 2**31]}, "input_ids is not a list of whole numbers"),
        ({"input_ids": IDS, "labels": [1]},
         "columns of tokens differ in length: input_ids 5, labels 1"),
        ({"input_ids": IDS, "labels": [6, 7, 8, 9, -100]},
         "labels are not those of input_ids: they are those of the next token; expected unshifted"),
        ({"input_ids": IDS, "labels": [5, 6, 1, 8, 9]},
         "labels are not those of input_ids: token 3 is 7, its label 1"),
        ({"input_ids": IDS, "loss_mask": [0, 0, 0, 0, -1]}, "a mask holds a number below 0"),
        ({"input_ids": IDS, "loss_mask": [0, 0, 0, 0, float("nan")]},
         "loss_mask is not a list of numbers: got [0, 0, 0, 0, nan]"),
        ({"input_ids": IDS, "labels": [-100] * 5}, "nothing to train: 5 tokens"),
        ({"input_ids": [1]}, "nothing to train: 1 token"),
        ({"input_ids": []}, "nothing to train: 0 tokens"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 0, 1, 1]},
         "attention_mask hides tokens between others"),
        ({"input_ids": IDS, "position_ids": [0, 1, 0, 1, 2]},
         "several examples in one row: position_ids start again; give each a row of its own"),
    ],
)  # fmt: skip
def test_what_is_refused(record: dict[str, Any], reason: str) -> None:
    row = token_row(record)
    assert isinstance(row, Dropped)
    assert ": ".join(filter(None, row)).startswith(reason)


def chat_row(answer: str = "Yes.") -> dict[str, Any]:
    tokenizer = load_tokenizer(str(tiny.TOKENIZER))
    question = tokenizer.encode("<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n")
    said = tokenizer.encode(f"{answer}<|im_end|>")
    return {"input_ids": question + said, "labels": [-100] * len(question) + said}


def write(path: Path, rows: list[dict[str, Any]]) -> DatasetConfig:
    path.write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(path=str(path))


def test_rows_of_ids_are_shown_counted_and_cut_like_others(tmp_path: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(str(tiny.TOKENIZER))
    row, long = chat_row(), chat_row("Well, " * 50)
    foreign = {"input_ids": [1, tokenizer.size]}
    entry = write(tmp_path / "rows.jsonl", [row, {**row, "text": "unread"}, long, foreign])
    argv = ["--dataset", entry.path, "--tokenizer_name", str(tiny.TOKENIZER), "--max_length", "64"]
    assert preview.main([*argv, "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown[0]["input_ids"] == row["input_ids"]
    assert shown[0]["trained"] == [float(label != -100) for label in row["labels"]]
    assert shown[0]["text"] == tokenizer.decode(row["input_ids"])
    assert shown[2]["dropped"].startswith("longer than max_length")
    assert shown[3]["dropped"] == (
        f"a token id is not in the tokenizer's vocabulary: id {tokenizer.size}; the tokenizer has "
        f"{tokenizer.size:,}"
    )
    assert preview.main(argv) == 0
    out = capsys.readouterr().out
    assert "[[Yes.<|im_end|>]]" in out
    assert "read as format 'tokens'" in out
    assert "2 rows that came as token ids: what is trained of them cannot be proven" in out

    template = resolve("auto", tokenizer)
    config = PreprocessConfig(tokenizer, template, max_length=64, truncation="truncate")
    cut = open_dataset([entry], config)
    assert (len(cut), report(cut)["not_provable"], report(cut)["truncated"]) == (3, 3, 1)
    assert report(cut)["stop_trained_share"] == pytest.approx(2 / 3)
    endless = write(tmp_path / "endless.jsonl", [row, {k: v[:-1] for k, v in row.items()}])
    found = report(open_dataset([endless], config))
    assert (found["no_stop_trained"], found["stop_trained_share"]) == (1, 0.5)
    whole = open_dataset([entry], config._replace(max_length=512))
    other = {**row, "labels": [-100, *row["input_ids"][1:]]}
    changed = write(tmp_path / "other.jsonl", [other, other, long, foreign])
    assert len({cache_key(entry, config), cache_key(changed, config)}) == 2
    assert open_dataset([changed], config._replace(max_length=512)).fingerprint != whole.fingerprint


@pytest.mark.torch
def test_the_loss_is_that_of_transformers_with_labels(tmp_path: Path) -> None:
    """Mean over all tokens whose label is not -100, each predicted by those before it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny.write_model(tmp_path / "model")
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    row = chat_row("Yes, at once.")
    row["labels"][3:5] = row["input_ids"][3:5]  # a second stretch
    with torch.no_grad():
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        expected = model(**batch).loss.item()
    ours = jt.load_model(tmp_path / "model").loss([row])
    assert ours.tokens == sum(label != -100 for label in row["labels"])
    assert ours.loss == pytest.approx(expected, abs=1e-5)  # float32 sums of 10 terms near 7
