"""`preview` from outside: what it prints, in which shape, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data.made import NAMES, byte_level_backend, save

from jaxtune import preview

ROWS = [
    {"instruction": "Name a prime.", "input": "", "output": "Seven."},
    {"instruction": "Add.", "input": "1 + 1", "output": "Two."},
    {"instruction": "Nothing?", "input": "", "output": ""},
    {"instruction": "Long?", "input": "", "output": "so " * 200},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "tokenizer", byte_level_backend(), **NAMES)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--dataset", str(folder / "data.jsonl"), "--tokenizer_name", str(folder / "tokenizer"),
        "--max_length", "300", *more,
    ]  # fmt: skip


def printed(capsys: Any, argv: list[str]) -> str:
    assert preview.main(argv) == 0
    return str(capsys.readouterr().out)


def test_json_is_one_object_per_example(folder: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder / "tokenizer")
    lines = printed(capsys, arguments(folder, "--json")).splitlines()
    found = [json.loads(line) for line in lines]
    assert [list(item) for item in found] == [
        ["dataset", "row", "text", "input_ids", "trained", "dropped", "untrained"]
    ] * len(ROWS)
    assert [item["row"] for item in found] == [0, 1, 2, 3]
    assert {item["dataset"] for item in found} == {"data"}
    for item, row in zip(found[:2], ROWS, strict=False):
        assert item["dropped"] is None
        assert reference(item["text"], add_special_tokens=False).input_ids == item["input_ids"]
        trained = [i for i, w in zip(item["input_ids"], item["trained"], strict=True) if w]
        assert reference.decode(trained) == row["output"] + "</s>"
    assert found[2]["dropped"].startswith("empty answer")
    assert found[2]["input_ids"] == []
    assert found[3]["dropped"].startswith("longer than max_length: ")
    assert len(found[3]["input_ids"]) == len(found[3]["trained"]) > 300
    assert len(printed(capsys, arguments(folder, "--json", "--examples", "2")).splitlines()) == 2


def test_text_marks_what_is_trained_then_reports(folder: Path, capsys: Any) -> None:
    out = printed(capsys, arguments(folder))
    assert "### Response:\n[[Seven.</s>]]\n" in out
    assert out.count("[[") == 2
    assert f"--- data row 2, {folder / 'data.jsonl'}:3\ndropped: empty answer: message 2" in out
    assert "4 records -> 2 examples" in out
    assert "dropped 1: longer than max_length" in out
    assert f"{folder / 'data.jsonl'}:4: " in out
    assert "\x1b" not in out


def test_stats(folder: Path, capsys: Any) -> None:
    out = printed(capsys, arguments(folder, "--stats"))
    assert "[[" not in out
    found = json.loads(printed(capsys, arguments(folder, "--stats", "--json")))
    assert (found["records"], found["examples"], found["dropped"]) == (4, 2, 2)
    assert found["packing"]["row_length"] == 300


def test_columns_and_predicted_steps(folder: Path, capsys: Any) -> None:
    more = ("--stats", "--json", "--columns", "input", "output", "--num_train_epochs", "5")
    found = json.loads(printed(capsys, arguments(folder, *more)))
    assert found["columns"]["input"]["(empty)"] == {"records": 1, "examples": 1}
    assert set(found["columns"]) == {"input", "output"}
    assert (found["packing"]["steps_per_epoch"], found["packing"]["total_steps"]) == (1, 5)
    assert preview.main(arguments(folder, "--stats", "--columns", "kind")) == 2
    assert "columns: no record that is trained has a column 'kind'" in capsys.readouterr().err


def test_the_side_that_is_held_out_is_compared(folder: Path, capsys: Any) -> None:
    (folder / "data.jsonl").write_text("\n".join([json.dumps(ROWS[0])] * 10))
    found = json.loads(
        printed(capsys, arguments(folder, "--stats", "--json", "--eval_split", ".2"))
    )
    assert (found["examples"], found["records"], found["duplicates"]) == (8, 8, 7)
    assert found["evaluation"] == {"examples": 2, "also_trained": 2, "nearly_trained": 2}


def test_page_shows_every_token_and_escapes_it(folder: Path, capsys: Any) -> None:
    hostile = {
        "instruction": "<script>alert(1)</script>\u202e\x1b",
        "output": "caf\u00e9 \U0001f389",
    }
    with (folder / "data.jsonl").open("a") as file:
        file.write("\n" + json.dumps(hostile))
    page = folder / "page.html"
    printed(capsys, arguments(folder, "--html", str(page)))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    pieces = re.findall(
        r'<span class="t( y)?" title="([\d ]+), weight [01]">(.*?)</span>', text, re.S
    )
    trained = "".join(shown for marked, _, shown in pieces if marked)
    assert trained == "Seven.&lt;/s&gt;Two.&lt;/s&gt;caf\u00e9 \U0001f389&lt;/s&gt;"
    party = next(ids for _, ids, shown in pieces if shown == "\U0001f389")
    assert len(party.split()) == 4  # a letter of four tokens is one piece
    assert text.count('<p class="d">dropped: ') == 2
    assert preview.main(arguments(folder, "--html", str(folder / "gone" / "p.html"))) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_from_python(folder: Path) -> None:
    from jaxtune.config import load

    values = dict(zip(("dataset", "tokenizer_name"), arguments(folder)[1:4:2], strict=True))
    result = preview.run(load(overrides=values))
    assert result.report is not None
    assert result.report["examples"] == 3


BAD: list[tuple[str, list[str], str]] = [
    ("missing file", ["--dataset", "gone.jsonl"], "gone.jsonl: no such file"),
    ("empty file", ["--dataset", "EMPTY"], "empty.jsonl: the file is empty"),
    ("broken JSON", ["--dataset", "BROKEN"], "broken.jsonl:17: not valid JSON"),
    ("missing field", ["--columns", "{output: answer}"],
     "data.jsonl:1: columns maps output to 'answer'; the record has: instruction, input, output"),
    ("wrong format", ["--format", "x"], "unknown flag '--format'"),
    ("placeholder", ["--template", "{instruction} {answer}"], "unknown placeholder {answer}"),
    ("template", ["--template", "chatml2"], "'chatml2' is not known. Did you mean 'chatml'?"),
    ("tokenizer", ["--tokenizer_name", "./gone"], "./gone: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input_is_exit_2_with_one_message(
    folder: Path, capsys: Any, more: list[str], message: str
) -> None:
    (folder / "empty.jsonl").write_text("")
    rows = [json.dumps(ROWS[0])] * 30
    rows[16] = rows[16][:-3]
    (folder / "broken.jsonl").write_text("\n".join(rows))
    names = {"EMPTY": "empty.jsonl", "BROKEN": "broken.jsonl"}
    more = [str(folder / names[word]) if word in names else word for word in more]
    if more[0] == "--columns":
        entry = f"[{{path: {folder / 'data.jsonl'}, columns: {more[1]}}}]"
        argv = ["--datasets", entry, *arguments(folder)[2:]]
    else:
        kept = arguments(folder)
        at = kept.index(more[0]) if more[0] in kept else len(kept)
        argv = kept[:at] + kept[at + 2 :] + more
    assert preview.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("jaxtune preview: ")
    assert "Traceback" not in captured.err


def test_absent_field_names_line_and_record(folder: Path, capsys: Any) -> None:
    rows = [json.dumps(ROWS[0])] * 16 + ['{"instruction": "q", "input": "", "response": "a"}']
    (folder / "data.jsonl").write_text("\n".join(rows))
    assert preview.main(arguments(folder, "--stats")) == 2
    assert (
        "data.jsonl:17: format 'alpaca' needs 'output'; the record has: instruction, input, "
        "response. Set datasets[].columns, or rename the field. Try --columns.output response"
    ) in capsys.readouterr().err


def test_no_jax_and_no_transformers(folder: Path) -> None:
    code = (
        "import sys; from jaxtune import preview; assert preview.main(sys.argv[1:]) == 0; "
        "found = {'jax', 'flax', 'transformers', 'torch'} & set(sys.modules); assert not found"
    )
    argv = [sys.executable, "-c", code, *arguments(folder, "--stats", "--json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
