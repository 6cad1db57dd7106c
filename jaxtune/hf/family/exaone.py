"""EXAONE 4: norms after each part; where layers slide, the others know no positions."""

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, layer_types, optional_size, size
from jaxtune.hf.family.family import Family, Ropes, layer
from jaxtune.hf.family.rope import ALL
from jaxtune.spec import LayerSpec


def _exaone4(config: Config, ropes: Ropes) -> list[LayerSpec]:
    window, every = optional_size(config, "sliding_window"), 1
    if window is not None and config.get("layer_types") is None:
        every = size(config, "sliding_window_pattern")
    slides = [kind == "sliding_attention" for kind in layer_types(config, full_every=every)]
    return [
        layer(
            config,
            ropes[ALL] if window is None or sliding else None,
            window=window if sliding else None,
            norms="post",
            qk_norm="head",
        )
        for sliding in slides
    ]


FAMILIES: dict[str, Family] = {
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        rows=rows.TABLES + rows.ATTENTION + rows.GATED_MLP + rows.POST_NORMS + rows.HEAD_NORMS,
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        layers=_exaone4,
    )
}
