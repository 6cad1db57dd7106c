"""What this project computes for a case: the other side of `make.reference`."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from golden.cases import NEW_TOKENS, PROMPTS, TEXTS, WEIGHTS, write_folder

from jaxtune.hf.load import HfModel, load_params, open_model
from jaxtune.inference.engine import Engine
from jaxtune.model import decoder
from jaxtune.ops.cross_entropy import linear_cross_entropy
from jaxtune.ops.head import logits
from jaxtune.tree import named

# Two correct programs in float32 differ by reassociated sums of at most 48 terms.
LOGITS, EXPERT_LOGITS, LOSS, GRADIENT = 2e-5, 5e-5, 1e-5, 1e-4

ROWS, LENGTH = 8, 32  # of every batch, so that one program serves all; meshes can cut them
PACKED = ((0, 1), (2,))  # texts of each row
ALONE = ((0,), (1,), (2,))


class Ours(NamedTuple):
    logits: tuple[np.ndarray, ...]  # of each text
    loss: float
    gradients: dict[str, np.ndarray]  # under the checkpoint's names


def rows(layout: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    """Texts laid out in rows; targets shifted within each text, padding in segment 0."""
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    batch["weights"] = np.zeros((ROWS, LENGTH), np.float32)
    for row, texts in enumerate(layout):
        at = 0
        for segment, text in enumerate(texts, start=1):
            size = len(TEXTS[text])
            cut = slice(at, at + size)
            batch["inputs"][row, cut] = TEXTS[text]
            batch["targets"][row, at : at + size - 1] = TEXTS[text][1:]
            batch["weights"][row, at : at + size - 1] = WEIGHTS[text][1:]
            batch["segment_ids"][row, cut] = segment
            batch["positions"][row, cut] = np.arange(size)
            at += size
    return batch


@functools.cache
def program(name: str) -> tuple[HfModel, functools.partial[Any]]:
    """The imported model and batch -> ((mean loss, logits), gradients), compiled once.

    Its one argument is the parameters, under `args`.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(write_folder(name, Path(folder)))
        params = load_params(model, None, jnp.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch):
        output = decoder.forward(
            model.spec,
            {"params": params},
            decoder.TokenRows(batch["inputs"], batch["segment_ids"], batch["positions"]),
            decoder.ForwardConfig(jnp.float32, "none"),
        )
        sums = linear_cross_entropy(
            output.hidden, output.head, batch["targets"], batch["weights"], block=11
        )
        return sums.loss / sums.weight, logits(output.hidden, output.head)

    return model, functools.partial(run, params)


@functools.cache
def ours(name: str, layout: tuple[tuple[int, ...], ...]) -> Ours:
    model, run = program(name)
    (loss, logits), grads = run(rows(layout))
    by_text = {}
    for row, texts in enumerate(layout):
        at = 0
        for text in texts:
            by_text[text] = np.asarray(logits[row, at : at + len(TEXTS[text])])
            at += len(TEXTS[text])
    texts = tuple(by_text[i] for i in range(len(TEXTS)))
    return Ours(texts, float(loss), as_in_checkpoint(model, grads))


def as_in_checkpoint(model: HfModel, params: Any) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and in the shapes of the model's files."""
    leaves = named(params)
    tensors: dict[str, np.ndarray] = {}
    for parameter, placed in model.placed.items():
        values = np.asarray(leaves[parameter])
        for piece in placed.pieces():
            at = tuple(piece.place.get(axis, slice(None)) for axis in placed.row.axes)
            tensors[piece.name] = placed.write(values[at], tensors.get(piece.name))
    return tensors


# Cases whose first two prompts are read at once: one more program to compile.
TOGETHER = ("llama", "gemma3", "gpt-oss")


def greedy(name: str) -> list[list[int]]:
    """The likeliest NEW_TOKENS after each prompt, with the cache: in two slots, of which one is
    filled again and again while the other goes on."""
    model, run = program(name)
    (params,) = run.args
    engine = Engine(model.spec, {"params": params}, dtype=jnp.float32, slots=2)
    first, second, third = PROMPTS
    found: dict[int, list[int]] = {}

    def submit(prompt: np.ndarray, most: int) -> None:
        found[engine.submit(prompt.tolist(), max_new_tokens=most)] = []

    def step() -> None:
        for event in engine.step():
            found[event.request] += event.tokens

    submit(first, NEW_TOKENS)
    if name not in TOGETHER:
        step()
    for prompt, most in ((third, 5), (second, NEW_TOKENS), (third, NEW_TOKENS)):
        submit(prompt, most)
    while engine.busy:
        step()
    before, short, middle, last = found.values()
    assert short == last[:5]
    return [before, middle, last]


def logits_tolerance(name: str) -> float:
    """Wider for experts: their sums are taken in an order that depends on the routing."""
    model, _ = program(name)
    return EXPERT_LOGITS if any(layer.moe for layer in model.spec.layers) else LOGITS
