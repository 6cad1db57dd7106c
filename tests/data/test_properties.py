"""What must hold for any data, any batch, any number of hosts and any place to resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtune.config import DataError, DatasetConfig
from jaxtune.data import preprocess
from jaxtune.data.dataset import Batches, Dataset, open_dataset
from jaxtune.data.formats import FORMATS
from jaxtune.data.packing import best_fit_decreasing, one_each, packed_batch, shuffled
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.schema import WeightedTokens
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import shift, token_texts
from jaxtune.data.tokenizer import Tokenizer

# Eighths add up exactly in float32, so sums may be compared with ==.
WEIGHTS = st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.0])


@st.composite
def examples(draw: st.DrawFn) -> list[WeightedTokens]:
    """Example i is made of the ids 100 i + 1, 100 i + 2, ...: each token tells where it is from."""
    found = []
    for number in range(draw(st.integers(1, 10))):
        weights = draw(st.lists(WEIGHTS, min_size=2, max_size=12))
        ids = np.arange(100 * number + 1, 100 * number + 1 + len(weights), dtype=np.int32)
        found.append(WeightedTokens(ids, np.array([0.0, *weights[1:]], np.float32)))
    return found


@given(examples(), st.integers(11, 30), st.booleans(), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=120, deadline=None)
def test_packing_keeps_every_weight_and_lets_no_segment_predict_its_neighbour(
    made: list[WeightedTokens], capacity: int, packing: bool, seed: int, epoch: int
) -> None:
    lengths = np.array([len(tokens.ids) - 1 for tokens in made])
    descending = np.sort(lengths)[::-1]
    bins = best_fit_decreasing(descending, capacity) if packing else one_each(len(made))
    rows = shuffled(bins, lengths, seed, epoch)
    numbers = [rows.examples[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]  # noqa: B905
    batch = packed_batch(numbers, lambda i: shift(made[i]), capacity)
    assert batch.weights.sum() == sum(tokens.weights.sum() for tokens in made)
    real = batch.segment_ids > 0
    assert real.sum() == lengths.sum()
    assert not batch.weights[~real].any()
    # The id says which example a position is from: input, target and weight must be of one.
    source, at = np.divmod(batch.inputs[real] - 1, 100)
    assert (batch.targets[real] == batch.inputs[real] + 1).all()
    expected = [made[i].weights[k + 1] for i, k in zip(source, at, strict=True)]
    assert batch.weights[real].tolist() == expected
    assert (batch.positions[real] == at).all()
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            assert len({(i - 1) // 100 for i in batch.inputs[row][segments == segment]}) == 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, byte_level: Tokenizer) -> Dataset:
    folder = tmp_path_factory.mktemp("properties")
    rows = [{"instruction": f"Say {i}.", "output": "word " * (1 + i % 9)} for i in range(37)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_dataset(
        [DatasetConfig(path=str(folder / "a.jsonl"))],
        PreprocessConfig(byte_level, resolve("alpaca_original", byte_level), max_length=256),
        cache_dir=folder / "cache",
    )


@given(
    per_host=st.integers(1, 3),
    hosts=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 5),
    packing=st.booleans(),
    at=st.integers(0, 60),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_resumed_at_any_step_on_any_number_of_hosts_the_order_is_the_same(
    dataset: Dataset, per_host: int, hosts: int, seed: int, packing: bool, at: int
) -> None:
    rows = 12  # of the whole batch, whatever the hosts
    straight = Batches(dataset, batch_size=rows, seed=seed, packing=packing)
    order = [straight.examples(step) for step in range(at + 2)]
    resumed = Batches(dataset, batch_size=rows, seed=seed, packing=packing)
    assert resumed.examples(at) == order[at]
    assert resumed.examples(at + 1) == order[at + 1]
    whole = straight.batch(at)
    share = rows // hosts
    for field in whole._fields:
        parts = [
            getattr(resumed.batch_rows(at, h * share, (h + 1) * share), field) for h in range(hosts)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, field))


@given(
    st.lists(
        st.tuples(
            st.text(max_size=8) | st.sampled_from(["\U0001f389", " a", "\u65e5\u672c "]), WEIGHTS
        ),
        max_size=5,
    )
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_token_by_token_is_the_whole_text(
    byte_level: Tokenizer, parts: list[tuple[str, float]]
) -> None:
    """The page shows every token once, and letters of several tokens whole."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in [*parts, ("</s>", 1.0)]:
        found = byte_level.encode(text)
        ids += found
        weights += [weight] * len(found)
    tokens = WeightedTokens(np.array(ids, np.int32), np.array(weights, np.float32))
    pieces = token_texts(tokens, byte_level)
    assert [number for _, numbers, _ in pieces for number in numbers] == ids
    assert [weight for _, numbers, weight in pieces for _ in numbers] == weights
    assert "".join(text for text, _, _ in pieces) == byte_level.decode(ids)
    assert "\ufffd" not in "".join(text for text, _, _ in pieces) or any(
        "\ufffd" in text for text, _ in parts
    )


# -- any JSON ------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # half surrogate pairs too
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["<s>", "</s>", "<|im_end|>", "{{ x }}", "\x00", "[]", '{"a": null}'])
)
KEYS = st.sampled_from(
    [
        "role", "content", "weight", "train", "from", "value", "text", "type", "tool_calls",
        "function", "arguments", "name", "masked", "input", "output",
    ]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=3),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", "x"])},
    optional={"content": VALUES, "weight": VALUES, "tool_calls": VALUES, "name": VALUES},
)


@st.composite
def record(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """The columns that the format needs, some it may have, and anything in them."""
    known = FORMATS[name]
    fields = {column: draw(VALUES | st.lists(TURN, max_size=4)) for column in known.required}
    for column in known.optional:
        if draw(st.booleans()):
            fields[column] = draw(VALUES)
    return fields


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_anywhere_is_a_row_or_a_clear_error(
    tmp_path: Path, byte_level: Tokenizer, name: str, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(record(name) | VALUES, min_size=1, max_size=3))
    file = tmp_path / "any.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    template = resolve(data.draw(st.sampled_from(["chatml", "alpaca", "llama2"])), byte_level)
    chosen = PreprocessConfig(
        byte_level, template, data.draw(st.sampled_from(["assistant", "all"]))
    )
    entry = DatasetConfig(path=str(file), format=name)
    refused = ""
    try:
        for item in preprocess.preprocess(entry, chosen):
            assert (item.dropped is None) or item.dropped.reason
            if item.dropped is None:
                assert item.tokens is not None
                assert item.tokens.weights.any()
                assert (item.tokens.weights >= 0).all()
                assert np.isfinite(item.tokens.weights).all()
        preprocess.tokenize_chunk(
            list(preprocess.read(entry)), name=name, entry=entry, config=chosen
        )  # and in the form that is stored
    except DataError as error:
        refused = str(error)
    assert not refused or refused.startswith(f"{file}:")
