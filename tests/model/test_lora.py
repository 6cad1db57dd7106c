"""Adapters: nothing at first, merged the same as beside, detached norms, dropout by the key."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model import decoder
from jaxtune.model.lora import Lora, lengths, merged_kernel
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack
from jaxtune.tree import map_named, named

LAYER = LayerSpec(
    heads=4, kv_heads=2, head_dim=8, mlp_width=32, rope=RopeSpec(theta=100.0), qkv_bias=True
)
SPEC = ModelSpec(
    vocab=64, width=16, stacks=(Stack((LAYER,), 2),), norm_eps=1e-6, tie_head=False,
    max_positions=128, init_scale=0.3,
)  # fmt: skip
INPUTS = np.random.default_rng(3).integers(0, 64, (2, 10))
SHARED = {"q": "D", "k": "D", "v": "D", "o": "HK", "gate": "D", "up": "D", "down": "F"}
LETTERS = {"q": "DHK", "k": "DGK", "v": "DGK", "o": "HKD", "gate": "DF", "up": "DF", "down": "FD"}


@pytest.fixture(scope="module")
def params() -> Any:
    return decoder.init(SPEC, jax.random.key(0), jnp.float32)


@functools.partial(jax.jit, static_argnames="lora")
def logits(params: Any, adapters: Any, lora: Lora, key: jax.Array | None = None) -> jax.Array:
    return decoder.logits(
        SPEC, {"params": params, "lora": adapters}, INPUTS, lora=lora, dtype=jnp.float32, key=key,
        segment_ids=np.ones_like(INPUTS), positions=np.tile(np.arange(10), (2, 1)),
    )  # fmt: skip


def plain(params: Any) -> jax.Array:
    return logits(params, {}, Lora(r=1, alpha=1.0))


def moved(adapters: Any) -> Any:
    """Adapters as training might leave them: far enough from the start to move every logit."""

    def move(name: str, leaf: jax.Array) -> jax.Array:
        seed = sum(map(ord, name))
        return leaf + 0.05 * np.random.RandomState(seed).normal(size=leaf.shape).astype("f4")

    return map_named(move, adapters)


KINDS = {
    "lora": Lora(r=3, alpha=6.0),
    "rslora": Lora(r=4, alpha=6.0, rslora=True),
    "dora": Lora(r=3, alpha=6.0, dora=True),
    "rows": Lora(r=2, alpha=2.0, tokens=(int(INPUTS[0, 0]), 62, 63)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_a_moved_one_is_the_merged_model(
    kind: str, params: Any
) -> None:
    lora = KINDS[kind]
    fresh = decoder.init_adapters(SPEC, lora, params, jax.random.key(1))
    # DoRA divides a length by itself: 1 up to rounding
    np.testing.assert_allclose(logits(params, fresh, lora), plain(params), atol=1e-5)
    for name, leaf in named(fresh).items():
        if name.endswith("/a"):
            reach = 1 / np.sqrt(np.prod(leaf.shape[1:-1]))
            assert 0.8 * reach < np.abs(leaf).max() <= reach, name
    adapters = moved(fresh)
    beside = logits(params, adapters, lora)
    assert np.abs(beside - plain(params)).max() > 0.1

    def merge(name: str, leaf: jax.Array) -> jax.Array:
        module, _, last = name.rpartition("/")
        if last == "kernel" and module in decoder.projections(SPEC):
            group = {k.rpartition("/")[2]: v for k, v in named(adapters).items() if module in k}
            part = module.rpartition("/")[2]
            layers = [
                merged_kernel(
                    {key: np.asarray(value[n]) for key, value in group.items()},
                    np.asarray(leaf[n]), LETTERS[part], SHARED[part], lora,
                )
                for n in range(len(leaf))
            ]  # fmt: skip
            return jnp.asarray(np.stack(layers))
        if lora.tokens and module in ("embed", "head"):
            rows, ids = adapters[module]["rows"], np.array(lora.tokens)
            return leaf.at[ids].set(rows) if module == "embed" else leaf.at[:, ids].set(rows.T)
        return leaf

    whole = plain(map_named(merge, params))
    assert np.abs(beside - whole).max() < 1e-5 * np.abs(beside).max()


def test_the_scale_is_alpha_over_r_or_over_its_root() -> None:
    assert Lora(r=16, alpha=32.0).scale == 2.0
    assert Lora(r=16, alpha=32.0, rslora=True).scale == 8.0


def test_only_targets_have_adapters(params: Any) -> None:
    lora = Lora(r=2, alpha=4.0, targets=frozenset({"stack_0/layer_0/attention/q"}))
    made = named(decoder.init_adapters(SPEC, lora, params, jax.random.key(1)))
    assert {name: leaf.shape for name, leaf in made.items()} == {
        "stack_0/layer_0/attention/q/a": (2, 16, 2),
        "stack_0/layer_0/attention/q/b": (2, 2, 4, 8),
    }
    assert named(decoder.adapter_axes(SPEC, lora))["stack_0/layer_0/attention/q/b"] == (
        "layers", None, "heads", "head_dim",
    )  # fmt: skip


def test_the_length_of_a_sum_is_that_of_the_sum_itself() -> None:
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=size) for size in ((4, 5, 6), (4, 5, 3), (3, 6)))
    found = lengths("HKD", "HK", jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), 0.7)
    expected = np.linalg.norm((w + 0.7 * np.einsum("HKR,RD->HKD", a, b)).reshape(20, 6), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dropout_follows_the_key_and_keeps_the_mean(params: Any) -> None:
    lora = Lora(r=2, alpha=4.0, dropout=0.25, targets=frozenset({"stack_0/layer_0/mlp/down"}))
    adapters = moved(decoder.init_adapters(SPEC, lora, params, jax.random.key(1)))
    still = logits(params, adapters, lora)
    one, again, other = (logits(params, adapters, lora, key=jax.random.key(k)) for k in (1, 1, 2))
    assert (one == again).all()
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - still).max() > 1e-3
    # One linear layer before a residual: the mean over keys is near the value without dropout.
    draws = [logits(params, adapters, lora, key=jax.random.key(k)) for k in range(3, 35)]
    assert np.abs(np.mean(draws, axis=0) - still).mean() < 0.25 * np.abs(one - still).mean()


def test_rows_of_other_tokens_stay_frozen(params: Any) -> None:
    lora = KINDS["rows"]
    adapters = decoder.init_adapters(SPEC, lora, params, jax.random.key(1))

    def loss(adapters: Any) -> jax.Array:
        return jnp.sum(jnp.square(logits(params, adapters, lora)))

    gradient = jax.grad(loss)(adapters)
    assert gradient["embed"]["rows"].shape == gradient["head"]["rows"].shape == (3, 16)
    seen = np.isin(lora.tokens, INPUTS)
    moves = np.abs(gradient["embed"]["rows"]).max(axis=1) > 0
    assert (moves == seen).all()
    assert (np.abs(gradient["head"]["rows"]).max(axis=1) > 0).all()
