"""What hosts compare before they begin; runs of two that differ are in `tests/multihost`."""

from __future__ import annotations

import pytest

from jaxtune.config import ConfigError, load
from jaxtune.parallel import processes
from jaxtune.training import host_consistency


def test_hosts_and_values_are_named_the_fewest_first() -> None:
    same = {"seed": "1", "jax": "0.9"}
    assert host_consistency.differences([same, same]) == []
    assert host_consistency.differences([same, {**same, "seed": "2"}]) == [
        "seed is 2 on host 1 and 1 on host 0"
    ]
    six = [{**same, "jax": "0.8"}, same, same, same, same, same]
    assert host_consistency.differences(six) == [
        "jax is 0.8 on host 0 and 0.9 on host 1, 2, 3 and 2 more"
    ]
    # Another version may have other fields.
    assert host_consistency.differences([same, {**same, "z_loss": "0.0"}]) == [
        "z_loss is 0.0 on host 1 and unknown on host 0"
    ]


def test_long_values_are_cut() -> None:
    (said,) = host_consistency.differences([{"prompts": "x" * 999}, {"prompts": "y"}])
    assert len(said) < 200


def test_where_things_lie_may_be_of_each_host() -> None:
    mine = {"dataset": "/a/train.jsonl", "model_name_or_path": "/a/model", "output_dir": "/a/out",
            "dataset_num_proc": 2, "hosts.process_id": 0, "tokenizer_name": "/a/t"}  # fmt: skip
    theirs = {"dataset": "/b/train.jsonl", "model_name_or_path": "/b/model", "output_dir": "/b/out",
              "dataset_num_proc": 4, "hosts.process_id": 1, "tokenizer_name": "/b/t"}  # fmt: skip
    fields = host_consistency._fields_of(load(overrides=mine))
    assert fields == host_consistency._fields_of(load(overrides=theirs))
    assert {"learning_rate", "mesh.fsdp", "lora.r", "seed", "datasets"} <= fields.keys()


@pytest.mark.parametrize("name", ["learning_rate", "lora.r", "max_steps", "save_steps", "seed"])
def test_every_other_field_is_compared(name: str) -> None:
    before, now = (host_consistency._fields_of(load(overrides={name: value})) for value in (1, 2))
    assert {field for field in before if before[field] != now[field]} == {name}


def test_alone_nothing_is_said_and_several_hear_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_consistency.check_same({"seed": "1"})
    monkeypatch.setattr(processes, "gather_texts", lambda text: [text, "another"])
    monkeypatch.setattr(processes, "publish", lambda name, text: None)
    monkeypatch.setattr(processes, "receive", lambda name, host: f'{{"seed": "{host}"}}')
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="not about to run the same: seed is 1 on host 1 and 0"):
        host_consistency.check_same({"seed": "0"})
