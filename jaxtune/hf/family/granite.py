"""Granite 3: Llama with a number on the embeddings, the scores, each residual and the logits."""

from typing import Any

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, number
from jaxtune.hf.family.family import Family, Ropes, biases, same_layers
from jaxtune.spec import LayerSpec


def _granite(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(
        config,
        ropes,
        **biases(config),
        mlp_bias=bool(config["mlp_bias"]),
        scale=number(config, "attention_multiplier"),
        residual_scale=number(config, "residual_multiplier"),
    )


def _model(config: Config) -> dict[str, Any]:
    return {
        "embed_scale": number(config, "embedding_multiplier"),
        "logit_scale": 1 / number(config, "logits_scaling"),
    }


FAMILIES: dict[str, Family] = {
    "granite": Family(
        architecture="GraniteForCausalLM",
        rows=rows.DECODER + rows.ATTENTION_BIAS + rows.MLP_BIAS,
        defaults={
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        layers=_granite,
        model=_model,
    )
}
