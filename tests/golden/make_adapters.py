"""Writes `adapters/`: folders that `peft` made for the case "llama", and the logits it gives.

python tests/golden/make_adapters.py        needs torch and peft
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden.cases import TEXTS, write_folder

FOLDER = Path(__file__).with_name("adapters")
KINDS = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "use_rslora": True,
        "target_modules": r".*\.(mlp\.gate_proj|self_attn\.o_proj)",
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"o_proj": 7},
    },
    "dora": {
        "use_dora": True,
        "target_modules": "all-linear",
        "trainable_token_indices": {"embed_tokens": [9, 60], "lm_head": [9, 60]},
    },
}


def main() -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    logits = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = write_folder("llama", Path(scratch) / "base")
        for kind, settings in KINDS.items():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, **settings)
            adapted = peft.get_peft_model(model, config).eval()
            torch.manual_seed(0)
            with torch.no_grad():
                for values in adapted.parameters():
                    if values.requires_grad:
                        values += 0.05 * torch.randn(values.shape)
                logits[kind] = adapted(torch.tensor(TEXTS[0])[None]).logits[0].numpy()
            adapted.peft_config["default"].base_model_name_or_path = "base"
            adapted.save_pretrained(FOLDER / kind)
            (FOLDER / kind / "README.md").unlink()
    np.savez_compressed(FOLDER / "logits.npz", **logits)


if __name__ == "__main__":
    main()
