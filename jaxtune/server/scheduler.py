"""Requests from any thread, decoded by one: limits, deadlines, cancelling, closing.

Any thread may submit, cancel or close; `run` is the one that computes. Every model's own queue
decides what is decoded next, first come, first served. Knows no HTTP and no text of a prompt.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from jaxtune.cli import note
from jaxtune.config import JaxtuneError
from jaxtune.data.templating.template import Template
from jaxtune.inference.generate import TextEvent
from jaxtune.inference.sampling import Sampling
from jaxtune.parallel import memory
from jaxtune.server.openai_schema import BROKEN, BUSY, Refused

# Tokens of every answer between two looks at new requests and at clients that have gone.
_STEPS = 4


class Generator(Protocol):
    """A model with a queue and slots: `TextGenerator`."""

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = ...,
        stop: Sequence[str] = (),
        template: Template | None = None,
    ) -> int: ...

    def cancel(self, request: int) -> None: ...

    def step(self, most: int = ...) -> Iterable[TextEvent]: ...

    def give_up(self) -> int: ...


class GenerationRequest(NamedTuple):
    """A prompt for a model; `template` is that of the prompt if it is a conversation."""

    model: str
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    template: Template | None = None


class ServeSettings(NamedTuple):
    """The limits of a server, and what a request has that names nothing else.

    Each model decodes `slots` requests at a time, `queue` more may wait. `seconds` are from the
    request to the end of its answer, waiting included; `grace` those that answers have to end in
    after a signal. Without `seed_given` each request draws its own seed.
    """

    sampling: Sampling
    max_new_tokens: int
    seed_given: bool = False
    body_bytes: int = 1 << 20
    messages: int = 1000
    slots: int = 8
    queue: int = 64
    seconds: float = 300.0
    grace: float = 10.0


@dataclass(eq=False)
class PendingRequest:
    """A request on its way. `deliver` is called by the thread that runs the models."""

    request: GenerationRequest
    deliver: Callable[[TextEvent | Refused], None]
    deadline: float
    began: float | None = None  # when it got a slot
    number: int | None = None  # that its model gave it
    done: bool = False


class Scheduler:
    """The requests of all models, and the thread that runs the models."""

    def __init__(self, generators: Mapping[str, Generator], settings: ServeSettings) -> None:
        self.settings = settings
        self._generators = dict(generators)
        # Calls for the thread that computes. A signal handler puts into it, too: this queue alone
        # may be entered twice by one thread.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending: dict[str, dict[int, PendingRequest]] = {name: {} for name in generators}
        self._lock = threading.Lock()
        self._here = dict.fromkeys(generators, 0)  # by model, those in the inbox included
        self._answering = 0
        self._closing = False
        self._close_by = math.inf
        self._mean_seconds = 1.0  # of an answer, for Retry-After

    @property
    def places(self) -> int:
        """Count the requests that may wait or have a slot."""
        return self.settings.queue + self.settings.slots * len(self._generators)

    # -- any thread --

    def submit(
        self, request: GenerationRequest, deliver: Callable[[TextEvent | Refused], None]
    ) -> PendingRequest:
        """Queue a request. Raises: Refused if too many wait, or the server is stopping."""
        if self._closing:
            raise stopping()
        with self._lock:
            self._here[request.model] += 1
            if self._beyond_slots() > self.settings.queue:
                self._here[request.model] -= 1
                raise self._busy()
        pending = PendingRequest(request, deliver, time.monotonic() + self.settings.seconds)
        self._inbox.put(partial(self._queue, pending))
        return pending

    def cancel(self, pending: PendingRequest) -> None:
        """End a request whose client has gone, before the next token. Harmless when done."""
        if not pending.done:
            self._inbox.put(partial(self._drop, pending))

    def close(self) -> None:
        """Let `run` return when all is answered, after `grace` seconds at the latest.

        A second call ends it at once. May be called by a signal handler.
        """
        self._inbox.put(self._close)

    def counts(self) -> tuple[int, int]:
        """Count the requests that wait and those that have a slot."""
        answering = self._answering
        return max(0, sum(self._here.values()) - answering), answering

    def _beyond_slots(self) -> int:
        """Count those that have to wait: none while their model has a free slot, also before the
        thread that computes has seen them."""
        return sum(max(0, here - self.settings.slots) for here in self._here.values())

    def _busy(self) -> Refused:
        waiting = self._beyond_slots()
        seconds = waiting * self._mean_seconds / self.settings.slots
        return Refused(
            429,
            f"{waiting} requests wait already, which is the limit. Ask again later.",
            kind=BUSY,
            code="rate_limit_exceeded",
            headers={"Retry-After": str(max(1, min(60, round(seconds))))},
        )

    # -- the thread that computes --

    def run(self) -> None:
        """Run until closed. An exception of a model ends it, after every request was answered.

        If memory runs out, one request is ended and the others go on.
        """
        try:
            while not (self._closing and self._finished()):
                self._receive(block=not self._has_work())
                self._drop_late()
                for name, pending in self._pending.items():
                    if pending:
                        self._step(name)
        except BaseException:
            self._closing = True
            self._refuse_all(Refused(500, "the model failed; the server stops.", kind=BROKEN))
            raise

    def _has_work(self) -> bool:
        return any(self._pending.values())

    def _receive(self, *, block: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(block=block)()
                block = False

    def _close(self) -> None:
        grace = 0 if self._closing else self.settings.grace
        self._closing, self._close_by = True, time.monotonic() + grace

    def _queue(self, pending: PendingRequest) -> None:
        request = pending.request
        try:
            pending.number = self._generators[request.model].submit(
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                stop=request.stop,
                template=request.template,
            )
        except JaxtuneError as error:
            self._finish(pending)
            pending.deliver(Refused(400, str(error)))
            return
        self._pending[request.model][pending.number] = pending

    def _finished(self) -> bool:
        if self._has_work() and time.monotonic() < self._close_by:
            return False
        self._receive(block=False)  # what came before `closing` was seen
        self._refuse_all(stopping())
        return True

    def _refuse_all(self, refusal: Refused) -> None:
        for pending in self._all():
            self._drop(pending)
            pending.deliver(refusal)

    def _all(self) -> list[PendingRequest]:
        return [pending for each in self._pending.values() for pending in each.values()]

    def _drop_late(self) -> None:
        now = time.monotonic()
        for pending in self._all():
            if now > pending.deadline:
                self._drop(pending)
                pending.deliver(_late(self.settings.seconds, waited=pending.began is None))

    def _step(self, name: str) -> None:
        generator, all_pending = self._generators[name], self._pending[name]
        began = time.monotonic()
        try:
            events = generator.step(_STEPS)
        except Exception as error:
            if not memory.is_exhausted(error):
                raise
            pending = all_pending.pop(generator.give_up())
            self._finish(pending)
            pending.deliver(_too_large(pending.request))
            return
        for event in events:
            pending = all_pending[event.request]
            if pending.began is None:  # a slot gives its first event in the same step
                pending.began = began
                self._answering += 1
            if event.generation is not None:
                del all_pending[event.request]
                self._finish(pending)
                self._mean_seconds += 0.1 * (time.monotonic() - pending.began - self._mean_seconds)
            pending.deliver(event)

    def _drop(self, pending: PendingRequest) -> None:
        """End a request in the queue, or in its slot."""
        if pending.done:
            return
        self._finish(pending)
        assert pending.number is not None
        del self._pending[pending.request.model][pending.number]
        self._generators[pending.request.model].cancel(pending.number)

    def _finish(self, pending: PendingRequest) -> None:
        pending.done = True
        self._answering -= pending.began is not None
        with self._lock:
            self._here[pending.request.model] -= 1


def _too_large(request: GenerationRequest) -> Refused:
    size = f"{len(request.prompt)} tokens and an answer of up to {request.max_new_tokens}"
    note(
        f"out of memory on a device: a request of {size} is ended, the others go on. "
        "A smaller --serve_length or fewer --serve_slots leave more room."
    )
    return Refused(
        503,
        f"there is no memory for {size}. Shorten the prompt or ask for less.",
        kind=BROKEN,
        code="out_of_memory",
    )


def stopping() -> Refused:
    return Refused(503, "the server is stopping.", kind=BROKEN, code="stopping")


def _late(seconds: float, *, waited: bool) -> Refused:
    what = "was not begun" if waited else "did not end"
    return Refused(
        503 if waited else 504,
        f"the answer {what} within {seconds:g} seconds, the limit of this server.",
        kind=BROKEN,
        code="timeout",
        headers={"Retry-After": "5"} if waited else None,
    )
