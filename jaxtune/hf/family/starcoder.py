"""StarCoder2: LayerNorm, a plain MLP, biases everywhere."""

from typing import Any

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, number, optional_size
from jaxtune.hf.family.family import Family, Ropes, same_layers
from jaxtune.hf.layout import Row
from jaxtune.spec import LayerSpec

_ROWS = (
    Row("model.norm.bias", "final_norm/bias", "D -> D"),
    *rows.layer_rows(
        ("mlp.c_fc.weight", "mlp/up/kernel", "F D -> L D F"),
        ("mlp.c_fc.bias", "mlp/up/bias", "F -> L F"),
        ("mlp.c_proj.weight", "mlp/down/kernel", "D F -> L F D"),
        ("mlp.c_proj.bias", "mlp/down/bias", "D -> L D"),
        ("input_layernorm.bias", "attention_norm/bias", "D -> L D"),
        ("post_attention_layernorm.bias", "mlp_norm/bias", "D -> L D"),
    ),
)


def _starcoder2(config: Config, ropes: Ropes) -> list[LayerSpec]:
    bias, window = bool(config["use_bias"]), optional_size(config, "sliding_window")
    biases = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bias}
    return same_layers(config, ropes, window=window, gated=False, **biases)


def _model(config: Config) -> dict[str, Any]:
    return {"norm": "layer", "norm_eps": number(config, "norm_epsilon")}


FAMILIES: dict[str, Family] = {
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        rows=rows.TABLES + rows.ATTENTION + rows.PRE_NORMS + rows.ATTENTION_BIAS + _ROWS,
        defaults={
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        layers=_starcoder2,
        model=_model,
    )
}
