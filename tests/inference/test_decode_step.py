"""Decoding with a cache against the plain way: run everything again for each token."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.decoding import Decoded, decode_all
from model.conftest import SPEC

from jaxtune.config import ConfigError, DataError
from jaxtune.inference import decode_step, engine
from jaxtune.inference.sampling import Sampling
from jaxtune.model import decoder
from jaxtune.model.decoder import Params
from jaxtune.parallel import mesh

rng = np.random.default_rng(1)
PROMPTS = [rng.integers(0, SPEC.vocab, n).tolist() for n in (3, 17, 1, 9, 16, 4, 2)]
NEW = 12


@pytest.fixture(scope="module")
def next_logits(params: Params) -> Callable[[list[int]], np.ndarray]:
    """Of a text's next token, `[V]`: the whole text, without cache or batch."""
    length = max(len(prompt) for prompt in PROMPTS) + NEW

    @jax.jit
    def run(inputs_T: jax.Array, size: jax.Array) -> jax.Array:
        positions = jnp.arange(length)[None]
        logits_BTV = decoder.logits(
            SPEC,
            {"params": params},
            inputs_T[None],
            segment_ids=(positions < size).astype(jnp.int32),
            positions=positions,
            dtype=jnp.float32,
        )
        return logits_BTV[0, size - 1]

    def of(tokens: list[int]) -> np.ndarray:
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(run(padded, len(tokens)))

    return of


@pytest.fixture(scope="module")
def plain(next_logits: Callable[[list[int]], np.ndarray]) -> list[list[int]]:
    """The NEW likeliest tokens after each prompt, without cache or batch."""
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(next_logits(tokens).argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def run(params: Params, prompts: list[list[int]], **options: Any) -> list[Decoded]:
    options = {"max_new_tokens": NEW, "stop_ids": (), "dtype": jnp.float32} | options
    return decode_all(SPEC, params, prompts, **options)


def test_a_batch_of_unequal_prompts_is_the_plain_way(
    params: Params, plain: list[list[int]]
) -> None:
    assert len({token for answer in plain for token in answer}) > 10  # no model that babbles
    assert run(params, PROMPTS) == [Decoded(answer, False) for answer in plain]


def test_a_repetition_penalty_is_on_prompt_and_answer(
    params: Params, plain: list[list[int]], next_logits: Callable[[list[int]], np.ndarray]
) -> None:
    """Every token that the text has counts, whenever it came, and once."""
    expected, in_answer = [], 0
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            logits = next_logits(tokens).copy()
            before = int(logits.argmax())
            seen = np.unique(tokens)
            logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.8, logits[seen] / 1.8)
            tokens.append(int(logits.argmax()))
            in_answer += before != tokens[-1] and before not in prompt
        expected.append(Decoded(tokens[len(prompt) :], False))
    assert in_answer > 3  # tokens that the answer's own ones kept away
    assert run(params, PROMPTS, sampling=Sampling(repetition_penalty=1.8)) == expected
    assert [each.tokens for each in expected] != plain


def test_one_by_one_and_small_batches_are_the_batch(params: Params, plain: list[list[int]]) -> None:
    assert run(params, PROMPTS, batch_size=3) == [Decoded(answer, False) for answer in plain]
    assert run(params, PROMPTS[1:2]) == [Decoded(plain[1], False)]


def test_stops_at_a_stop_id_and_leaves_it_out(params: Params, plain: list[list[int]]) -> None:
    stop_ids = {plain[0][4], plain[1][0], plain[3][NEW - 1]}

    def cut(answer: list[int]) -> Decoded:
        stops = [i for i, token in enumerate(answer) if token in stop_ids]
        return Decoded(answer[: stops[0]], True) if stops else Decoded(answer, False)

    expected = [cut(answer) for answer in plain]
    assert expected[1] == Decoded([], True)  # at once
    assert not all(generation.stopped for generation in expected)
    assert run(params, PROMPTS, stop_ids=stop_ids) == expected


def test_a_stop_id_after_the_last_allowed_token_is_not_seen(
    params: Params, plain: list[list[int]]
) -> None:
    answer = plain[0]
    n = next(i for i in range(1, NEW) if answer[i] not in answer[:i])
    stop_ids = {answer[n]}
    ended = run(params, PROMPTS[:1], max_new_tokens=n + 1, stop_ids=stop_ids)
    assert ended == [Decoded(answer[:n], True)]
    not_yet = run(params, PROMPTS[:1], max_new_tokens=n, stop_ids=stop_ids)
    assert not_yet == [Decoded(answer[:n], False)]


def test_many_stop_ids(params: Params, plain: list[list[int]]) -> None:
    harmless = [1000 + i for i in range(20)]
    assert run(params, PROMPTS[:1], stop_ids=harmless) == [Decoded(plain[0], False)]
    at_once = run(params, PROMPTS[:1], stop_ids=[*harmless, plain[0][0]])
    assert at_once == [Decoded([], True)]


def test_one_token_at_a_time_is_many_at_a_time(params: Params, plain: list[list[int]]) -> None:
    for prompt, answer, stop_ids in (
        (PROMPTS[0], plain[0], ()),
        (PROMPTS[1], plain[1], (plain[1][0],)),
        (PROMPTS[3], plain[3], (plain[3][5],)),
    ):
        expected = run(params, [prompt], stop_ids=stop_ids)[0]
        assert expected.tokens == answer[: len(expected.tokens)]
        assert run(params, [prompt], stop_ids=stop_ids, most=1) == [expected]


def test_a_model_on_a_mesh_says_the_same(params: Params, plain: list[list[int]]) -> None:
    grid = mesh.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    shardings = mesh.shardings(decoder.axes(SPEC), decoder.abstract(SPEC, jnp.float32), grid)
    spread = jax.device_put(params, shardings)
    expected = [Decoded(answer, False) for answer in plain]
    assert run(spread, PROMPTS, mesh=grid) == expected
    assert run(spread, PROMPTS[:1], mesh=grid, most=1) == expected[:1]
    assert jax.sharding.get_abstract_mesh().empty  # nothing is left set between tokens


@pytest.mark.slow
def test_half_precision_runs(params: Params) -> None:
    for generation in run(params, PROMPTS[:2], dtype=jnp.bfloat16):
        assert len(generation.tokens) == NEW


def test_the_last_position_ends_an_answer(params: Params) -> None:
    prompt = PROMPTS[1] * 3  # 51 of 64 positions
    assert len(run(params, [prompt, PROMPTS[0]], max_new_tokens=20)[0].tokens) == 64 - 51


def test_a_new_prompt_of_a_known_size_compiles_nothing(params: Params) -> None:
    run(params, PROMPTS[:2])
    programs = decode_step.prefill._cache_size(), decode_step.decode._cache_size()
    run(params, [[5] * 20, [6] * 18], stop_ids={9}, max_new_tokens=NEW - 3)
    assert (decode_step.prefill._cache_size(), decode_step.decode._cache_size()) == programs


def test_shapes_come_in_few_sizes() -> None:
    assert [engine._bucket(n) for n in (1, 16, 17, 1000, 1025, 2049)] == [
        16,
        16,
        32,
        1024,
        2048,
        3072,
    ]


def test_no_prompts_no_answers(params: Params) -> None:
    assert run(params, []) == []


def test_refusals(params: Params) -> None:
    too_long = re.escape(
        "prompt 1 has 64 tokens; the model has 64 positions, and the answer needs at least one. "
        "Shorten the prompt."
    )
    with pytest.raises(DataError, match=too_long):
        run(params, [[1], [1] * 64])
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        run(params, [[]])
    with pytest.raises(ConfigError, match="max_new_tokens is 0; expected at least 1"):
        run(params, [[1]], max_new_tokens=0)
