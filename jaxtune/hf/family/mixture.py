"""Mixtures of experts: Mixtral, Qwen2 and Qwen3 MoE, OLMoE and gpt-oss."""

from typing import Any

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, layer_types, number, optional_size, refuse, size
from jaxtune.hf.family.family import Family, Ropes, biases, layer, same_layers
from jaxtune.hf.family.rope import ALL, RopeKeys
from jaxtune.hf.layout import Row
from jaxtune.spec import LayerSpec, MoeSpec

_COMMON = rows.TABLES + rows.PRE_NORMS + rows.ATTENTION


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and experts of one tensor each."""
    return rows.layer_rows(
        (f"{block}.gate.weight", "moe/router/kernel", "E D -> L D E"),
        (f"{block}.experts.{{E}}.{gate}.weight", "moe/gate/kernel", "F D -> L E D F"),
        (f"{block}.experts.{{E}}.{up}.weight", "moe/up/kernel", "F D -> L E D F"),
        (f"{block}.experts.{{E}}.{down}.weight", "moe/down/kernel", "D F -> L E F D"),
    )


_QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_SHARED = rows.layer_rows(
    ("mlp.shared_expert.gate_proj.weight", "moe/shared/gate/kernel", "F D -> L D F"),
    ("mlp.shared_expert.up_proj.weight", "moe/shared/up/kernel", "F D -> L D F"),
    ("mlp.shared_expert.down_proj.weight", "moe/shared/down/kernel", "D F -> L F D"),
    ("mlp.shared_expert_gate.weight", "moe/shared_gate/kernel", "S D -> L D S"),
)
_STACKED = rows.layer_rows(
    ("self_attn.sinks", "attention/sinks", "H -> L H"),
    ("mlp.router.weight", "moe/router/kernel", "E D -> L D E"),
    ("mlp.router.bias", "moe/router/bias", "E -> L E"),
    ("mlp.experts.gate_up_proj", "moe/gate/kernel", "E D (F *) -> L E D F"),
    ("mlp.experts.gate_up_proj", "moe/up/kernel", "E D (F *) -> L E D F"),
    ("mlp.experts.gate_up_proj_bias", "moe/gate/bias", "E (F *) -> L E F"),
    ("mlp.experts.gate_up_proj_bias", "moe/up/bias", "E (F *) -> L E F"),
    ("mlp.experts.down_proj", "moe/down/kernel", "E F D -> L E F D"),
    ("mlp.experts.down_proj_bias", "moe/down/bias", "E D -> L E D"),
)


def _moe(config: Config, **fields: Any) -> MoeSpec:
    """Read the keys that all of them share.

    Version 5 writes `num_experts` as `num_local_experts`.
    """
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return MoeSpec(
        size(config, key),
        size(config, "num_experts_per_tok"),
        # Where router logits are an output transformers adds the loss in training.
        aux_coef=number(config, "router_aux_loss_coef") if config["output_router_logits"] else 0.0,
        **fields,
    )


def _by_softmax(config: Config, **fields: Any) -> MoeSpec:
    over = "chosen" if config["norm_topk_prob"] else "all"
    return _moe(config, softmax_over=over, **fields)


def _mixtral(config: Config, ropes: Ropes) -> list[LayerSpec]:
    refuse(config, "router_jitter_noise")
    window = optional_size(config, "sliding_window")
    return same_layers(config, ropes, window=window, moe=_moe(config))


def _qwen2_moe(config: Config, ropes: Ropes) -> list[LayerSpec]:
    moe = _by_softmax(config, shared_width=size(config, "shared_expert_intermediate_size"))
    window = size(config, "sliding_window") if config["use_sliding_window"] else None
    if config.get("layer_types") is None:
        last = int(number(config, "max_window_layers"))
        count = size(config, "num_hidden_layers")
        slides = [n % 2 == 0 and n < last for n in range(count)]
    else:
        slides = [kind == "sliding_attention" for kind in layer_types(config)]
    return [
        layer(
            config,
            ropes[ALL],
            window=window if slide else None,
            qkv_bias=bool(config["qkv_bias"]),
            **mlp,
        )
        for slide, mlp in zip(slides, _sparse(config, moe), strict=True)
    ]


def _qwen3_moe(config: Config, ropes: Ropes) -> list[LayerSpec]:
    window = size(config, "sliding_window") if config["use_sliding_window"] else None
    return [
        layer(config, ropes[ALL], window=window, qk_norm="head", **biases(config), **mlp)
        for mlp in _sparse(config, _by_softmax(config))
    ]


def _sparse(config: Config, moe: MoeSpec) -> list[dict[str, Any]]:
    """Of each layer: experts at every `decoder_sparse_step`-th that is not in `mlp_only_layers`."""
    step, dense = size(config, "decoder_sparse_step"), config.get("mlp_only_layers") or []
    experts = {"moe": moe, "mlp_width": size(config, "moe_intermediate_size")}
    return [
        experts if (n + 1) % step == 0 and n not in dense else {}
        for n in range(size(config, "num_hidden_layers"))
    ]


def _olmoe(config: Config, ropes: Ropes) -> list[LayerSpec]:
    refuse(config, "clip_qkv")
    moe = _by_softmax(config)
    return same_layers(config, ropes, qk_norm="full", **biases(config), moe=moe)


def _gpt_oss(config: Config, ropes: Ropes) -> list[LayerSpec]:
    clamp = number(config, "swiglu_alpha"), number(config, "swiglu_limit")
    moe = _moe(config, router_bias=True, clamp=clamp)
    window = optional_size(config, "sliding_window")
    return [
        layer(
            config,
            ropes[ALL],
            window=window if kind == "sliding_attention" else None,
            **biases(config),
            mlp_bias=True,
            sinks=True,
            moe=moe,
        )
        for kind in layer_types(config, full_every=2)
    ]


_ROUTER = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_QWEN = {
    **_ROUTER,
    "norm_topk_prob": False,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        rows=_COMMON + _experts("block_sparse_moe", "w1", "w3", "w2"),
        defaults={
            **_ROUTER,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        layers=_mixtral,
        rope=RopeKeys(thetas={ALL: ("rope_theta", 1_000_000.0)}),
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        rows=rows.DECODER + rows.QKV_BIAS + _QWEN_EXPERTS + _SHARED,
        defaults={
            **_QWEN,
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        layers=_qwen2_moe,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.HEAD_NORMS + _QWEN_EXPERTS,
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        layers=_qwen3_moe,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        rows=_COMMON + rows.ATTENTION_BIAS + rows.FULL_NORMS + _QWEN_EXPERTS,
        defaults={
            **_ROUTER,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        layers=_olmoe,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        rows=_COMMON + rows.ATTENTION_BIAS + _STACKED,
        defaults={
            **_ROUTER,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "sliding_window": 128,
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        layers=_gpt_oss,
        rope=RopeKeys(thetas={ALL: ("rope_theta", 150_000.0)}),
    ),
}
