"""Llama and its relatives: norms before each part, a gated MLP."""

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, layer_types, number, optional_size, size
from jaxtune.hf.family.family import Family, Ropes, biases, layer, same_layers
from jaxtune.hf.family.rope import ALL, RopeKeys
from jaxtune.spec import LayerSpec


def _llama(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(config, ropes, **biases(config), mlp_bias=bool(config["mlp_bias"]))


def _mistral(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(config, ropes, window=optional_size(config, "sliding_window"))


def _seed_oss(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(
        config,
        ropes,
        qkv_bias=bool(config["attention_bias"]),
        out_bias=bool(config["attention_out_bias"]),
        mlp_bias=bool(config["mlp_bias"]),
    )


def _qwen2(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return [layer(config, ropes[ALL], window=w, qkv_bias=True) for w in _qwen_windows(config)]


def _qwen3(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return [
        layer(config, ropes[ALL], window=window, qk_norm="head", **biases(config))
        for window in _qwen_windows(config)
    ]


def _qwen_windows(config: Config) -> list[int | None]:
    """Each layer's window: `layer_types` where stated, else from `max_window_layers` on."""
    window = size(config, "sliding_window") if config["use_sliding_window"] else None
    if config.get("layer_types") is None:
        first = int(number(config, "max_window_layers"))
        return [window if n >= first else None for n in range(size(config, "num_hidden_layers"))]
    return [window if kind == "sliding_attention" else None for kind in layer_types(config)]


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.MLP_BIAS,
        defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        layers=_llama,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        rows=rows.DECODER,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        layers=_mistral,
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        rows=rows.DECODER,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        layers=_mistral,
        rope=RopeKeys(grows=True),
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.MLP_BIAS,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        layers=_seed_oss,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        rows=rows.DECODER + rows.QKV_BIAS,
        defaults=_QWEN,
        layers=_qwen2,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.HEAD_NORMS,
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        layers=_qwen3,
    ),
}
