"""Exact attention in blocks for where there is no kernel: plain XLA, never `[T S]` scores.

The signature of `reference`. A block of queries visits, in a loop, only the blocks of
keys between the first and the last that any of its queries may see: what is later, out of the
window or of other segments costs nothing, so a row packed with many short texts costs little more
than the texts alone. That range is data, read from segments and positions at run time.

The softmax is summed up on the way (Milakov & Gimelshein 2018, arXiv:1805.02867); the backward pass
makes the scores again from the log of its sum (Dao et al. 2022, arXiv:2205.14135).

Scores lie `[G s q]`, keys before queries: their maximum and sum run over whole vectors, which on
CPU is what a softmax costs. J is query heads per kv head; q = J * t, all queries of a block that
read the same keys. n counts blocks of queries, m blocks of keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.ops.product import einsum_f32
from jaxtune.ops.reference import AttentionMask, AttentionSpec

QUERY_BLOCK = 128
KEY_BLOCK = 128
LOWEST = -1e30  # where a running maximum begins; finite, so that differences of two are zero
UNSEEN = 2 * LOWEST  # added to a score: its weight is zero even where nothing was seen yet
FAR = jnp.iinfo(jnp.int32).max


class _BlockStatic(NamedTuple):
    """Numbers known when tracing; t and s are tokens in a block of queries and of keys."""

    window: int | None
    softcap: float | None
    scale: float
    t: int
    s: int


class _Row(NamedTuple):
    """A row in blocks: queries `[n G q K]`, keys and values `[m G s K]`, and their mask.

    `first` and `stop` `[n]` are the range of key blocks that each block of queries visits.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: AttentionMask  # of queries [n t], of keys [m s]
    first: jax.Array
    stop: jax.Array


def blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    spec: AttentionSpec,
) -> jax.Array:
    """Attend as `reference` does, row by row, for any positions and segments.

    Exact whatever their order; what is skipped is most where segments ascend and positions grow
    along the row, as in packed rows. Softmax and sums of gradients in float32. Differentiable once,
    in reverse. What it keeps for that has the name "attention" for `jax.checkpoint` policies.
    """
    t, s = min(QUERY_BLOCK, q.shape[1]), min(KEY_BLOCK, k.shape[1])
    assert spec.scale is not None
    static = _BlockStatic(spec.window, spec.softcap, spec.scale, t, s)
    return _attend(q, k, v, mask, spec.sinks, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    sinks: jax.Array | None,
    static: _BlockStatic,
) -> jax.Array:
    return _forward(q, k, v, mask, sinks, static)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    sinks: jax.Array | None,
    static: _BlockStatic,
) -> tuple[jax.Array, Any]:
    T, H = q.shape[1:3]
    G = k.shape[2]
    sinks_Gq = None if sinks is None else _of_queries(sinks, G, static.t)

    def of_row(row: _Row) -> tuple[jax.Array, jax.Array]:
        blocks = functools.partial(_mix, row, static, sinks_Gq)
        out_nGqK, logs_nGq = jax.lax.map(blocks, jnp.arange(row.q.shape[0]))
        return out_nGqK, logs_nGq

    # One row after the other: its blocks stay in cache, and its range is its own.
    out_BnGqK, logs_BnGq = jax.lax.map(of_row, _rows(q, k, v, mask, static))
    out = _join(out_BnGqK, T, H).astype(q.dtype)
    out = checkpoint_name(out, "attention")
    logs_BnGq = checkpoint_name(logs_BnGq, "attention")
    return out, (q, k, v, mask, sinks, out, logs_BnGq)


def _mix(
    row: _Row, static: _BlockStatic, sinks_Gq: jax.Array | None, i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Queries of block i: what they get `[G q K]`, and the logs of their sums `[G q]`, f32."""
    q_GqK = row.q[i]
    G, Q, K = q_GqK.shape

    def visit(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top_Gq, total_Gq, mixed_GKq = sums
        scores_Gsq, mask_1sq = _scores(row, static, i, j)
        scores_Gsq = scores_Gsq + mask_1sq
        higher_Gq = jnp.maximum(top_Gq, jnp.max(scores_Gsq, axis=1))
        exps_Gsq = jnp.exp(scores_Gsq - higher_Gq[:, None, :])
        shrink_Gq = jnp.exp(top_Gq - higher_Gq)
        total_Gq = total_Gq * shrink_Gq + jnp.sum(exps_Gsq, axis=1)
        new_GKq = _product("GsK,Gsq->GKq", row.v[j], exps_Gsq)
        return higher_Gq, total_Gq, mixed_GKq * shrink_Gq[:, None, :] + new_GKq

    nothing_Gq = jnp.zeros((G, Q), jnp.float32)
    start = (nothing_Gq + LOWEST, nothing_Gq, jnp.zeros((G, K, Q), jnp.float32))
    top_Gq, total_Gq, mixed_GKq = jax.lax.fori_loop(row.first[i], row.stop[i], visit, start)
    sees_Gq = total_Gq > 0
    log_Gq = jnp.where(sees_Gq, top_Gq + jnp.log(jnp.where(sees_Gq, total_Gq, 1.0)), 0.0)
    if sinks_Gq is not None:
        log_Gq = jnp.where(sees_Gq, jnp.logaddexp(log_Gq, sinks_Gq), 0.0)
    share_Gq = jnp.where(sees_Gq, jnp.exp(top_Gq - log_Gq), 0.0)
    return jnp.swapaxes(mixed_GKq * share_Gq[:, None, :], 1, 2), log_Gq


def _backward(
    static: _BlockStatic, residuals: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    q, k, v, mask, sinks, out, logs_BnGq = residuals
    S, G = k.shape[1:3]
    inner_BTH = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    inner_BnGq = _split(inner_BTH[..., None], static.t, G)[..., 0]
    d_out_BnGqK = _split(d_out, static.t, G)

    def of_row(row_values: tuple[_Row, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        row, logs_nGq, inner_nGq, d_out_nGqK = row_values
        zeros_mGsK = jnp.zeros(row.k.shape, jnp.float32)
        sums = functools.partial(_slopes, row, static, logs_nGq, inner_nGq, d_out_nGqK)
        (d_k, d_v), d_q = jax.lax.scan(sums, (zeros_mGsK, zeros_mGsK), jnp.arange(row.q.shape[0]))
        return d_q, d_k, d_v

    rows = _rows(q, k, v, mask, static)
    d_q, d_k, d_v = jax.lax.map(of_row, (rows, logs_BnGq, inner_BnGq, d_out_BnGqK))
    d_sinks = None
    if sinks is not None:
        # A sink's weight is taken from every query that sees anything: the others have log 0 and
        # inner product 0.
        weights_BnGq = jnp.exp(_of_queries(sinks, G, static.t)[None, None] - logs_BnGq)
        taken_BnGJt = (weights_BnGq * inner_BnGq).reshape(*logs_BnGq.shape[:3], -1, static.t)
        d_sinks = -jnp.sum(taken_BnGJt, axis=(0, 1, 4)).reshape(sinks.shape).astype(sinks.dtype)
    d_q = _join(d_q, *q.shape[1:3]).astype(q.dtype)
    return d_q, _join(d_k, S, G).astype(k.dtype), _join(d_v, S, G).astype(v.dtype), None, d_sinks


_attend.defvjp(_forward, _backward)


def _slopes(
    row: _Row,
    static: _BlockStatic,
    logs_nGq: jax.Array,
    inner_nGq: jax.Array,
    d_out_nGqK: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    i: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Add what block i of queries gives to the gradients of keys and values `[m G s K]`, f32;
    the gradient of its queries `[G q K]`."""
    q_GqK, d_out_GqK = row.q[i], d_out_nGqK[i]
    log_G1q, inner_G1q = logs_nGq[i][:, None, :], inner_nGq[i][:, None, :]

    def visit(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q_GKq, d_k_mGsK, d_v_mGsK = sums
        scores_Gsq, mask_1sq = _scores(row, static, i, j)
        weights_Gsq = jnp.exp(scores_Gsq + mask_1sq - log_G1q)
        d_v_GsK = _product("Gsq,GqK->GsK", weights_Gsq, d_out_GqK)
        d_weights_Gsq = _product("GsK,GqK->Gsq", row.v[j], d_out_GqK)
        d_scores_Gsq = weights_Gsq * (d_weights_Gsq - inner_G1q) * static.scale
        if static.softcap is not None:
            d_scores_Gsq = d_scores_Gsq * (1.0 - jnp.square(scores_Gsq / static.softcap))
        d_k_GsK = _product("Gsq,GqK->GsK", d_scores_Gsq, q_GqK)
        # Queries last: the product the other way round takes twice as long on CPU.
        d_q_GKq = d_q_GKq + _product("GsK,Gsq->GKq", row.k[j], d_scores_Gsq)
        return d_q_GKq, d_k_mGsK.at[j].add(d_k_GsK), d_v_mGsK.at[j].add(d_v_GsK)

    zeros_GKq = jnp.zeros(jnp.swapaxes(q_GqK, 1, 2).shape, jnp.float32)
    start = (zeros_GKq, *sums)
    d_q_GKq, d_k_mGsK, d_v_mGsK = jax.lax.fori_loop(row.first[i], row.stop[i], visit, start)
    return (d_k_mGsK, d_v_mGsK), jnp.swapaxes(d_q_GKq, 1, 2)


def _scores(
    row: _Row, static: _BlockStatic, i: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores `[G s q]` of queries i and keys j, f32; what to add to hide the unseen `[1 s q]`."""
    scores_Gsq = _product("GsK,GqK->Gsq", row.k[j], row.q[i]) * static.scale
    if static.softcap is not None:
        scores_Gsq = static.softcap * jnp.tanh(scores_Gsq / static.softcap)
    segments_1t = row.mask.query_segments[i][None, :]
    distance_st = row.mask.query_positions[i][None, :] - row.mask.key_positions[j][:, None]
    seen_st = (segments_1t == row.mask.key_segments[j][:, None]) & (segments_1t != 0)
    seen_st = seen_st & (distance_st >= 0)
    if static.window is not None:
        seen_st = seen_st & (distance_st < static.window)
    heads = row.q.shape[2] // static.t
    return scores_Gsq, jnp.tile(jnp.where(seen_st, 0.0, UNSEEN), (1, 1, heads))


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """In the smaller dtype of the two, that of the model's own arrays; sums in f32."""
    dtype = min(x.dtype, y.dtype, key=lambda d: d.itemsize)
    x, y = x.astype(dtype), y.astype(dtype)
    return einsum_f32(equation, x, y)


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    static: _BlockStatic,
) -> _Row:
    """Every row in blocks, `[B ...]`; what fills the last blocks is padding."""
    G = k.shape[2]
    blocks = AttentionMask(*map(_blocks, mask, (static.t, static.s, static.t, static.s)))
    first, stop = visited(blocks, static.window)
    q, k, v = _split(q, static.t, G), _split(k, static.s, G), _split(v, static.s, G)
    return _Row(q, k, v, blocks, first, stop)


def visited(mask: AttentionMask, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Key blocks [first, stop) that hold all that a block of queries sees, int32 `[B n]` each.

    `mask` is in blocks: of queries `[B n t]`, of keys `[B m s]`.

    Tokens are in order of (segment, position), and a query sees a stretch of that order: a block of
    keys is needed if the stretch from its first key to its last meets that of the queries.

        segments  1 1 2 2 | 2 3 3 3    blocks of four. The first sees no key after (2, 1): [0, 1);
        positions 0 1 0 1 | 2 0 1 2    the second none before (2, 0): [0, 2)
    """
    back = FAR if window is None else window - 1
    (low_of, low_at), (top_of, top_at) = _ends(mask.query_segments, mask.query_positions)
    low_at = jnp.maximum(low_at, back) - back
    (first_of, first_at), (last_of, last_at) = _ends(mask.key_segments, mask.key_positions)

    def up_to(of_x: jax.Array, at_x: jax.Array, of_y: jax.Array, at_y: jax.Array) -> jax.Array:
        return (of_x < of_y) | ((of_x == of_y) & (at_x <= at_y))

    B1m, Bn1 = (slice(None), None, slice(None)), (slice(None), slice(None), None)
    needed_Bnm = up_to(first_of[B1m], first_at[B1m], top_of[Bn1], top_at[Bn1])
    needed_Bnm &= up_to(low_of[Bn1], low_at[Bn1], last_of[B1m], last_at[B1m])
    any_Bn = jnp.any(needed_Bnm, axis=-1)
    first_Bn = jnp.where(any_Bn, jnp.argmax(needed_Bnm, axis=-1), 0)
    after_Bn = jnp.argmax(needed_Bnm[..., ::-1], axis=-1)
    stop_Bn = jnp.where(any_Bn, needed_Bnm.shape[-1] - after_Bn, 0)
    return first_Bn.astype(jnp.int32), stop_Bn.astype(jnp.int32)


def _ends(
    segments: jax.Array, positions: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The lowest and the highest (segment, position) of each block that is no padding.

    Of a block of padding a lowest above and a highest below all others.
    """
    low_of = jnp.min(jnp.where(segments != 0, segments, FAR), axis=-1)
    low_at = jnp.min(jnp.where(segments == low_of[..., None], positions, FAR), axis=-1)
    top_of = jnp.max(segments, axis=-1)
    top_at = jnp.max(jnp.where(segments == top_of[..., None], positions, -1), axis=-1)
    return (low_of, low_at), (top_of, top_at)


def _of_queries(per_head_H: jax.Array, groups: int, t: int) -> jax.Array:
    """Repeat one number a head for its queries: `[H]` -> f32 `[G q]`."""
    return jnp.repeat(per_head_H.astype(jnp.float32).reshape(groups, -1), t, axis=1)


def _blocks(x_BT: jax.Array, block: int) -> jax.Array:
    """`[B T ...]` -> `[B n block ...]`, the last block filled with zeros."""
    B, T = x_BT.shape[:2]
    rest = [(0, 0), (0, -T % block)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, rest).reshape(B, -1, block, *x_BT.shape[2:])


def _split(x_BTHK: jax.Array, block: int, groups: int) -> jax.Array:
    """`[B T H K]` -> `[B n G q K]`, q = H / G * block."""
    B, _, H, K = x_BTHK.shape
    x_BntHK = _blocks(x_BTHK, block)
    x_BntGJK = x_BntHK.reshape(*x_BntHK.shape[:3], groups, H // groups, K)
    return jnp.moveaxis(x_BntGJK, 2, 4).reshape(B, -1, groups, H // groups * block, K)


def _join(x_BnGqK: jax.Array, length: int, heads: int) -> jax.Array:
    """`[B n G q K]` -> `[B T H K]`, the inverse of `_split` without its filling."""
    B, n, G, _, K = x_BnGqK.shape
    x_BnGJtK = x_BnGqK.reshape(B, n, G, heads // G, -1, K)
    return jnp.moveaxis(x_BnGJtK, 4, 2).reshape(B, -1, heads, K)[:, :length]
