"""GLM 4: half of each head rotated, in pairs of neighbours; from 0414 on norms on both sides."""

from functools import partial

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config
from jaxtune.hf.family.family import Family, Ropes, same_layers
from jaxtune.hf.family.rope import RopeKeys
from jaxtune.spec import LayerSpec

_DOWN = tuple(row for row in rows.GATED_MLP if "down_proj" in row.source)
_ROWS = rows.TABLES + rows.ATTENTION + rows.QKV_BIAS + rows.PRE_NORMS + rows.GATE_UP + _DOWN
_POST_NORMS = rows.layer_rows(
    ("post_self_attn_layernorm.weight", "attention_post_norm/scale", "D -> L D"),
    ("post_mlp_layernorm.weight", "mlp_post_norm/scale", "D -> L D"),
)


def _glm(config: Config, ropes: Ropes, *, norms: str) -> list[LayerSpec]:
    return same_layers(config, ropes, qkv_bias=bool(config["attention_bias"]), norms=norms)


_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_ROPE = RopeKeys(partial=True, interleaved=True)

FAMILIES: dict[str, Family] = {
    "glm": Family(
        architecture="GlmForCausalLM",
        rows=_ROWS,
        defaults=_DEFAULTS,
        layers=partial(_glm, norms="pre"),
        rope=_ROPE,
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        rows=_ROWS + _POST_NORMS,
        defaults=_DEFAULTS,
        layers=partial(_glm, norms="both"),
        rope=_ROPE,
    ),
}
