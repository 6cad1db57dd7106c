"""From hidden states to logits, and to their cross-entropy without ever holding all of them.

`Head` is the one place that knows how hidden states become logits: training, evaluation and
decoding all read it. The loss knows nothing of prompts, padding ids or ignore labels: what counts
is in `weights`. It returns sums, never a mean, so that microbatches, devices and hosts can be
added up before the one division.

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
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxtune.ops.product import einsum_f32

SMALL_LOGITS = 2**23  # elements, of all tokens: below this one block of all is the fastest
BLOCK_LOGITS = 2**26  # elements of one block of the vocabulary, of all tokens: 256 MiB
WHOLE_KERNEL = 5 * 2**26  # elements of a kernel that may be whole: with its gradient 1.9 GiB
WHOLE_LOGITS = 2**28  # elements of a chunk with all of the vocabulary: 1 GiB
SHORTEST_CHUNK = 2048  # tokens: shorter ones leave a matrix unit waiting for sums in memory
NARROW, NARROW_CHUNK = 1024, 1024  # below that width a step is short and the memory a CPU's
MOST_CHUNKS = 16
LANES = 128  # blocks are whole tiles of a matrix unit
LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel"],
    meta_fields=["scale", "softcap", "by_token", "gather", "scatter", "cuts"],
)
@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * hidden @ kernel / softcap). A pytree; its leaf is the kernel.

    `kernel` is as stored, any dtype: `[D V]`, or with `by_token` a table `[V D]`. Without `softcap`
    logits are not bounded. Where the kernel holds only this device's slice of D, `gather` makes the
    whole of D of a block of it (same layout, in the dtype it is multiplied in), and `scatter` sums
    the gradient of such a whole block over devices and keeps this device's slice. `cuts` is over
    how many devices V is spread automatically: every block takes an equal part of each range.
    """

    kernel: jax.Array
    scale: float = 1.0
    softcap: float | None = None
    by_token: bool = False
    gather: Callable[[jax.Array], jax.Array] | None = None
    scatter: Callable[[jax.Array], jax.Array] | None = None
    cuts: int = 1

    @property
    def vocab(self) -> int:
        return self.kernel.shape[0 if self.by_token else 1]


class Sums(NamedTuple):
    """Float32 scalars over tokens: sum(w * loss), sum(w), sum(w * [the best guess is right]).

    `penalty` is what is minimised beside `loss`, on the same scale: z-loss, and what an objective
    adds.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    penalty: jax.Array | float = 0.0


class TokenLosses(NamedTuple):
    """Of each token `[B T]`: its cross-entropy, float32 and without its weight, and whether the
    best guess is right; 0 and False at weight 0."""

    loss: jax.Array
    correct: jax.Array


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Float32 `[B T V]` of `hidden` `[B T D]`, multiplied in the dtype of `hidden`."""
    kernel = head.kernel.astype(hidden.dtype)
    if head.gather is not None:
        kernel = head.gather(kernel)
    equation = "BTD,VD->BTV" if head.by_token else "BTD,DV->BTV"
    return _shaped(einsum_f32(equation, hidden, kernel), head)


def linear_cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    block: int | None = None,
    compact: bool = True,
) -> Sums:
    """Weighted cross-entropy of the logits of `hidden` `[B T D]` against `targets` `[B T]`.

    `weights` `[B T]` is each target's share in the sums; at weight 0 a target may be any id below
    V. Matrix products run in the dtype of `hidden` with float32 sums, all else in float32; the
    gradient of the kernel is summed over tokens in float32, whatever the kernel is stored in.
    `weights` are data: they get no gradient. A best guess shared by several ids is the lowest.

    `z_loss` times the squared log-sum-exp of a token's logits is its share of `penalty`. `block` is
    entries of the vocabulary at a time (their logits are alive, and computed again in the backward
    pass); the default is the whole vocabulary where the kernel is small and there is no `z_loss`,
    else what keeps the logits of a block for all tokens within 256 MiB. `compact` brings
    tokens with a weight together and passes over chunks without any; not where T is spread over
    devices automatically, as tokens would have to move between them.
    """
    if head.vocab % head.cuts:
        raise ValueError(
            f"linear_cross_entropy: {head.vocab} entries cannot be cut into {head.cuts} equal "
            "ranges; use cuts=1."
        )
    cut = plan(
        math.prod(hidden.shape[:-1]),
        hidden.shape[-1],
        head.vocab,
        cuts=head.cuts,
        z_loss=z_loss,
        block=block,
        compact=compact,
    )
    return _fused(cut, hidden, head, targets, weights.astype(jnp.float32))


def token_losses(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    block: int | None = None,
    compact: bool = True,
) -> TokenLosses:
    """`linear_cross_entropy` before it is added up; arguments as there. Has no gradient."""
    size = math.prod(hidden.shape[:-1]), hidden.shape[-1], head.vocab
    cut = plan(*size, cuts=head.cuts, block=block, compact=compact)
    running, tokens, back = _read(cut, hidden, head, targets, weights.astype(jnp.float32))
    each, _ = _of_tokens(running, tokens)
    if back is None:
        return each
    return TokenLosses(*(values.reshape(-1)[back] for values in each))


class Plan(NamedTuple):
    """How a call is cut; static. `block` is entries of each of the `cuts` ranges."""

    chunk: int  # tokens
    chunks: int
    block: int
    blocks: int
    z_loss: float
    at_once: bool  # one block of all, whose gradients are made with its logits


def plan(
    tokens: int,
    width: int,
    vocab: int,
    *,
    cuts: int = 1,
    z_loss: float = 0.0,
    block: int | None = None,
    compact: bool = True,
) -> Plan:
    """How the loss of so many tokens is cut; arguments as `linear_cross_entropy` has them."""
    size = vocab // cuts
    small = tokens * vocab <= SMALL_LOGITS
    at_once = block is None and not z_loss and size * width <= WHOLE_KERNEL
    # Tokens that stay where they are stay in one chunk.
    at_once = at_once and (compact or tokens * size <= WHOLE_LOGITS)
    if at_once:
        part = size
    elif block is None:
        part = _even_block(size, 1 if small else -(-tokens * vocab // BLOCK_LOGITS))
    else:
        part = min(size, -(-block // cuts))
    shortest = NARROW_CHUNK if width < NARROW else SHORTEST_CHUNK
    chunks = max(1, min(MOST_CHUNKS, tokens // shortest)) if compact and not small else 1
    chunk = -(-tokens // chunks)
    if at_once and chunk * size > WHOLE_LOGITS:
        chunk = max(LANES, WHOLE_LOGITS // size // LANES * LANES)
    return Plan(chunk, -(-tokens // chunk), part, -(-size // part), z_loss, at_once)


def _even_block(size: int, wanted: int) -> int:
    """Width of `wanted` blocks or up to twice as many: whole tiles, with the least overlap."""
    if wanted == 1:
        return size

    def width(blocks: int) -> int:
        return min(size, -(-size // (blocks * LANES)) * LANES)

    def waste(blocks: int) -> int:
        return width(blocks) * -(-size // width(blocks)) - size

    return width(min(range(wanted, 2 * wanted), key=waste))


class _Running(NamedTuple):
    """What a token knows after some blocks, of each range of the vocabulary: `[.. cuts]`."""

    top: jax.Array  # largest logit
    best: jax.Array  # lowest id that has it, int32
    total: jax.Array  # sum of exp(logit - top)
    at_target: jax.Array  # logit of the target, 0 before it came


class _Tokens(NamedTuple):
    """`[B T ..]` as they came, or with chunks `[chunks chunk ..]`, those with a weight last."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


class _Block(NamedTuple):
    """Of the vocabulary: `kernel` `[D W]`, by token `[W D]`, of equal parts of each range; `ids`
    `[cuts W/cuts]`, -1 where an earlier block had that entry, if `overlaps`."""

    kernel: jax.Array
    ids: jax.Array
    start: jax.Array | int
    overlaps: bool


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    head: Head
    tokens: _Tokens
    normaliser: jax.Array  # log-sum-exp of the logits, 0 at weight 0
    back: jax.Array | None  # where each token went, when they were moved


class _Made(NamedTuple):
    """The gradients of the loss themselves, where the forward pass made them."""

    d_hidden: jax.Array
    d_head: Head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    cut: Plan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> Sums:
    return _streamed(cut, hidden, head, targets, weights)[0]


def _forward(
    cut: Plan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Saved | _Made]:
    way = _with_gradients if cut.at_once else _streamed
    return way(cut, hidden, head, targets, weights)


def _backward(cut: Plan, saved: _Saved | _Made, d_sums: Sums) -> tuple[jax.Array, Head, None, None]:
    if isinstance(saved, _Saved):
        return _streamed_back(cut, saved, d_sums)
    d_hidden, d_kernel = saved.d_hidden, saved.d_head.kernel
    d_head = dataclasses.replace(saved.d_head, kernel=_scaled(d_kernel, d_sums.loss))
    return _scaled(d_hidden, d_sums.loss), d_head, None, None


_fused.defvjp(_forward, _backward)


def _with_gradients(
    cut: Plan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Made]:
    tokens, back = _arranged(cut, _Tokens(hidden, targets, weights))
    block = _block(cut, head, 0, hidden.dtype)
    rows = _rows(head, block)

    def visit(part: _Tokens, d_hidden: jax.Array, shared: Any) -> Any:
        sums, d_block = shared
        values = _logits(part.hidden, block, head)
        running = _fold(_nothing(part.targets, head), values, block, part.targets)
        more, normaliser = _finish(cut, running, part)
        weights = part.weights
        d_logits = _d_logits(values, block, head, part.targets, weights, weights, normaliser)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden, d_block = _d_product(part.hidden, rows, d_logits, d_hidden, d_block)
        return d_hidden, (jax.tree.map(jnp.add, sums, more), d_block)

    zero = jnp.zeros((), jnp.float32)
    shared = Sums(zero, zero, zero, zero), _no_gradient(block, hidden)
    d_hidden, (sums, d_block) = _over_chunks(
        cut, _first(cut, tokens.weights), visit, tokens, _no_gradients(cut, head, tokens), shared
    )
    d_kernel = _put(cut, head, jnp.zeros_like(head.kernel), d_block, block.start)
    d_head = dataclasses.replace(head, kernel=d_kernel)
    return sums, _Made(_joined(d_hidden, back, hidden.dtype), d_head)


def _streamed(
    cut: Plan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, _Saved]:
    running, tokens, back = _read(cut, hidden, head, targets, weights)
    sums, normaliser = _finish(cut, running, tokens)
    return sums, _Saved(head, tokens, normaliser, back)


def _read(
    cut: Plan, hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[_Running, _Tokens, jax.Array | None]:
    """What every token knows after the whole vocabulary, the tokens, and where each went."""
    tokens, back = _arranged(cut, _Tokens(hidden, targets, weights))
    first = _first(cut, tokens.weights)

    def visit(number: Any, running: _Running) -> _Running:
        block = _block(cut, head, number, hidden.dtype)

        def fold(part: _Tokens, running: _Running, shared: None) -> tuple[_Running, None]:
            logits = _logits(part.hidden, block, head)
            return _fold(running, logits, block, part.targets), shared

        return _over_chunks(cut, first, fold, tokens, running, None)[0]

    return _each_block(cut, visit, _nothing(tokens.targets, head)), tokens, back


def _streamed_back(cut: Plan, saved: _Saved, d_sums: Sums) -> tuple[jax.Array, Head, None, None]:
    head, tokens = saved.head, saved.tokens
    dtype, first = tokens.hidden.dtype, _first(cut, tokens.weights)
    # Of a token's loss by its logits: share * softmax - owed * [is the target].
    owed = tokens.weights * d_sums.loss
    share = owed + tokens.weights * (d_sums.penalty * 2 * cut.z_loss) * saved.normaliser

    def visit(number: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_kernel = totals
        block = _block(cut, head, number, dtype)
        rows = _rows(head, block)

        def descend(part: Any, d_hidden: jax.Array, d_block: jax.Array) -> Any:
            (hidden, targets, _), share, owed, normaliser = part
            values = _logits(hidden, block, head)
            d_logits = _d_logits(values, block, head, targets, share, owed, normaliser)
            return _d_product(hidden, rows, d_logits.astype(dtype), d_hidden, d_block)

        parts = (tokens, share, owed, saved.normaliser)
        none = _no_gradient(block, tokens.hidden)
        d_hidden, d_block = _over_chunks(cut, first, descend, parts, d_hidden, none)
        return d_hidden, _put(cut, head, d_kernel, d_block, block.start)

    none = _no_gradients(cut, head, tokens), jnp.zeros_like(head.kernel)
    d_hidden, d_kernel = _each_block(cut, visit, none)
    d_head = dataclasses.replace(head, kernel=d_kernel)
    return _joined(d_hidden, saved.back, dtype), d_head, None, None


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


# -- tokens --------------------------------------------------------------------------------------


def _arranged(cut: Plan, tokens: _Tokens) -> tuple[_Tokens, jax.Array | None]:
    """Tokens as the cut wants them, and where each of `[B T]` went if they were moved: in chunks,
    those with a weight last."""
    if cut.chunks == 1:
        return tokens, None
    hidden, targets, weights = tokens
    filler = cut.chunks * cut.chunk - targets.size
    order = jnp.argsort(weights.reshape(-1) != 0, stable=True)
    places = jnp.pad(order, (filler, 0))
    back = (jnp.argsort(order) + filler).reshape(targets.shape)
    is_token = jnp.arange(places.size) >= filler

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(cut.chunks, cut.chunk, *x.shape[1:])

    moved = _Tokens(
        split(hidden.reshape(-1, hidden.shape[-1])[places]),
        split(targets.reshape(-1)[places]),
        split(jnp.where(is_token, weights.reshape(-1)[places], 0.0)),
    )
    return moved, back


def _no_gradients(cut: Plan, head: Head, tokens: _Tokens) -> jax.Array:
    """Zeros `[cuts B T D]`, or with chunks `[chunks cuts chunk D]`: of hidden states by range."""
    lead = tokens.targets.shape
    leading = (lead[0], head.cuts, *lead[1:]) if cut.chunks > 1 else (head.cuts, *lead)
    return jnp.zeros((*leading, tokens.hidden.shape[-1]), jnp.float32)


def _joined(d_hidden: jax.Array, back: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`[B T D]` of gradients by range, every token back in its place.

    Ranges are added here, once: where V is spread over devices this is the one exchange.
    """
    whole = jnp.sum(d_hidden, axis=0 if back is None else 1).astype(dtype)
    return whole if back is None else whole.reshape(-1, whole.shape[-1])[back]


def _first(cut: Plan, weights: jax.Array) -> jax.Array | None:
    """The first chunk with a weight; None where there is one chunk of all."""
    if cut.chunks == 1:
        return None
    return cut.chunks - jnp.sum(jnp.any(weights != 0, axis=1), dtype=jnp.int32)


def _over_chunks(
    cut: Plan,
    first: jax.Array | None,
    visit: Callable[[Any, Any, Any], tuple[Any, Any]],
    tokens: Any,
    own: Any,
    shared: Any,
) -> tuple[Any, Any]:
    """(own, shared) after `visit(tokens, own, shared)` of every chunk from `first` on.

    A loop whose start is found while it runs: a branch inside it would copy what is added up in it.
    Whoever reads the compiled loop finds all chunks, the most it can turn.
    """
    if first is None:
        return visit(tokens, own, shared)

    def turn(state: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        chunk, own, shared = state

        def pick(x: jax.Array) -> jax.Array:
            return lax.dynamic_index_in_dim(x, chunk, keepdims=False)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(x, new, chunk, 0)

        new, shared = visit(jax.tree.map(pick, tokens), jax.tree.map(pick, own), shared)
        return chunk + 1, jax.tree.map(put, own, new), shared

    state = (first, own, shared)
    return lax.while_loop(lambda state: state[0] < cut.chunks, turn, state)[1:]


# -- blocks of the vocabulary --------------------------------------------------------------------


def _each_block(cut: Plan, visit: Callable[[Any, Any], Any], state: Any) -> Any:
    """`state` after `visit(number, state)` of every block."""
    return visit(0, state) if cut.blocks == 1 else lax.fori_loop(0, cut.blocks, visit, state)


def _rows(head: Head, block: _Block) -> jax.Array:
    """The kernel of a block as `[cuts W/cuts D]`, for the gradient of hidden states."""
    rows = _ranges(head, block.kernel)
    return rows if head.by_token else _turned(jnp.moveaxis(rows, 0, -1))


def _no_gradient(block: _Block, hidden: jax.Array) -> jax.Array:
    """Zeros `[D W]`."""
    return jnp.zeros((hidden.shape[-1], block.ids.size), jnp.float32)


def _block(cut: Plan, head: Head, number: Any, dtype: DTypeLike) -> _Block:
    """Block `number`, whole: cast to `dtype`, then gathered. The last one may overlap."""
    size = head.vocab // head.cuts
    start = jnp.minimum(number * cut.block, size - cut.block) if cut.blocks > 1 else 0
    part = lax.dynamic_slice_in_dim(_ranges(head, head.kernel), start, cut.block, _axis(head))
    part = _flat(head, part).astype(dtype)
    if head.gather is not None:
        part = head.gather(part)
    within = start + jnp.arange(cut.block, dtype=jnp.int32)
    ids = jnp.arange(head.cuts, dtype=jnp.int32)[:, None] * size + within[None, :]
    overlaps = cut.blocks * cut.block != size
    if overlaps:
        ids = jnp.where((within >= number * cut.block)[None, :], ids, -1)
    return _Block(part, ids, start, overlaps)


def _put(cut: Plan, head: Head, d_kernel: jax.Array, d_block: jax.Array, start: Any) -> jax.Array:
    """`d_kernel` with the gradient `[D W]` of the whole block at `start` added, scattered."""
    d_block = d_block.T if head.by_token else d_block
    if head.scatter is not None:
        d_block = head.scatter(d_block)
    part = _ranges(head, d_block.astype(d_kernel.dtype))
    total = _ranges(head, d_kernel)
    if cut.blocks * cut.block * head.cuts != head.vocab:
        part = part + lax.dynamic_slice_in_dim(total, start, cut.block, _axis(head))
    total = lax.dynamic_update_slice_in_dim(total, part, start, _axis(head))
    return total.reshape(d_kernel.shape)


def _ranges(head: Head, kernel: jax.Array) -> jax.Array:
    """`[D V]` as `[D cuts W]`, `[V D]` as `[cuts W D]`."""
    if head.by_token:
        return kernel.reshape(head.cuts, -1, kernel.shape[1])
    return kernel.reshape(kernel.shape[0], head.cuts, -1)


def _flat(head: Head, ranges: jax.Array) -> jax.Array:
    if head.by_token:
        return ranges.reshape(-1, ranges.shape[2])
    return ranges.reshape(ranges.shape[0], -1)


def _axis(head: Head) -> int:
    return 1 if head.by_token else 2


# -- numbers -------------------------------------------------------------------------------------


def _shaped(products: jax.Array, head: Head) -> jax.Array:
    if head.scale != 1.0:
        products = products * head.scale
    if head.softcap is not None:
        products = head.softcap * jnp.tanh(products / head.softcap)
    return products


def _logits(hidden: jax.Array, block: _Block, head: Head) -> jax.Array:
    """Float32 `[.. cuts W/cuts]` of `hidden` `[.. D]`."""
    lead, kernel = _letters(hidden), "WD" if head.by_token else "DW"
    equation = f"{lead}D,{kernel}->{lead}W"
    products = einsum_f32(equation, hidden, block.kernel)
    return _shaped(products, head).reshape(*hidden.shape[:-1], *block.ids.shape)


def _letters(hidden: jax.Array) -> str:
    return "BT" if hidden.ndim == 3 else "N"


def _ids(block: _Block, targets: jax.Array) -> jax.Array:
    return block.ids.reshape((1,) * targets.ndim + block.ids.shape)


def _nothing(targets: jax.Array, head: Head) -> _Running:
    """Before the first block."""
    shape = (*targets.shape, head.cuts)
    zero = jnp.zeros(shape, jnp.float32)
    return _Running(zero + LOWEST, jnp.zeros(shape, jnp.int32), zero, zero)


def _fold(running: _Running, logits: jax.Array, block: _Block, targets: jax.Array) -> _Running:
    """`running` with the `logits` `[.. cuts W/cuts]` of a block: plain reductions over W alone.

    An argmax over V takes as long as the product that made the logits on a CPU, and gathers a V
    that is spread over devices; so would a lookup of the target.
    """
    ids = _ids(block, targets)
    if block.overlaps:
        logits = jnp.where(ids >= 0, logits, LOWEST)
    highest = jnp.max(logits, axis=-1)
    top = jnp.maximum(running.top, highest)
    total = running.total * jnp.exp(running.top - top)
    total = total + jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    at_target = running.at_target + _at_target(logits, block, targets)
    is_best = logits >= highest[..., None]
    # Ids below 2**24 are exact in float32, whose largest a CPU finds several times faster.
    lowest = -jnp.max(jnp.where(is_best, -ids.astype(jnp.float32), LOWEST), axis=-1)
    lowest = lowest.astype(jnp.int32)
    best = jnp.where(highest > running.top, lowest, running.best)
    return _Running(top, best, total, at_target)


def _at_target(logits: jax.Array, block: _Block, targets: jax.Array) -> jax.Array:
    """`[.. cuts]`: the logit of the target, 0 in a block without it."""

    def summed(logits: jax.Array, targets: jax.Array) -> jax.Array:
        is_target = _ids(block, targets) == targets[..., None, None]
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

    def looked_up(logits: jax.Array, targets: jax.Array) -> jax.Array:
        place = jnp.clip(targets - block.start, 0, block.ids.shape[1] - 1)[..., None, None]
        is_target = block.ids[0][place] == targets[..., None, None]
        found = jnp.take_along_axis(logits, place, axis=-1)
        return jnp.where(is_target, found, 0.0)[..., 0]

    if block.ids.shape[0] > 1:
        return summed(logits, targets)
    # A pass over the logits costs a CPU a tenth of their product; elsewhere it is in another pass.
    return lax.platform_dependent(logits, targets, cpu=looked_up, default=summed)


def _finish(cut: Plan, running: _Running, tokens: _Tokens) -> tuple[Sums, jax.Array]:
    """Ranges joined: the sums, and each token's log-sum-exp."""
    each, normaliser = _of_tokens(running, tokens)
    weights = tokens.weights
    sums = Sums(
        loss=jnp.sum(weights * each.loss),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * each.correct),
        penalty=cut.z_loss * jnp.sum(weights * normaliser**2),
    )
    return sums, normaliser


def _of_tokens(running: _Running, tokens: _Tokens) -> tuple[TokenLosses, jax.Array]:
    """Ranges joined: what each token has come to, and its log-sum-exp; 0 at weight 0."""
    top = jnp.max(running.top, axis=-1)
    total = jnp.sum(running.total * jnp.exp(running.top - top[..., None]), axis=-1)
    is_best = running.top >= top[..., None]
    best = jnp.min(jnp.where(is_best, running.best, jnp.iinfo(jnp.int32).max), axis=-1)
    counts = tokens.weights != 0
    normaliser = jnp.where(counts, top + jnp.log(jnp.where(counts, total, 1.0)), 0.0)
    loss = jnp.where(counts, normaliser - jnp.sum(running.at_target, axis=-1), 0.0)
    return TokenLosses(loss, (best == tokens.targets) & counts), normaliser


def _d_logits(
    logits: jax.Array,
    block: _Block,
    head: Head,
    targets: jax.Array,
    share: jax.Array,
    owed: jax.Array,
    normaliser: jax.Array,
) -> jax.Array:
    """Gradient of the products hidden x kernel of a block, float32 `[.. cuts W/cuts]`."""
    ids = _ids(block, targets)
    softmax = jnp.exp(logits - normaliser[..., None, None])
    is_target = ids == targets[..., None, None]
    d_logits = share[..., None, None] * softmax
    d_logits = d_logits - jnp.where(is_target, owed[..., None, None], 0.0)
    if head.softcap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / head.softcap))
    if head.scale != 1.0:
        d_logits = d_logits * head.scale
    return jnp.where(ids >= 0, d_logits, 0.0) if block.overlaps else d_logits


def _d_product(
    hidden: jax.Array,
    kernel: jax.Array,
    d_logits: jax.Array,
    d_hidden: jax.Array,
    d_block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`d_hidden` `[cuts .. D]` and `d_block` `[D W]` with what a block adds, float32; `kernel` is
    that block as `[cuts W/cuts D]`, `d_logits` `[.. cuts W/cuts]`."""
    lead = _letters(hidden)
    equation = f"{lead}cv,cvD->c{lead}D"
    d_hidden = d_hidden + einsum_f32(equation, d_logits, kernel)
    d_logits = d_logits.reshape(*d_logits.shape[:-2], -1)
    across = _turned(jnp.moveaxis(hidden, -1, 0))
    equation = f"D{lead},{lead}W->DW"
    more = einsum_f32(equation, across, d_logits)
    return d_hidden, d_block + more


def _turned(x: jax.Array) -> jax.Array:
    """`x`, on a CPU in the order of its axes: products along columns take twice as long there."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
