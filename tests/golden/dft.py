"""Writes `dft.npz`: TRL's dynamic fine-tuning loss and its gradients on a tiny Llama.

    python tests/golden/dft.py            needs torch, trl, accelerate and datasets

The trainer itself computes them: `SFTTrainer(loss_type="dft").compute_loss`, told how many tokens
of the whole step are trained, as `Trainer` tells it with gradient accumulation.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden.cases import TEXTS, WEIGHTS, write_folder

FILE = Path(__file__).with_name("dft.npz")
CASE = "llama"
TOKENIZER = (
    Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "model"
)  # any that pads
GRADIENTS = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")


def write() -> None:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    rows = [
        {"input_ids": text.tolist(), "completion_mask": (weights != 0).astype(int).tolist()}
        for text, weights in zip(TEXTS, WEIGHTS, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(CASE, Path(folder))
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"),
            trl.SFTConfig(
                output_dir=folder,
                loss_type="dft",
                per_device_train_batch_size=len(rows),
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                completion_only_loss=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast.from_pretrained(TOKENIZER),
        )
        (batch,) = trainer.get_train_dataloader()
        trained = int((batch["labels"][:, 1:] != -100).sum())
        loss = trainer.compute_loss(
            trainer.model.train(), batch, num_items_in_batch=torch.tensor(trained)
        )
        loss.backward()
        found = dict(trainer.model.named_parameters())
        values = {name: found[name].grad.numpy() for name in GRADIENTS}
        np.savez_compressed(
            FILE, loss=loss.item(), trained=trained, trl=np.array(trl.__version__), **values
        )
    print(f"{FILE}: trl {trl.__version__}, loss {loss.item():.6f} of {trained} tokens")


if __name__ == "__main__":
    write()
