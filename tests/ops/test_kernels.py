"""Kernels of TPU and GPU, interpreted: against the reference, whose suite is `test_attention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.test_attention import CASES, MASK, SEGMENTS, pairs, qkv, spec_of

from jaxtune.ops.attention import choose
from jaxtune.ops.cudnn import cudnn
from jaxtune.ops.reference import (
    AttentionMask,
    AttentionShape,
    AttentionSpec,
    ContextShard,
    reference,
)
from jaxtune.ops.splash import BlockSizes, blocks, splash

SCALE = 8**-0.5
interpreted = functools.partial(splash, interpret=True)


def run(implementation: Any, case: str, mask: AttentionMask, *arrays: jax.Array) -> Any:
    """Output, and gradients of q, k and v."""
    spec = spec_of({"scale": SCALE} | CASES[case])

    def both_ways(*arrays: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: implementation(q, k, v, mask, spec), *arrays)
        return out, pull(jnp.sin(out + 1))

    return jax.jit(both_ways)(*arrays)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_values_and_gradients_are_those_of_the_reference(case: str) -> None:
    ours = run(interpreted, case, MASK, *qkv())
    theirs = run(reference, case, MASK, *qkv())
    # f32 products of eight numbers of size one, summed by blocks: a few units in the last place.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), ours, theirs)
    assert np.all(np.asarray(ours[0])[SEGMENTS == 0] == 0)
    for gradient in ours[1]:
        assert np.all(np.asarray(gradient)[SEGMENTS == 0] == 0)


@pytest.mark.parametrize("case", ["plain", "window", "scale"])
def test_the_call_of_cudnn_is_the_reference(case: str) -> None:
    """The same call as on a GPU, answered by XLA: mask, window, scale and padding."""
    # An even number of tokens, as cuDNN wants: the last is padding, or of the text.
    arrays = [x[:, :-1] for x in qkv()]
    mask = AttentionMask(*(x[:, :-1] for x in MASK))
    ours = run(functools.partial(cudnn, kernel="xla"), case, mask, *arrays)
    theirs = run(reference, case, mask, *arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), ours, theirs)
    for array in (ours[0], *ours[1]):
        assert np.all(np.asarray(array)[SEGMENTS[:, :-1] == 0] == 0)


def test_blocks_by_length_and_size_of_heads() -> None:
    assert blocks(640, 640, 64) == BlockSizes(128, 128, 128, fused=True)
    assert blocks(4096, 4096, 256) == BlockSizes(512, 512, 512, fused=True)
    assert blocks(8192, 8192, 128) == BlockSizes(1024, 1024, 512, fused=True)
    assert blocks(8192, 2048, 256) == BlockSizes(512, 512, 512, fused=False)
    assert blocks(32768, 384, 128) == BlockSizes(128, 1024, 512, fused=False)


def test_the_two_backward_kernels_give_what_the_fused_one_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = run(interpreted, "all", MASK, *qkv())
    monkeypatch.setattr("jaxtune.ops.splash.PARTS", 0)
    two = run(interpreted, "all", MASK, *qkv())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=4e-6), fused, two)


def test_a_row_of_several_blocks_with_a_window_over_their_edges() -> None:
    T = 640  # blocks of 128
    rng = np.random.default_rng(1)
    shapes = (1, T, 2, 8), (1, T, 1, 8), (1, T, 1, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [300, 200, 100, 40])[None], jnp.int32)
    lengths = [np.arange(n) for n in (300, 200, 100, 40)]
    positions = jnp.asarray(np.concatenate(lengths)[None], jnp.int32)
    mask, spec = pairs(segments, positions), AttentionSpec(SCALE, window=150)
    ours, theirs = (f(q, k, v, mask, spec) for f in (interpreted, reference))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_it_is_chosen_on_a_tpu_and_the_reason_is_told_where_it_is_not() -> None:
    def chosen(platform: str, queries: int, keys: int, size: int) -> tuple[str, str]:
        return choose(platform, AttentionShape(queries, keys, (size,)))

    assert chosen("tpu", 2048, 2048, 128)[0] == "splash"
    decoding, why = chosen("tpu", 1, 2048, 128)
    assert (decoding, "1 queries over 2048 keys" in why) == ("reference", True)
    odd, why = chosen("tpu", 2048, 2048, 20)
    assert (odd, "head_dim 20" in why) == ("blocked", True)
    with pytest.raises(ValueError, match="1 queries over 3 keys"):
        splash(jnp.ones((1, 1, 2, 8)), *2 * [jnp.ones((1, 3, 2, 8))], MASK, AttentionSpec(SCALE))


def test_cudnn_is_chosen_on_a_gpu_and_the_reason_is_told_where_it_is_not() -> None:
    def chosen(**changes: Any) -> tuple[str, str]:
        return choose("gpu", AttentionShape(2048, 2048, (128,))._replace(**changes))

    assert chosen()[0] == "cudnn"
    for changes, reason in (
        ({"dtype": "float32"}, "computes in bfloat16 or float16, here is float32"),
        ({"queries": 1024}, "1024 queries over 2048 keys"),
        ({"head_dims": (64, 256)}, "head_dim 256 is no multiple of 8 up to 128"),
        ({"queries": 16384, "keys": 16384}, "up to 8192, not 16384"),
        ({"softcap": True}, "cuDNN has no softcap"),
        ({"sinks": True}, "cuDNN has no sinks"),
    ):
        name, why = chosen(**changes)
        assert (name, reason in why) == ("blocked", True), why
    with pytest.raises(ValueError, match="cudnn attention: cuDNN computes in bfloat16 or float16"):
        cudnn(*(x[:, :10] for x in qkv()), MASK, AttentionSpec(SCALE))


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
    spec = AttentionSpec(SCALE, window=window, sinks=jnp.asarray([0.5, -1.0]))
    order = np.arange(T, dtype=np.int32).reshape(4, -1)[[[0, 3], [1, 2]]].reshape(devices, -1)

    def on_devices(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = jnp.zeros_like(q)
        for device in range(devices):
            mine = order[device]
            mask = AttentionMask(ids[:, mine], ids, at[:, mine], at)
            shard = ContextShard(order, jnp.asarray(device))
            out = out.at[:, mine].set(interpreted(q[:, mine], k, v, mask, spec, shard=shard))
        return out

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return reference(q, k, v, pairs(ids, at), spec)

    def both_ways(f: Any) -> Any:
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(jnp.sin(out + 1))

    ours, theirs = (jax.jit(functools.partial(both_ways, f))() for f in (on_devices, whole))
    # Gradients of keys are sums over 300 queries, up to ten in size.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)
