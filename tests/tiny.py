"""A model of the quickstart's tokenizer, small enough to train in a test, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "model"


def write_model(folder: Path, *, layers: int = 2, kv_heads: int = 1, positions: int = 256) -> None:
    """Writes the tokenizer's files and the config of a tiny llama into a new `folder`."""
    shutil.copytree(TOKENIZER, folder)
    vocab = len(json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]) + 16
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
