"""The cross-entropy of hidden states, without ever holding the logits of all tokens.

Nothing here knows of prompts, padding ids or ignore labels: what counts is in `weights`. The
result is sums, never a mean, so that microbatches, devices and hosts can be added up before the one
division. `cross_entropy_reference` is the definition; the forms below give the same numbers:

    tokens with a weight last, in chunks       the others cost nothing (`compact`)
    for each block of the vocabulary           its part of the kernel: cast, gathered, once a pass
      for each chunk, from the first weight    logits, folded into log-sum-exp, target, best guess
    backward: the same loops once more         d_logits -> gradients of hidden and of the block

A kernel that is small enough to be whole is one block. Then a chunk's logits are those of the whole
vocabulary, and its gradients are made beside them in the forward pass: three products, not four.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxtune.ops.head import (
    Head,
    VocabBlock,
    add_block_gradient,
    block_logits,
    block_rows,
    logits,
    row_major,
    token_letters,
    vocab_block,
)
from jaxtune.ops.loss_plan import LossPlan, LossType, plan_loss
from jaxtune.ops.product import einsum_f32

LOWEST = float(jnp.finfo(jnp.float32).min)
S = TypeVar("S")  # the state of a loop
C = TypeVar("C")


class Sums(NamedTuple):
    """Float32 scalars over tokens: sum(w * loss), sum(w), sum(w * [the best guess is right]).

    `auxiliary` is what is minimised beside `loss`, on the same scale: z-loss, and what an objective
    adds. `nll` is sum(w * -log p), which `loss` is too but with another `loss_type`; no gradient.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    auxiliary: jax.Array | float = 0.0
    nll: jax.Array | float = 0.0


class TokenLosses(NamedTuple):
    """A loss and a hit for each token `[B T]`: float32 cross-entropy without its weight, bool.

    0 and False at weight 0.
    """

    loss: jax.Array
    correct: jax.Array


def cross_entropy_reference(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
) -> Sums:
    """Sum the loss from all logits at once, `[B T V]`: the definition; differentiate it with JAX.

    Arguments as `linear_cross_entropy` has them.
    """
    logits_BTV = logits(hidden, head)
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    at_target_BT = jnp.take_along_axis(logits_BTV, targets[..., None], axis=-1)[..., 0]
    nll_BT = normaliser_BT - at_target_BT
    scale_BT = lax.stop_gradient(jnp.exp(-nll_BT)) if loss_type == "dft" else 1.0
    return Sums(
        loss=jnp.sum(weights * scale_BT * nll_BT),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * (jnp.argmax(logits_BTV, axis=-1) == targets)),
        auxiliary=z_loss * jnp.sum(weights * normaliser_BT**2),
        nll=lax.stop_gradient(jnp.sum(weights * nll_BT)),
    )


def linear_cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
    block: int | None = None,
    compact: bool = True,
) -> Sums:
    """Sum the weighted cross-entropy of the logits of `hidden` `[B T D]` against `targets` `[B T]`.

    `weights` `[B T]` is each target's share in the sums; at weight 0 a target may be any id below
    V. Matrix products run in the dtype of `hidden` with float32 sums, all else in float32; the
    gradient of the kernel is summed over tokens in float32, whatever the kernel is stored in.
    `weights` are data: they get no gradient. A best guess shared by several ids is the lowest.

    `loss_type` "nll" is -log p of the target, "dft" that times p, which counts as a constant
    (dynamic fine-tuning, arXiv:2508.05629): what the model finds unlikely moves it less. `weight`
    is the same for both.

    `z_loss` times the squared log-sum-exp of a token's logits is its share of `auxiliary`. `block`
    is entries of the vocabulary at a time (their logits are alive, and computed again in the
    backward pass); the default is the whole vocabulary if the kernel is small and there is no
    `z_loss`, else what keeps the logits of a block for all tokens within 256 MiB. `compact` brings
    tokens with a weight together and passes over chunks without any; not where T is spread over
    devices automatically, as tokens would have to move between them.
    """
    if head.vocab % head.shards:
        raise ValueError(
            f"linear_cross_entropy: {head.vocab} entries cannot be divided into {head.shards} "
            "equal shards; use shards=1."
        )
    plan = _plan(hidden, head, z_loss, block, compact)._replace(loss_type=loss_type)
    return _loss_sums(plan, hidden, head, targets, weights.astype(jnp.float32))


def token_losses(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    block: int | None = None,
    compact: bool = True,
) -> TokenLosses:
    """Compute each token's loss; arguments as `linear_cross_entropy` has them. Has no gradient."""
    plan = _plan(hidden, head, 0.0, block, compact)
    softmax, tokens, order = _softmax_over_blocks(
        plan, hidden, head, targets, weights.astype(jnp.float32)
    )
    losses, _ = _token_losses(softmax, tokens)
    if order is None:
        return losses
    return TokenLosses(*(values.reshape(-1)[order] for values in losses))


def _plan(
    hidden: jax.Array, head: Head, z_loss: float, block: int | None, compact: bool
) -> LossPlan:
    return plan_loss(
        math.prod(hidden.shape[:-1]),
        hidden.shape[-1],
        head.vocab,
        shards=head.shards,
        z_loss=z_loss,
        block=block,
        compact=compact,
    )


class _OnlineSoftmax(NamedTuple):
    """A token's softmax after some blocks, for each shard of the vocabulary: `[.. shards]`."""

    top: jax.Array  # largest logit
    best: jax.Array  # lowest id that has it, int32
    total: jax.Array  # sum of exp(logit - top)
    at_target: jax.Array  # logit of the target, 0 before its block


class _Tokens(NamedTuple):
    """Tokens in place `[B T ..]`, or in chunks `[chunks chunk ..]`, those with a weight last."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


class _Residuals(NamedTuple):
    """A forward pass's values for a backward pass that computes the logits again."""

    head: Head
    tokens: _Tokens
    scale: jax.Array  # weight of a token's -log p in the loss
    normaliser: jax.Array  # log-sum-exp of the logits, 0 at weight 0
    order: jax.Array | None  # the place of each token among the chunks, if they were moved


class _Gradients(NamedTuple):
    """The gradients of the loss themselves, if the forward pass made them."""

    d_hidden: jax.Array
    d_head: Head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(
    plan: LossPlan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> Sums:
    return _blocked(plan, hidden, head, targets, weights)[0]


def _forward(
    plan: LossPlan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Residuals | _Gradients]:
    form = _whole_kernel if plan.whole_kernel else _blocked
    return form(plan, hidden, head, targets, weights)


def _backward(
    plan: LossPlan, saved: _Residuals | _Gradients, d_sums: Sums
) -> tuple[jax.Array, Head, None, None]:
    if isinstance(saved, _Residuals):
        return _blocked_backward(plan, saved, d_sums)
    d_hidden, d_kernel = saved.d_hidden, saved.d_head.kernel
    d_head = dataclasses.replace(saved.d_head, kernel=_scaled(d_kernel, d_sums.loss))
    return _scaled(d_hidden, d_sums.loss), d_head, None, None


_loss_sums.defvjp(_forward, _backward)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


# -- one block of all: gradients are made with the logits -----------------------------------------


def _whole_kernel(
    plan: LossPlan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Gradients]:
    tokens, order = _compacted(plan, _Tokens(hidden, targets, weights))
    block = vocab_block(head, plan.block, plan.blocks, 0, hidden.dtype)
    rows = block_rows(head, block)

    def visit(chunk: _Tokens, d_hidden: jax.Array, carry: Any) -> Any:
        sums, d_block = carry
        values = block_logits(chunk.hidden, block, head)
        softmax = _fold(_no_softmax(chunk.targets, head), values, block, chunk.targets)
        chunk_sums, scale, normaliser = _finish(plan, softmax, chunk)
        d_logits = _d_logits(values, block, head, chunk.targets, scale, scale, normaliser)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden, d_block = _add_products(chunk.hidden, rows, d_logits, d_hidden, d_block)
        return d_hidden, (jax.tree.map(jnp.add, sums, chunk_sums), d_block)

    zero = jnp.zeros((), jnp.float32)
    carry = Sums(zero, zero, zero, zero, zero), _zero_block(block, hidden)
    first = _first_weighted_chunk(plan, tokens.weights)
    zeros = _zero_hidden(plan, head, tokens)
    d_hidden, (sums, d_block) = _over_chunks(plan, first, visit, tokens, zeros, carry)
    d_kernel = add_block_gradient(head, jnp.zeros_like(head.kernel), d_block, block)
    d_head = dataclasses.replace(head, kernel=d_kernel)
    return sums, _Gradients(_in_place(d_hidden, order, hidden.dtype), d_head)


# -- block by block: logits are made again in the backward pass -----------------------------------


def _blocked(
    plan: LossPlan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Residuals]:
    softmax, tokens, order = _softmax_over_blocks(plan, hidden, head, targets, weights)
    sums, scale, normaliser = _finish(plan, softmax, tokens)
    return sums, _Residuals(head, tokens, scale, normaliser, order)


def _softmax_over_blocks(
    plan: LossPlan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[_OnlineSoftmax, _Tokens, jax.Array | None]:
    """Every token's softmax over the whole vocabulary; the tokens and their order."""
    tokens, order = _compacted(plan, _Tokens(hidden, targets, weights))
    first = _first_weighted_chunk(plan, tokens.weights)

    def visit(number: Any, softmax: _OnlineSoftmax) -> _OnlineSoftmax:
        block = vocab_block(head, plan.block, plan.blocks, number, hidden.dtype)

        def fold(
            chunk: _Tokens, softmax: _OnlineSoftmax, carry: None
        ) -> tuple[_OnlineSoftmax, None]:
            values = block_logits(chunk.hidden, block, head)
            return _fold(softmax, values, block, chunk.targets), carry

        return _over_chunks(plan, first, fold, tokens, softmax, None)[0]

    return _over_blocks(plan, visit, _no_softmax(tokens.targets, head)), tokens, order


def _blocked_backward(
    plan: LossPlan, saved: _Residuals, d_sums: Sums
) -> tuple[jax.Array, Head, None, None]:
    head, tokens = saved.head, saved.tokens
    dtype, first = tokens.hidden.dtype, _first_weighted_chunk(plan, tokens.weights)
    # A token's loss by its logits: softmax_scale * softmax - target_scale * [is the target].
    target_scale = saved.scale * d_sums.loss
    z_scale = tokens.weights * (d_sums.auxiliary * 2 * plan.z_loss) * saved.normaliser
    softmax_scale = target_scale + z_scale

    def visit(number: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_kernel = totals
        block = vocab_block(head, plan.block, plan.blocks, number, dtype)
        rows = block_rows(head, block)

        def descend(chunk: Any, d_hidden: jax.Array, d_block: jax.Array) -> Any:
            (hidden, targets, _), softmax_scale, target_scale, normaliser = chunk
            values = block_logits(hidden, block, head)
            d_logits = _d_logits(
                values, block, head, targets, softmax_scale, target_scale, normaliser
            )
            return _add_products(hidden, rows, d_logits.astype(dtype), d_hidden, d_block)

        chunks = (tokens, softmax_scale, target_scale, saved.normaliser)
        zeros = _zero_block(block, tokens.hidden)
        d_hidden, d_block = _over_chunks(plan, first, descend, chunks, d_hidden, zeros)
        return d_hidden, add_block_gradient(head, d_kernel, d_block, block)

    zeros = _zero_hidden(plan, head, tokens), jnp.zeros_like(head.kernel)
    d_hidden, d_kernel = _over_blocks(plan, visit, zeros)
    d_head = dataclasses.replace(head, kernel=d_kernel)
    return _in_place(d_hidden, saved.order, dtype), d_head, None, None


# -- loops over chunks of tokens and blocks of the vocabulary -------------------------------------


def _compacted(plan: LossPlan, tokens: _Tokens) -> tuple[_Tokens, jax.Array | None]:
    """Tokens in chunks, those with a weight last, and the place of each of `[B T]` among them.

    With one chunk nothing is moved, and the order is None.
    """
    if plan.chunks == 1:
        return tokens, None
    hidden, targets, weights = tokens
    filler = plan.chunks * plan.chunk - targets.size
    by_weight = jnp.argsort(weights.reshape(-1) != 0, stable=True)
    places = jnp.pad(by_weight, (filler, 0))
    order = (jnp.argsort(by_weight) + filler).reshape(targets.shape)
    is_token = jnp.arange(places.size) >= filler

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(plan.chunks, plan.chunk, *x.shape[1:])

    moved = _Tokens(
        split(hidden.reshape(-1, hidden.shape[-1])[places]),
        split(targets.reshape(-1)[places]),
        split(jnp.where(is_token, weights.reshape(-1)[places], 0.0)),
    )
    return moved, order


def _in_place(d_hidden: jax.Array, order: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`[B T D]` of gradients by shard, every token back in its place.

    Shards are added here, once: where V is spread over devices this is the one exchange.
    """
    whole = jnp.sum(d_hidden, axis=0 if order is None else 1).astype(dtype)
    return whole if order is None else whole.reshape(-1, whole.shape[-1])[order]


def _zero_hidden(plan: LossPlan, head: Head, tokens: _Tokens) -> jax.Array:
    """Zeros `[shards B T D]`, or with chunks `[chunks shards chunk D]`."""
    lead = tokens.targets.shape
    leading = (lead[0], head.shards, *lead[1:]) if plan.chunks > 1 else (head.shards, *lead)
    return jnp.zeros((*leading, tokens.hidden.shape[-1]), jnp.float32)


def _zero_block(block: VocabBlock, hidden: jax.Array) -> jax.Array:
    """Zeros `[D W]`."""
    return jnp.zeros((hidden.shape[-1], block.ids.size), jnp.float32)


def _first_weighted_chunk(plan: LossPlan, weights: jax.Array) -> jax.Array | None:
    """The first chunk with a weight; None if there is one chunk of all."""
    if plan.chunks == 1:
        return None
    return plan.chunks - jnp.sum(jnp.any(weights != 0, axis=1), dtype=jnp.int32)


def _over_chunks(
    plan: LossPlan,
    first: jax.Array | None,
    visit: Callable[[Any, S, C], tuple[S, C]],
    tokens: Any,
    per_chunk: S,
    carry: C,
) -> tuple[S, C]:
    """(per_chunk, carry) after `visit(tokens, per_chunk, carry)` of every chunk from `first` on.

    A loop whose start is known only while it runs: a branch inside it would copy what is added up
    in it. A reader of the compiled loop sees all chunks, the most it can run.
    """
    if first is None:
        return visit(tokens, per_chunk, carry)

    def body(state: tuple[jax.Array, S, C]) -> tuple[jax.Array, S, C]:
        chunk, per_chunk, carry = state
        pick = functools.partial(lax.dynamic_index_in_dim, index=chunk, keepdims=False)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=chunk, axis=0)
        new, carry = visit(jax.tree.map(pick, tokens), jax.tree.map(pick, per_chunk), carry)
        return chunk + 1, jax.tree.map(put, per_chunk, new), carry

    state = (first, per_chunk, carry)
    _, per_chunk, carry = lax.while_loop(lambda state: state[0] < plan.chunks, body, state)
    return per_chunk, carry


def _over_blocks(plan: LossPlan, visit: Callable[[Any, S], S], state: S) -> S:
    """`state` after `visit(number, state)` of every block."""
    if plan.blocks == 1:
        return visit(0, state)
    last: S = lax.fori_loop(0, plan.blocks, visit, state)
    return last


# -- numbers of one chunk and one block -----------------------------------------------------------


def _ids(block: VocabBlock, targets: jax.Array) -> jax.Array:
    return block.ids.reshape((1,) * targets.ndim + block.ids.shape)


def _no_softmax(targets: jax.Array, head: Head) -> _OnlineSoftmax:
    """The softmax before the first block."""
    shape = (*targets.shape, head.shards)
    zero = jnp.zeros(shape, jnp.float32)
    return _OnlineSoftmax(zero + LOWEST, jnp.zeros(shape, jnp.int32), zero, zero)


def _fold(
    softmax: _OnlineSoftmax, logits: jax.Array, block: VocabBlock, targets: jax.Array
) -> _OnlineSoftmax:
    """`softmax` with the `logits` `[.. shards W/shards]` of a block: plain reductions over W alone.

    An argmax over V takes as long as the product that made the logits on a CPU, and gathers a V
    that is spread over devices; so would a lookup of the target.
    """
    ids = _ids(block, targets)
    if block.overlaps:
        logits = jnp.where(ids >= 0, logits, LOWEST)
    highest = jnp.max(logits, axis=-1)
    top = jnp.maximum(softmax.top, highest)
    total = softmax.total * jnp.exp(softmax.top - top)
    total = total + jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    at_target = softmax.at_target + _at_target(logits, block, targets)
    is_best = logits >= highest[..., None]
    # Ids below 2**24 are exact in float32, whose largest a CPU finds several times faster.
    lowest = -jnp.max(jnp.where(is_best, -ids.astype(jnp.float32), LOWEST), axis=-1)
    best = jnp.where(highest > softmax.top, lowest.astype(jnp.int32), softmax.best)
    return _OnlineSoftmax(top, best, total, at_target)


def _at_target(logits: jax.Array, block: VocabBlock, targets: jax.Array) -> jax.Array:
    """`[.. shards]`: the logit of the target, 0 in a block without it."""

    def summed(logits: jax.Array, targets: jax.Array) -> jax.Array:
        is_target = _ids(block, targets) == targets[..., None, None]
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

    def indexed(logits: jax.Array, targets: jax.Array) -> jax.Array:
        place = jnp.clip(targets - block.start, 0, block.ids.shape[1] - 1)[..., None, None]
        is_target = block.ids[0][place] == targets[..., None, None]
        at_place = jnp.take_along_axis(logits, place, axis=-1)
        return jnp.where(is_target, at_place, 0.0)[..., 0]

    if block.ids.shape[0] > 1:
        return summed(logits, targets)
    # A pass over the logits costs a CPU a tenth of their product; elsewhere it is in another pass.
    at_target: jax.Array = lax.platform_dependent(logits, targets, cpu=indexed, default=summed)
    return at_target


def _finish(
    plan: LossPlan, softmax: _OnlineSoftmax, tokens: _Tokens
) -> tuple[Sums, jax.Array, jax.Array]:
    """Join the shards: the sums; each token's weight of -log p in the loss, and log-sum-exp."""
    losses, normaliser = _token_losses(softmax, tokens)
    weights = tokens.weights
    scale = weights * jnp.exp(-losses.loss) if plan.loss_type == "dft" else weights
    sums = Sums(
        loss=jnp.sum(scale * losses.loss),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * losses.correct),
        auxiliary=plan.z_loss * jnp.sum(weights * normaliser**2),
        nll=jnp.sum(weights * losses.loss),
    )
    return sums, scale, normaliser


def _token_losses(softmax: _OnlineSoftmax, tokens: _Tokens) -> tuple[TokenLosses, jax.Array]:
    """Join the shards: each token's loss and its log-sum-exp; 0 at weight 0."""
    top = jnp.max(softmax.top, axis=-1)
    total = jnp.sum(softmax.total * jnp.exp(softmax.top - top[..., None]), axis=-1)
    is_best = softmax.top >= top[..., None]
    best = jnp.min(jnp.where(is_best, softmax.best, jnp.iinfo(jnp.int32).max), axis=-1)
    counts = tokens.weights != 0
    normaliser = jnp.where(counts, top + jnp.log(jnp.where(counts, total, 1.0)), 0.0)
    loss = jnp.where(counts, normaliser - jnp.sum(softmax.at_target, axis=-1), 0.0)
    return TokenLosses(loss, (best == tokens.targets) & counts), normaliser


def _d_logits(
    logits: jax.Array,
    block: VocabBlock,
    head: Head,
    targets: jax.Array,
    softmax_scale: jax.Array,
    target_scale: jax.Array,
    normaliser: jax.Array,
) -> jax.Array:
    """Gradient of the products hidden x kernel of a block, float32 `[.. shards W/shards]`."""
    ids = _ids(block, targets)
    softmax = jnp.exp(logits - normaliser[..., None, None])
    is_target = ids == targets[..., None, None]
    d_logits = softmax_scale[..., None, None] * softmax
    d_logits = d_logits - jnp.where(is_target, target_scale[..., None, None], 0.0)
    if head.softcap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / head.softcap))
    if head.scale != 1.0:
        d_logits = d_logits * head.scale
    return jnp.where(ids >= 0, d_logits, 0.0) if block.overlaps else d_logits


def _add_products(
    hidden: jax.Array,
    rows: jax.Array,
    d_logits: jax.Array,
    d_hidden: jax.Array,
    d_block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`d_hidden` `[shards .. D]` and `d_block` `[D W]` with what a block adds, float32.

    `rows` is that block's kernel as `[shards W/shards D]`, `d_logits` `[.. shards W/shards]`.
    """
    lead = token_letters(hidden)
    d_hidden = d_hidden + einsum_f32(f"{lead}cv,cvD->c{lead}D", d_logits, rows)
    d_logits = d_logits.reshape(*d_logits.shape[:-2], -1)
    across = row_major(jnp.moveaxis(hidden, -1, 0))
    return d_hidden, d_block + einsum_f32(f"D{lead},{lead}W->DW", across, d_logits)
