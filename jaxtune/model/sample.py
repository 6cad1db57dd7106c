"""Greedy decoding with a key-value cache: prompts in, token ids out. Knows no text.

Prompts of unequal length share a batch: they are padded on the right, read once, and then every
row writes at its own position. Shapes come in few sizes, so a new prompt rarely compiles anything.
"""

import contextlib
import functools
from collections.abc import Collection, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.config import ConfigError, DataError
from jaxtune.mesh import constrain, row_shards
from jaxtune.model.decoder import Cache, Params, empty_cache, forward, rope_limits
from jaxtune.ops.cross_entropy import Head, logits
from jaxtune.spec import ModelSpec

SHORTEST_ROW = 16
LONGEST_DOUBLING = 1024  # above, rows grow by this much instead of doubling
STOP_SLOTS = 8


class Generation(NamedTuple):
    """The tokens after the prompt; `stopped` says a stop id came (it is not among the tokens)."""

    tokens: list[int]
    stopped: bool


class Row(NamedTuple):
    """Right-padded prompts `[B T]`, the length of each, and how many tokens each may grow `[B]`."""

    tokens: Any  # i32, numpy outside jit
    lengths: Any
    limits: Any


class State(NamedTuple):
    """Decoding between two steps: the newest token of each row `[B]` and everything before it."""

    newest: jax.Array  # i32 [B]
    active: jax.Array  # bool [B], still being written
    stopped: jax.Array  # bool [B], ended with a stop id
    counts: jax.Array  # i32 [B], tokens written
    tokens: jax.Array  # i32 [B N]
    step: jax.Array  # i32 [], columns of `tokens` in use
    cache: Cache | None


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 32,
) -> list[Generation]:
    """The most likely continuation of each prompt, token by token, in the order of `prompts`.

    A row ends at a stop id, after `max_new_tokens` (a stop id counts), or at the model's last
    position. Computes in `dtype`; `params` may live on `mesh` in any sharding.
    Raises DataError for a prompt that is empty or leaves no position free.
    """
    _check(spec, prompts, max_new_tokens)
    params = _cast(params, dtype)
    room = _bucket(max_new_tokens)
    smallest_batch = 1 if mesh is None else row_shards(mesh)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generations: dict[int, Generation] = {}
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        rows = _rows(spec, [prompts[i] for i in chosen], max_new_tokens, smallest_batch)
        with _on(mesh):
            tokens, counts, stopped = jax.device_get(
                _generate(spec, params, rows, _stops(stop_ids), room=room, dtype=np.dtype(dtype))
            )
        for row, i in enumerate(chosen):
            generations[i] = Generation(tokens[row, : counts[row]].tolist(), bool(stopped[row]))
    return [generations[i] for i in range(len(prompts))]


def stream(
    spec: ModelSpec,
    params: Params,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
) -> Generator[int, None, bool]:
    """`generate` for one prompt, each token as soon as it is known; the stop id is not yielded.

    The errors of `generate` are raised here, before the first token is asked for. As the value of
    a `yield from`, or of StopIteration, it says whether a stop id came.
    """
    _check(spec, [prompt], max_new_tokens)
    return _stream(
        spec,
        _cast(params, dtype),
        _rows(spec, [prompt], max_new_tokens, 1),
        _stops(stop_ids),
        room=_bucket(max_new_tokens),
        dtype=np.dtype(dtype),
        mesh=mesh,
    )


def _stream(
    spec: ModelSpec,
    params: Params,
    rows: Row,
    stop_ids: np.ndarray,
    *,
    room: int,
    dtype: np.dtype,
    mesh: jax.sharding.Mesh | None,
) -> Generator[int, None, bool]:
    with _on(mesh):
        state = _read_prompts_jit(spec, params, rows, stop_ids, room=room, dtype=dtype)
    while True:
        newest, counts, active, stopped, step = jax.device_get(
            (state.newest, state.counts, state.active, state.stopped, state.step)
        )
        if counts[0] == step:  # otherwise the newest is the stop id
            yield int(newest[0])
        if not active[0]:
            return bool(stopped[0])
        with _on(mesh):
            state = _advance_jit(spec, params, rows, stop_ids, state, dtype=dtype)


def _read_prompts(
    spec: ModelSpec,
    params: Params,
    rows: Row,
    stop_ids: jax.Array,
    *,
    room: int,
    dtype: np.dtype,
) -> State:
    """Runs all prompts through the model once and takes the first new token of each row."""
    B, T = rows.tokens.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    # The padding's keys land in slots that its row overwrites before it can see them.
    output = forward(
        spec,
        {"params": params},
        rows.tokens,
        segment_ids=(positions_BT < rows.lengths[:, None]).astype(jnp.int32),
        positions=positions_BT,
        dtype=dtype,
        remat="none",
        cache=empty_cache(spec, rows=B, length=T + room, dtype=dtype),
    )
    last_B1D = output.hidden[jnp.arange(B)[:, None], rows.lengths[:, None] - 1]
    nothing_B = jnp.zeros(B, jnp.int32)
    state = State(
        newest=nothing_B,
        active=rows.limits > 0,
        stopped=jnp.zeros(B, bool),
        counts=nothing_B,
        tokens=jnp.zeros((B, room), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        cache=output.cache,
    )
    return _record(state, _best(last_B1D, output.head), rows, stop_ids)


def _advance(
    spec: ModelSpec,
    params: Params,
    rows: Row,
    stop_ids: jax.Array,
    state: State,
    *,
    dtype: np.dtype,
) -> State:
    """Feeds the newest token of each row and takes the next."""
    state = _outgrown(spec, params, rows, state, dtype=dtype)
    output = forward(
        spec,
        {"params": params},
        state.newest[:, None],
        segment_ids=jnp.ones_like(state.newest)[:, None],
        positions=(rows.lengths + state.step - 1)[:, None],
        dtype=dtype,
        remat="none",
        cache=state.cache,
    )
    state = state._replace(cache=output.cache)
    return _record(state, _best(output.hidden, output.head), rows, stop_ids)


def _outgrown(
    spec: ModelSpec, params: Params, rows: Row, state: State, *, dtype: np.dtype
) -> State:
    """Reads all texts again when the newest token makes one longer than a limit of its rope.

    Every position of such a text, and all that was computed from it, is then another.
    """
    B, T = rows.tokens.shape
    S = T + state.tokens.shape[1]
    limits = [limit for limit in rope_limits(spec) if limit < S]
    if not limits:
        return state

    def read_again() -> Cache | None:
        rows_B1 = jnp.arange(B)[:, None]
        places_BN = rows.lengths[:, None] + jnp.arange(S - T)[None, :]
        tokens_BS = jnp.zeros((B, S), jnp.int32).at[:, :T].set(rows.tokens)
        tokens_BS = tokens_BS.at[rows_B1, places_BN].set(state.tokens)
        positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        return forward(
            spec,
            {"params": params},
            tokens_BS,
            segment_ids=(positions_BS < lengths_B[:, None]).astype(jnp.int32),
            positions=positions_BS,
            dtype=dtype,
            remat="none",
            cache=empty_cache(spec, rows=B, length=S, dtype=dtype),
        ).cache

    lengths_B = rows.lengths + state.step
    crossed = jnp.any(jnp.array([jnp.any(lengths_B == limit + 1) for limit in limits]))
    return state._replace(cache=jax.lax.cond(crossed, read_again, lambda: state.cache))


def _record(state: State, next_B: jax.Array, rows: Row, stop_ids: jax.Array) -> State:
    is_stop_B = jnp.any(next_B[:, None] == stop_ids[None, :], axis=-1)
    written_B = state.active & ~is_stop_B
    counts_B = state.counts + written_B
    return State(
        newest=next_B,
        active=written_B & (counts_B < rows.limits),
        stopped=state.stopped | (state.active & is_stop_B),
        counts=counts_B,
        tokens=state.tokens.at[:, state.step].set(next_B, mode="drop"),
        step=state.step + 1,
        cache=state.cache,
    )


def _best(hidden_B1D: jax.Array, head: Head) -> jax.Array:
    return jnp.argmax(logits(hidden_B1D, head)[:, 0], axis=-1).astype(jnp.int32)


_read_prompts_jit = jax.jit(_read_prompts, static_argnames=("spec", "room", "dtype"))
_advance_jit = jax.jit(_advance, static_argnames=("spec", "dtype"), donate_argnames=("state",))


@functools.partial(jax.jit, static_argnames=("spec", "room", "dtype"))
def _generate(
    spec: ModelSpec,
    params: Params,
    rows: Row,
    stop_ids: jax.Array,
    *,
    room: int,
    dtype: np.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens `[B room]`, how many of them count `[B]`, and whether a stop id came `[B]`."""
    state = jax.lax.while_loop(
        lambda state: jnp.any(state.active),
        lambda state: _advance(spec, params, rows, stop_ids, state, dtype=dtype),
        _read_prompts(spec, params, rows, stop_ids, room=room, dtype=dtype),
    )
    # On every device, so that every host can read them.
    return (
        constrain(state.tokens, None, None),
        constrain(state.counts, None),
        constrain(state.stopped, None),
    )


def _check(spec: ModelSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {i} has no tokens; there is nothing to continue.")
        if len(prompt) >= spec.max_positions:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens; the model has {spec.max_positions} "
                "positions, and the answer needs at least one. Shorten the prompt."
            )


def _rows(
    spec: ModelSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int, smallest_batch: int
) -> Row:
    """Prompts in a bucketed shape; rows that are not needed hold one token and may not grow."""
    B = max(smallest_batch, 1 << (len(prompts) - 1).bit_length())
    T = _bucket(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((B, T), np.int32)
    lengths, limits = np.ones(B, np.int32), np.zeros(B, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
        limits[i] = min(max_new_tokens, spec.max_positions - len(prompt))
    return Row(tokens, lengths, limits)


def _bucket(length: int) -> int:
    """The next power of two, or the next multiple of LONGEST_DOUBLING above it."""
    if length > LONGEST_DOUBLING:
        return -(-length // LONGEST_DOUBLING) * LONGEST_DOUBLING
    return max(SHORTEST_ROW, 1 << (length - 1).bit_length())


def _stops(stop_ids: Collection[int]) -> np.ndarray:
    """Stop ids in a fixed number of slots; -1 is no token."""
    ids = sorted(set(stop_ids))
    slots = max(1, -(-len(ids) // STOP_SLOTS)) * STOP_SLOTS
    return np.array(ids + [-1] * (slots - len(ids)), np.int32)


def _cast(params: Params, dtype: DTypeLike) -> Params:
    """Weights in compute dtype once, instead of once a token."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
