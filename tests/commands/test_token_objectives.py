"""`loss_type` and `prompt_loss_weight` as a user sets them: numbers of a run, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_model

from jaxtune import evaluate, preview, train
from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder

ROWS = [
    {"instruction": f"Where is number {i}?", "output": f"In {place}." * (1 + i % 3)}
    for i, place in enumerate(("Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul"))
]


def argv(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_run_of_both_is_the_sum_over_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At learning rate 0, one step over all rows, packed, in two microbatches on eight devices.

    What it reports is made of each token's probability, from all logits at once, and of the weights
    that `preview` shows. Its evaluation on the same rows is the cross-entropy of the answers.
    """
    write_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = {
        "model_name_or_path": tmp_path / "model", "dataset": data, "max_length": 64,
        "prompt_loss_weight": 0.3,
    }  # fmt: skip
    run = {
        **fields, "loss_type": "dft", "init": "random", "eval_datasets": data, "max_steps": 1,
        "learning_rate": 0, "logging_steps": 1, "per_device_train_batch_size": 1, "mesh.fsdp": 4,
        "mesh.tensor": 2, "gradient_accumulation_steps": 2, "save_dtype": "float32",
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    assert train.main(argv(run)) == 0
    capsys.readouterr()
    assert preview.main([*argv(fields), "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained, evaluated = map(json.loads, (tmp_path / "out" / "metrics.jsonl").open())

    model = open_model(tmp_path / "out" / "hf")
    params = load_params(model, None, jnp.float32)
    shape = (len(shown), max(len(row["input_ids"]) for row in shown))
    ids, weights = np.zeros(shape, np.int32), np.zeros(shape)
    for i, row in enumerate(shown):
        ids[i, : len(row["input_ids"])], weights[i, : len(row["trained"])] = (
            row["input_ids"],
            row["trained"],
        )
    logits = decoder.logits(
        model.spec, {"params": params}, ids, dtype=jnp.float32,
        segment_ids=np.ones(shape, np.int32), positions=np.arange(shape[1]) + 0 * ids,
    )  # fmt: skip
    before = np.asarray(logits[:, :-1], np.float64)
    log_p = before - np.log(np.exp(before).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]
    counts = weights[:, 1:] > 0
    w, nll = weights[:, 1:][counts], each[counts]
    assert set(w.tolist()) == {float(np.float32(0.3)), 1.0}
    assert trained["nll"] == pytest.approx((w * nll).sum() / w.sum(), rel=1e-5)
    assert trained["loss"] == pytest.approx((w * np.exp(-nll) * nll).sum() / w.sum(), rel=1e-5)
    assert trained["tokens_trained"] == len(w)
    assert evaluated["eval_loss"] == pytest.approx(nll[w == 1].mean(), rel=1e-5)
    assert evaluated["eval_tokens_trained"] == (w == 1).sum()

    again = {**fields, "model_name_or_path": tmp_path / "out" / "hf", "loss_type": "dft"}
    assert evaluate.main([*argv(again), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "focal"}, "loss_type: Input should be 'nll' or 'dft'; got 'focal'"),
        ({"prompt_loss_weight": 1.5}, "prompt_loss_weight: Input should be less than or equal"),
        ({"prompt_loss_weight": 0.1, "train_on": "all"},
         "prompt_loss_weight is of train_on assistant or last; with all, prompts weigh 1"),
    ],
)  # fmt: skip
def test_mistakes_are_exit_2(
    fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(argv({"dataset": "rows.jsonl", **fields})) == 2
    assert message in capsys.readouterr().err
