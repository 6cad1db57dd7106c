"""A step's memory and work on a device, by arithmetic from shapes and shardings.

Exact: parameters and the optimiser's state. Counted by a rule: gradients, activations, logits and
what one layer needs while it is computed backward. The rules are held against the compiler by
benchmarks/plan_fit.py; where the step is compiled its own figures stand instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxtune.ops import expert_parallel, splash
from jaxtune.ops.loss_plan import LossPlan, plan_loss
from jaxtune.spec import (
    Backward,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    Stack,
    attention_flops_per_token,
    expert_parameters,
    flops_per_token,
    layer_parameters,
    of_one_token,
    parameter_count,
    whole_backward,
)
from jaxtune.training.program import Program

KINDS = ("parameters", "optimiser", "gradients", "activations", "logits", "temporaries")
AIM = 0.97  # of the memory, that the compiler's schedule keeps within where it can
BODY_BYTES = 30 * 2**20  # of a program, for each layer of a pattern; its code lies in HBM too


class Work(NamedTuple):
    """A device's part of a step.

    `sizes` are the devices along data, fsdp, expert, tensor and context; `rows` of `length` tokens
    are one microbatch of one device, before `context` cuts them. `item` is the bytes of a number in
    the computation's dtype, `stored` those of a stored matrix's; `trained` are the bytes of trained
    parameters in f32 on one device, `lora` whether they are adapters. `attention` is the
    implementation's name, `block` how many columns of the vocabulary, or None for what the loss
    chooses. `back` is what the backward pass makes, None for everything.
    """

    spec: ModelSpec
    sizes: Mapping[str, int]
    rows: int
    length: int
    microbatches: int
    remat: str
    item: int
    stored: int
    trained: int
    lora: bool
    attention: str
    block: int | None = None
    z_loss: float = 0.0
    back: Backward | None = None

    @property
    def backward(self) -> Backward:
        return self.back or whole_backward(self.spec)

    @property
    def reached(self) -> tuple[Stack, ...]:
        """Stacks that gradients pass through."""
        return self.spec.stacks[self.backward.first :]

    @property
    def tokens(self) -> float:
        """Of one microbatch on one device."""
        return self.rows * self.length / self.sizes["context"]

    @property
    def shards(self) -> int:
        """Into how many slices a weight is cut that is gathered where it is used."""
        return self.sizes["fsdp"] * self.sizes["expert"] * self.sizes["context"]

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def row_shards(self) -> int:
        """Count the devices over which the rows of a batch are sharded."""
        return self.sizes["data"] * self.sizes["fsdp"] * self.sizes["expert"]

    @property
    def tokens_per_step(self) -> int:
        """Of all devices together."""
        return self.rows * self.length * self.microbatches * self.row_shards


def held(program: Program, *, offload: bool = False) -> dict[str, int]:
    """Return bytes on a device of `parameters` and `optimiser`, by shapes and shardings.

    Also those of the optimiser in its `host`'s memory and of the `trained` parameters alone as f32.
    With `offload` the optimiser is on the host, but for the arrays on their way: by rule four of
    the largest.
    """
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
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.ceil(math.prod(where.shard_shape(leaf.shape)) * (item or _item(leaf.dtype)))
        for leaf, where in pairs
    )


def _item(dtype: Any) -> float:
    return 0.5 if str(dtype) in ("uint4", "int4") else float(dtype.itemsize)


# -- memory --------------------------------------------------------------------------------------


def memory(work: Work, held: Mapping[str, int], limit: int | None = None) -> dict[str, int]:
    """Bytes by `KINDS` on one device when most is held; they add up to the estimate.

    That is either in the loss, with the logits, or in the backward pass of a layer, with the
    gradients of all layers: the larger of both counts. Weights that are stored wider than they are
    computed with lie beside themselves, narrow, from the first layer to the last. Near the `limit`
    the compiler holds less: it aims at `AIM` of it, as far as there is something to be saved.
    """
    saved = activations(work)
    logits, head = loss(work)
    layer = max((one_turn(work, stack) for stack in work.reached), default=0.0)
    accumulated = work.trained if work.microbatches > 1 else 0
    gradients = accumulated + microbatch_gradients(work)
    program = BODY_BYTES * sum(len(stack.pattern) for stack in work.spec.stacks)
    everywhere = narrowed(work, held) + program
    sizes: list[float] = [gradients, saved, 0, layer + everywhere]
    if logits + head + accumulated > layer + gradients:
        sizes = [accumulated, saved, logits, head + everywhere]
    sizes = [held["parameters"], held["optimiser"], *sizes]
    counted = dict(zip(KINDS, sizes, strict=True))
    if limit is not None and not counted["logits"]:
        above = max(0.0, sum(sizes) - AIM * limit)
        most = max((spared(work, layer) for layer in set(layers_of(work.reached))), default=0.0)
        counted["temporaries"] -= min(above, most)
    return {name: round(size) for name, size in counted.items()}


def narrowed(work: Work, held: Mapping[str, int]) -> float:
    """Weights beside themselves in the computation's dtype. The compiler casts all layers at once,
    before the loop over them, and a head that is streamed; an embedding is looked up as it is
    stored. With nothing recomputed the backward pass finds the layers' weights as the forward pass
    gathered them: whole."""
    if work.remat == "none" and work.shards > 1:
        elsewhere = 1 - 1 / work.sizes["expert"]
        numbers = sum(
            layer_parameters(work.spec, layer, active=False) - elsewhere * travelling(work, layer)
            for layer in layers_of(work.reached)
        )
        whole = numbers * work.item / work.sizes["tensor"]
        return whole + trained_shares(work)[1] * work.trained * work.item / 4
    if work.stored <= work.item:
        return 0.0
    every, head = parameter_count(work.spec), work.spec.vocab * work.spec.width
    cast: float = sum(layer_parameters(work.spec, x, active=False) for x in work.spec.layers)
    cast += 0.0 if loss_plan(work).whole_kernel else head
    return held["parameters"] * cast / every * work.item / work.stored


def microbatch_gradients(work: Work) -> float:
    """Gradients of one microbatch in the backward pass of the layers: in the computation's dtype,
    but for the head's (adapters': all of them), which are f32."""
    if work.lora:
        return work.trained
    layers, head = trained_shares(work)
    return work.trained * (head + layers * work.item / 4)


def trained_shares(work: Work) -> tuple[float, float]:
    """Return the shares of the trained parameters: matrices of layers, and the head."""
    back, spec = work.backward, work.spec
    matrices = sum(
        stack.repeats * (sum(dense) + sum(experts))
        for stack, dense, experts in zip(spec.stacks, back.dense, back.experts, strict=True)
    )
    head = spec.vocab * spec.width if back.head else 0
    return matrices / back.numbers, head / back.numbers


def activations(work: Work) -> float:
    """Count bytes that the forward pass keeps for the backward pass, of all layers reached."""
    return sum(work.tokens * saved_bytes(work, layer) for layer in layers_of(work.reached))


def layers_of(stacks: Sequence[Stack]) -> list[LayerSpec]:
    return [layer for stack in stacks for _ in range(stack.repeats) for layer in stack.pattern]


def offloaded(work: Work) -> float:
    """The same in the host's memory."""
    if work.remat != "offload":
        return 0.0
    return len(layers_of(work.reached)) * work.tokens * work.item * work.spec.width


def saved_bytes(work: Work, layer: LayerSpec) -> float:
    """Bytes per token that a layer leaves behind, by the name of the policy; as JAX says of it
    (`jax.vjp`) for causal attention in a kernel."""
    D, cut, item = work.spec.width, work.sizes["tensor"], work.item
    q, kv = layer.heads * layer.head_dim / cut, 2 * layer.kv_heads * layer.head_dim / cut
    sums = 4 * layer.heads / cut  # of the softmax
    # The products of a mixture have no name of their own.
    named = layer.mlp_width if layer.moe is None else layer.moe.shared_width
    wide = named * (2 if layer.gated else 1) / cut
    # A norm behind the MLP needs what the MLP gave.
    into_mlp = 2 * D if layer.norms == "pre" else 3 * D
    everything = item * (2 * D + 3 * q + kv) + sums + _in_norms(work, layer) + _in_mlp(work, layer)
    return {
        "full": item * D,
        "offload": 0.0,
        "attention": item * (D + q) + sums,
        "projections": item * (into_mlp + 2 * q + kv + wide) + sums,
        "dots": item * (into_mlp + q + kv + wide),
        "none": everything,
    }[work.remat]


def _in_norms(work: Work, layer: LayerSpec) -> float:
    """Count what norms keep, twice in f32 and twice in the compute dtype."""
    cut = work.sizes["tensor"]
    widths: float = (4 if layer.norms == "both" else 2) * work.spec.width
    if layer.qk_norm is not None:
        widths += (layer.heads + layer.kv_heads) * layer.head_dim / cut
    return (2 * work.item + 2 * 4) * widths


def _in_mlp(work: Work, layer: LayerSpec) -> float:
    cut, item = work.sizes["tensor"], work.item
    if layer.moe is None:
        return item * (3 if layer.gated else 5) * layer.mlp_width / cut
    each, shared = layer.moe.per_token, item * 3 * layer.moe.shared_width / cut
    if (peers := work.sizes["expert"]) > 1:  # tokens of all of them, and no more
        return item * peers * work.spec.width + shared
    experts = item * 6 * layer.mlp_width / cut + (item + 4) * work.spec.width
    return each * experts + 4 * work.spec.width + shared


def one_turn(work: Work, stack: Stack) -> float:
    """While a pattern of layers is computed backward, which is one turn of a loop: the layer that
    takes most, and the whole gradients of the others' weights, which are scattered at its end."""
    most = max(one_layer(work, layer) for layer in stack.pattern)
    if work.lora or work.shards == 1:
        return most
    every = [
        layer_parameters(work.spec, layer, active=False)
        - travelling(work, layer) * (1 - 1 / work.sizes["expert"])
        for layer in stack.pattern
    ]
    return most + work.item * (sum(every) - max(every)) / work.sizes["tensor"]


def travelling(work: Work, layer: LayerSpec) -> float:
    """Parameters of a layer's experts side by side, which are cut over `expert` and stay so."""
    return 0.0 if layer.moe is None else 3.0 * work.spec.width * layer.mlp_width * layer.moe.experts


def one_layer(work: Work, layer: LayerSpec) -> float:
    """While a layer is computed backward: its MLP or its attention, whichever takes more, beside
    the gradients that pass through, and weights gathered: the widest in use, its gradient and the
    next one under way."""
    D, cut, item = work.spec.width, work.sizes["tensor"], work.item
    in_mlp, in_attention = item * _mlp_at_once(work, layer), item * _attention_at_once(work, layer)
    # The small products of an adapter are left for later, and what they read with them.
    at_once = in_mlp + in_attention if work.lora else max(in_mlp, in_attention)
    gathered = 0.0
    if work.shards > 1:
        experts = 1 if layer.moe is None else layer.moe.experts / work.sizes["expert"]
        widest = D * layer.mlp_width * experts
        gathered = item * (3 * widest + 2 * D * layer.heads * layer.head_dim) / cut
    passing = work.tokens * (at_once + item * 4 * D)
    return passing + gathered + _in_rounds(work, layer) + _scores(work, layer)


def _in_rounds(work: Work, layer: LayerSpec) -> float:
    """Count bytes where tokens travel to their experts.

    Tokens of all devices along `expert`, the gradients of what became of them, their sum in f32,
    and the experts' own.
    """
    peers = work.sizes["expert"]
    if layer.moe is None or peers == 1:
        return 0.0
    sums = 0.0 if work.lora else 4 * travelling(work, layer) / peers / work.sizes["tensor"]
    return peers * work.tokens * work.spec.width * (2 * work.item + 4) + sums


def spared(work: Work, layer: LayerSpec) -> float:
    """Count what the compiler does without where memory is short.

    Gate or up beside their gradients, two of the widths that pass through, and weights that are
    under way before they are needed; and it leaves nothing of adapters for later.
    """
    D, cut, item = work.spec.width, work.sizes["tensor"], work.item
    inner = _mlp_width(layer) / cut if recomputes(work) else 0.0
    early = 0.0
    if work.shards > 1 and layer.moe is None:
        early = item * D * (layer.mlp_width + layer.heads * layer.head_dim) / cut
    parts = _mlp_at_once(work, layer), _attention_at_once(work, layer)
    later = min(parts) if work.lora else 0.0
    return work.tokens * item * (inner + 2 * D + later) + early


def _mlp_at_once(work: Work, layer: LayerSpec) -> float:
    """Numbers per token: gate and up, and the gradients of both."""
    again = work.remat in ("full", "offload", "attention")
    cut = work.sizes["tensor"]
    if layer.moe is None:
        products = 2 if layer.gated else 1
        return (2 if again else 1) * products * layer.mlp_width / cut
    at_once = layer.moe.per_token * (4 * layer.mlp_width / cut + 4 * work.spec.width)
    copies, rows = a_round(work, layer.moe)
    return at_once if work.sizes["expert"] == 1 else at_once * (rows / copies)


def a_round(work: Work, mixture: MoeSpec) -> tuple[int, int]:
    """Copies of tokens that a device's own experts have on average, and those of one round."""
    copies = math.ceil(work.tokens) * mixture.per_token
    return copies, expert_parallel.round_rows(copies, 2 * copies)


def _attention_at_once(work: Work, layer: LayerSpec) -> float:
    """Numbers per token: queries, what heads mix, the gradients of both, of keys and of values;
    and the kernel's partial sums of the gradient of queries, one a block of keys."""
    q = layer.heads * layer.head_dim / work.sizes["tensor"]
    kv = 2 * layer.kv_heads * layer.head_dim / work.sizes["tensor"]
    return (4 + partial_sums(work, layer)) * q + 2 * kv


def partial_sums(work: Work, layer: LayerSpec) -> int:
    """Of the gradient of queries, that the attention kernel leaves in memory: one a key block."""
    if work.attention != "splash":
        return 0
    length = -(-work.length // splash.TILE) * splash.TILE
    blocks = splash.blocks(length, length // work.sizes["context"], layer.head_dim)
    return length // blocks.keys if blocks.fused else 0


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
    """(logits, head): bytes of the logits that are there at once, f32, and where they are streamed
    of their gradient; of the block of the head they are made with and its gradient, and of those
    of the hidden states."""
    tokens, width, cut = work.tokens, work.spec.width, loss_plan(work)
    each = 4 if cut.whole_kernel else 4 + work.item
    head = cut.block * width * (work.item + (4 if work.backward.head else 0))
    return each * cut.chunk * cut.block, head + tokens * width * (4 + work.item)


def loss_plan(work: Work) -> LossPlan:
    """Plan how the loss is cut into blocks."""
    tensor = work.sizes["tensor"]
    return plan_loss(
        math.ceil(work.tokens),
        work.spec.width,
        work.spec.vocab,
        shards=tensor if work.spec.vocab % tensor == 0 else 1,
        block=work.block,
        z_loss=work.z_loss,
    )


# -- work ----------------------------------------------------------------------------------------


def model_flops(work: Work) -> float:
    """Of one device and step, without recomputation."""
    each = flops_per_token(work.spec, work.length, work.backward)
    return each * work.tokens_per_step / work.devices


def all_flops(work: Work) -> tuple[float, float]:
    """(matrix products, attention) of one device and step, recomputation included."""
    return sum(flops(work)), attention_flops(work)


class Products(NamedTuple):
    """FLOPs of matrix products of one device and step, those of a mixture's experts apart."""

    layers: float
    experts: float
    head: float


def flops(work: Work) -> Products:
    spec, back, tokens = work.spec, work.backward, work.tokens_per_step / work.devices
    of_layers = of_experts = 0.0
    for i, stack in enumerate(spec.stacks):
        passes = back.reaches(i)
        each, again = (4.0 if passes else 2.0), (2.0 if passes and recomputes(work) else 0.0)
        for layer, dense, every in zip(stack.pattern, back.dense[i], back.experts[i], strict=True):
            experts = expert_parameters(spec, layer)
            dense_flops = (each + again) * (layer_parameters(spec, layer) - experts) + 2.0 * dense
            expert_flops = (each + again) * experts + 2.0 * of_one_token(layer, every)
            # What a layer's last product gives is not needed again, but by a norm behind it.
            if layer.norms == "pre":
                shared = layer.mlp_width if layer.moe is None else layer.moe.shared_width
                dense_flops -= again * spec.width * shared
                expert_flops -= again * experts / 3
            of_layers += stack.repeats * dense_flops
            of_experts += stack.repeats * expert_flops
    # A head that is streamed makes its logits again in the backward pass whatever the policy.
    of_head = 2.0 * (1 + back.through_head + back.head) + 2.0 * (not loss_plan(work).whole_kernel)
    return Products(
        tokens * of_layers, tokens * of_experts, tokens * of_head * spec.vocab * spec.width
    )


def attention_flops(work: Work) -> float:
    again = work.remat not in ("none", "attention", "projections")
    total = 0.0
    for i, stack in enumerate(work.spec.stacks):
        passes = 3 + again if work.backward.reaches(i) else 1
        each = sum(attention_flops_per_token(layer, work.length) for layer in stack.pattern)
        total += stack.repeats * passes * each
    return total * work.tokens_per_step / work.devices


def recomputes(work: Work) -> bool:
    """Test if a layer's products with weights are recomputed in the backward pass."""
    return work.remat not in ("none", "dots", "projections")


class Sent(NamedTuple):
    """Bytes that one device sends in a step, by what they are."""

    gathered: float  # weights of the layers, made whole
    head: float  # a head, made whole
    scattered: float  # gradients, added up and cut
    everywhere: float  # gradients along `data`, added up
    exchanged: float  # activations over `tensor`
    rows: float  # keys and values over `context`
    travelled: float = 0.0  # tokens over `expert`, to a mixture's experts and back


def sent_bytes(work: Work) -> Sent:
    """Weights are gathered forward and backward, a head that is whole once, gradients scattered
    once: for each microbatch. Experts are so along `fsdp` and `context` alone; over `expert` tokens
    are gathered, and again where that is recomputed, and so is the gradient of what became of them;
    that and the gradient of tokens are added up and scattered. Over `tensor` a layer adds up what
    attention and MLP give, and the gradients of their inputs, and attention's again where
    it is recomputed."""
    spec, sizes, again = work.spec, work.sizes, work.microbatches
    head, reached = spec.vocab * spec.width, layers_of(work.reached)
    share = {axis: (size - 1) / size for axis, size in sizes.items()}
    each = (work.shards - 1) / work.shards * work.item / sizes["tensor"] * again
    elsewhere, peers = 0.0, sizes["expert"]
    if peers > 1:  # as if all parameters were cut like others than experts
        along = work.shards // peers
        elsewhere = 1 - (along - 1) / along / peers / ((work.shards - 1) / work.shards)

    def numbers(layers: Sequence[LayerSpec]) -> float:
        return sum(
            layer_parameters(spec, layer, active=False) - elsewhere * travelling(work, layer)
            for layer in layers
        )

    def mixtures(layers: Sequence[LayerSpec]) -> int:
        return sum(layer.moe is not None for layer in layers)

    matrices, of_head = trained_shares(work)
    trained = work.backward.numbers * (matrices + of_head)
    trained -= elsewhere * sum(
        stack.repeats * sum(experts)
        for stack, experts in zip(spec.stacks, work.backward.experts, strict=True)
    )
    passes = 2 * mixtures(spec.layers) + (2 if work.remat == "none" else 3) * mixtures(reached)
    times = 2 * len(spec.layers) + (3 if recomputes(work) else 2) * len(reached)
    widths = times * spec.width * work.item
    keys = sum(4 * layer.kv_heads * layer.head_dim for layer in spec.layers) * work.item
    return Sent(
        gathered=each * (numbers(spec.layers) + (work.remat != "none") * numbers(reached)),
        head=each * head * (1 if loss_plan(work).whole_kernel else 2),
        scattered=each * trained,
        everywhere=2 * share["data"] * work.trained,
        exchanged=2 * share["tensor"] * widths * work.tokens * again,
        rows=(sizes["context"] - 1) * keys * work.tokens * again,
        travelled=(peers - 1) * passes * spec.width * work.item * work.tokens * again,
    )


def wire(work: Work) -> dict[str, float]:
    """The same bytes by mesh axis."""
    sent = sent_bytes(work)
    along = {
        "fsdp": sent.gathered + sent.head + sent.scattered,
        "data": sent.everywhere,
        "expert": sent.travelled,
        "tensor": sent.exchanged,
        "context": sent.rows,
    }
    return {axis: size for axis, size in along.items() if size}
