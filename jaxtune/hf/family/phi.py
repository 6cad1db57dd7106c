"""Phi-3 and Phi-4: Llama with queries, keys and values in one tensor, gate and up in another."""

from jaxtune.hf.family import rows
from jaxtune.hf.family.config_keys import Config, optional_size
from jaxtune.hf.family.family import Family, Ropes, same_layers
from jaxtune.hf.family.rope import RopeKeys
from jaxtune.spec import LayerSpec

_FUSED = rows.layer_rows(
    ("self_attn.qkv_proj.weight", "attention/q/kernel", "(* H K) D -> L D H K"),
    ("self_attn.qkv_proj.weight", "attention/k/kernel", "(* G K) D -> L D G K"),
    ("self_attn.qkv_proj.weight", "attention/v/kernel", "(* G K) D -> L D G K"),
)
_WHOLE = tuple(
    row
    for row in rows.ATTENTION + rows.GATED_MLP
    if "o_proj" in row.source or "down_proj" in row.source
)


def _phi3(config: Config, ropes: Ropes) -> list[LayerSpec]:
    return same_layers(config, ropes, window=optional_size(config, "sliding_window"))


FAMILIES: dict[str, Family] = {
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        rows=rows.TABLES + rows.PRE_NORMS + _FUSED + rows.GATE_UP + _WHOLE,
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        layers=_phi3,
        rope=RopeKeys(
            aliases={"su": "longrope", "yarn": "longrope"},  # the first files' names for it
            type_key="type",
            beside=("original_max_position_embeddings",),
            partial=True,
        ),
    ),
}
