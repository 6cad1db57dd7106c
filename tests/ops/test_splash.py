"""The TPU's kernel, interpreted: against the reference, whose own suite is `test_attention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.test_attention import CASES, POSITIONS, SEGMENTS, both, qkv

from jaxtune.ops.attention import Tokens, choose, reference
from jaxtune.ops.splash import splash

PLACES = {"segments": Tokens(*both(SEGMENTS)), "positions": Tokens(*both(POSITIONS))}
DEFAULTS = {"window": None, "softcap": None, "sinks": None, "scale": 8**-0.5}
interpreted = functools.partial(splash, interpret=True)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_values_and_gradients_are_those_of_the_reference(case: str) -> None:
    options = DEFAULTS | CASES[case]
    sinks = options.pop("sinks")

    def run(implementation: Any, *arrays: jax.Array) -> Any:
        out, pull = jax.vjp(
            lambda q, k, v: implementation(
                q, k, v, **PLACES, **options, sinks=None if sinks is None else jnp.asarray(sinks)
            ),
            *arrays,
        )
        return out, pull(jnp.sin(out + 1))

    ours = jax.jit(functools.partial(run, interpreted))(*qkv())
    theirs = jax.jit(functools.partial(run, reference))(*qkv())
    # f32 products of eight numbers of size one, summed by blocks: a few units in the last place.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), ours, theirs)
    assert np.all(np.asarray(ours[0])[SEGMENTS == 0] == 0)
    for gradient in ours[1]:
        assert np.all(np.asarray(gradient)[SEGMENTS == 0] == 0)


def test_a_row_of_several_blocks_with_a_window_over_their_edges() -> None:
    T = 640  # blocks of 128
    rng = np.random.default_rng(1)
    shapes = (1, T, 2, 8), (1, T, 1, 8), (1, T, 1, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [300, 200, 100, 40])[None], jnp.int32)
    lengths = [np.arange(n) for n in (300, 200, 100, 40)]
    positions = jnp.asarray(np.concatenate(lengths)[None], jnp.int32)
    places = {"segments": Tokens(segments, segments), "positions": Tokens(positions, positions)}
    options = DEFAULTS | {"window": 150}
    ours, theirs = (f(q, k, v, **places, **options) for f in (interpreted, reference))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_it_is_chosen_on_a_tpu_and_the_reason_is_told_where_it_is_not() -> None:
    def asked(platform: str, queries: int, keys: int, size: int) -> tuple[str, str]:
        return choose(platform, queries=queries, keys=keys, head_dims=[size])

    assert asked("tpu", 2048, 2048, 128)[0] == "splash"
    decoding, why = asked("tpu", 1, 2048, 128)
    assert (decoding, "1 queries over 2048 keys" in why) == ("reference", True)
    odd, why = asked("tpu", 2048, 2048, 20)
    assert (odd, "head_dim 20" in why) == ("blocked", True)
    with pytest.raises(ValueError, match="1 queries over 3 keys"):
        splash(
            jnp.ones((1, 1, 2, 8)), *2 * [jnp.ones((1, 3, 2, 8))], **PLACES, **DEFAULTS
        )  # fmt: skip
