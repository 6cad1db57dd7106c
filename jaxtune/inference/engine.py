"""Decoding with a key-value cache: prompts in, token ids out. Knows no text.

    engine = Engine(spec, {"params": params}, dtype=jnp.float32, slots=8)
    request = engine.submit([1, 7, 9], max_new_tokens=20, stop_ids={2})
    while engine.busy:
        for event in engine.step():      # Event(request, tokens=(5, 3), reason=None), ...
            ...

An engine has a fixed number of slots. A text that ends leaves its slot to the next prompt that
waits, while the others go on; which slot, which neighbours and how many tokens a call makes change
nothing in an answer. `generate` and `stream` are an engine asked for many answers, and for one.
Shapes come in few sizes, so that a new prompt rarely compiles anything.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxtune.config import ConfigError, DataError
from jaxtune.inference import decode_step as device
from jaxtune.inference.decode_step import MOST_STEPS, Asked, Program, Slots, Texts, Written
from jaxtune.inference.sampling import GREEDY, Sampling, settings
from jaxtune.inference.unstack import unrolled
from jaxtune.model.decoder import Params, rope_limits
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import platform_of, row_shards
from jaxtune.spec import ModelSpec

SHORTEST_ROW = 16
LONGEST_DOUBLING = 1024  # above, rows grow by this much instead of doubling
STOP_SLOTS = 8
READ_AT_ONCE = 8192  # tokens, padding included, unless one prompt alone is longer


class Generation(NamedTuple):
    """The tokens after the prompt; `stopped` says a stop id came (it is not among the tokens)."""

    tokens: list[int]
    stopped: bool


class Event(NamedTuple):
    """New tokens of a request. `reason` is None while it goes on; then "stop", a stop id came (it
    is not among the tokens), or "length"."""

    request: int
    tokens: tuple[int, ...]
    reason: str | None

    @property
    def finished(self) -> bool:
        return self.reason is not None


class _Text(NamedTuple):
    """A request: what it asked for, and all its tokens so far."""

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
    """Answers any number of requests, `slots` of them at a time, first come, first served.

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
        spec, self._variables = unrolled(spec, variables, platform=platform)
        self._program = Program(spec, lora, np.dtype(dtype))
        self._mesh = mesh
        self._limit = min(spec.max_positions, max_length or spec.max_positions)
        smallest = 1 if mesh is None else row_shards(mesh)
        self._rows = max(smallest, 1 << (slots - 1).bit_length())
        self._free = list(range(slots))[::-1]
        self._at: dict[int, _Text] = {}  # by slot
        self._waiting: deque[_Text] = deque()
        self._requests = 0
        self._slots: Slots | None = None
        self._length = self._stops = 0

    @property
    def busy(self) -> bool:
        """Whether any request is being answered or waits."""
        return bool(self._at or self._waiting)

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
        """Puts a prompt into the queue and gives the request's number, which no other has.

        It ends at a stop id, after `max_new_tokens` (a stop id counts), or where the text may not
        be longer. Random numbers follow from `sampling.seed`, `number` and a token's place in the
        answer. Raises ConfigError, and DataError for a prompt that is empty or leaves no position
        free.
        """
        self._check(prompt, max_new_tokens, f"prompt {number}")
        request, self._requests = self._requests, self._requests + 1
        limit = min(max_new_tokens, self._limit - len(prompt))
        stops = tuple(sorted(set(stop_ids)))
        tokens = [int(token) for token in prompt]
        self._waiting.append(_Text(request, tokens, len(tokens), limit, stops, sampling, number))
        return request

    def cancel(self, request: int) -> None:
        """Ends a request wherever it is; it has no event after this. One that ended is ignored."""
        self._waiting = deque(text for text in self._waiting if text.request != request)
        for slot, text in list(self._at.items()):
            if text.request == request:
                self._leave(slot)

    def step(self, most: int = MOST_STEPS) -> list[Event]:
        """Reads prompts into slots that are free, or else writes up to `most` tokens of each text
        that is being answered. Nothing to do: no events."""
        if not self.busy:
            return []
        outgrown = self._outgrown()
        if outgrown or (self._waiting and self._free):
            return self._read(outgrown or self._admitted())
        return self._advance(max(1, min(most, MOST_STEPS)))

    def give_up(self) -> int:
        """After a `step` that raised for want of memory: ends one request, whose number this is.
        All others are read again, into room that is made anew.

        It is the one that may become longest, of those that have no answer yet if there are any:
        the room that could not be had was for them.
        """
        unread = [text for text in self._at.values() if len(text.tokens) == text.prompt]
        ended = max(unread or self._at.values(), key=lambda text: text.prompt + text.limit)
        self._slots = None  # what failed may have consumed them
        for slot, text in sorted(self._at.items(), key=lambda item: -item[1].request):
            self._leave(slot)
            if text.request != ended.request:
                self._waiting.appendleft(text)
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
        del self._at[slot]
        self._free.append(slot)

    # -- reading -------------------------------------------------------------------------------

    def _admitted(self) -> dict[int, _Text]:
        """The next texts that wait, as many as there is room for and are read at once, by slot."""
        admitted: dict[int, _Text] = {}
        longest = 0
        while self._waiting and self._free:
            longest = max(longest, len(self._waiting[0].tokens))
            rows = self._batch(len(admitted) + 1)
            if admitted and rows * _bucket(longest) > READ_AT_ONCE:
                break
            admitted[self._free.pop()] = self._waiting.popleft()
        self._at |= admitted
        return admitted

    def _batch(self, texts: int) -> int:
        """How many rows read so many texts: the next power of four, or as many as slots have."""
        return min(self._rows, 1 << ((texts - 1).bit_length() + 1) // 2 * 2)

    def _outgrown(self) -> dict[int, _Text]:
        """Texts that the newest token made longer than a limit of their rope: all positions, and
        all that was computed from them, are then others. They are read again, like new ones."""
        limits = rope_limits(self._program.spec)
        return {slot: text for slot, text in self._at.items() if len(text.tokens) - 1 in limits}

    def _read(self, texts: Mapping[int, _Text]) -> list[Event]:
        self._make_room()
        rows = self._batch(len(texts))
        length = _bucket(max(len(text.tokens) for text in texts.values()))
        tokens = np.zeros((rows, length), np.int32)
        given = list(texts.items())
        # What fills the batch has one token, goes nowhere and may not grow.
        lengths, slots = np.ones(rows, np.int32), np.full(rows, self._rows, np.int32)
        left, written = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        stop_ids = np.full((rows, self._stops), -1, np.int32)
        for row, (slot, text) in enumerate(given):
            tokens[row, : len(text.tokens)] = text.tokens
            lengths[row], slots[row], left[row] = len(text.tokens), slot, text.left
            written[row] = len(text.tokens) - text.prompt
            stop_ids[row, : len(text.stop_ids)] = text.stop_ids
        fill = rows - len(given)
        drawn = settings(
            [text.sampling for _, text in given] + [GREEDY] * fill,
            [text.number for _, text in given] + [0] * fill,
        )
        asked = Asked(stop_ids, drawn)
        with _on(self._mesh):
            self._slots, found = device.read(
                self._program,
                self._variables,
                self._slots,
                Texts(tokens, lengths, slots, left, written, asked),
            )
        return self._events(found, {slot: row for row, (slot, _) in enumerate(given)})

    def _make_room(self) -> None:
        """Slots as long as the longest text may become, with room for its stop ids."""
        texts = list(self._at.values())
        length = _bucket(max(text.prompt + text.limit for text in texts))
        most = max(len(text.stop_ids) for text in texts)
        stops = max(1, -(-most // STOP_SLOTS)) * STOP_SLOTS
        alone = not any(len(text.tokens) > text.prompt for text in texts)
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
                self._slots = device.longer(
                    self._program, self._slots, length=self._length, stops=self._stops
                )

    # -- writing -------------------------------------------------------------------------------

    def _advance(self, most: int) -> list[Event]:
        live = np.zeros(self._rows, bool)
        live[list(self._at)] = True
        for limit in rope_limits(self._program.spec):
            # Up to the token that makes a text too long for what was computed of it.
            sizes = [len(text.tokens) for text in self._at.values()]
            most = min([most, *(limit + 1 - size for size in sizes if size <= limit)])
        with _on(self._mesh):
            self._slots, found = device.advance(
                self._program,
                self._variables,
                self._slots,
                live,
                np.int32(most),
                np.bool_(bool(self._waiting)),
            )
        return self._events(found, {slot: slot for slot in self._at})

    def _events(self, found: Written, rows: Mapping[int, int]) -> list[Event]:
        """What was written of the text in each slot, which has a row in `found`."""
        found = jax.device_get(found)
        events = []
        for slot, row in sorted(rows.items()):
            text = self._at[slot]
            new = tuple(found.tokens[row, : found.counts[row]].tolist())
            text.tokens.extend(new)
            reason = None
            if not found.active[row]:
                reason = "stop" if found.stopped[row] else "length"
                self._leave(slot)
            events.append(Event(text.request, new, reason))
        return events


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
    sampling: Sampling = GREEDY,
) -> list[Generation]:
    """The continuation of each prompt, in the order of `prompts`: the likeliest, or a draw.

    A row ends at a stop id, after `max_new_tokens` (a stop id counts), or at the model's last
    position. Computes in `dtype`, `batch_size` rows at a time; `params` may live on `mesh` in any
    sharding. Prompt i is number i of `sampling`'s seed.
    Raises DataError for a prompt that is empty or leaves no position free.
    """
    slots = max(1, min(batch_size, len(prompts)))
    engine = Engine(spec, {"params": params}, dtype=dtype, slots=slots, mesh=mesh)
    by_request = {
        engine.submit(
            prompts[i],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            number=i,
        ): i
        for i in by_length(prompts)
    }
    found = [Generation([], False) for _ in prompts]
    while engine.busy:
        for event in engine.step():
            i = by_request[event.request]
            tokens = [*found[i].tokens, *event.tokens]
            found[i] = Generation(tokens, event.reason == "stop")
    return found


def by_length(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest first: neighbours in the queue are read together, and what is left for the end, when
    slots run empty, is short."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def stream(
    spec: ModelSpec,
    params: Params,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
    sampling: Sampling = GREEDY,
) -> Generator[int, None, bool]:
    """`generate` for one prompt, each token as soon as it is known; the stop id is not yielded.

    The errors of `generate` are raised here, before the first token is asked for. As the value of
    a `yield from`, or of StopIteration, it says whether a stop id came.
    """
    engine = Engine(spec, {"params": params}, dtype=dtype, slots=1, mesh=mesh)
    engine.submit(prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling)
    return _stream(engine)


def _stream(engine: Engine) -> Generator[int, None, bool]:
    reason = None
    while engine.busy:
        for event in engine.step(1):
            yield from event.tokens
            reason = event.reason
    return reason == "stop"


def _bucket(length: int) -> int:
    """The next power of two, or the next multiple of LONGEST_DOUBLING above it."""
    if length > LONGEST_DOUBLING:
        return -(-length // LONGEST_DOUBLING) * LONGEST_DOUBLING
    return max(SHORTEST_ROW, _power(length))


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _cast(params: Params, dtype: DTypeLike) -> Params:
    """Weights in compute dtype once, instead of once a token."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
