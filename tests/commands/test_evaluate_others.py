"""`evaluate` asking others: a judge over HTTP, and lm-evaluation-harness as a process."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.judge_server import likes_the_first, likes_the_longer, serving
from scipy.stats import binomtest

from jaxtune import evaluate
from jaxtune.config import ConfigError, load
from jaxtune.evaluate import EvaluateOptions
from jaxtune.evaluation import harness
from jaxtune.inference import generate
from jaxtune.parallel import heartbeat, processes

SAID = "Yes, you can"  # by the parrot; the contrary one says Sorry
SECRET = "sk-never-to-be-seen-0123456789"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "desk.jsonl"
    rows = [{"instruction": f"May I, {n}?", "output": SAID, "kind": "ab"[n % 2]} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def judged(parrot: Any, contrary: Any, data: Path, url: str, **more: Any) -> dict[str, Any]:
    config = load(overrides={"model_name_or_path": str(parrot.folder), "max_length": 128})
    options = EvaluateOptions(
        dataset=str(data), generate=8, base=str(contrary.folder), judge=url, judge_model="tiny",
        by="kind", **more,
    )  # fmt: skip
    result = evaluate.run(config, options)
    print(result)
    return dict(result.scores)


def test_a_judge_who_likes_the_longer(
    parrot: Any, contrary: Any, data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(likes_the_longer) as server:
        found = judged(parrot, contrary, data, server.url, judge_concurrency=2)
    assert len(server.seen) == 1 + 2 * 8  # asked once before any model was loaded
    assert server.most_at_once <= 2
    asked = [body["messages"][0]["content"] for _, _, body in server.seen[1:]]
    assert sum("<conversation>\nMay I, 3?\n</conversation>" in text for text in asked) == 2
    assert all(f"<expected_answer>\n{SAID}\n</expected_answer>" in text for text in asked)
    assert found["win_rate"] == 1.0
    assert found["by_column"]["kind"]["a"]["win_rate"] == 1.0
    theirs = binomtest(8, 8).proportion_ci(0.95, "wilson")
    assert found["judge"] == {
        "model": "tiny", "wins": 8, "ties": 0, "losses": 0, "inconsistent": 0, "unparseable": 0,
        "failed": 0, "win_rate": 1.0, "interval": pytest.approx([*theirs]), "clear": True,
    }  # fmt: skip
    assert {row["verdict"] for row in found["generations"]} == {"win"}
    assert "verdict" not in found["base"]["generations"][0]
    said = capsys.readouterr()
    assert "Judge tiny: 8 wins, 0 ties, 0 losses of tuned" in said.out
    assert SECRET not in said.out + said.err + json.dumps(found)


def test_a_judge_sees_no_thinking(
    parrot: Any, contrary: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(model: Any, words: Any, prompts: Any, **more: Any) -> Any:
        said = "Sorry." if model.name == str(contrary.folder) else "It is allowed."
        return [generate.Generation(f"<think>\nHm.\n</think>\n\n{said}", True, 9) for _ in prompts]

    monkeypatch.setattr(generate, "generate", answer)
    with serving(likes_the_longer) as server:
        found = judged(parrot, contrary, data, server.url)
    assert found["judge"]["wins"] == 8
    asked = [body["messages"][0]["content"] for _, _, body in server.seen[1:]]
    for text in asked:
        assert "Hm." not in text
        assert "\nIt is allowed.\n</answer_" in text
        assert "\nSorry.\n</answer_" in text


def test_a_judge_who_likes_the_first_and_one_who_breaks(
    parrot: Any, contrary: Any, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(likes_the_first) as server:
        found = judged(parrot, contrary, data, server.url)
    assert (found["win_rate"], found["judge"]["ties"], found["judge"]["inconsistent"]) == (
        0.5,
        8,
        8,
    )
    assert not found["judge"]["clear"]
    assert "not told apart from 50%" in capsys.readouterr().out

    def breaks(number: int, a: str, b: str) -> Any:
        return likes_the_longer(number, a, b) if number < 6 else (403, b"no more", {})

    with serving(breaks) as server:
        found = judged(parrot, contrary, data, server.url, judge_concurrency=1)
    judge = found["judge"]
    assert (judge["wins"], judge["failed"], judge["unparseable"]) == (2, 6, 0)
    assert not judge["clear"]  # two are too few
    assert found["win_rate"] == 1.0  # of those with a verdict
    assert [row["verdict"] for row in found["generations"]] == ["win"] * 2 + [None] * 6
    assert "6 pairs have no verdict; the first: " in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert evaluate.main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_refusals(
    parrot: Any, contrary: Any, data: Path, tmp_path: Path, copy_without: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    model = ("--model_name_or_path", parrot.folder, "--dataset", data)
    both = (*model, "--base", contrary.folder, "--generate", 2)
    assert "Give --base DIR and --generate N" in refusal(capsys, *model, "--judge", "http://x")
    said = refusal(capsys, *both, "--judge", "http://127.0.0.1:9/v1")
    assert "judge_model is not set" in said
    rubric = tmp_path / "r.txt"
    rubric.write_text("Which?")
    said = refusal(capsys, *both, "--judge", "http://x", "--judge_prompt", rubric)
    assert "has no {question}, {answer_a}, {answer_b}" in said
    no = (401, f'{{"error": {{"message": "wrong key {SECRET}"}}}}'.encode(), {})
    with serving(lambda number, a, b: no) as server:
        said = refusal(capsys, *both, "--judge", server.url, "--judge_model", "m")
    assert "refused with HTTP 401: wrong key ***. Nothing was evaluated." in said
    assert "evaluation:" not in said
    assert SECRET not in said
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    said = refusal(capsys, *model, "--harness", "arc_easy")
    assert "lm_eval is not installed. pip install 'jaxtune[harness]'" in said
    monkeypatch.undo()
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    bare = copy_without(parrot.folder, "*.safetensors")
    argv = ("--model_name_or_path", bare, "--dataset", data, "--harness", "arc_easy")
    assert "holds no weights in HF format. Give an exported folder" in refusal(capsys, *argv)
    odd = tmp_path / "a,b"
    odd.symlink_to(parrot.folder)
    argv = ("--model_name_or_path", odd, "--dataset", data, "--harness", "arc_easy")
    assert "cannot be given a path with , or =" in refusal(capsys, *argv)


@pytest.mark.parametrize("more", [{"harness": ("arc_easy",)}, {"judge": "http://x"}])
def test_what_is_done_on_one_host(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "join", lambda hosts: None)
    monkeypatch.setattr(processes, "count", lambda: 2)
    (name,) = more
    with pytest.raises(ConfigError, match=rf"{name}: .* one host\. Evaluate there, or"):
        evaluate.run(load(overrides={"model_name_or_path": "m"}), EvaluateOptions(**more))


def test_what_the_harness_says(
    parrot: Any, contrary: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A program in its place: what it is called with, what is read of its file, and its failure."""
    stand_in = tmp_path / "stand-in"
    (stand_in / "lm_eval").mkdir(parents=True)
    (stand_in / "lm_eval" / "__init__.py").touch()
    (stand_in / "lm_eval" / "__main__.py").write_text(
        "import json, pathlib, sys\n"
        "words = sys.argv[1:]\n"
        "if 'bad' in words: sys.exit('Traceback\\n\\nno such task: bad')\n"
        "out = pathlib.Path(words[words.index('--output_path') + 1]) / 'model'\n"
        "out.mkdir()\n"
        "scores = {'alias': 'x', 'acc,none': 0.5, 'acc_stderr,none': 0.1, 'f1,strict': 1,\n"
        "          'f1_stderr,strict': 'N/A', 'sample_len': 8, 'words': len(words),\n"
        "          'perplexity,none': float('inf'), 'perplexity_stderr,none': float('nan')}\n"
        "(out / 'results_1.json').write_text(json.dumps({'results': {' '.join(words): scores}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.syspath_prepend(str(stand_in))
    argv = [
        "--model_name_or_path", str(parrot.folder), "--dataset", str(data), "--base",
        str(contrary.folder), "--harness", "one", "two", "--harness_args", "[--limit, '5']",
    ]  # fmt: skip
    assert evaluate.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row, folder in ((found, parrot.folder), (found["base"], contrary.folder)):
        ((words, scores),) = row["harness"].items()
        assert scores == {
            "acc": 0.5, "acc_stderr": 0.1, "f1,strict": 1.0,
            "perplexity": None, "perplexity_stderr": None,
        }  # fmt: skip
        assert words.startswith(f"run --model hf --model_args pretrained={folder} --tasks one two ")
        assert words.endswith("--limit 5")
    assert evaluate.main(argv) == 0
    assert " perplexity not finite " in " ".join(capsys.readouterr().out.split())
    bad = [word if word != "one" else "bad" for word in argv]
    assert "lm_eval ended with 1: Traceback | no such task: bad" in refusal(capsys, *bad)


@pytest.mark.slow
@pytest.mark.torch
def test_the_harness_itself_on_a_task_of_this_machine(
    parrot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiple choice whose answers the parrot knows by heart: no network, no hub."""
    for name in ("lm_eval", "torch"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} here: the hand-off to lm-evaluation-harness did not run")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "q.jsonl"
    rows = [{"question": f"{n}\n", "label": int(n % 4 == 0)} for n in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "task.yaml"
    task.write_text(
        "task: of_this_machine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        f"doc_to_choice: ['{SAID}', 'Sorry']\ndoc_to_target: '{{{{label}}}}'\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    found = harness.run(harness.folder_of(str(parrot.folder)), [str(task)], ["--limit", "8"])
    assert found["of_this_machine"]["acc"] == 0.75  # it always says that it can be done
    assert 0.1 < found["of_this_machine"]["acc_stderr"] < 0.2
    assert sys.modules.get("lm_eval") is None
