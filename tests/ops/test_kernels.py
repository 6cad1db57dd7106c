"""Kernels of TPU and GPU, interpreted: against the reference, whose suite is `test_attention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.test_attention import CASES, POSITIONS, SEGMENTS, both, qkv

from jaxtune.ops.attention import Share, Tokens, choose, reference
from jaxtune.ops.cudnn import cudnn
from jaxtune.ops.splash import Blocks, blocks, splash

PLACES = {"segments": Tokens(*both(SEGMENTS)), "positions": Tokens(*both(POSITIONS))}
DEFAULTS = {"window": None, "softcap": None, "sinks": None, "scale": 8**-0.5}
interpreted = functools.partial(splash, interpret=True)


def run(implementation: Any, options: dict[str, Any], *arrays: jax.Array, **places: Any) -> Any:
    """Output, and gradients of q, k and v."""
    sinks = options["sinks"]
    options = options | {"sinks": None if sinks is None else jnp.asarray(sinks)}

    def both_ways(*arrays: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: implementation(q, k, v, **places, **options), *arrays)
        return out, pull(jnp.sin(out + 1))

    return jax.jit(both_ways)(*arrays)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_values_and_gradients_are_those_of_the_reference(case: str) -> None:
    options = DEFAULTS | CASES[case]
    ours = run(interpreted, options, *qkv(), **PLACES)
    theirs = run(reference, options, *qkv(), **PLACES)
    # f32 products of eight numbers of size one, summed by blocks: a few units in the last place.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), ours, theirs)
    assert np.all(np.asarray(ours[0])[SEGMENTS == 0] == 0)
    for gradient in ours[1]:
        assert np.all(np.asarray(gradient)[SEGMENTS == 0] == 0)


@pytest.mark.parametrize("case", ["plain", "window", "scale"])
def test_what_cudnn_is_asked_for_is_the_reference(case: str) -> None:
    """The same call as on a GPU, answered by XLA: mask, window, scale and padding."""
    # An even number of tokens, as cuDNN wants: the last is padding, or of the text.
    options, arrays = DEFAULTS | CASES[case], [x[:, :-1] for x in qkv()]
    places = {name: Tokens(*(x[:, :-1] for x in pair)) for name, pair in PLACES.items()}
    ours = run(functools.partial(cudnn, kernel="xla"), options, *arrays, **places)
    theirs = run(reference, options, *arrays, **places)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), ours, theirs)
    for array in (ours[0], *ours[1]):
        assert np.all(np.asarray(array)[SEGMENTS[:, :-1] == 0] == 0)


def test_blocks_by_length_and_size_of_heads() -> None:
    assert blocks(640, 640, 64) == Blocks(128, 128, 128, fused=True)
    assert blocks(4096, 4096, 256) == Blocks(512, 512, 512, fused=True)
    assert blocks(8192, 8192, 128) == Blocks(1024, 1024, 512, fused=True)
    assert blocks(8192, 2048, 256) == Blocks(512, 512, 512, fused=False)
    assert blocks(32768, 384, 128) == Blocks(128, 1024, 512, fused=False)


def test_the_two_backward_kernels_give_what_the_fused_one_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = DEFAULTS | CASES["all"]
    fused = run(interpreted, options, *qkv(), **PLACES)
    monkeypatch.setattr("jaxtune.ops.splash.PARTS", 0)
    two = run(interpreted, options, *qkv(), **PLACES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), fused, two)


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


def test_cudnn_is_chosen_on_a_gpu_and_the_reason_is_told_where_it_is_not() -> None:
    def asked(**changes: Any) -> tuple[str, str]:
        rows: dict[str, Any] = {"queries": 2048, "keys": 2048, "head_dims": [128]}
        return choose("gpu", **rows | changes)

    assert asked()[0] == "cudnn"
    for changes, reason in (
        ({"dtype": "float32"}, "computes in bfloat16 or float16, here is float32"),
        ({"queries": 1024}, "1024 queries over 2048 keys"),
        ({"head_dims": [64, 256]}, "head_dim 256 is no multiple of 8 up to 128"),
        ({"queries": 16384, "keys": 16384}, "up to 8192, not 16384"),
        ({"softcap": True}, "cuDNN has no softcap"),
        ({"sinks": True}, "cuDNN has no sinks"),
    ):
        name, why = asked(**changes)
        assert (name, reason in why) == ("blocked", True), why
    with pytest.raises(ValueError, match="cudnn attention: cuDNN computes in bfloat16 or float16"):
        cudnn(*(x[:, :10] for x in qkv()), **PLACES, **DEFAULTS)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("fused", [True, False])
def test_devices_that_share_a_row_have_its_values_and_gradients(
    window: int | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch from the front and one from the back each, against the whole row in order."""
    monkeypatch.setattr("jaxtune.ops.splash.PARTS", 8 if fused else 0)
    T, devices = 512, 2
    rng = np.random.default_rng(1)
    shapes = (1, T, 2, 8), (1, T, 1, 8), (1, T, 1, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    sizes = (300, 150, 62)
    ids = jnp.asarray(np.repeat([1, 2, 0], sizes)[None], jnp.int32)
    at = jnp.asarray(np.concatenate([np.arange(n) for n in sizes])[None], jnp.int32)
    options = DEFAULTS | {"window": window, "sinks": jnp.asarray([0.5, -1.0])}
    order = np.arange(T, dtype=np.int32).reshape(4, -1)[[[0, 3], [1, 2]]].reshape(devices, -1)

    def on_devices(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = jnp.zeros_like(q)
        for device in range(devices):
            mine = order[device]
            places = {
                "segments": Tokens(ids[:, mine], ids), "positions": Tokens(at[:, mine], at)
            }  # fmt: skip
            share = Share(order, jnp.asarray(device))
            out = out.at[:, mine].set(
                interpreted(q[:, mine], k, v, **places, **options, share=share)
            )
        return out

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        places = {"segments": Tokens(ids, ids), "positions": Tokens(at, at)}
        return reference(q, k, v, **places, **options)

    def both_ways(f: Any) -> Any:
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(jnp.sin(out + 1))

    ours, theirs = (jax.jit(functools.partial(both_ways, f))() for f in (on_devices, whole))
    # Gradients of keys are sums over 300 queries, up to ten in size.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)
