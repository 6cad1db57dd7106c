import re

import pytest

from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack, flops_per_token, parameter_count

ROPE = RopeSpec(10_000.0)


def model(layer: LayerSpec, *, vocab: int, width: int, repeats: int, tie_head: bool) -> ModelSpec:
    return ModelSpec(vocab, width, (Stack((layer,), repeats),), 1e-6, tie_head, 4096)


# The sizes their makers publish (total_parameters of the safetensors files, tied heads once).
PUBLISHED = {
    "Llama 3 8B": (
        model(
            LayerSpec(32, 8, 128, 14336, ROPE), vocab=128256, width=4096, repeats=32, tie_head=False
        ),
        8_030_261_248,
    ),
    "Mistral 7B": (
        model(
            LayerSpec(32, 8, 128, 14336, ROPE, window=4096),
            vocab=32000,
            width=4096,
            repeats=32,
            tie_head=False,
        ),
        7_241_732_096,
    ),
    "Qwen2.5 0.5B": (
        model(
            LayerSpec(14, 2, 64, 4864, ROPE, qkv_bias=True),
            vocab=151936,
            width=896,
            repeats=24,
            tie_head=True,
        ),
        494_032_768,
    ),
    "Qwen3 0.6B": (
        model(
            LayerSpec(16, 8, 128, 3072, ROPE, qk_norm=True),
            vocab=151936,
            width=1024,
            repeats=28,
            tie_head=True,
        ),
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    spec, count = PUBLISHED[name]
    assert parameter_count(spec) == count


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
def test_attention_flops_count_the_pairs_that_are_computed(window: int | None) -> None:
    T, H, K = 5, 4, 8
    layer = LayerSpec(H, 2, K, 32, ROPE, window=window)
    spec = model(layer, vocab=64, width=16, repeats=3, tie_head=False)
    pairs = sum(1 for t in range(T) for s in range(t + 1) if window is None or t - s < window)
    one_pair = 2 * (2 * K)  # a multiplication and an addition per feature: score, weighted sum
    attention = 3 * 3 * H * pairs * one_pair / T  # layers, forward + twice that backward
    matrices = 3 * (2 * 16 * H * K + 2 * 16 * 2 * K + 3 * 16 * 32) + 16 * 64
    assert flops_per_token(spec, T) == pytest.approx(6 * matrices + attention)


def test_a_tied_head_costs_flops_but_no_parameters() -> None:
    layer = LayerSpec(4, 2, 8, 32, ROPE)
    tied = model(layer, vocab=64, width=16, repeats=1, tie_head=True)
    untied = model(layer, vocab=64, width=16, repeats=1, tie_head=False)
    assert flops_per_token(tied, 8) == flops_per_token(untied, 8)
    assert parameter_count(untied) - parameter_count(tied) == 64 * 16


def test_layers_come_in_the_order_a_token_meets_them() -> None:
    near, far = LayerSpec(4, 2, 8, 32, ROPE, window=4), LayerSpec(4, 2, 8, 32, ROPE)
    spec = ModelSpec(64, 16, (Stack((near, far), 2), Stack((near,), 1)), 1e-6, True, 128)
    assert spec.layers == (near, far, near, far, near)


def test_equal_specs_are_one_static_argument() -> None:
    layer = LayerSpec(4, 2, 8, 32, RopeSpec(5e5, "llama3", 8.0))
    one, other = (model(layer, vocab=64, width=16, repeats=1, tie_head=True) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSpec(6, 4, 8, 32, ROPE), "6 attention heads cannot share 4 key-value heads"),
        (lambda: LayerSpec(4, 4, 7, 32, ROPE), "head_dim is 7; rotary positions need an even"),
        (lambda: LayerSpec(4, 4, 8, 0, ROPE), "mlp_width is 0; expected at least 1"),
        (lambda: LayerSpec(4, 4, 8, 32, ROPE, window=0), "attention window is 0; expected"),
        (
            lambda: LayerSpec(4, 4, 8, 32, ROPE, activation="swish2"),
            "activation is 'swish2'; expected one of silu, gelu",
        ),
        (lambda: RopeSpec(1e4, "yarn"), "rope scaling is 'yarn'; expected one of none, linear"),
        (lambda: RopeSpec(0.0), "rope theta is 0.0; expected a positive number"),
        (lambda: RopeSpec(factor=0.0), "rope factor is 0.0; expected a positive number"),
        (
            lambda: RopeSpec(1e4, "llama3", 8.0, 4.0, 1.0),
            "rope high_freq_factor (1.0) must exceed low_freq_factor (4.0)",
        ),
        (lambda: Stack((), 2), "a stack needs at least one layer"),
        (lambda: Stack((LayerSpec(4, 4, 8, 32, ROPE),), 0), "a stack repeats 0 times"),
        (lambda: ModelSpec(64, 16, (), 1e-6, True, 128), "a model needs at least one stack"),
        (lambda: ModelSpec(0, 16, (), 1e-6, True, 128), "vocab is 0; expected at least 1"),
    ],
)
def test_impossible_models_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]
