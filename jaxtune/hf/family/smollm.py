"""SmolLM3: Llama in which every fourth layer knows no positions."""

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, layer_types, size
from jaxtune.hf.family.family import Family, Ropes, biases, layer
from jaxtune.hf.family.rope import ALL, RopeKeys
from jaxtune.spec import LayerSpec


def _smollm3(config: Config, ropes: Ropes) -> list[LayerSpec]:
    count = size(config, "num_hidden_layers")
    rotated = config.get("no_rope_layers")  # 1 where there is rope, 0 where there is none
    if rotated is None:
        every = size(config, "no_rope_layer_interval")
        rotated = [int((n + 1) % every != 0) for n in range(count)]
    if len(rotated) < count:
        raise ValueError(f"no_rope_layers names {len(rotated)} of {count} layers")
    window = None
    if config["use_sliding_window"] and config.get("sliding_window") is not None:
        window = size(config, "sliding_window")
    slides = [not flag for flag in rotated[:count]]
    if config.get("layer_types") is not None:
        slides = [kind == "sliding_attention" for kind in layer_types(config)]
    return [
        layer(
            config,
            ropes[ALL] if rotated[n] else None,
            **biases(config),
            mlp_bias=bool(config["mlp_bias"]),
            window=window if slides[n] else None,
        )
        for n in range(count)
    ]


FAMILIES: dict[str, Family] = {
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.MLP_BIAS,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        layers=_smollm3,
        rope=RopeKeys(thetas={ALL: ("rope_theta", 2_000_000.0)}),
    )
}
