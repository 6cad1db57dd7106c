"""`evaluate` against closed forms: a model whose logits and answers are known beforehand."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sacrebleu
from children import environment
from data.chat_templates import THINKING
from transformers import AutoTokenizer

from jaxtune import evaluate, preview, train
from jaxtune.api import evaluate as api
from jaxtune.config import ConfigError, load
from jaxtune.evaluate import EvaluateOptions
from jaxtune.inference import generate
from jaxtune.inference import load as inference
from jaxtune.parallel import heartbeat, processes
from jaxtune.parallel.mesh import make_mesh

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
    result = evaluate.run(load(overrides=values), EvaluateOptions(**(options or {})))
    print(result)
    return dict(result.scores)


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
    assert set(found) == {"eval_loss", "eval_perplexity", "eval_token_accuracy", "intervals",
                          "eval_tokens_trained", "examples", "by_dataset", "bootstrap"}  # fmt: skip


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


@pytest.fixture
def unlearnt(parrot: Any) -> dict[str, Any]:
    """A model whose tokens do look at each other: random weights."""
    source = parrot.folder.parent / "hf-source"
    return {"model": source, "tokenizer_name": str(TOKENIZER), "init": "random"}


def test_of_each_value_whatever_the_batch_and_the_devices(
    unlearnt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 1, 3 and 8, packed and not, on one device and on eight, agree to 1e-6: over all,
    by data set and by value of a column; so do the intervals."""
    data = write(tmp_path / "d.jsonl", [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(ROWS)])

    def flat(found: dict[str, Any]) -> dict[str, float]:
        rows = {"all": found, **found["by_dataset"], **found["by_column"]["kind"]}
        losses = {(n, k): row[k] for n, row in rows.items() for k in found["intervals"]}
        ends = {(n, k, e): row["intervals"][k][e]
                for n, row in rows.items() for k in found["intervals"] for e in (0, 1)}  # fmt: skip
        return {**losses, **ends}

    def measured(**more: Any) -> dict[str, float]:
        return flat(scores(data=data, options={"by": "kind"}, **unlearnt, **more))

    first = measured(per_device_eval_batch_size=1)
    assert len(first) == 4 * 9
    for more in (
        {"per_device_eval_batch_size": 3, "packing": False},
        {"per_device_eval_batch_size": 8, "max_length": 160},
        {"mesh.tensor": 2, "mesh.fsdp": 2, "mesh.context": 2},
    ):
        assert measured(**more) == pytest.approx(first, rel=1e-6), more
    alone = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    monkeypatch.setattr(api, "open_mesh", lambda config: alone)
    assert measured(per_device_eval_batch_size=3) == pytest.approx(first, rel=1e-6)


@pytest.mark.torch
def test_equals_torch_on_the_same_ids(tmp_path: Path) -> None:
    """sum(w*ce)/sum(w) of a folder that transformers wrote, on the ids and weights that `preview`
    shows; weights other than 0 and 1 among them."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "hf")
    rows = [*ROWS, dialogue("Half?", "A half.")]
    rows[-1]["messages"][1]["weight"] = 0.5
    data = write(tmp_path / "d.jsonl", rows)
    shown = tmp_path / "shown.jsonl"
    with shown.open("w") as file, contextlib.redirect_stdout(file):
        argv = ["--dataset", str(data), "--tokenizer_name", str(tmp_path / "hf"), "--json"]
        assert preview.main([*argv, "--examples", "99"]) == 0
    loss = weight = hits = 0.0
    for line in map(json.loads, shown.read_text().splitlines()):
        ids, w = torch.tensor([line["input_ids"]]), np.array(line["trained"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        ce = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        loss, weight = loss + float(w @ ce), weight + float(w.sum())
        hits += float(w @ (logits.argmax(-1) == ids[0, 1:]).numpy())
    found = scores(tmp_path / "hf", data)
    assert weight % 1 == 0.5 or weight != found["eval_tokens_trained"]
    assert found["eval_loss"] == pytest.approx(loss / weight, abs=1e-5)
    assert found["eval_token_accuracy"] == pytest.approx(hits / weight, abs=1e-9)


def test_each_value_of_a_column(
    parrot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["odd", "even", None, "even", "odd"]
    rows = [{**row, **({"kind": k} if k else {})} for row, k in zip(ROWS, kinds, strict=True)]
    data = write(tmp_path / "d.jsonl", rows)
    found = scores(parrot, data, options={"by": "kind", "generate": 4})
    parts = found["by_column"]["kind"]
    assert sorted(parts) == ["(absent)", "even", "odd"]
    for kind, part in parts.items():
        own = [r for r, k in zip(ROWS, kinds, strict=True) if (k or "(absent)") == kind]
        loss, accuracy, tokens = expected(parrot, own)
        assert part["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert part["eval_token_accuracy"] == pytest.approx(accuracy)
        assert (part["eval_tokens_trained"], part["examples"]) == (tokens, len(own))
    assert (parts["odd"]["questions"], parts["odd"]["exact_match"]) == (1, 1.0)
    assert (parts["even"]["questions"], parts["even"]["exact_match"]) == (2, 0.5)
    assert found["questions"] == 4
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["by", "kind", "examples", "questions", "loss", "exact", "match"] in shown
    ends = {line[0]: line[-1] for line in shown if len(line) == 5}
    assert (ends["odd"], ends["even"], ends["(absent)"]) == ("100.0%", "50.0%", "0.0%")


def test_many_values_are_told_apart_up_to_a_bound(parrot: Any, tmp_path: Path) -> None:
    rows = [{**dialogue("Is it?", "Yes"), "n": n} for n in [*range(30), 0]]
    data = write(tmp_path / "d.jsonl", rows)
    parts = scores(parrot, data, options={"by": "n"})["by_column"]["n"]
    assert len(parts) == 21
    assert parts["0"]["examples"] == 2
    assert parts["other"]["examples"] == 10
    assert sum(part["examples"] for part in parts.values()) == 31


def test_every_score_of_the_answers(parrot: Any, data: Path) -> None:
    found = scores(parrot, data, options={"generate": 5})
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(SAID, add_special_tokens=False)["input_ids"]
    assert found["contains"] == pytest.approx(2 / 5)
    assert found["answer_tokens"] == len(ids)
    assert found["distinct_1"] == pytest.approx(len(set(ids)) / (5 * len(ids)))
    assert found["refusal_rate"] == found["repetition"] == 0.0
    references = [row["reference"] for row in found["generations"]]
    theirs = sacrebleu.corpus_chrf([SAID] * 5, [references]).score
    assert found["chrf"] == pytest.approx(theirs, abs=1e-9)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu([SAID] * 5, [references]).score)
    for key in (
        *("exact_match", "contains", "rougeL", "chrf", "bleu", "stop_rate", "answer_tokens"),
        *("length_ratio", "refusal_rate", "distinct_1", "distinct_2", "repetition"),
    ):
        low, high = found["intervals"][key]
        assert low - 1e-9 <= found[key] <= high + 1e-9, key
        assert found["by_dataset"]["desk"][key] == found[key]


def test_differences_of_two_models(
    parrot: Any, contrary: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dialogue(f"May I, {n}?", SAID if n % 4 else "No") for n in range(16)]
    data = write(tmp_path / "d.jsonl", rows)
    options = {"generate": 16, "base": str(contrary.folder), "resamples": 500}
    found = scores(parrot, data, options=options)
    assert "difference" not in found["base"]
    for row in (found, found["by_dataset"]["d"]):
        for key, change in row["difference"].items():
            base = found["base"][key]
            assert change["value"] == pytest.approx(row[key] - base), key
            low, high = change["interval"]
            assert low <= change["value"] + 1e-9, key
            assert change["clear"] in (False, not low <= 0 <= high)
    assert found["difference"]["exact_match"]["value"] == 0.75
    assert found["difference"]["exact_match"]["clear"]
    assert found["difference"]["eval_loss"]["clear"]
    assert not found["difference"]["stop_rate"]["clear"]  # both always stop
    assert found["bootstrap"] == {"resamples": 500, "level": 0.95, "seed": 42}
    shown = capsys.readouterr().out.splitlines()
    (line,) = [line for line in shown if line.startswith("  exact match")]
    assert line.split()[:6] == ["exact", "match", "0.0%", "75.0%", "+75.0", "points"]
    assert line.split()[6] == "better"
    (line,) = [line for line in shown if line.startswith("  stop rate")]
    assert line.split() == [
        *("stop", "rate", "100.0%", "100.0%", "0.0", "points", "\u221210.9", "to", "+10.9")
    ]
    same = scores(parrot, data, options={**options, "base": str(parrot.folder)})
    assert not any(change["clear"] for change in same["difference"].values())


def test_general_text_is_read_in_windows(parrot: Any, contrary: Any, tmp_path: Path) -> None:
    """Every token once, with those before it in its window; the end of a document not at all."""
    text = ["It is late. " * 40, "Yes, you can return it.", "x"]
    general = tmp_path / "general.txt"
    general.write_text("\n\n".join(text))
    data = write(tmp_path / "d.jsonl", ROWS)
    options = {"general": str(general), "base": str(contrary.folder)}
    found = scores(parrot, data, options=options, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for model, row in ((parrot, found["general"]), (contrary, found["base"]["general"])):
        losses = []
        for document in text:
            ids = np.array(tokenizer(document, add_special_tokens=False)["input_ids"])
            if len(ids) < 2:
                continue
            logits = model.logits(ids[:-1])  # of one token each, so windows do not matter
            logits -= logits.max(-1, keepdims=True)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses += [-logs[i, after] for i, after in enumerate(ids[1:])]
        assert row["eval_tokens_trained"] == len(losses)
        assert row["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    change = found["general"]["difference"]["eval_loss"]
    assert change["value"] == pytest.approx(
        found["general"]["eval_loss"] - found["base"]["general"]["eval_loss"]
    )


def test_the_witnesses_of_general_text_are_its_documents(
    parrot: Any, contrary: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To these models a window is no context, so however a document is cut the interval stays."""
    general = tmp_path / "general.txt"
    texts = ["It is late. " * 40, "Yes, you can return it. " * 9, "A laptop? " * 20, "Sorry. " * 30]
    general.write_text("\n\n".join(texts))
    data = write(tmp_path / "d.jsonl", ROWS)
    options = {"general": str(general), "base": str(contrary.folder)}
    short, long = (
        scores(parrot, data, options=options, max_length=n)["general"] for n in (32, 128)
    )
    assert short["eval_tokens_trained"] == long["eval_tokens_trained"]
    for key in ("eval_loss", "eval_token_accuracy"):
        assert short["intervals"][key] == pytest.approx(long["intervals"][key], rel=1e-5)
        ends = (part["difference"][key]["interval"] for part in (short, long))
        assert next(ends) == pytest.approx(next(ends), rel=1e-4)
    assert not short["difference"]["eval_loss"]["clear"]  # four are too few
    assert "one document" not in capsys.readouterr().err
    general.write_text(texts[0])
    found = scores(parrot, data, options=options, max_length=32)["general"]
    assert set(found["intervals"].values()) == {None}
    assert found["difference"]["eval_loss"]["interval"] is None
    assert "is one document, so its loss has no interval" in capsys.readouterr().err


def test_questions_that_are_too_long_are_left_out_for_both_and_counted(
    parrot: Any, contrary: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation whose first answer is an example, and whose last question is too long."""
    long = dialogue("Hello.", "Yes", "Is it late? " * 99, "No")
    data = write(tmp_path / "d.jsonl", [ROWS[0], long, ROWS[1]])
    options = {"generate": 3, "base": str(contrary.folder)}
    found = scores(parrot, data, options=options, truncation="truncate", max_length=64)
    said = capsys.readouterr().err
    assert "generate: 1 of 3 questions are too long for 256 positions (d: 1)" in said
    for row in (found, found["base"]):
        assert (row["questions"], row["questions_left_out"]) == (2, 1)
        assert [each["reference"] for each in row["generations"]] == [
            ROWS[0]["messages"][1]["content"],
            ROWS[1]["messages"][1]["content"],
        ]
    write(data, [long])
    argv = ("--model_name_or_path", parrot.folder, "--dataset", data, "--generate", 1)
    refused = refusal(capsys, *argv, "--truncation", "truncate", "--max_length", 64)
    assert "generate: 1 of 1 questions are too long for 256 positions" in refused


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


def thinks(monkeypatch: pytest.MonkeyPatch, said: Sequence[str]) -> list[Any]:
    """Models say `said`, whatever they are asked; gives the templates of the questions."""
    given: list[Any] = []

    def answer(model: Any, words: Any, prompts: Any, *, templates: Any, **more: Any) -> Any:
        given.extend(templates)
        encode = words.tokenizer.encode
        return [generate.Generation(text, True, len(encode(text))) for text in said]

    monkeypatch.setattr(generate, "generate", answer)
    return given


def test_what_is_thought_is_not_compared(
    parrot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The template writes an empty reasoning into the last answer, as Qwen 3's does."""
    data = write(tmp_path / "d.jsonl", [dialogue(f"Q{n}?", "Paris.") for n in range(3)])
    empty = "<think>\n\n</think>\n\nParis."
    said = [empty, "<think>\nFrance.\n</think>\n\nParis.", "<think>\nParis. Paris. Par"]
    thinks(monkeypatch, said)
    found = scores(parrot, data, options={"generate": 3}, template=THINKING)
    rows = found["generations"]
    assert [row["reference"] for row in rows] == [empty] * 3
    assert [row["response"] for row in rows] == said
    assert [row["exact_match"] for row in rows] == [True, True, False]
    assert found["exact_match"] == found["contains"] == pytest.approx(2 / 3)
    assert found["rougeL"] == pytest.approx(2 / 3)
    encode = inference.open_codec(load(overrides={"model_name_or_path": str(parrot.folder)}))[
        0
    ].encode
    lengths = [len(encode(text)) for text in said]
    assert found["answer_tokens"] == pytest.approx(np.mean(lengths))
    assert found["length_ratio"] == pytest.approx(sum(lengths) / (3 * lengths[0]))
    shown = capsys.readouterr().out
    assert "think" not in shown
    assert shown.count("Paris. (right)") == 2


def test_answers_end_as_the_template_of_their_data_set_does(
    parrot: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = thinks(monkeypatch, [SAID])
    entries = [{"path": str(data), "template": "vicuna"}]
    scores(parrot, options={"generate": 1}, datasets=entries)
    assert [template.name for template in given] == ["vicuna"]


def test_drawn_answers_are_those_of_the_seed(unlearnt: dict[str, Any], data: Path) -> None:
    drawn = {"generate": 2, "max_new_tokens": 6, "temperature": 1.0}

    def said(**options: Any) -> list[str]:
        found = scores(data=data, options={**drawn, **options}, seed=3, **unlearnt)
        return [row["response"] for row in found["generations"]]

    first = said()
    assert said(generate=1) == first[:1]  # whatever else is asked
    assert said(top_k=1)[0] != first[0]


def test_an_answer_that_does_not_end_is_cut(parrot: Any, data: Path) -> None:
    found = scores(parrot, data, options={"generate": 1, "max_new_tokens": 2})
    assert found["stop_rate"] == 0.0
    assert found["generations"][0]["response"] == "Yes,"
    assert found["exact_match"] == 0.0


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
    assert ["base", "tuned", "difference", "95%", "interval"] in lines
    # Of one question there is no interval.
    assert ["exact", "match", "0.0%", "100.0%", "+100.0", "points"] in lines
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
        env=environment(devices=1),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = scores(parrot, data, options={"generate": 5})
    # A loss of 34 to 1e-6 is a perplexity to 3.4e-5.
    tolerances = {"eval_loss": 1e-6, "eval_perplexity": 1e-4, "eval_token_accuracy": 1e-6}
    for key, near in tolerances.items():
        assert found[key] == pytest.approx(here[key], rel=near)
        assert found["intervals"][key] == pytest.approx(here["intervals"][key], rel=near)
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
    assert "no record that is evaluated has a column 'sort'. The first has: messages." in refusal(
        capsys, *model, "--dataset", data, "--by", "sort"
    )
    empty = tmp_path / "empty.txt"
    empty.write_text("x\n")
    assert "no text in it has two tokens" in refusal(
        capsys, *model, "--dataset", data, "--general", empty
    )
    assert "resamples" in refusal(capsys, *model, "--dataset", data, "--resamples", 3)
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


def test_a_judge_is_asked_by_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "join", lambda asked: None)
    monkeypatch.setattr(processes, "count", lambda: 4)
    options = EvaluateOptions(judge="http://127.0.0.1:1", base="b", generate=2)
    with pytest.raises(ConfigError, match=r"judge: runs on one host\. Evaluate there"):
        evaluate.run(load(overrides={}), options)
