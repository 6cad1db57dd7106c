"""Rows that families share: the names of transformers for tensors, and their layouts."""

from jaxtune.hf.layout import Row

_LAYER = "model.layers.{L}."
_BLOCK = "stack_{i}/layer_{j}/"


def layer_rows(*rows: tuple[str, str, str]) -> tuple[Row, ...]:
    """Rows of tensors that every layer has: (name in the layer, name in the block, layout)."""
    return tuple(Row(_LAYER + source, _BLOCK + target, layout) for source, target, layout in rows)


TABLES = (
    Row("model.embed_tokens.weight", "embed/table", "V D -> V D"),
    Row("model.norm.weight", "final_norm/scale", "D -> D"),
    Row("lm_head.weight", "head/kernel", "V D -> D V"),
)
ATTENTION = layer_rows(
    ("self_attn.q_proj.weight", "attention/q/kernel", "(H K) D -> L D H K"),
    ("self_attn.k_proj.weight", "attention/k/kernel", "(G K) D -> L D G K"),
    ("self_attn.v_proj.weight", "attention/v/kernel", "(G K) D -> L D G K"),
    ("self_attn.o_proj.weight", "attention/o/kernel", "D (H K) -> L H K D"),
)
GATED_MLP = layer_rows(
    ("mlp.gate_proj.weight", "mlp/gate/kernel", "F D -> L D F"),
    ("mlp.up_proj.weight", "mlp/up/kernel", "F D -> L D F"),
    ("mlp.down_proj.weight", "mlp/down/kernel", "D F -> L F D"),
)
PRE_NORMS = layer_rows(
    ("input_layernorm.weight", "attention_norm/scale", "D -> L D"),
    ("post_attention_layernorm.weight", "mlp_norm/scale", "D -> L D"),
)
POST_NORMS = layer_rows(
    ("post_attention_layernorm.weight", "attention_post_norm/scale", "D -> L D"),
    ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "D -> L D"),
)
QKV_BIAS = layer_rows(
    ("self_attn.q_proj.bias", "attention/q/bias", "(H K) -> L H K"),
    ("self_attn.k_proj.bias", "attention/k/bias", "(G K) -> L G K"),
    ("self_attn.v_proj.bias", "attention/v/bias", "(G K) -> L G K"),
)
ATTENTION_BIAS = QKV_BIAS + layer_rows(("self_attn.o_proj.bias", "attention/o/bias", "D -> L D"))
MLP_BIAS = layer_rows(
    ("mlp.gate_proj.bias", "mlp/gate/bias", "F -> L F"),
    ("mlp.up_proj.bias", "mlp/up/bias", "F -> L F"),
    ("mlp.down_proj.bias", "mlp/down/bias", "D -> L D"),
)
HEAD_NORMS = layer_rows(
    ("self_attn.q_norm.weight", "attention/q_norm/scale", "K -> L K"),
    ("self_attn.k_norm.weight", "attention/k_norm/scale", "K -> L K"),
)
FULL_NORMS = layer_rows(
    ("self_attn.q_norm.weight", "attention/q_norm/scale", "(H K) -> L H K"),
    ("self_attn.k_norm.weight", "attention/k_norm/scale", "(G K) -> L G K"),
)
GATE_UP = layer_rows(
    ("mlp.gate_up_proj.weight", "mlp/gate/kernel", "(* F) D -> L D F"),
    ("mlp.gate_up_proj.weight", "mlp/up/kernel", "(* F) D -> L D F"),
)
DECODER = TABLES + PRE_NORMS + ATTENTION + GATED_MLP
