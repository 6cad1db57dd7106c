"""What a step holds and does on one device, by arithmetic from shapes and shardings.

Exact: parameters and the optimiser's state. Counted by a rule: gradients, activations, logits and
what one layer needs while it is computed backward. The rules are held against the compiler by
benchmarks/plan_fit.py; where the step is compiled its own figures stand instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.ops import cross_entropy
from jaxtune.spec import (
    LayerSpec,
    ModelSpec,
    flops_per_token,
    layer_parameters,
    matmul_parameters,
)

if TYPE_CHECKING:
    from jaxtune.learn.program import Program

KINDS = ("parameters", "optimiser", "gradients", "activations", "logits", "temporaries")
MATMUL_SHARE = {"v6e": 0.55}  # of the peak that matrix products reach; see `share`
KERNEL_SHARE = 0.5  # of the peak that attention kernels reach


class Work(NamedTuple):
    """One device's part of a step.

    `sizes` are the devices along data, fsdp, tensor and context; `rows` of `length` tokens are one
    microbatch of one device, before `context` cuts them. `item` is the bytes of a number in the
    computation's dtype; `trained` are the bytes of trained parameters in f32 on one device, `lora`
    whether they are adapters. `attention` is the implementation's name, `block` how many columns
    of the vocabulary, or None for what the loss chooses.
    """

    spec: ModelSpec
    sizes: Mapping[str, int]
    rows: int
    length: int
    microbatches: int
    remat: str
    item: int
    trained: int
    lora: bool
    attention: str
    block: int | None = None
    z_loss: float = 0.0

    @property
    def tokens(self) -> float:
        """Of one microbatch on one device."""
        return self.rows * self.length / self.sizes["context"]

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def tokens_per_step(self) -> int:
        """Of all devices together."""
        shards = self.sizes["data"] * self.sizes["fsdp"]
        return self.rows * self.length * self.microbatches * shards


def held(program: Program, *, offload: bool = False) -> dict[str, int]:
    """Bytes of `parameters` and `optimiser` on one device, of what of the optimiser is in its
    `host`'s memory, and of the `trained` parameters alone as f32, by shapes and shardings.

    With `offload` that is all of it, but for the arrays on their way: by rule four of the largest.
    """
    import jax

    state, placed = program.abstract, program.shardings
    moments = _bytes(state.opt_state, placed.opt_state)
    pairs = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(placed.opt_state), strict=True)
    largest = max((_bytes([leaf], [where]) for leaf, where in pairs), default=0)
    return {
        "parameters": _bytes(program.variables, program.placed),
        "optimiser": min(moments, 4 * largest) if offload else moments,
        "host": moments if offload else 0,
        "trained": _bytes(state.trained, placed.trained, item=4),
    }


def _bytes(tree: Any, shardings: Any, *, item: int | None = None) -> int:
    import jax

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.ceil(math.prod(where.shard_shape(leaf.shape)) * (item or _item(leaf.dtype)))
        for leaf, where in pairs
    )


def _item(dtype: Any) -> float:
    return 0.5 if str(dtype) in ("uint4", "int4") else float(dtype.itemsize)


# -- memory --------------------------------------------------------------------------------------


def memory(work: Work, held: Mapping[str, int]) -> dict[str, int]:
    """Bytes by `KINDS` on one device when most is held; they add up to the estimate.

    That is either in the loss, with the logits, or in the backward pass of a layer, with the
    gradients of those before it: the larger of both counts.
    """
    gradients = work.trained * (2 if work.microbatches > 1 else 1)
    kept = activations(work)
    logits, head = loss(work)
    layer = max(one_layer(work, layer) for layer in set(work.spec.layers))
    accumulated = work.trained if work.microbatches > 1 else 0
    in_loss, in_layer = logits + head + accumulated, layer + gradients
    parts = (accumulated, kept, logits, head) if in_loss > in_layer else (gradients, kept, 0, layer)
    counted = (held["parameters"], held["optimiser"], *parts)
    return {name: round(size) for name, size in zip(KINDS, counted, strict=True)}


def activations(work: Work) -> float:
    """What the forward pass leaves for the backward pass, of all layers."""
    return sum(work.tokens * work.item * kept(work, layer) for layer in work.spec.layers)


def offloaded(work: Work) -> float:
    """The same in the host's memory."""
    if work.remat != "offload":
        return 0.0
    return len(work.spec.layers) * work.tokens * work.item * work.spec.width


def kept(work: Work, layer: LayerSpec) -> float:
    """Numbers per token that a layer leaves behind, by the name of the policy."""
    D, cut = work.spec.width, work.sizes["tensor"]
    q, kv = layer.heads * layer.head_dim / cut, 2 * layer.kv_heads * layer.head_dim / cut
    wide = _mlp_width(layer) / cut * (2 if layer.gated else 1)
    return {
        "full": D,
        "offload": 0.0,
        "attention": D + q,
        "projections": 2 * D + 2 * q + kv + wide,
        "dots": 2 * D + q + kv + wide,
        "none": 6 * D + 3 * q + 2 * kv + 2 * wide,
    }[work.remat]


def one_layer(work: Work, layer: LayerSpec) -> float:
    """While a layer is computed backward: its own activations again, the gradients of the widest,
    and its weights gathered, with those of the next one under way."""
    everything = kept(work._replace(remat="none"), layer)
    wide = 2 * _mlp_width(layer) / work.sizes["tensor"]
    whole = layer_parameters(work.spec, layer, active=False)
    weights = whole / work.sizes["tensor"] * work.item
    gathered = 2 * weights + (0 if work.lora else weights) if work.sizes["fsdp"] > 1 else 0.0
    return work.tokens * work.item * (everything + wide) + gathered + _scores(work, layer)


def _scores(work: Work, layer: LayerSpec) -> float:
    """Of attention that keeps all scores, f32: scores, their exponentials and the gradient."""
    if work.attention != "reference":
        return 0.0
    heads = layer.heads / work.sizes["tensor"]
    return 3 * 4 * work.rows * heads * work.length**2


def _mlp_width(layer: LayerSpec) -> float:
    """Hidden numbers per token, of all experts that it meets."""
    if layer.moe is None:
        return layer.mlp_width
    return layer.moe.per_token * layer.mlp_width + layer.moe.shared_width


def loss(work: Work) -> tuple[float, float]:
    """(logits, head): bytes of the logits that are there at once and of their gradient, and of the
    block of the head they are made with, its gradient and that of the hidden states."""
    tokens, width, cut = work.tokens, work.spec.width, _head(work)
    head = cut.block * width * (work.item + (0 if work.lora else 4))
    return 2 * 4 * cut.chunk * cut.block, head + tokens * width * (4 + work.item)


def _head(work: Work) -> cross_entropy.Plan:
    """How the loss is cut."""
    tensor = work.sizes["tensor"]
    cuts = tensor if work.spec.vocab % tensor == 0 else 1
    asked: dict[str, Any] = {"cuts": cuts, "block": work.block, "z_loss": work.z_loss}
    return cross_entropy.plan(math.ceil(work.tokens), work.spec.width, work.spec.vocab, **asked)


# -- work ----------------------------------------------------------------------------------------


def model_flops(work: Work) -> float:
    """Of one device and step, without recomputation."""
    each = flops_per_token(work.spec, work.length, frozen=work.lora)
    return each * work.tokens_per_step / work.devices


def all_flops(work: Work) -> tuple[float, float]:
    """(matrix products, attention) of one device and step, recomputation included."""
    spec, tokens = work.spec, work.tokens_per_step / work.devices
    products = matmul_parameters(spec)
    attention = flops_per_token(spec, work.length) - 6.0 * products
    # What a layer's last product gives is not needed again.
    last = sum(spec.width * _mlp_width(layer) for layer in spec.layers)
    layers = products - spec.vocab * spec.width - last
    again = {"none": 0.0, "dots": 0.0, "projections": 0.0}.get(work.remat, 1.0)
    # A head that is streamed makes its logits again in the backward pass whatever the policy.
    head = 0 if _head(work).at_once else spec.vocab * spec.width
    of_matrices = (4.0 if work.lora else 6.0) * products + 2.0 * (again * layers + head)
    repeated = 0.0 if work.remat in ("none", "attention", "projections") else attention / 3
    return tokens * of_matrices, tokens * (attention + repeated)


def wire(work: Work, held: Mapping[str, int]) -> dict[str, float]:
    """Bytes one device sends in a step, by mesh axis: weights gathered forward and backward, a
    whole head once, gradients scattered once; activations over tensor, keys and values over
    context."""
    spec, sizes = work.spec, work.sizes
    head = spec.vocab * spec.width
    whole = matmul_parameters(spec, active=False)
    gathered = (whole - head) * (1 if work.remat == "none" else 2)
    gathered += head * (1 if _head(work).at_once else 2)
    scattered = 0 if work.lora else whole
    weights = (gathered + scattered) * work.item / sizes["tensor"] * work.microbatches
    along: dict[str, float] = {}
    for axis, size in sizes.items():
        share = (size - 1) / size
        along[axis] = {
            "fsdp": share * weights,
            "data": 2 * share * work.trained,
            "tensor": 2 * share * 6 * len(spec.layers) * spec.width
            * work.item * work.tokens * work.microbatches,
            "context": (size - 1) * work.tokens * work.item * work.microbatches
            * sum(4 * layer.kv_heads * layer.head_dim for layer in spec.layers),
        }[axis]  # fmt: skip
    return {axis: sent for axis, sent in along.items() if sent}


def share(kind: str) -> float:
    """What part of a chip's peak the matrix products of a large step reach: 0.7, and 0.55 on v6e.

    From the compiler's schedules of an 8B model on v5e, v5p and v6e; docs/plan.md.
    """
    return MATMUL_SHARE.get(kind, 0.7)
