"""`report` from outside: a page for every run directory, one message for what is none."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data.made import NAMES, byte_level_backend, save

from jaxtune import report
from jaxtune.config import ConfigError, DataError, dump, load
from jaxtune.reporting.data import with_targets
from jaxtune.reporting.starts import record_start

HOSTILE = (
    "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>' \" --> ${x} \u202e\x1b"
)
COUNTS = ("wins", "ties", "losses", "inconsistent", "unparseable", "failed")
VOID = {"meta", "br", "input", "img", "link", "hr"}
TRAIN = [
    {"kind": "train", "step": 5, "epoch": 0.5, "loss": 2.5, "token_accuracy": 0.25,
     "grad_norm": 1.125, "learning_rate": 1e-5, "tokens_total": 10, "tokens_trained": 5,
     "examples_seen": 2, "tokens_per_second": None, "mfu": None},
    {"kind": "train", "step": 10, "epoch": 1.0, "loss": 0.12345678901234567,
     "token_accuracy": 0.75, "grad_norm": 0.1, "learning_rate": 3.3e-7, "tokens_total": 20,
     "tokens_trained": 10, "examples_seen": 4, "tokens_per_second": 1234.5, "mfu": None},
]  # fmt: skip
EVAL = [
    {"kind": "eval", "step": 10, "eval_loss": 0.5, "eval_perplexity": 1.6487,
     "eval_token_accuracy": 0.625, "eval_tokens_trained": 7,
     "by_dataset": {"a": {"eval_loss": 0.25}, "b": {"eval_loss": 0.75}}},
]  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and keeps what a browser would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in reader.values("href")} <= set(ids)
    return reader


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory as `train` leaves it, but for checkpoints and model."""
    save(tmp_path / "tokenizer", byte_level_backend(), **NAMES)
    data = tmp_path / "data.jsonl"
    data.write_text(
        lines(
            {"instruction": HOSTILE, "output": HOSTILE, "kind": "odd"},
            {"instruction": "Add.", "output": "Two.", "kind": "plain"},
            {"instruction": "Name a prime.", "output": "Seven.", "kind": "plain"},
        )
    )
    run = tmp_path / "run"
    run.mkdir()
    dataset = {
        "path": str(data),
        "proportions": {"column": "kind", "target": {"odd": 0.25, "plain": 0.75}},
    }
    values = {"tokenizer_name": str(tmp_path / "tokenizer"), "datasets": [dataset]}
    config = load(overrides={**values, "max_length": 512, "template": "alpaca"})
    (run / "config.yaml").write_text(dump(config))
    (run / "metrics.jsonl").write_text(lines(*TRAIN, *EVAL))
    return run


def page_of(folder: Path, *more: str) -> Reader:
    assert report.main([str(folder), *more]) == 0
    return read(folder / "report.html")


def chart(page: Reader, title: str) -> dict[str, Any]:
    charts = [json.loads(text) for text in page.values("data-chart")]
    found = next(chart for chart in charts if chart["title"] == title)
    return {line["name"]: (line["x"], line["y"]) for line in found["series"]}


def test_numbers_of_the_page_are_those_of_the_run(folder: Path) -> None:
    page = page_of(folder)
    assert chart(page, "Loss") == {
        "training": ([5, 10], [2.5, 0.12345678901234567]),
        "evaluation": ([10], [0.5]),
        "evaluation: a": ([10], [0.25]),
        "evaluation: b": ([10], [0.75]),
    }
    assert chart(page, "Learning rate") == {"learning rate": ([5, 10], [1e-5, 3.3e-7])}
    assert chart(page, "Throughput") == {"tokens a second": ([5, 10], [None, 1234.5])}
    titles = [json.loads(text)["title"] for text in page.values("data-chart")]
    assert "Model FLOPs utilisation" not in titles  # every row says null
    for text in ("62.5%", "1.649", "Lengths in tokens", "Seven.", "target", "25.0%", "75.0%"):
        assert text in page.text


def test_hostile_text_stays_text_wherever_it_comes_from(folder: Path) -> None:
    harmless = page_of(folder)
    again = {**EVAL[0], "by_dataset": {HOSTILE: {"eval_loss": 1.0}, "b": {"eval_loss": 2.0}}}
    odd = {**TRAIN[1], HOSTILE: 7.0}
    (folder / "metrics.jsonl").write_text(lines(TRAIN[0], odd, again))
    samples = [
        {"step": step, "prompt": HOSTILE, "response": HOSTILE + end, "stopped": True}
        for step, end in ((5, ""), (10, "x"))
    ]
    (folder / "samples.jsonl").write_text(lines(*samples))
    versions = {HOSTILE: HOSTILE}
    start = {"step": 0, "time": HOSTILE, "device": HOSTILE, "versions": versions}
    (folder / "starts.jsonl").write_text(lines(start))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"\n# {HOSTILE}".replace("\x1b", ""))
    answer = {"prompt": HOSTILE, "reference": HOSTILE, "response": HOSTILE, "stopped": False}
    scores = {"eval_loss": 1.0, HOSTILE: 3.0, "generations": [answer]}
    scores["by_dataset"] = {HOSTILE: {"eval_loss": 1.0}, "b": {}}
    scores["by_column"] = {HOSTILE: {HOSTILE: {"eval_loss": 1.0, "exact_match": HOSTILE}}}
    scores["intervals"] = {"eval_loss": [HOSTILE, 1], HOSTILE: HOSTILE}
    scores["difference"] = {
        "eval_loss": {"value": 1.0, "interval": HOSTILE, "clear": True},
        HOSTILE: {"value": HOSTILE, "clear": HOSTILE},
    }
    scores["harness"] = {HOSTILE: {HOSTILE: HOSTILE}}
    scores["general"] = {"eval_loss": HOSTILE}
    scores["judge"] = {"model": HOSTILE, **dict.fromkeys(COUNTS, 1), "win_rate": HOSTILE}
    evaluation = folder / f"{HOSTILE.replace('/', '')}.json"
    evaluation.write_text(json.dumps({**scores, "base": scores}))
    page = page_of(folder, "--evaluation", str(evaluation))

    assert page.tags.count("script") == harmless.tags.count("script") == 1
    assert page.script == harmless.script
    assert "img" not in page.tags
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in written
    assert "\u202e" not in written
    allowed = {"class", "id", "data-chart", "aria-label", "title", "dir", "tabindex", "role"}
    assert not {name for _, name, _ in page.attributes if name.startswith("on")}
    shown = HOSTILE.replace("\u202e", "<U+202E>").replace("\x1b", "\u241b")
    assert page.text.count(shown) >= 14
    carried = {name for _, name, value in page.attributes if "alert(1)" in value}
    assert carried <= allowed


def test_nothing_is_loaded_and_only_the_own_script_runs(folder: Path) -> None:
    import base64
    import hashlib

    page = page_of(folder)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = next(text for text in page.values("content") if "default-src" in text)
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy
    written = (folder / "report.html").read_text(encoding="utf-8")
    for word in ("http:", "https:", "<link", "url(", "@import", "src=", "innerHTML", "eval("):
        assert word not in written


def test_a_run_that_is_killed_or_still_writing(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    page = page_of(folder)
    assert chart(page, "Gradient norm") == {"gradient norm": ([5, 10], [1.125, 0.1])}
    assert "The last line of metrics.jsonl is not whole" in page.text


def test_a_run_without_a_step_yet(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    page = page_of(folder)
    assert "No step has been written yet." in page.text
    assert "Lengths in tokens" in page.text


@pytest.mark.parametrize(("nan", "inf"), [("nan", "inf"), (float("nan"), float("inf"))])
def test_numbers_that_are_not_finite(folder: Path, nan: Any, inf: Any) -> None:
    """As texts, and as earlier versions wrote them."""
    row = {
        **EVAL[0],
        "eval_loss": nan,
        "eval_perplexity": inf,
        "by_dataset": {"a": {"eval_loss": nan}},
    }
    (folder / "metrics.jsonl").write_text(lines(*TRAIN, row, {**EVAL[0], "step": 20}))
    page = page_of(folder)
    assert chart(page, "Loss")["evaluation"] == ([10, 20], [None, 0.5])
    assert "not finite" in page.text
    assert not any("NaN" in text for text in page.values("data-chart"))


def test_data_that_is_gone_is_said_and_can_be_pointed_to(folder: Path, capsys: Any) -> None:
    data = folder.parent / "data.jsonl"
    moved = data.rename(folder.parent / "moved.jsonl")
    page = page_of(folder)
    assert f"left out here: {data}: no such file" in page.text
    assert chart(page, "Loss")["training"][1] == [2.5, 0.12345678901234567]
    assert f"data: left out: {data}" in capsys.readouterr().err
    assert "Seven." in page_of(folder, "--dataset", str(moved)).text
    (folder / "config.yaml").unlink()
    assert "has no config.yaml" in page_of(folder).text


def test_where_it_ran_and_how_it_was_batched(folder: Path) -> None:
    (folder / "hf").mkdir()
    for step in (0, 5):
        if step:
            with (folder / "starts.jsonl").open("a") as file:
                file.write('{"step": 3, "ti')  # killed there
        record_start(
            folder, step=step, total_steps=40, rows_per_step=1, device="TPU v9", devices=16, hosts=4
        )
    page = page_of(folder, "--packing", "false")
    # Three rows, one a step, three epochs; alone, a device would take eight at once.
    for text in ("of 40", "9 steps", "16 x TPU v9", "of each row filled", "jaxlib"):
        assert text in page.text
    assert page.text.count("16 x TPU v9") == 2
    again = f"--config {folder / 'config.yaml'} \\\n  --output_dir {folder}-again"
    assert again in page.text
    assert f"--model_name_or_path {folder / 'hf'} \\\n  --base BASE" in page.text


def test_a_target_is_a_share_of_its_own_data_set() -> None:
    target = {"column": "kind", "target": {"odd": 0.25, "plain": 0.75}}
    datasets = [{"path": "a.jsonl", "proportions": target}, {"path": "b.jsonl"}]
    rows = [
        {"dataset": "a", "value": "odd", "share_after": 0.1},
        {"dataset": "a", "value": "plain", "share_after": 0.3},
        {"dataset": "b", "value": None, "share_after": 0.6},
    ]
    found = with_targets(load(overrides={"datasets": datasets}), rows)
    assert [row.get("target") for row in found] == pytest.approx([0.1, 0.3, None])
    twice = load(overrides={"datasets": [datasets[0], {**datasets[0], "path": "x/a.csv"}]})
    assert with_targets(twice, rows) == rows


def test_answers_with_their_differences(folder: Path) -> None:
    base = {"prompt": "Q?", "reference": "a blue fox", "response": "a red fox", "stopped": False}
    tuned = {**base, "response": "a blue fox", "stopped": True}
    scores = {"eval_loss": 2.0, "exact_match": 0.0, "generations": [base]}
    found = {"eval_loss": 1.5, "exact_match": 1.0, "generations": [tuned], "base": scores}
    file = folder / "e.json"
    file.write_text(json.dumps(found))
    page = page_of(folder, "--evaluation", str(file), str(file), "--columns", "kind")
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert written.count("a <del>red</del> fox") == written.count("a <ins>blue</ins> fox") == 2
    for text in ("did not stop", "exact", "+100.0 points", "\u22120.5000", "By kind", "plain"):
        assert text in page.text


def test_an_evaluation_in_the_run_directory_is_shown_by_itself(folder: Path, capsys: Any) -> None:
    row = {"prompt": "Q?", "reference": "a blue fox", "response": "a blue fox"}
    base = {"eval_loss": 2.0, "generations": [{**row, "response": "a red fox"}]}
    found = {"eval_loss": 1.5, "generations": [row], "base": base}
    own, other = folder / "evaluation.json", folder / "e.json"
    assert "Answers in" not in page_of(folder).text
    own.write_text(json.dumps(found))
    page = page_of(folder)
    for text in ("Answers in evaluation.json", "\u22120.5000", "base", "tuned"):
        assert text in page.text
    other.write_text(json.dumps(found))
    assert "Answers in evaluation.json" not in page_of(folder, "--evaluation", str(other)).text
    (folder / "hf").mkdir()
    (folder / "hf" / "README.md").write_text("# tuned\n\n## Data\n")
    page_of(folder, "--card")
    assert "2.000" in (folder / "hf" / "README.md").read_text()
    capsys.readouterr()
    for broken in ("", '{"loss": 1}'):
        own.write_text(broken)
        assert "evaluation.json cannot be read, so it is left out here." in page_of(folder).text
        assert f"evaluation: left out: {own}: " in capsys.readouterr().err
    assert report.main([str(folder), "--card"]) == 2
    assert "card: there is no evaluation to put there" in capsys.readouterr().err


def test_an_answer_is_marked_as_it_was_scored(folder: Path) -> None:
    """What it thought is shown, and was not compared; older files do not say."""
    row = {"prompt": "Q?", "reference": "<think>a</think>fox", "response": "<think>b</think>fox"}
    file = folder / "e.json"
    for more, marks in (({"exact_match": True}, 1), ({"exact_match": False}, 0), ({}, 0)):
        found = {"eval_loss": 1.5, "generations": [{**row, **more}]}
        file.write_text(json.dumps(found))
        page_of(folder, "--evaluation", str(file))
        written = (folder / "report.html").read_text(encoding="utf-8")
        assert written.count('<b class="right">exact</b>') == marks


def test_differences_with_their_intervals(folder: Path) -> None:
    base = {"eval_loss": 2.0, "exact_match": 0.0, "rougeL": 0.5}
    change = {
        "eval_loss": {"value": -0.5, "interval": [-0.75, -0.25], "clear": True},
        "exact_match": {"value": 0.25, "interval": [-0.125, 0.5], "clear": False},
        "rougeL": {"value": -0.25, "interval": [-0.3, -0.2], "clear": True},
    }
    row = {"eval_loss": 1.5, "exact_match": 0.25, "rougeL": 0.25, "difference": change}
    judge = {"model": "j", **dict.fromkeys(COUNTS, 2), "win_rate": 0.5, "interval": [0.1, 0.9],
             "clear": False}  # fmt: skip
    answer = {"prompt": "Q?", "reference": "a", "response": "b", "verdict": "loss"}
    found = {
        **row, "by_column": {"kind": {"odd": row}}, "general": row, "judge": judge,
        "harness": {"arc": {"acc": 0.5, "acc_stderr": 0.01}}, "generations": [answer],
        "base": {**base, "general": base, "by_column": {"kind": {"odd": base}},
                 "harness": {"arc": {"acc": 0.25}}},
    }  # fmt: skip
    file = folder / "e.json"
    file.write_text(json.dumps(found))
    page = page_of(folder, "--evaluation", str(file))
    for text in (
        "\u22120.7500 to \u22120.2500", "+25.0 points", "\u221212.5 to +50.0", "by kind", "odd",
        "loss, general text", "0.5000 \u00b10.0100", "Win rate 50.0% (10.0 to 90.0%), not told",
        "only where its 95% interval excludes 0", "judged a loss",
    ):  # fmt: skip
        assert text in page.text, text
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert written.count('<b class="right">better</b>') == 3  # of all, of odd, of general text
    assert written.count('<b class="wrong">worse</b>') == 1
    (folder / "hf").mkdir()
    card = folder / "hf" / "README.md"
    card.write_text("# tuned\n\n## Data\n")
    page_of(folder, "--evaluation", str(file), "--card")
    assert "| ROUGE-L | 0.500 | 0.250 | \u22120.250 |" in card.read_text(encoding="utf-8")
    alone = {"eval_loss": 1.5, "intervals": {"eval_loss": [1.25, 1.75]}}
    file.write_text(json.dumps(alone))
    assert "1.2500 to 1.7500" in page_of(folder, "--evaluation", str(file)).text


def test_the_picture(folder: Path) -> None:
    found = report.run(load(), report.ReportOptions(run_dir=str(folder), png=True, examples=0))
    assert found.picture is not None
    head = found.picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (1600, 900)


def test_the_picture_says_how_to_get_what_it_needs(
    folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main([str(folder), "--png"]) == 2
    assert "pip install 'jaxtune[report]'" in capsys.readouterr().err


BAD: list[tuple[str, str, str]] = [
    ("metrics.jsonl", '{"kind": "train"\n{"kind": "train", "step": 1, "loss": 1}\n',
     "metrics.jsonl:1: not valid JSON: "),
    ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: expected an object; got [1]"),
    ("metrics.jsonl", '{"kind": "train", "step": -1}\n',
     "metrics.jsonl:1: step: Input should be greater than or equal to 0; got -1."),
    ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": "x"}\n',
     "metrics.jsonl:1: loss: Input should be a valid number; got 'x'."),
    ("metrics.jsonl", '{"kind": "eval", "step": 1, "eval_loss": 1, "by_dataset": [1]}\n',
     'metrics.jsonl:1: by_dataset: Input should be a valid dictionary; got [1].'),
    ("samples.jsonl", '{"step": 1, "prompt": 2}\n',
     "samples.jsonl:1: prompt: Input should be a valid string; got 2."),
    ("starts.jsonl", '{"step": "x"}\n',
     "starts.jsonl:1: step: Input should be a valid integer; got 'x'."),
    ("config.yaml", "learning_rat: 1\n", "config.yaml: unknown key 'learning_rat'"),
    ("e.json", "{", "e.json: not readable as JSON"),
    ("e.json", '{"loss": 1}',
     "e.json: eval_loss: Field required. Give what 'jaxtune evaluate --json' printed"),
    ("e.json", '{"eval_loss": 1, "generations": [{"prompt": 1}]}', "generations.0.prompt: Input"),
    ("e.json", '{"eval_loss": 1, "difference": [1]}', "e.json: difference: Input"),
    ("e.json", '{"eval_loss": 1, "by_column": {"a": {"b": 1}}}', "e.json: by_column.a.b: Input"),
    ("e.json", '{"eval_loss": 1, "by_column": 1}', "e.json: by_column: Input"),
    ("e.json", '{"eval_loss": 1, "harness": {"a": 1}}', "e.json: harness.a: Input"),
    ("e.json", '{"eval_loss": 1, "judge": {"model": "m", "wins": -1}}',
     "e.json: judge.wins: Input"),
    ("e.json", '{"eval_loss": 1, "general": 1}', "e.json: general: Input"),
    ("e.json", '{"eval_loss": 1, "base": null}', "e.json: base: Input"),
    ("e.json", "[1]", "e.json: expected an object; got [1]. Give what 'jaxtune evaluate"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_what_is_broken_is_named(
    name: str, text: str, message: str, folder: Path, capsys: Any
) -> None:
    (folder / name).write_text(text)
    more = ["--evaluation", str(folder / "e.json")] if name == "e.json" else []
    assert report.main([str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "report.html").exists()


def test_what_is_no_run_directory(folder: Path, capsys: Any) -> None:
    for path, message in (
        (folder / "gone", "there is no such folder. Give the output_dir"),
        (folder / "metrics.jsonl", "is a file"),
        (folder.parent, "expected metrics.jsonl, which every run writes; the folder has: data"),
    ):
        assert report.main([str(path)]) == 2
        assert message in capsys.readouterr().err
    assert report.main([]) == 2
    assert "RUN_DIR is missing" in capsys.readouterr().err
    assert report.main([str(folder), "--evaluation", "gone.json"]) == 2
    assert "gone.json: cannot be read: No such file" in capsys.readouterr().err
    assert report.main([str(folder), "--html", str(folder / "no" / "r.html")]) == 2
    assert "r.html: cannot be written: No such file" in capsys.readouterr().err
    assert report.main([str(folder), "--card"]) == 2
    assert "card: there is no evaluation to put there" in capsys.readouterr().err
    file = folder / "e.json"
    file.write_text('{"eval_loss": 1}')
    assert report.main([str(folder), "--evaluation", str(file), "--card"]) == 2
    assert "README.md: cannot be read: No such file" in capsys.readouterr().err
    assert report.main([str(folder), "--columns", "sort"]) == 2
    assert "no record that is trained has a column 'sort'" in capsys.readouterr().err


def test_at_the_end_of_training_a_failure_is_a_note(folder: Path, capsys: Any) -> None:
    from jaxtune.reporting.write import after_training

    (folder / "metrics.jsonl").unlink()
    after_training(folder, load(), None, None, {"mixture": []})  # type: ignore[arg-type]
    assert "report: not written: " in capsys.readouterr().err


def test_reading_a_run_needs_no_jax(folder: Path) -> None:
    code = (
        "import sys\nfrom jaxtune import report\n"
        f"assert report.main([{str(folder)!r}]) == 0\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_from_python(folder: Path) -> None:
    (folder / "samples.jsonl").write_text("1\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:1: expected an object"):
        report.run(load(), report.ReportOptions(run_dir=str(folder)))
    with pytest.raises(DataError, match=r"samples\.jsonl:1"):
        report.run(load(overrides={"output_dir": str(folder)}))
    with pytest.raises(ConfigError, match="RUN_DIR is missing"):
        report.run(load())


def test_a_browser_draws_the_curves(folder: Path) -> None:
    """The script itself: Chromium runs it and prints the document that it made."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page's script did not run")
    evals = {**EVAL[0], "by_dataset": {HOSTILE: {"eval_loss": 0.25}, "b": {"eval_loss": 0.75}}}
    (folder / "metrics.jsonl").write_text(lines(*TRAIN, evals))
    page_of(folder)
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu",
            "--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom",
            f"--user-data-dir={folder / 'browser'}", f"file://{folder / 'report.html'}",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    drawn = Reader()
    drawn.feed(done.stdout)
    charts = drawn.tags.count("figcaption") - 2  # two are histograms
    assert charts == 5
    classes = drawn.values("class")
    assert classes.count("line s0") == charts
    assert classes.count("s0") == charts + 1  # a button each; throughput's one point is a dot
    assert {"training", "evaluation", "log"} <= set(re.findall(r">([a-z]+)<", done.stdout))
    assert ">0.1235<" in done.stdout  # the last loss, beside its line's name
    assert drawn.tags.count("script") == 1
    assert "img" not in drawn.tags
    assert HOSTILE.replace("\u202e", "<U+202E>").replace("\x1b", "\u241b") in drawn.text
