import re
from dataclasses import replace

import pytest

from jaxtune.spec import (
    LayerSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    Stack,
    apart,
    flops_per_token,
    parameter_count,
    whole_backward,
)

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
            LayerSpec(16, 8, 128, 3072, ROPE, qk_norm="head"),
            vocab=151936,
            width=1024,
            repeats=28,
            tie_head=True,
        ),
        596_049_920,
    ),
    "Gemma 2 2B": (
        model(
            LayerSpec(8, 4, 256, 9216, ROPE, norms="both"),
            vocab=256000,
            width=2304,
            repeats=26,
            tie_head=True,
        ),
        2_614_341_888,
    ),
    "Gemma 3 1B": (
        model(
            LayerSpec(4, 1, 256, 6912, ROPE, norms="both", qk_norm="head"),
            vocab=262144,
            width=1152,
            repeats=26,
            tie_head=True,
        ),
        999_885_952,
    ),
    "OLMo 2 7B": (
        model(
            LayerSpec(32, 32, 128, 11008, ROPE, norms="post", qk_norm="full"),
            vocab=100352,
            width=4096,
            repeats=32,
            tie_head=False,
        ),
        7_298_617_344,
    ),
    "Mixtral 8x7B": (
        model(
            LayerSpec(32, 8, 128, 14336, ROPE, moe=MoeSpec(8, 2)),
            vocab=32000,
            width=4096,
            repeats=32,
            tie_head=False,
        ),
        46_702_792_704,
    ),
    "Qwen3 30B-A3B": (
        model(
            LayerSpec(32, 4, 128, 768, ROPE, qk_norm="head", moe=MoeSpec(128, 8)),
            vocab=151936,
            width=2048,
            repeats=48,
            tie_head=False,
        ),
        30_532_122_624,
    ),
    "gpt-oss 20B": (
        model(
            LayerSpec(
                64,
                8,
                64,
                2880,
                ROPE,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
                sinks=True,
                moe=MoeSpec(32, 4, router_bias=True, clamp=(1.702, 7.0)),
            ),
            vocab=201088,
            width=2880,
            repeats=24,
            tie_head=False,
        ),
        20_914_757_184,
    ),
    "StarCoder2 3B": (
        replace(
            model(
                LayerSpec(24, 2, 128, 12288, ROPE, 4096, True, True, True, gated=False),
                vocab=49152,
                width=3072,
                repeats=30,
                tie_head=True,
            ),
            norm="layer",
        ),
        3_030_371_328,
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
    frozen = whole_backward(spec)._replace(dense=((0,),), head=False)
    assert flops_per_token(spec, T, frozen) == pytest.approx(4 * matrices + attention)
    unreached = frozen._replace(first=1, through_head=False)
    assert flops_per_token(spec, T, unreached) == pytest.approx(2 * matrices + attention / 3)


def test_an_mlp_without_a_gate_has_two_matrices() -> None:
    gated = LayerSpec(4, 2, 8, 32, ROPE, mlp_bias=True)
    specs = [
        model(layer, vocab=64, width=16, repeats=3, tie_head=False)
        for layer in (gated, replace(gated, gated=False))
    ]
    assert flops_per_token(specs[0], 8) - flops_per_token(specs[1], 8) == 6 * 3 * 16 * 32
    assert parameter_count(specs[0]) - parameter_count(specs[1]) == 3 * (16 * 32 + 32)


def test_a_mixture_costs_the_experts_that_one_token_uses() -> None:
    T, shared = 8, 24
    dense = LayerSpec(4, 2, 8, 32, ROPE, mlp_bias=True)
    mixed = replace(dense, moe=MoeSpec(6, 2, router_bias=True, shared_width=shared))
    specs = [
        model(layer, vocab=64, width=16, repeats=3, tie_head=False) for layer in (dense, mixed)
    ]
    mlp, router, extra = 3 * 16 * 32, 16 * 6, 3 * 16 * shared + 16
    assert flops_per_token(specs[1], T) - flops_per_token(specs[0], T) == 6 * 3 * (
        mlp + router + extra
    )
    one = mlp + 2 * 32 + 16
    assert parameter_count(specs[1]) - parameter_count(specs[0]) == 3 * (
        5 * one + router + 6 + extra
    )


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
        (lambda: LayerSpec(4, 4, 7, 32, ROPE), "head_dim 7 x 1 gives 7"),
        (lambda: LayerSpec(4, 4, 8, 0, ROPE), "mlp_width is 0; expected at least 1"),
        (lambda: LayerSpec(4, 4, 8, 32, ROPE, window=0), "attention window is 0; expected"),
        (
            lambda: LayerSpec(4, 4, 8, 32, ROPE, activation="swish2"),
            "activation is 'swish2'; expected one of silu, gelu",
        ),
        (lambda: RopeSpec(1e4, "dynamic"), "rope scaling is 'dynamic'; expected one of none"),
        (lambda: RopeSpec(0.0), "rope theta is 0.0; expected a positive number"),
        (lambda: RopeSpec(factor=0.0), "rope factor is 0.0; expected a positive number"),
        (
            lambda: RopeSpec(1e4, "llama3", 8.0, 4.0, 1.0),
            "rope high_freq_factor (1.0) must exceed low_freq_factor (4.0)",
        ),
        (lambda: RopeSpec(scaling="yarn", beta_fast=0.5), "rope beta_fast (0.5) must be at least"),
        (lambda: RopeSpec(fraction=0.0), "rope fraction is 0.0; expected 0 < x <= 1"),
        (lambda: RopeSpec(attention_factor=0.0), "rope attention_factor is 0.0; expected a"),
        (lambda: RopeSpec(short_factors=(1.0, 0.0)), "short and long factors must all be positive"),
        (
            lambda: LayerSpec(4, 4, 10, 32, RopeSpec(fraction=0.5)),
            "need an even number of features; head_dim 10 x 0.5 gives 5",
        ),
        (
            lambda: LayerSpec(4, 4, 8, 32, RopeSpec(scaling="longrope", short_factors=(1.0,) * 3)),
            "rope has 3 short_factors; 8 rotated features need 4",
        ),
        (lambda: LayerSpec(4, 4, 8, 32, ROPE, qk_norm="k"), "qk_norm is 'k'; expected head, full"),
        (
            lambda: LayerSpec(4, 4, 8, 32, ROPE, norms="mid"),
            "norms stand 'mid'; expected one of pre",
        ),
        (lambda: LayerSpec(4, 4, 8, 32, ROPE, softcap=0.0), "attention softcap is 0.0; expected a"),
        (
            lambda: replace(PUBLISHED["Gemma 3 1B"][0], norm="batch"),
            "norm is 'batch'; expected one of rms, layer",
        ),
        (
            lambda: replace(PUBLISHED["Gemma 3 1B"][0], logit_softcap=-1.0),
            "logit_softcap is -1.0; expected a positive number",
        ),
        (lambda: MoeSpec(4, 5), "each token uses 5 of 4 experts; expected 1 to all"),
        (lambda: MoeSpec(4, 0), "each token uses 0 of 4 experts; expected 1 to all"),
        (lambda: MoeSpec(4, 1, "best"), "router softmax is over 'best'; expected all or chosen"),
        (lambda: MoeSpec(4, 1, clamp=(1.0, 0.0)), "expert clamp is (1.0, 0.0); expected a pos"),
        (lambda: MoeSpec(4, 1, shared_width=-1), "shared width is -1; expected 0 or more"),
        (lambda: MoeSpec(4, 1, aux_coef=-0.1), "router aux_coef is -0.1; expected 0 or more"),
        (
            lambda: LayerSpec(4, 4, 8, 32, ROPE, gated=False, moe=MoeSpec(4, 1)),
            "experts are gated MLPs; this layer's are not",
        ),
        (
            lambda: ModelSpec(
                64,
                16,
                tuple(Stack((LayerSpec(4, 4, 8, 32, ROPE, moe=MoeSpec(n, 1)),), 1) for n in (4, 6)),
                1e-6,
                True,
                128,
            ),
            "the mixtures of one model differ in experts or aux_coef",
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


@pytest.mark.parametrize("last", range(1, 16))
def test_the_last_layers_set_apart_are_the_same_layers(last: int) -> None:
    """Every cut of (three kinds x4), (one kind x2), one: before, inside and between repeats."""
    kinds = [LayerSpec(1, 1, 4, width, None) for width in (4, 8, 12, 16, 20)]
    stacks = (Stack(tuple(kinds[:3]), 4), Stack((kinds[3],), 2), Stack((kinds[4],), 1))
    spec = ModelSpec(8, 4, stacks, 1e-6, True, 8)
    split, first = apart(spec, last)
    assert split.layers == spec.layers
    behind = replace(spec, stacks=split.stacks[first:]).layers
    assert len(behind) == last
    assert parameter_count(split) == parameter_count(spec)


def test_more_last_layers_than_there_are_is_an_error() -> None:
    spec = model(LayerSpec(1, 1, 4, 4, None), vocab=8, width=4, repeats=3, tie_head=True)
    assert apart(spec, 3) == (spec, 0)
    with pytest.raises(ValueError, match="the last 4 layers are asked for; the model has 3"):
        apart(spec, 4)
