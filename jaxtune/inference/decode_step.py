"""Decoding on the device: sequences in a fixed number of slots, and the jitted programs over them.

    empty -> prefill (prompts into free slots) -> decode (all slots, several tokens) -> prefill ...

A slot is one row of every array. A row depends on its own sequence and options alone, so slots may
hold any mixture, and a free slot computes what nobody reads. Only shapes are static: of slots, of
the rows of a prefill, of stop ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.inference.sampling import SamplingArrays, choose
from jaxtune.model import decoder
from jaxtune.model.decoder import Cache, Params
from jaxtune.model.lora import Lora
from jaxtune.ops.head import logits
from jaxtune.parallel.mesh import constrain
from jaxtune.spec import ModelSpec

MOST_STEPS = 32  # tokens of a row in one call of `decode`


class RowOptions(NamedTuple):
    """The stop ids (-1 is no token) and the sampling of each row, arrays `[B ...]`."""

    stop_ids: Any  # i32 [B W]
    sampling: SamplingArrays


class Prompts(NamedTuple):
    """Right-padded sequences `[R T]` to prefill, numpy, with their slots (one out of range: none).

    `left` and `written` `[R]` count the tokens that each may still get, and has.
    """

    tokens: Any
    lengths: Any
    slots: Any
    left: Any
    written: Any
    options: RowOptions


class Slots(NamedTuple):
    """The state of all sequences between two tokens; the newest ones are not in the cache yet."""

    newest: jax.Array  # i32 [B]
    length: jax.Array  # i32 [B], tokens of the sequence, the newest included
    left: jax.Array  # i32 [B], tokens that may still come; 0: the row is done
    written: jax.Array  # i32 [B], tokens of the answer
    seen: jax.Array  # bool [B V], tokens that the sequence has
    options: RowOptions
    cache: Cache


class DecodedTokens(NamedTuple):
    """The new tokens of a call: the first `counts` `[B]` of `tokens` `[B N]`, replicated.

    `active` `[B]`: the row goes on; `stopped` `[B]`: it met a stop id.
    """

    tokens: jax.Array
    counts: jax.Array
    active: jax.Array
    stopped: jax.Array


class DecodeProgram(NamedTuple):
    """A model as all calls share it; static."""

    spec: ModelSpec
    lora: Lora | None
    dtype: np.dtype


def _empty(program: DecodeProgram, *, rows: int, length: int, stops: int) -> Slots:
    spec = program.spec
    zeros_B = jnp.zeros(rows, jnp.int32)
    ones_B = jnp.ones(rows, jnp.float32)
    sampling = SamplingArrays(
        zeros_B * 0.0, zeros_B, ones_B, ones_B, jnp.zeros((rows, 2), jnp.uint32), zeros_B
    )
    return _placed(
        Slots(
            newest=zeros_B,
            length=zeros_B,
            left=zeros_B,
            written=zeros_B,
            seen=jnp.zeros((rows, spec.vocab), bool),
            options=RowOptions(jnp.full((rows, stops), -1, jnp.int32), sampling),
            cache=decoder.empty_cache(spec, rows=rows, length=length, dtype=program.dtype),
        )
    )


def _prefill(
    program: DecodeProgram, variables: Mapping[str, Params], slots: Slots, prompts: Prompts
) -> tuple[Slots, DecodedTokens]:
    """Run the prompts through the model, fill their slots, and take a token of each."""
    R, T = prompts.tokens.shape
    positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (R, T))
    is_text_RT = positions_RT < prompts.lengths[:, None]
    output = decoder.forward(
        program.spec,
        variables,
        decoder.TokenRows(prompts.tokens, is_text_RT.astype(jnp.int32), positions_RT),
        decoder.ForwardConfig(program.dtype, remat="none", lora=program.lora),
        keep=True,
    )
    assert output.cache is not None
    rows_R = jnp.arange(R)
    last_R1D = output.hidden[rows_R, prompts.lengths - 1][:, None]
    seen_RV = jnp.zeros((R, program.spec.vocab), bool)
    seen_RV = seen_RV.at[rows_R[:, None], prompts.tokens].max(is_text_RT)
    read = Slots(
        newest=jnp.zeros(R, jnp.int32),
        length=prompts.lengths,
        left=prompts.left,
        written=prompts.written,
        seen=seen_RV,
        options=prompts.options,
        cache={},
    )
    read, written_R = _next(read, logits(last_R1D, output.head)[:, 0])

    def into(of_slots: jax.Array, of_prompts: jax.Array) -> jax.Array:
        return of_slots.at[prompts.slots].set(of_prompts, mode="drop")

    cache = decoder.in_slots(slots.cache, output.cache, prompts.slots, prompts.lengths)
    rest = jax.tree.map(into, slots._replace(cache={}), read)
    slots = _placed(rest._replace(cache=cache))
    return slots, _replicated(DecodedTokens(read.newest[:, None], *written_R))


def _decode(
    program: DecodeProgram,
    variables: Mapping[str, Params],
    slots: Slots,
    live: jax.Array,
    steps: jax.Array,
    until_one_ends: jax.Array,
) -> tuple[Slots, DecodedTokens]:
    """Decode up to `steps` tokens of each of the `live` rows `[B]`, fewer when no row goes on.

    With `until_one_ends` fewer also when one row ends.
    """
    B = live.shape[0]
    slots = slots._replace(left=jnp.where(live, slots.left, 0))
    begun_B = slots.left > 0
    zeros_B = jnp.zeros(B, jnp.int32)
    tokens_BN = jnp.zeros((B, MOST_STEPS), jnp.int32)

    def goes_on(carry: tuple[jax.Array, Slots, DecodedTokens]) -> jax.Array:
        step, _, done = carry
        ended = jnp.any(begun_B & ~done.active)
        return (step < steps) & jnp.any(done.active) & ~(until_one_ends & ended)

    def token(
        carry: tuple[jax.Array, Slots, DecodedTokens],
    ) -> tuple[jax.Array, Slots, DecodedTokens]:
        step, slots, done = carry
        output = decoder.forward(
            program.spec,
            variables,
            decoder.TokenRows(
                slots.newest[:, None], jnp.ones((B, 1), jnp.int32), slots.length[:, None] - 1
            ),
            decoder.ForwardConfig(program.dtype, remat="none", lora=program.lora),
            cache=slots.cache,
        )
        assert output.cache is not None
        slots, (counts_B, active_B, stopped_B) = _next(
            slots._replace(cache=output.cache), logits(output.hidden, output.head)[:, 0]
        )
        column_B1 = slots.newest[:, None]
        tokens_BN = jax.lax.dynamic_update_slice(done.tokens, column_B1, (0, step))
        done = DecodedTokens(tokens_BN, done.counts + counts_B, active_B, done.stopped | stopped_B)
        return step + 1, slots, done

    start = DecodedTokens(tokens_BN, zeros_B, begun_B, jnp.zeros(B, bool))
    _, slots, written = jax.lax.while_loop(goes_on, token, (jnp.zeros((), jnp.int32), slots, start))
    return slots, _replicated(written)


def _next(
    slots: Slots, logits_BV: jax.Array
) -> tuple[Slots, tuple[jax.Array, jax.Array, jax.Array]]:
    """Take the next token of each row; returns counts, active rows and stopped rows too."""
    options = slots.options
    next_B = choose(logits_BV, slots.seen, options.sampling, slots.written)
    active_B = slots.left > 0
    is_stop_B = active_B & jnp.any(next_B[:, None] == options.stop_ids, axis=-1)
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


def _grow(program: DecodeProgram, slots: Slots, *, length: int, stops: int) -> Slots:
    """Grow the slots to `length` tokens each and to so many stop ids."""
    more = ((0, 0), (0, stops - slots.options.stop_ids.shape[1]))
    stop_ids = jnp.pad(slots.options.stop_ids, more, constant_values=-1)
    cache = decoder.longer(slots.cache, program.spec, length)
    return _placed(slots._replace(options=slots.options._replace(stop_ids=stop_ids), cache=cache))


def _placed(slots: Slots) -> Slots:
    """Shard the rows over the mesh; the cache is placed already."""
    placed: Slots = jax.tree.map(
        lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), slots._replace(cache={})
    )
    return placed._replace(cache=slots.cache)


def _replicated(written: DecodedTokens) -> DecodedTokens:
    return DecodedTokens(*(constrain(x, *[None] * x.ndim) for x in written))


empty = jax.jit(_empty, static_argnames=("program", "rows", "length", "stops"))
prefill = jax.jit(_prefill, static_argnames=("program",), donate_argnames=("slots",))
decode = jax.jit(_decode, static_argnames=("program",), donate_argnames=("slots",))
grow = jax.jit(_grow, static_argnames=("program", "length", "stops"))
