"""Tiny models that exercise every switch of every family, and the texts they are run on.

A case is a `config.json`; its weights come from numpy's frozen `RandomState`, seeded with its
name, so the same folder can be written with or without torch. Values are large enough that
positions, windows, masks, norms and biases all move the logits by far more than the tolerances.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from jaxtune.hf.family.registry import family_of
from jaxtune.hf.layout import place
from jaxtune.hf.load import layer_numbers
from jaxtune.model import decoder
from jaxtune.tree import named

VOCAB, NEW_TOKENS = 61, 32
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_V4 = {"rope_theta": 100.0, "torch_dtype": "float32"}
_V5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "dtype": "float32"}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 32,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _case(kind: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": kind, **BASE, **keys}


CASES: dict[str, dict[str, Any]] = {
    "llama": _case("llama", **_V4),
    "llama-v5-tied": _case("llama", **_V5, tie_word_embeddings=True),
    "llama-rope-llama3": _case("llama", **_V4, rope_scaling=_LLAMA3),
    "llama-v5-rope-llama3": _case(
        "llama", rope_parameters={**_LLAMA3, "rope_theta": 100.0}, dtype="float32"
    ),
    "llama-rope-linear": _case("llama", **_V4, rope_scaling={"type": "linear", "factor": 2.5}),
    "llama-biases": _case("llama", **_V4, attention_bias=True, mlp_bias=True),
    "llama-head-dim": _case("llama", **_V4, head_dim=12, num_key_value_heads=1),
    "mistral-window": _case("mistral", **_V4, sliding_window=5),
    "qwen2-tied": _case("qwen2", **_V4, tie_word_embeddings=True, use_sliding_window=False),
    "qwen2-windows": _case(
        "qwen2",
        **_V5,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": _case("qwen3", **_V4, head_dim=12, tie_word_embeddings=True),
    "qwen3-windows": _case(
        "qwen3",
        **_V5,
        head_dim=16,
        num_hidden_layers=5,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
    "gemma": _case("gemma", **_V4, hidden_act="gelu", head_dim=12, attention_bias=True),
    "gemma2": _case(
        "gemma2",
        **_V5,
        num_hidden_layers=3,
        head_dim=12,
        sliding_window=4,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
    ),
    "gemma3": _case(
        "gemma3_text",
        **_V4,
        rope_local_base_freq=10.0,
        rope_scaling={"rope_type": "linear", "factor": 2.5},
        num_hidden_layers=4,
        sliding_window_pattern=3,
        sliding_window=4,
        head_dim=8,
    ),
    "gemma3-v5": _case(
        "gemma3_text",
        dtype="float32",
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 200.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=5,
        head_dim=8,
        attention_bias=True,
        final_logit_softcapping=2.5,
        tie_word_embeddings=False,
    ),
    "phi3": _case("phi3", **_V5, sliding_window=5),
    # Texts on both sides of the limit; two of three prompts grow past it while decoding.
    "phi3-longrope": _case(
        "phi3",
        **_V4,
        original_max_position_embeddings=11,
        partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.5, 4.0]},
        tie_word_embeddings=True,
    ),
    "olmo2": _case("olmo2", **_V4, rope_scaling=_YARN, attention_bias=True),
    "olmo3": _case(
        "olmo3", torch_dtype="float32", rope_scaling=_YARN, num_hidden_layers=4, sliding_window=4
    ),
    "granite": _case(
        "granite",
        **_V5,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        logits_scaling=0.7,
        residual_multiplier=0.6,
        attention_multiplier=0.5,
    ),
    "smollm3": _case(
        "smollm3",
        **_V4,
        num_hidden_layers=3,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=4,
        tie_word_embeddings=True,
    ),
    "starcoder2": _case("starcoder2", **_V5, hidden_act="gelu_pytorch_tanh", sliding_window=5),
    # Texts of two to five periods, of which queries grow; two prompts grow past them.
    "ministral3": _case(
        "ministral3",
        dtype="float32",
        head_dim=12,
        rope_parameters={
            **_YARN,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 4,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.4,
        },
    ),
    "seed-oss": _case(
        "seed_oss", **_V5, head_dim=12, attention_bias=True, attention_out_bias=True, mlp_bias=True
    ),
    "glm": _case("glm", **_V4, head_dim=16, partial_rotary_factor=0.5),
    "glm4": _case("glm4", **_V5, head_dim=12, attention_bias=True, tie_word_embeddings=True),
    "exaone4": _case(
        "exaone4", **_V4, num_hidden_layers=4, sliding_window=4, sliding_window_pattern=2
    ),
    "mixtral": _case(
        "mixtral", **_V4, num_local_experts=5, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen2-moe": _case(
        "qwen2_moe",
        **_V4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        use_sliding_window=True,
        sliding_window=4,
    ),
    "qwen3-moe": _case(
        "qwen3_moe",
        **_V4,
        num_hidden_layers=4,
        head_dim=12,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3-moe-v5": _case(
        "qwen3_moe",
        **_V5,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=True,
    ),
    "olmoe": _case("olmoe", **_V4, num_experts=4, num_experts_per_tok=2),
    # Limits that random weights reach; a window on the first and third layer.
    "gpt-oss": _case(
        "gpt_oss",
        torch_dtype="float32",
        rope_theta=100.0,
        rope_scaling={**_YARN, "truncate": False},
        num_hidden_layers=4,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=20,
        swiglu_limit=0.8,
        sliding_window=4,
    ),
}

_random = np.random.RandomState(0)
TEXTS = tuple(_random.randint(3, VOCAB, size=n) for n in (18, 10, 13))
# Weight of each token as a target; the first token of a text is no target.
WEIGHTS = tuple(
    np.round(_random.rand(len(text)) * (_random.rand(len(text)) < 0.7), 2) for text in TEXTS
)
PROMPTS = tuple(text[:n] for text, n in zip(TEXTS, (9, 4, 13), strict=True))


class Reference(NamedTuple):
    """What transformers computes: logits of each text alone, weighted mean loss, its gradients.

    `generated` are the greedy continuations of PROMPTS, without stop tokens.
    """

    logits: tuple[np.ndarray, ...]
    loss: float
    gradients: dict[str, np.ndarray]
    generated: tuple[np.ndarray, ...]


def tensors(name: str) -> dict[str, np.ndarray]:
    """The case's weights under the names and shapes of its checkpoint, float32."""
    family = family_of(CASES[name])
    spec = family.to_spec(CASES[name])
    shapes = {key: leaf.shape for key, leaf in named(decoder.abstract(spec, np.float32)).items()}
    placed = place(family.rows, shapes, layer_numbers(spec)).values()
    found = {piece.name: p.tensor_shape for p in placed for piece in p.pieces()}
    random = np.random.RandomState(zlib.crc32(name.encode()))
    weights = {}
    for tensor, shape in sorted(found.items()):
        centre = 1 - spec.norm_offset if "norm" in tensor else 0
        values = random.normal(size=shape) * 0.2 + centre
        weights[tensor] = values.astype(np.float32)
    return weights


def write_folder(name: str, folder: Path, **keys: Any) -> Path:
    """The case as a folder in Hugging Face format; `keys` change its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CASES[name], **keys}, indent=2))
    save_file(tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path, **keys: Any) -> Path:
    """A tiny byte-level BPE beside a model, as transformers saves one; `keys` join its config."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a prime is seven"] * 5, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 77,
        **keys,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sampled(values: np.ndarray, count: int = 12) -> np.ndarray:
    """Fixed places of a tensor, then its sum of squares: what is stored of a gradient."""
    flat = values.reshape(-1)
    places = np.random.RandomState(flat.size).randint(flat.size, size=count)
    return np.append(flat[places], np.sum(np.square(flat, dtype=np.float64))).astype(np.float32)
