"""Weights and proportions: exact counts of every epoch, everything seen evenly, a pure function."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import ConfigError, DataError, DatasetConfig, dump, load
from jaxtune.data import mixing
from jaxtune.data.dataset import Batches, Dataset, open_dataset, split
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.progress import counts_before, counts_of, epoch_at, fingerprint
from jaxtune.data.report.data_report import report
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer


def rows(count: int, word: str, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"instruction": f"{word} {i}", "output": f"{word} " * (1 + i % 5), **columns}
        for i in range(count)
    ]


def entry(path: Path, data: list[dict[str, Any]], **options: Any) -> DatasetConfig:
    path.write_text("\n".join(json.dumps(row) for row in data), encoding="utf-8")
    return DatasetConfig(path=str(path), **options)


def opened(entries: list[DatasetConfig], tokenizer: Tokenizer) -> Dataset:
    template = resolve("alpaca", tokenizer)
    return open_dataset(entries, PreprocessConfig(tokenizer, template, max_length=128))


def epochs(batches: Batches, count: int) -> list[Counter[int]]:
    """How often each example is in each epoch, from the batches themselves."""
    found = []
    start = 0
    for epoch in range(count):
        end = batches.end_of_epoch(epoch)
        steps = range(start, end)
        found.append(Counter(n for s in steps for row in batches.examples(s) for n in row))
        start = end
    return found


@pytest.fixture
def weighted(tmp_path: Path, byte_level: Tokenizer) -> Dataset:
    """10 examples of weight 3, 50 of weight 1: 22.5 of 60 an epoch, and 37.5."""
    few = entry(tmp_path / "few.jsonl", rows(10, "few"), weight=3)
    return opened([few, entry(tmp_path / "many.jsonl", rows(50, "many"))], byte_level)


@pytest.fixture
def uneven(tmp_path: Path, byte_level: Tokenizer) -> Dataset:
    """Epochs of as many examples, but of other lengths, so of another number of rows."""
    long = [{"instruction": "q", "output": "word " * i} for i in range(1, 30)]
    half = entry(tmp_path / "long.jsonl", long, weight=0.5)
    return opened([half, entry(tmp_path / "few.jsonl", rows(10, "few"))], byte_level)


SHOP = [
    *rows(30, "s", kind="shipping"), *rows(60, "r", kind="returns"), *rows(6, "n", kind=7),
    *rows(4, "x"),
]  # fmt: skip
TARGET = {"column": "kind", "target": {"shipping": 0.8, "returns": 0.15, 7: 0.05}}


@pytest.fixture
def shop(tmp_path: Path, byte_level: Tokenizer) -> Dataset:
    return opened([entry(tmp_path / "shop.jsonl", SHOP, proportions=TARGET)], byte_level)


# -- what is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_weights_decide_how_often_an_example_is_seen(weighted: Dataset, packing: bool) -> None:
    batches = Batches(weighted, batch_size=4, seed=1, packing=packing)
    seen = epochs(batches, 8)
    few = weighted.source_of == 0
    for epoch in seen:
        assert sum(epoch.values()) == len(weighted) == 60
        assert sum(n for i, n in epoch.items() if few[i]) == 23  # 22.5, rounded once
    total = sum(seen, Counter())
    for stratum in weighted.strata:
        counts = [total[i] for i in stratum.numbers]
        assert max(counts) - min(counts) <= 1  # nobody is left out, nobody is favoured
    assert seen[0] != seen[1]


def test_equal_weights_are_no_mixture(tmp_path: Path, byte_level: Tokenizer) -> None:
    def batches(weight: float) -> Batches:
        parts = [
            entry(tmp_path / f"{word}.jsonl", rows(9 * len(word), word), weight=weight)
            for word in ("a", "bb")
        ]
        return Batches(opened(parts, byte_level), batch_size=2, seed=0)

    plain, heavy = batches(1), batches(2.5)
    assert not heavy.dataset.mixed
    assert all(epoch == Counter(range(27)) for epoch in epochs(plain, 3))
    assert [plain.examples(s) for s in range(9)] == [heavy.examples(s) for s in range(9)]
    assert fingerprint(plain) == fingerprint(heavy)


def test_proportions_are_reached_within_rounding(shop: Dataset) -> None:
    batches = Batches(shop, batch_size=4, seed=3)
    kinds = np.array([row.get("kind", None) for row in SHOP], object)
    for epoch in epochs(batches, 5):
        count = Counter(kinds[i] for i in epoch.elements())
        assert count == {"shipping": 77, "returns": 14, 7: 5}  # of 96: 76.8, 14.4, 4.8
    assert any("4 examples are in no target and left out" in note for note in shop.notes)
    later = sum(epochs(batches, 30), Counter())
    assert set(later) == set(range(96))  # what is thinned out is seen in other epochs


def test_proportions_within_weights(tmp_path: Path, byte_level: Tokenizer) -> None:
    shop = entry(tmp_path / "shop.jsonl", SHOP, proportions=TARGET, weight=2)
    data = opened([shop, entry(tmp_path / "a.jsonl", rows(48, "a"))], byte_level)
    assert [(s.value, s.drawn) for s in data.strata] == [
        ("shipping", 92), ("returns", 17), ("7", 6), (mixing.OTHER, 0), (None, 29),
    ]  # fmt: skip
    assert sum(s.drawn for s in data.strata) == 96 + 48


def test_the_report_has_shares_before_and_after(shop: Dataset) -> None:
    found = {part["value"]: part for part in report(shop)["mixture"]}
    assert found["shipping"] == {
        "dataset": "shop", "value": "shipping", "examples": 30, "share_before": 0.3,
        "per_epoch": 77, "share_after": 77 / 96,
    }  # fmt: skip
    assert found[mixing.OTHER]["share_after"] == 0
    json.dumps(found)


def test_values_are_kept_whatever_the_chunk(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Chunks number the values they meet; the dataset has one numbering."""
    data = [{"text": str(i), "kind": "z" if i < 600 else "yx"[i % 2]} for i in range(1100)]
    target = {"x": 0.5, "y": 0.25, "z": 0.25}
    part = entry(tmp_path / "a.jsonl", data, proportions={"column": "kind", "target": target})
    found = opened([part], byte_level)
    known = found.sources[0].stored.summary["values"]
    assert [known[code] for code in found.gather("values")] == [row["kind"] for row in data]
    drawn = {stratum.value: stratum.drawn for stratum in found.strata}
    assert drawn == {"x": 550, "y": 275, "z": 275}


# -- order ----------------------------------------------------------------------------------------


def test_a_mixed_step_is_a_pure_function_of_seed_and_step(weighted: Dataset) -> None:
    straight = Batches(weighted, batch_size=3, seed=3)
    ends = [straight.end_of_epoch(epoch) for epoch in range(4)]
    steps = [straight.batch(step) for step in range(ends[-1])]
    for step in (0, ends[0] - 1, ends[0], ends[1] + 1, ends[2], ends[3] - 1):
        resumed = Batches(weighted, batch_size=3, seed=3)
        for name, array in resumed.batch(step)._asdict().items():
            np.testing.assert_array_equal(array, getattr(steps[step], name))
        assert resumed.locate(step) == next(
            (e, step - (ends[e - 1] if e else 0)) for e in range(4) if step < ends[e]
        )
    assert Batches(weighted, batch_size=3, seed=4).examples(0) != straight.examples(0)
    seen = [counts_of(straight, step) for step in range(ends[-1])]
    for step in (0, ends[0], ends[1] + 1):
        assert counts_before(straight, step) == tuple(
            sum(part[i] for part in seen[:step]) for i in range(3)
        )
    assert [epoch_at(straight, end) for end in (0, *ends)] == [0, 1, 2, 3, 4]
    assert [straight.total_steps(n) for n in (1, 2, 4)] == [ends[0], ends[1], ends[3]]
    assert ends[0] < straight.total_steps(1.5) <= ends[1]


def test_each_epoch_is_packed_by_its_own_lengths(uneven: Dataset) -> None:
    batches = Batches(uneven, batch_size=1, seed=0)
    lengths = uneven.token_counts - 1
    counts = set()
    for epoch, seen in enumerate(epochs(batches, 6)):
        end = batches.end_of_epoch(epoch)
        start = batches.end_of_epoch(epoch - 1) if epoch else 0
        for step in range(start, end):
            numbers = batches.examples(step)[0]
            assert 0 < lengths[numbers].sum() <= batches.row_length
            assert np.count_nonzero(batches.batch(step).segment_ids) == lengths[numbers].sum()
        assert seen == Counter(batches.drawn(epoch).tolist())
        counts.add(end - start)
    assert len(counts) > 1  # else this has shown nothing


def test_threads_agree_where_epochs_end(uneven: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer asks while batches are made ahead in another thread."""
    alone = [Batches(uneven, batch_size=1, seed=3).locate(step) for step in range(200)]
    packed = Batches._packed

    def slow(self: Batches, epoch: int) -> Any:
        time.sleep(0.001)
        return packed(self, epoch)

    monkeypatch.setattr(Batches, "_packed", slow)
    shared = Batches(uneven, batch_size=1, seed=3)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(shared.locate, range(200))) == alone


def test_every_pass_has_its_own_order() -> None:
    half = [mixing.Stratum("d", None, np.arange(30), 15)]
    first, second, third, fourth = (set(mixing.draw(half, 0, e).tolist()) for e in range(4))
    assert first | second == third | fourth == set(range(30))
    assert first not in (third, fourth)


def test_fingerprint_follows_the_mixture(tmp_path: Path, byte_level: Tokenizer) -> None:
    def print_of(**options: Any) -> str:
        parts = [
            entry(tmp_path / "shop.jsonl", SHOP, **options), entry(tmp_path / "a.jsonl", SHOP)
        ]  # fmt: skip
        return fingerprint(Batches(opened(parts, byte_level), batch_size=2, seed=0))

    other = {"column": "kind", "target": {"shipping": 0.5, "returns": 0.5}}
    options = [{}, {"weight": 2}, {"weight": 3}, {"proportions": TARGET}, {"proportions": other}]
    assert len({print_of(**option) for option in options}) == len(options)


def test_a_held_out_side_is_not_mixed(shop: Dataset) -> None:
    train, held_out = split(shop, 0.2, seed=0)
    batches = Batches(held_out, batch_size=2, seed=0, order="file")
    assert epochs(batches, 1) == [Counter(range(20))]
    assert sum(epochs(Batches(train, batch_size=2, seed=0), 1)[0].values()) == sum(
        stratum.drawn for stratum in train.strata
    )


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_every_stratum_is_gone_through_evenly(sizes: list[tuple[int, int]], seed: int) -> None:
    starts = np.cumsum([0] + [size for size, _ in sizes])
    mixed = [
        mixing.Stratum("d", None, np.arange(start, start + size), drawn)
        for start, (size, drawn) in zip(starts, sizes, strict=False)
    ]
    total: Counter[int] = Counter()
    for epoch in range(5):
        numbers = mixing.draw(mixed, seed, epoch)
        np.testing.assert_array_equal(numbers, mixing.draw(mixed, seed, epoch))
        total.update(numbers.tolist())
        for stratum in mixed:
            counts = [total[i] for i in stratum.numbers]
            assert sum(counts) == (epoch + 1) * stratum.drawn
            assert max(counts) - min(counts) <= 1


@given(st.integers(0, 10_000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_apportion_is_whole_and_near(total: int, shares: list[float]) -> None:
    counts = mixing.apportion(total, shares)
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1


# -- what cannot be drawn -------------------------------------------------------------------------


def test_targets_that_cannot_be_met(tmp_path: Path, byte_level: Tokenizer) -> None:
    def target(**shares: float) -> DatasetConfig:
        return entry(
            tmp_path / "shop.jsonl", SHOP, proportions={"column": "kind", "target": shares}
        )

    message = (
        r"shop.jsonl: proportions: no example has 'shiping' in its column 'kind'. Did you mean "
        r"'shipping'\? There are: 7, null, returns, shipping\."
    )
    with pytest.raises(DataError, match=message):
        opened([target(shiping=0.5, returns=0.5)], byte_level)
    message = r"leave none of the 30 examples of shipping in an epoch of 90. Raise them"
    with pytest.raises(ConfigError, match=message):
        opened([target(shipping=0.001, returns=0.999)], byte_level)
    wrong = entry(tmp_path / "a.jsonl", SHOP, proportions={"column": "sort", "target": {"a": 1}})
    with pytest.raises(DataError, match=r"in its column 'sort'.*There are: null"):
        opened([wrong], byte_level)


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ({"column": "c", "target": {"a": 0.5, "b": 0.4}}, r"shares add up to 1; these to 0\.9"),
        ({"column": "c", "target": {"a": 1.5, "b": -0.5}}, r"target\.b"),
        ({"colum": "c", "target": {"a": 1}}, r"unknown key.*Did you mean 'column'"),
    ],
)
def test_proportions_are_validated(proportions: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(overrides={"datasets": [{"path": "a.jsonl", "proportions": proportions}]})


def test_proportions_survive_the_run_directory() -> None:
    target = {7: 0.5, True: 0.25, "a": 0.25}
    entries = [{"path": "a.jsonl", "proportions": {"column": "c", "target": target}}]
    config = load(overrides={"datasets": entries})
    proportions = config.datasets[0].proportions
    assert proportions is not None
    assert proportions.target == {"7": 0.5, "true": 0.25, "a": 0.25}
    assert load(overrides=yaml.safe_load(dump(config))) == config


def test_evaluation_takes_no_mixture() -> None:
    with pytest.raises(ConfigError, match="eval_datasets have no weight and no proportions"):
        load(overrides={"eval_datasets": [{"path": "a.jsonl", "weight": 2}]})


# -- what a dataset may have of its own -----------------------------------------------------------


def test_template_and_system_prompt_of_one_dataset(tmp_path: Path, byte_level: Tokenizer) -> None:
    data = rows(2, "w")
    parts = [
        entry(tmp_path / "a.jsonl", data),
        entry(tmp_path / "b.jsonl", data, template="Q: {instruction} A: {output}"),
        entry(tmp_path / "c.jsonl", data, template="chatml", system_prompt="Be brief."),
        entry(tmp_path / "d.jsonl", data, system_prompt="Be kind."),
    ]
    found = opened(parts, byte_level)
    texts = [byte_level.decode(found.tokens(i).ids.tolist()) for i in range(0, 8, 2)]
    assert texts[0].startswith("Below is an instruction")
    assert texts[1] == "Q: w 0 A: w </s>"
    assert texts[2].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nw 0")
    assert texts[3].startswith("Be kind.\n\n### Instruction:\nw 0")
    prints = {opened([part], byte_level).fingerprint for part in parts}
    assert len(prints) == 4
    with pytest.raises(ConfigError, match="template: 'chatlm' is not known"):
        opened([parts[0].model_copy(update={"template": "chatlm"})], byte_level)
