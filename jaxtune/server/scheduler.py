"""Requests wait here, first come, first served, and one thread runs the models.

Any thread may ask, cancel or close; `run` is the one that computes. It gives waiting requests the
places that are free, lets every model make a token for all of its own at once, and hands out what
came. Knows no HTTP and no text of a prompt.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from jaxtune.cli import note
from jaxtune.config import JaxtuneError
from jaxtune.parallel import memory
from jaxtune.server.openai_schema import BROKEN, BUSY, Refused

if TYPE_CHECKING:
    from jaxtune.data.templating.template import Template
    from jaxtune.inference.generate import Generation, TextEvent
    from jaxtune.inference.sampling import Sampling

# Tokens that every answer is taken further before others are looked at: who waits, who has gone.
_STEPS = 4


class Event(NamedTuple):
    """More text of an answer; with the last of it how it ended."""

    text: str
    ended: Generation | None


class Engine(Protocol):
    """A model that answers several requests at a time: `answering.TextGenerator`."""

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = ...,
        stop: Sequence[str] = (),
        template: Template | None = None,
    ) -> int:
        """The number of the request. Raises `JaxtuneError`."""
        ...

    def cancel(self, request: int) -> None: ...

    def step(self, most: int = ...) -> Iterable[TextEvent]: ...

    def give_up(self) -> int:
        """After a step that raised for want of memory: the request that is ended for it."""
        ...


class Wanted(NamedTuple):
    model: str
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    template: Template | None = None  # of the prompt, where it is a conversation


class Limits(NamedTuple):
    """`slots` answers are made at the same time by each model, and `queue` requests may wait for
    one of them, those that find one free not counted.
    `seconds` are those from the question to the end of its answer, waiting included; `grace`
    those that answers have to end in when the server is told to stop."""

    body_bytes: int = 1 << 20
    messages: int = 1000
    slots: int = 8
    queue: int = 64
    seconds: float = 300.0
    grace: float = 10.0


@dataclass(eq=False)
class Job:
    """A request on its way. `deliver` is called by the thread that runs the models."""

    wanted: Wanted
    deliver: Callable[[Event | Refused], None]
    deadline: float
    began: float | None = None
    number: int | None = None
    done: bool = False


class _Close(NamedTuple):
    pass


class Desk:
    """Where requests wait and are answered."""

    def __init__(self, engines: Mapping[str, Engine], limits: Limits) -> None:
        self.limits = limits
        self._engines = dict(engines)
        # A signal handler puts into it, too: this queue alone may be entered twice by one thread.
        self._inbox: queue.SimpleQueue[tuple[str, Job] | _Close] = queue.SimpleQueue()
        self._waiting: dict[str, deque[Job]] = {name: deque() for name in engines}
        self._running: dict[str, dict[int, Job]] = {name: {} for name in engines}
        self._count = threading.Lock()
        # By model, those that wait, are still in the inbox, or are answered.
        self._here = dict.fromkeys(engines, 0)
        self._closing = False
        self._close_by = math.inf
        self._mean_seconds = 1.0  # of an answer, for Retry-After

    @property
    def places(self) -> int:
        """How many requests may wait or be answered."""
        return self.limits.queue + self.limits.slots * len(self._engines)

    # -- any thread --

    def ask(self, wanted: Wanted, deliver: Callable[[Event | Refused], None]) -> Job:
        """Raises `Refused` when too many wait, or the server is stopping."""
        if self._closing:
            raise stopping()
        with self._count:
            self._here[wanted.model] += 1
            if self._beyond_slots() > self.limits.queue:
                self._here[wanted.model] -= 1
                raise self._busy()
        job = Job(wanted, deliver, time.monotonic() + self.limits.seconds)
        self._inbox.put(("ask", job))
        return job

    def cancel(self, job: Job) -> None:
        """The client has gone: its place is free before the next token. Harmless when done."""
        if not job.done:
            self._inbox.put(("cancel", job))

    def close(self) -> None:
        """`run` returns when all is answered, after `grace` seconds at the latest; when called
        again, at once. May be called by a signal handler."""
        self._inbox.put(_Close())

    def counts(self) -> tuple[int, int]:
        """How many requests wait, and how many are being answered."""
        answered = sum(map(len, self._running.values()))
        return max(0, sum(self._here.values()) - answered), answered

    def _beyond_slots(self) -> int:
        """How many have to wait: a request is none of them while its model has a free slot, also
        before the thread that computes has come to it."""
        return sum(max(0, here - self.limits.slots) for here in self._here.values())

    def _busy(self) -> Refused:
        wait = self._beyond_slots()
        waits = wait * self._mean_seconds / self.limits.slots
        return Refused(
            429,
            f"{wait} requests wait already, which is the limit. Ask again later.",
            kind=BUSY,
            code="rate_limit_exceeded",
            headers={"Retry-After": str(max(1, min(60, round(waits))))},
        )

    # -- the thread that computes --

    def run(self) -> None:
        """Until closed. What an engine raises ends it, after every request has been told; but for
        want of memory one request is ended, and the others go on."""
        try:
            while not (self._closing and self._all_told()):
                self._hear(block=not self._has_work())
                self._drop_late()
                self._admit()
                for name in self._engines:
                    if self._running[name]:
                        self._step(name)
        except BaseException:
            self._closing = True
            self._tell_all(Refused(500, "the model failed; the server stops.", kind=BROKEN))
            raise

    def _has_work(self) -> bool:
        return any(self._running.values()) or any(self._waiting.values())

    def _hear(self, *, block: bool) -> None:
        while True:
            try:
                said = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if isinstance(said, _Close):
                again = self._closing
                self._closing = True
                self._close_by = time.monotonic() + (0 if again else self.limits.grace)
                continue
            what, job = said
            if what == "ask":
                self._waiting[job.wanted.model].append(job)
            else:
                self._drop(job)

    def _all_told(self) -> bool:
        if self._has_work() and time.monotonic() < self._close_by:
            return False
        self._hear(block=False)  # what was asked before `closing` was seen
        self._tell_all(stopping())
        return True

    def _tell_all(self, refusal: Refused) -> None:
        for job in self._jobs():
            self._drop(job)
            job.deliver(refusal)

    def _jobs(self) -> list[Job]:
        waiting = [job for jobs in self._waiting.values() for job in jobs]
        return waiting + [job for jobs in self._running.values() for job in jobs.values()]

    def _drop_late(self) -> None:
        now = time.monotonic()
        for job in self._jobs():
            if now > job.deadline:
                waited = job.number is None
                self._drop(job)
                job.deliver(_late(self.limits.seconds, waited=waited))

    def _admit(self) -> None:
        """Waiting requests into free places, in the order in which they came."""
        for name, engine in self._engines.items():
            waiting, running = self._waiting[name], self._running[name]
            while waiting and len(running) < self.limits.slots:
                job = waiting.popleft()
                wanted = job.wanted
                try:
                    number = engine.submit(
                        wanted.prompt,
                        max_new_tokens=wanted.max_new_tokens,
                        sampling=wanted.sampling,
                        stop=wanted.stop,
                        template=wanted.template,
                    )
                except JaxtuneError as error:
                    self._leaves(job)
                    job.deliver(Refused(400, str(error)))
                    continue
                job.number, job.began = number, time.monotonic()
                running[number] = job

    def _step(self, name: str) -> None:
        running = self._running[name]
        try:
            pieces = self._engines[name].step(_STEPS)
        except Exception as error:
            if not memory.is_exhausted(error):
                raise
            job = running.pop(self._engines[name].give_up())
            self._leaves(job)
            job.deliver(self._too_large(job.wanted))
            return
        for piece in pieces:
            job = running[piece.request]
            if piece.generation is not None:
                del running[piece.request]
                self._leaves(job)
                assert job.began is not None
                self._mean_seconds += 0.1 * (time.monotonic() - job.began - self._mean_seconds)
            job.deliver(Event(piece.text, piece.generation))

    def _too_large(self, wanted: Wanted) -> Refused:
        asked = f"{len(wanted.prompt)} tokens and an answer of up to {wanted.max_new_tokens}"
        note(
            f"out of memory on a device: a request of {asked} is ended, the others go on. "
            "A smaller --serve_length or fewer --serve_slots leave more room."
        )
        return Refused(
            503,
            f"there is no memory for {asked}. Shorten the prompt or ask for less.",
            kind=BROKEN,
            code="out_of_memory",
        )

    def _drop(self, job: Job) -> None:
        """Out of the queue, or out of its place."""
        if job.done:
            return
        self._leaves(job)
        name = job.wanted.model
        if job.number is None:
            self._waiting[name].remove(job)
        else:
            del self._running[name][job.number]
            self._engines[name].cancel(job.number)

    def _leaves(self, job: Job) -> None:
        job.done = True
        with self._count:
            self._here[job.wanted.model] -= 1


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
