"""OLMo 2 and 3: norms after each part, and over all heads of queries and keys together."""

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, layer_types, optional_size
from jaxtune.hf.family.family import Family, Ropes, biases, layer, same_layers
from jaxtune.hf.family.rope import RopeKeys
from jaxtune.spec import LayerSpec

_ATTENTION = rows.ATTENTION + rows.ATTENTION_BIAS + rows.FULL_NORMS
_ROWS = rows.TABLES + _ATTENTION + rows.GATED_MLP + rows.POST_NORMS


def _olmo2(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(config, ropes, norms="post", qk_norm="full", **biases(config))


def _olmo3(config: Config, ropes: Ropes) -> list[LayerSpec]:
    windows = {
        "sliding_attention": optional_size(config, "sliding_window"),
        "full_attention": None,
    }
    return [
        layer(
            config,
            ropes[kind],
            window=windows[kind],
            norms="post",
            qk_norm="full",
            **biases(config),
        )
        for kind in layer_types(config, full_every=4)
    ]


_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False}

FAMILIES: dict[str, Family] = {
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        rows=_ROWS,
        defaults=_DEFAULTS,
        layers=_olmo2,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        rows=_ROWS,
        defaults={**_DEFAULTS, "sliding_window": 4096},
        layers=_olmo3,
        # Version 4 has one base for all layers, and stretches those of full attention.
        rope=RopeKeys(
            thetas={
                "full_attention": ("rope_theta", 500_000.0),
                "sliding_attention": ("rope_theta", 500_000.0),
            }
        ),
    ),
}
