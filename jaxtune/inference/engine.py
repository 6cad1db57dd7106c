"""Decoding with a key-value cache: prompts in, token ids out. Knows no text.

    engine = Engine(spec, {"params": params}, dtype=jnp.float32, slots=8)
    request = engine.submit([1, 7, 9], max_new_tokens=20, stop_ids={2})
    while engine.busy:
        for event in engine.step():      # TokenEvent(request, tokens=(5, 3), reason=None), ...
            ...

An engine has a fixed number of slots. A sequence that ends leaves its slot to the next prompt that
waits, while the others go on; which slot, which neighbours and how many tokens a call makes change
nothing in an answer.Shapes come in few sizes, so that a new prompt rarely compiles anything.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxtune.config import ConfigError, DataError
from jaxtune.inference import decode_step as device
from jaxtune.inference.decode_step import (
    MOST_STEPS,
    DecodedTokens,
    DecodeProgram,
    Prompts,
    RowOptions,
    Slots,
)
from jaxtune.inference.sampling import GREEDY, Sampling, sampling_arrays
from jaxtune.inference.unstack import unstack
from jaxtune.model.decoder import Params, rope_limits
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import platform_of, row_shards
from jaxtune.spec import ModelSpec

SHORTEST_ROW = 16
LONGEST_DOUBLING = 1024  # above, rows grow by this much instead of doubling
STOP_SLOTS = 8
READ_AT_ONCE = 8192  # tokens, padding included, unless one prompt alone is longer


class TokenEvent(NamedTuple):
    """The new tokens of a request. `reason` is None while it goes on, then "stop" (a stop id came,
    which is not among the tokens) or "length"."""

    request: int
    tokens: tuple[int, ...]
    reason: str | None

    @property
    def finished(self) -> bool:
        return self.reason is not None


class _Sequence(NamedTuple):
    """A request with all its tokens so far."""

    request: int
    tokens: list[int]  # the prompt, then the answer
    prompt: int  # tokens of the prompt
    limit: int  # tokens of the answer
    stop_ids: tuple[int, ...]
    sampling: Sampling
    number: int

    @property
    def left(self) -> int:
        return self.prompt + self.limit - len(self.tokens)


class Engine:
    """A decoder of any number of requests, `slots` of them at a time, first come, first served.

    `variables` are {"params": ...}, with "lora" beside them if `lora` says how adapters are used.
    Weights are cast to `dtype`, the computation's; they may live on `mesh` in any sharding. Texts
    of up to `max_length` tokens, prompt and answer (the model's positions, if it has fewer): room
    for them is made as they come. To be used by one thread; on many hosts by all of them alike.
    """

    def __init__(
        self,
        spec: ModelSpec,
        variables: Mapping[str, Params],
        *,
        dtype: DTypeLike,
        slots: int,
        mesh: jax.sharding.Mesh | None = None,
        lora: Lora | None = None,
        max_length: int | None = None,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots is {slots}; expected at least 1.")
        variables = {**variables, "params": _cast(variables["params"], dtype)}
        platform = jax.default_backend() if mesh is None else platform_of(mesh)
        spec, self._variables = unstack(spec, variables, platform=platform)
        self._program = DecodeProgram(spec, lora, np.dtype(dtype))
        self._mesh = mesh
        self._limit = min(spec.max_positions, max_length or spec.max_positions)
        smallest = 1 if mesh is None else row_shards(mesh)
        self._rows = max(smallest, 1 << (slots - 1).bit_length())
        self._free = list(range(slots))[::-1]
        self._active: dict[int, _Sequence] = {}  # by slot
        self._waiting: deque[_Sequence] = deque()
        self._requests = 0
        self._slots: Slots | None = None
        self._length = self._stops = 0

    @property
    def busy(self) -> bool:
        """Return True if any request has a slot or waits."""
        return bool(self._active or self._waiting)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        number: int = 0,
    ) -> int:
        """Queue a prompt and return the number of the request, which is unique.

        It ends at a stop id, after `max_new_tokens` (a stop id counts), or where the text may not
        be longer. Random numbers follow from `sampling.seed`, `number` and a token's place in the
        answer. Raises: ConfigError, and DataError for a prompt that is empty or leaves no position
        free.
        """
        self._check(prompt, max_new_tokens, f"prompt {number}")
        request, self._requests = self._requests, self._requests + 1
        limit = min(max_new_tokens, self._limit - len(prompt))
        stops = tuple(sorted(set(stop_ids)))
        tokens = [int(token) for token in prompt]
        self._waiting.append(
            _Sequence(request, tokens, len(tokens), limit, stops, sampling, number)
        )
        return request

    def cancel(self, request: int) -> None:
        """End a request, queued or not; it has no event after this. One that ended is ignored."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request != request)
        for slot, sequence in list(self._active.items()):
            if sequence.request == request:
                self._leave(slot)

    def step(self, most: int = MOST_STEPS) -> list[TokenEvent]:
        """Prefill prompts into free slots, or else decode up to `most` tokens of each sequence.

        Returns no events if there is nothing to do.
        """
        if not self.busy:
            return []
        outgrown = self._outgrown()
        if outgrown or (self._waiting and self._free):
            return self._prefill(outgrown or self._admitted())
        return self._decode(max(1, min(most, MOST_STEPS)))

    def give_up(self) -> int:
        """End one request after a `step` that ran out of memory, and return its number.

        All others are prefilled again, into new slots.

        It is the one that may become longest, of those without an answer if there are any: the
        memory was for them.
        """
        unread = [
            sequence
            for sequence in self._active.values()
            if len(sequence.tokens) == sequence.prompt
        ]
        ended = max(
            unread or self._active.values(), key=lambda sequence: sequence.prompt + sequence.limit
        )
        self._slots = None  # what failed may have consumed them
        for slot, sequence in sorted(self._active.items(), key=lambda item: -item[1].request):
            self._leave(slot)
            if sequence.request != ended.request:
                self._waiting.appendleft(sequence)
        return ended.request

    def _check(self, prompt: Sequence[int], max_new_tokens: int, name: str) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
        if len(prompt) == 0:
            raise DataError(f"{name} has no tokens; there is nothing to continue.")
        if len(prompt) >= self._limit:
            whose = (
                "the model has" if self._limit == self._program.spec.max_positions else "here are"
            )
            raise DataError(
                f"{name} has {len(prompt)} tokens; {whose} {self._limit} "
                "positions, and the answer needs at least one. Shorten the prompt."
            )

    def _leave(self, slot: int) -> None:
        del self._active[slot]
        self._free.append(slot)

    # -- prefill -------------------------------------------------------------------------------

    def _admitted(self) -> dict[int, _Sequence]:
        """Give slots to the next requests in the queue, as many as one prefill takes."""
        admitted: dict[int, _Sequence] = {}
        longest = 0
        while self._waiting and self._free:
            longest = max(longest, len(self._waiting[0].tokens))
            rows = self._batch(len(admitted) + 1)
            if admitted and rows * _bucket(longest) > READ_AT_ONCE:
                break
            admitted[self._free.pop()] = self._waiting.popleft()
        self._active |= admitted
        return admitted

    def _batch(self, sequences: int) -> int:
        """Return the rows of a prefill of so many sequences: a power of four, at most all slots."""
        return min(self._rows, 1 << ((sequences - 1).bit_length() + 1) // 2 * 2)

    def _outgrown(self) -> dict[int, _Sequence]:
        """Return the sequences that the newest token made longer than a limit of their rope.

        All positions are then others, so they are prefilled again.
        """
        limits = rope_limits(self._program.spec)
        return {
            slot: sequence
            for slot, sequence in self._active.items()
            if len(sequence.tokens) - 1 in limits
        }

    def _prefill(self, sequences: Mapping[int, _Sequence]) -> list[TokenEvent]:
        self._make_room()
        rows = self._batch(len(sequences))
        length = _bucket(max(len(sequence.tokens) for sequence in sequences.values()))
        tokens = np.zeros((rows, length), np.int32)
        placed = list(sequences.items())
        # Padding rows have one token, go into no slot and may not grow.
        lengths, slots = np.ones(rows, np.int32), np.full(rows, self._rows, np.int32)
        left, written = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        stop_ids = np.full((rows, self._stops), -1, np.int32)
        for row, (slot, sequence) in enumerate(placed):
            tokens[row, : len(sequence.tokens)] = sequence.tokens
            lengths[row], slots[row], left[row] = len(sequence.tokens), slot, sequence.left
            written[row] = len(sequence.tokens) - sequence.prompt
            stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
        fill = rows - len(placed)
        drawn = sampling_arrays(
            [sequence.sampling for _, sequence in placed] + [GREEDY] * fill,
            [sequence.number for _, sequence in placed] + [0] * fill,
        )
        options = RowOptions(stop_ids, drawn)
        with _on(self._mesh):
            self._slots, new = device.prefill(
                self._program,
                self._variables,
                self._slots,
                Prompts(tokens, lengths, slots, left, written, options),
            )
        return self._events(new, {slot: row for row, (slot, _) in enumerate(placed)})

    def _make_room(self) -> None:
        """Make or grow the slots: as long as the longest sequence may become, with its stop ids."""
        sequences = list(self._active.values())
        length = _bucket(max(sequence.prompt + sequence.limit for sequence in sequences))
        most = max(len(sequence.stop_ids) for sequence in sequences)
        stops = max(1, -(-most // STOP_SLOTS)) * STOP_SLOTS
        alone = not any(len(sequence.tokens) > sequence.prompt for sequence in sequences)
        with _on(self._mesh):
            if self._slots is None or (alone and (length, stops) != (self._length, self._stops)):
                self._slots = None  # before the next ones are made
                self._slots = device.empty(
                    self._program, rows=self._rows, length=length, stops=stops
                )
                self._length, self._stops = length, stops
            if length > self._length or stops > self._stops:
                self._length = max(length, self._length)
                self._stops = max(stops, self._stops)
                self._slots = device.grow(
                    self._program, self._slots, length=self._length, stops=self._stops
                )

    # -- decode -------------------------------------------------------------------------------

    def _decode(self, most: int) -> list[TokenEvent]:
        live = np.zeros(self._rows, bool)
        live[list(self._active)] = True
        for limit in rope_limits(self._program.spec):
            # Up to the token that makes a sequence too long for what was computed of it.
            sizes = [len(sequence.tokens) for sequence in self._active.values()]
            most = min([most, *(limit + 1 - size for size in sizes if size <= limit)])
        with _on(self._mesh):
            self._slots, tokens = device.decode(
                self._program,
                self._variables,
                self._slots,
                live,
                np.int32(most),
                np.bool_(bool(self._waiting)),
            )
        return self._events(tokens, {slot: slot for slot in self._active})

    def _events(self, tokens: DecodedTokens, rows: Mapping[int, int]) -> list[TokenEvent]:
        """Return the new tokens of each slot, whose row in `tokens` is `rows[slot]`."""
        tokens = jax.device_get(tokens)
        events = []
        for slot, row in sorted(rows.items()):
            sequence = self._active[slot]
            new = tuple(tokens.tokens[row, : tokens.counts[row]].tolist())
            sequence.tokens.extend(new)
            reason = None
            if not tokens.active[row]:
                reason = "stop" if tokens.stopped[row] else "length"
                self._leave(slot)
            events.append(TokenEvent(sequence.request, new, reason))
        return events


def by_length(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Sort longest first: neighbours are prefilled together, and the last ones are short."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def _bucket(length: int) -> int:
    """Round up to a power of two, or to a multiple of LONGEST_DOUBLING above it."""
    if length > LONGEST_DOUBLING:
        return -(-length // LONGEST_DOUBLING) * LONGEST_DOUBLING
    return max(SHORTEST_ROW, 1 << (length - 1).bit_length())


def _cast(params: Params, dtype: DTypeLike) -> Params:
    """Cast the weights once, instead of once a token."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
