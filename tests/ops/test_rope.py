import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops import rope
from jaxtune.spec import RopeSpec

KINDS = {
    "none": RopeSpec(10_000.0),
    "linear": RopeSpec(10_000.0, "linear", factor=4.0),
    # Llama 3.1's own numbers, but for a context small enough that all three branches are met.
    "llama3": RopeSpec(500_000.0, "llama3", 8.0, 1.0, 4.0, original_max_positions=64),
    "yarn": RopeSpec(
        10_000.0,
        "yarn",
        4.0,
        original_max_positions=512,
        beta_fast=16.0,
        attention_factor=0.1 * math.log(4.0) + 1,
    ),
}
LONGROPE = RopeSpec(
    100.0,
    "longrope",
    original_max_positions=4,
    short_factors=(1.0, 1.5),
    long_factors=(2.0, 8.0),
    attention_factor=1.25,
    fraction=0.5,
)


def test_one_pair_turns_by_position_times_frequency() -> None:
    """K = 2 has one pair of frequency 1: (1, 0) at position p becomes (cos p, sin p)."""
    positions = jnp.array([[0, 1, 2, 1000]])
    cos, sin = rope.angles(KINDS["none"], 2, positions)
    x = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 4, 1, 2))
    turned = rope.rotate(x, cos, sin)[0, :, 0]
    p = np.array([0, 1, 2, 1000], np.float64)
    np.testing.assert_allclose(turned, np.stack([np.cos(p), np.sin(p)], -1), atol=1e-6)


def test_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(q_position: int, k_position: int) -> float:
        turned = [
            rope.rotate(x, *rope.angles(KINDS["none"], 16, jnp.array([[position]])))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_scaling_stretches_long_waves_and_keeps_short_ones() -> None:
    plain = rope.frequencies(RopeSpec(500_000.0), 64)
    linear = rope.frequencies(RopeSpec(500_000.0, "linear", factor=8.0), 64)
    np.testing.assert_allclose(linear, plain / 8, rtol=1e-6)
    ratio = rope.frequencies(KINDS["llama3"], 64) / plain
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 64 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 64 / 1], 1 / 8, rtol=1e-6)
    between = ratio[(waves > 64 / 4) & (waves < 64)]
    assert len(between) >= 2
    assert np.all((between > 1 / 8) & (between < 1))
    assert np.all(np.diff(between) < 0)


def test_yarn_keeps_what_turns_often_and_stretches_what_hardly_turns() -> None:
    spec = KINDS["yarn"]
    plain = rope.frequencies(KINDS["none"], 64)
    ratio = rope.frequencies(spec, 64) / plain
    turns = spec.original_max_positions * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 1.5 * spec.beta_fast], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < spec.beta_slow / 1.5], 1 / 4, rtol=1e-6)
    between = ratio[(ratio < 1 - 1e-6) & (ratio > 1 / 4 + 1e-6)]
    assert len(between) >= 3
    assert np.all(np.diff(between) < 0)


def test_each_text_of_a_row_is_rotated_by_its_own_length() -> None:
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]])
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    assert rope.last_positions(positions, segments).tolist() == [[4] * 5 + [3] * 4 + [0]]
    assert rope.last_positions(positions[:, :5], None).tolist() == [[4] * 5]
    cos, sin = rope.angles(LONGROPE, 8, positions, segments)
    # Five tokens are more than 4, four are not.
    plain = 100.0 ** -(np.arange(0, 4, 2) / 4)
    for cut, factors in ((slice(0, 5), (2.0, 8.0)), (slice(5, 9), (1.0, 1.5))):
        angle = np.asarray(positions)[0, cut, None] * plain / np.array(factors)
        np.testing.assert_allclose(cos[0, cut], 1.25 * np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[0, cut], 1.25 * np.sin(angle), atol=1e-6)


def test_the_rest_of_a_head_is_left_alone() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), jnp.float32)
    cos, sin = rope.angles(LONGROPE, 8, jnp.arange(5)[None])
    assert cos.shape == (1, 5, 2)
    turned = rope.rotate(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rope.rotate(x[..., :4], cos, sin), atol=1e-6)
    assert np.abs(turned[:, 1:, :, :4] - x[:, 1:, :, :4]).min() > 0


def test_neighbours_are_turned_as_halves_are_in_another_order() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), jnp.float32)
    cos, sin = rope.angles(LONGROPE, 8, jnp.arange(5)[None])  # 2 pairs
    halves = x[..., jnp.array([0, 2, 1, 3, 4, 5, 6, 7])]
    np.testing.assert_array_equal(
        rope.rotate(x, cos, sin, interleaved=True), rope.rotate(halves, cos, sin)
    )


def test_queries_grow_by_whole_periods() -> None:
    spec = RopeSpec(growth=0.1, original_max_positions=4)
    positions = jnp.array([[0, 3, 4, 7, 8, 40]])
    x = jnp.ones((1, 6, 2, 4), jnp.bfloat16)
    expected = 1 + 0.1 * np.log(np.array([1, 1, 2, 2, 3, 11]))
    found = rope.grown(spec, x, positions)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0, :, 0, 0], jnp.asarray(expected, jnp.bfloat16))
    assert rope.grown(RopeSpec(), x, positions) is x


def test_half_precision_is_turned_in_f32() -> None:
    positions = jnp.array([[100_000]])
    cos, sin = rope.angles(KINDS["none"], 8, positions)
    assert cos.dtype == sin.dtype == jnp.float32
    x = jnp.full((1, 1, 1, 8), 0.5, jnp.bfloat16)
    exact = rope.rotate(x.astype(jnp.float32), cos, sin)
    ours = rope.rotate(x, cos, sin)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    spec, head_dim, T = KINDS[kind], 32, 40
    parameters = {
        "rope_theta": spec.theta,
        "rope_type": "default" if kind == "none" else kind,
        "factor": spec.factor,
        "low_freq_factor": spec.low_freq_factor,
        "high_freq_factor": spec.high_freq_factor,
        "original_max_position_embeddings": spec.original_max_positions,
        "beta_fast": spec.beta_fast,
        "beta_slow": spec.beta_slow,
    }
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, T, heads, head_dim)).astype(np.float32) for heads in (4, 2))
    positions = rng.integers(0, 4096, (2, T))

    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    theirs = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(q).transpose(1, 2),
        torch.tensor(k).transpose(1, 2),
        *embedding(torch.tensor(q), torch.tensor(positions)),
    )
    cos, sin = rope.angles(spec, head_dim, jnp.asarray(positions))
    for ours, their in zip((q, k), theirs, strict=True):
        # One unit in the last place of a frequency, times a position of up to 4096.
        np.testing.assert_allclose(
            rope.rotate(jnp.asarray(ours), cos, sin), their.transpose(1, 2), atol=2e-3
        )
    # At small positions nothing is left of that.
    early = torch.arange(16)[None]
    cos, sin = rope.angles(spec, head_dim, jnp.arange(16)[None])
    their_cos, their_sin = embedding(torch.tensor(q), early)
    np.testing.assert_allclose(cos, their_cos[..., : head_dim // 2], atol=2e-6)
    np.testing.assert_allclose(sin, their_sin[..., : head_dim // 2], atol=2e-6)
