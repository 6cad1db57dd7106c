"""Gemma 1 to 3: norms that multiply by 1 + w, scaled embeddings, a tied head."""

from typing import Any

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import (
    Config,
    activation,
    layer_types,
    number,
    optional_number,
    optional_size,
    refuse,
    size,
)
from jaxtune.hf.family.family import Family, Ropes, biases, layer, same_layers
from jaxtune.hf.family.rope import ALL, RopeKeys
from jaxtune.spec import LayerSpec

_NORMS = (
    *(row for row in rows.PRE_NORMS if "input_layernorm" in row.source),
    *rows.POST_NORMS,
    *rows.layer_rows(("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> L D")),
)
_COMMON = rows.TABLES + rows.ATTENTION + rows.ATTENTION_BIAS + rows.GATED_MLP + _NORMS


def _model(config: Config) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "embed_scale": size(config, "hidden_size") ** 0.5,
        "logit_softcap": optional_number(config, "final_logit_softcapping"),
    }


def _gemma(config: Config, ropes: Ropes) -> list[LayerSpec]:
    refuse(config, "use_bidirectional_attention")
    name = str(config["hidden_act"])
    # The first files say gelu and mean its tanh approximation.
    act = activation("gelu_pytorch_tanh" if name == "gelu" else name)
    return same_layers(config, ropes, **biases(config), activation=act)


def _gemma2(config: Config, ropes: Ropes) -> list[LayerSpec]:
    softcap = optional_number(config, "attn_logit_softcapping")
    kinds = layer_types(config, full_every=2)
    return [_both_norms(config, ropes[ALL], kind, softcap=softcap) for kind in kinds]


def _gemma3(config: Config, ropes: Ropes) -> list[LayerSpec]:
    refuse(config, "attn_logit_softcapping")  # transformers reads it and does not apply it
    kinds = layer_types(config, full_every=size(config, "sliding_window_pattern"))
    return [_both_norms(config, ropes[kind], kind, qk_norm="head") for kind in kinds]


def _both_norms(config: Config, rope: Any, kind: str, **fields: Any) -> LayerSpec:
    refuse(config, "use_bidirectional_attention")
    return layer(
        config,
        rope,
        **biases(config),
        window=optional_size(config, "sliding_window") if kind == "sliding_attention" else None,
        norms="both",
        scale=number(config, "query_pre_attn_scalar") ** -0.5,
        activation=activation(str(config["hidden_activation"])),
        **fields,
    )


_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_DEFAULTS_2 = {
    **_DEFAULTS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

FAMILIES: dict[str, Family] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS,
        defaults={**_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        layers=_gemma,
        model=_model,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        rows=_COMMON,
        defaults=_DEFAULTS_2,
        layers=_gemma2,
        model=_model,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        rows=_COMMON + rows.HEAD_NORMS,
        defaults={
            **_DEFAULTS_2,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        layers=_gemma3,
        model=_model,
        rope=RopeKeys(
            thetas={
                "full_attention": ("rope_theta", 1_000_000.0),
                "sliding_attention": ("rope_local_base_freq", 10_000.0),
            }
        ),
    ),
}
