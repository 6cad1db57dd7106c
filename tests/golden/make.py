"""Writes `values/`: what transformers (torch, CPU, float32, eager attention) gives for `cases`.

    python tests/golden/make.py [CASE ...]        needs torch; run it after changing a case

Stored of each gradient: its largest magnitude, some of its values and its sum of squares.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden.cases import (
    CASES,
    NEW_TOKENS,
    PROMPTS,
    TEXTS,
    WEIGHTS,
    Reference,
    sampled,
    tensors,
    write_folder,
)

VALUES = Path(__file__).with_name("values")


def reference(folder: Path) -> Reference:
    """Runs transformers on the model in `folder`, each text alone."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits, losses = [], []
    for text, weights in zip(TEXTS, WEIGHTS, strict=True):
        out = model(input_ids=torch.tensor(text)[None]).logits[0]
        logits.append(out.detach().numpy())
        token_losses = torch.nn.functional.cross_entropy(
            out[:-1], torch.tensor(text)[1:], reduction="none"
        )
        losses.append((token_losses * torch.tensor(weights[1:], dtype=torch.float32)).sum())
    loss = sum(losses) / float(sum(weights[1:].sum() for weights in WEIGHTS))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    # Under the names and shapes of the file: in memory all experts of a layer are one tensor.
    gradients = {name: g.numpy() for name, g in revert_weight_conversion(model, found).items()}
    generated = []
    for prompt in PROMPTS:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        tokens = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        generated.append(tokens[0, len(prompt) :].numpy().astype(np.int16))
    return Reference(tuple(logits), loss.item(), gradients, tuple(generated))


def stored(name: str) -> Reference:
    """The reference of a case from its file; a gradient is (largest magnitude, *sampled)."""
    with np.load(VALUES / f"{name}.npz") as values:
        ends = np.cumsum([len(text) for text in TEXTS])[:-1]
        return Reference(
            tuple(np.split(values["logits"], ends)),
            float(values["loss"]),
            dict(zip(sorted(tensors(name)), values["gradients"], strict=True)),
            tuple(values["generated"]),
        )


def summary(found: Reference) -> dict[str, np.ndarray]:
    """Of each gradient (largest magnitude, *sampled)."""
    return {
        name: np.append(np.abs(gradient).max(), sampled(gradient))
        for name, gradient in found.gradients.items()
    }


def main(names: Sequence[str]) -> None:
    VALUES.mkdir(exist_ok=True)
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = reference(write_folder(name, Path(folder)))
        np.savez_compressed(
            VALUES / f"{name}.npz",
            loss=np.float32(found.loss),
            logits=np.concatenate(found.logits),
            gradients=np.stack([gradient for _, gradient in sorted(summary(found).items())]),
            generated=np.stack(found.generated),
        )
    for file in VALUES.glob("*.npz"):
        if file.stem not in CASES:
            file.unlink()
    size = sum(file.stat().st_size for file in VALUES.iterdir())
    print(f"{VALUES}: {len(CASES)} cases, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
