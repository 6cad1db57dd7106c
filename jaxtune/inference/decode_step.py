"""Decoding on the device: texts in a fixed number of slots, and the programs that move them on.

    empty -> read (some prompts, into some slots) -> advance (all slots, several tokens) -> read ...

A slot is one row of every array. What a row computes follows from its own text and settings alone,
so slots may hold any mixture of texts, and a slot that is free computes what nobody reads. Shapes
are the only thing static: of slots, of rows that are read at once, of stop ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.inference.sampling import Settings, choose
from jaxtune.model import decoder
from jaxtune.model.decoder import Cache, Params
from jaxtune.model.lora import Lora
from jaxtune.ops.cross_entropy import logits
from jaxtune.parallel.mesh import constrain
from jaxtune.spec import ModelSpec

MOST_STEPS = 32  # tokens of a row in one call of `advance`


class Asked(NamedTuple):
    """What each row wants, arrays `[B ...]`: the ids that end it (-1 is no token) and how it is
    drawn."""

    stop_ids: Any  # i32 [B W]
    settings: Settings


class Texts(NamedTuple):
    """Right-padded texts `[R T]` to be read, numpy: their lengths, the slots they go to (a slot
    that is not there: nowhere), how many tokens each may still get and how many it got `[R]`."""

    tokens: Any
    lengths: Any
    slots: Any
    left: Any
    written: Any
    asked: Asked


class Slots(NamedTuple):
    """All texts between two tokens; of each the newest token is not in the cache yet."""

    newest: jax.Array  # i32 [B]
    length: jax.Array  # i32 [B], tokens of the text, the newest included
    left: jax.Array  # i32 [B], tokens that may still come; 0: the row is done
    written: jax.Array  # i32 [B], tokens of the answer
    seen: jax.Array  # bool [B V], tokens that the text has
    asked: Asked
    cache: Cache


class Written(NamedTuple):
    """What a call wrote: of `tokens` `[B N]` the first `counts` `[B]`; which rows go on `[B]`, and
    which met a stop id `[B]`. On every device, so that every host can read it."""

    tokens: jax.Array
    counts: jax.Array
    active: jax.Array
    stopped: jax.Array


class Program(NamedTuple):
    """What all calls for one model share; static."""

    spec: ModelSpec
    lora: Lora | None
    dtype: np.dtype


def _empty(program: Program, *, rows: int, length: int, stops: int) -> Slots:
    spec = program.spec
    zeros_B = jnp.zeros(rows, jnp.int32)
    ones_B = jnp.ones(rows, jnp.float32)
    settings = Settings(
        zeros_B * 0.0, zeros_B, ones_B, ones_B, jnp.zeros((rows, 2), jnp.uint32), zeros_B
    )
    return _placed(
        Slots(
            newest=zeros_B,
            length=zeros_B,
            left=zeros_B,
            written=zeros_B,
            seen=jnp.zeros((rows, spec.vocab), bool),
            asked=Asked(jnp.full((rows, stops), -1, jnp.int32), settings),
            cache=decoder.empty_cache(spec, rows=rows, length=length, dtype=program.dtype),
        )
    )


def _read(
    program: Program, variables: Mapping[str, Params], slots: Slots, texts: Texts
) -> tuple[Slots, Written]:
    """Runs the texts through the model, keeps what decoding needs, and takes a token of each."""
    R, T = texts.tokens.shape
    positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (R, T))
    is_text_RT = positions_RT < texts.lengths[:, None]
    output = decoder.forward(
        program.spec,
        variables,
        texts.tokens,
        segment_ids=is_text_RT.astype(jnp.int32),
        positions=positions_RT,
        dtype=program.dtype,
        remat="none",
        keep=True,
        lora=program.lora,
    )
    assert output.cache is not None
    rows_R = jnp.arange(R)
    last_R1D = output.hidden[rows_R, texts.lengths - 1][:, None]
    seen_RV = jnp.zeros((R, program.spec.vocab), bool)
    seen_RV = seen_RV.at[rows_R[:, None], texts.tokens].max(is_text_RT)
    read = Slots(
        newest=jnp.zeros(R, jnp.int32),
        length=texts.lengths,
        left=texts.left,
        written=texts.written,
        seen=seen_RV,
        asked=texts.asked,
        cache={},
    )
    read, written_R = _next(read, logits(last_R1D, output.head)[:, 0])

    def into(of_slots: jax.Array, of_texts: jax.Array) -> jax.Array:
        return of_slots.at[texts.slots].set(of_texts, mode="drop")

    kept = decoder.in_slots(slots.cache, output.cache, texts.slots, texts.lengths)
    rest = jax.tree.map(into, slots._replace(cache={}), read)
    slots = _placed(rest._replace(cache=kept))
    return slots, _everywhere(Written(read.newest[:, None], *written_R))


def _advance(
    program: Program,
    variables: Mapping[str, Params],
    slots: Slots,
    live: jax.Array,
    steps: jax.Array,
    until_one_ends: jax.Array,
) -> tuple[Slots, Written]:
    """Up to `steps` tokens for each of the `live` rows `[B]`, fewer when no row goes on, or, with
    `until_one_ends`, when one does not."""
    B = live.shape[0]
    slots = slots._replace(left=jnp.where(live, slots.left, 0))
    begun_B = slots.left > 0
    zeros_B = jnp.zeros(B, jnp.int32)
    tokens_BN = jnp.zeros((B, MOST_STEPS), jnp.int32)

    def goes_on(carry: tuple[jax.Array, Slots, Written]) -> jax.Array:
        step, _, done = carry
        ended = jnp.any(begun_B & ~done.active)
        return (step < steps) & jnp.any(done.active) & ~(until_one_ends & ended)

    def token(carry: tuple[jax.Array, Slots, Written]) -> tuple[jax.Array, Slots, Written]:
        step, slots, done = carry
        output = decoder.forward(
            program.spec,
            variables,
            slots.newest[:, None],
            segment_ids=jnp.ones((B, 1), jnp.int32),
            positions=slots.length[:, None] - 1,
            dtype=program.dtype,
            remat="none",
            cache=slots.cache,
            lora=program.lora,
        )
        assert output.cache is not None
        slots, (counts_B, active_B, stopped_B) = _next(
            slots._replace(cache=output.cache), logits(output.hidden, output.head)[:, 0]
        )
        column_B1 = slots.newest[:, None]
        tokens_BN = jax.lax.dynamic_update_slice(done.tokens, column_B1, (0, step))
        done = Written(tokens_BN, done.counts + counts_B, active_B, done.stopped | stopped_B)
        return step + 1, slots, done

    start = Written(tokens_BN, zeros_B, begun_B, jnp.zeros(B, bool))
    _, slots, written = jax.lax.while_loop(goes_on, token, (jnp.zeros((), jnp.int32), slots, start))
    return slots, _everywhere(written)


def _next(
    slots: Slots, logits_BV: jax.Array
) -> tuple[Slots, tuple[jax.Array, jax.Array, jax.Array]]:
    """Takes the next token of each row; how many were written, who goes on, who met a stop id."""
    asked = slots.asked
    next_B = choose(logits_BV, slots.seen, asked.settings, slots.written)
    active_B = slots.left > 0
    is_stop_B = active_B & jnp.any(next_B[:, None] == asked.stop_ids, axis=-1)
    written_B = active_B & ~is_stop_B
    left_B = jnp.where(written_B, slots.left - 1, 0)
    count_B = written_B.astype(jnp.int32)
    slots = slots._replace(
        newest=next_B,
        length=slots.length + count_B,
        left=left_B,
        written=slots.written + count_B,
        seen=slots.seen.at[jnp.arange(next_B.shape[0]), next_B].max(written_B),
    )
    return slots, (count_B, left_B > 0, is_stop_B)


def _longer(program: Program, slots: Slots, *, length: int, stops: int) -> Slots:
    """The same texts with room for `length` tokens each and for so many stop ids."""
    more = ((0, 0), (0, stops - slots.asked.stop_ids.shape[1]))
    stop_ids = jnp.pad(slots.asked.stop_ids, more, constant_values=-1)
    cache = decoder.longer(slots.cache, program.spec, length)
    return _placed(slots._replace(asked=slots.asked._replace(stop_ids=stop_ids), cache=cache))


def _placed(slots: Slots) -> Slots:
    """Rows over the mesh, and the rest of them as the cache says."""
    placed = jax.tree.map(
        lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), slots._replace(cache={})
    )
    return placed._replace(cache=slots.cache)


def _everywhere(written: Written) -> Written:
    return Written(*(constrain(x, *[None] * x.ndim) for x in written))


empty = jax.jit(_empty, static_argnames=("program", "rows", "length", "stops"))
read = jax.jit(_read, static_argnames=("program",), donate_argnames=("slots",))
advance = jax.jit(_advance, static_argnames=("program",), donate_argnames=("slots",))
longer = jax.jit(_longer, static_argnames=("program", "length", "stops"))
