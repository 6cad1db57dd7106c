"""A server on a real socket over engines whose every answer is known: they say what was asked."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from jaxtune.config import DataError
from jaxtune.server.app import ServedModel, application
from jaxtune.server.auth import AccessPolicy
from jaxtune.server.bound_socket import Address, BoundSocket, bind
from jaxtune.server.prompts import PromptTokens
from jaxtune.server.run import serve
from jaxtune.server.scheduler import Scheduler, ServeSettings

POSITIONS = 200


@dataclass(frozen=True)
class Drawn:
    """The fields of `model.sampling.Sampling`, without JAX."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Said(NamedTuple):
    """`generate.Generation`, without JAX."""

    text: str
    stopped: bool
    tokens: int


class TextEvent(NamedTuple):
    request: int
    text: str
    generation: Said | None


class JaxRuntimeError(RuntimeError):
    """JAX's, by which a want of memory is known."""


class Echo:
    """Says the characters of a prompt, one a step, of `slots` prompts at a time; remembers in which
    order they were begun. It has no memory for one that begins with `enormous`.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []
        self.settings: list[tuple[int, Any, Sequence[str]]] = []
        self.cancelled: list[int] = []
        self.slots = 1
        self.waiting: dict[int, tuple[str, int, int]] = {}
        self.going: dict[int, tuple[str, int, int]] = {}
        self.most = 0
        self.broken = False
        self._numbers = itertools.count()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Any = None,
        stop: Sequence[str] = (),
        template: Any = None,
    ) -> int:
        text = "".join(map(chr, prompt))
        if "unspeakable" in text:
            raise DataError("prompt 0 cannot be said.")
        number = next(self._numbers)
        self.settings.append((max_new_tokens, sampling, stop))
        self.waiting[number] = (text, 0, max_new_tokens)
        return number

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)
        del (self.going if request in self.going else self.waiting)[request]

    def step(self, most: int | None = None) -> list[TextEvent]:
        if self.broken:
            raise RuntimeError("no memory for 'a secret question'")
        time.sleep(self.seconds)
        while self.waiting and len(self.going) < self.slots:
            number = next(iter(self.waiting))
            self.going[number] = self.waiting.pop(number)
            self.asked.append(self.going[number][0])
            self.most = max(self.most, len(self.going))
        if self._enormous():
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        pieces = []
        for number, (text, said, most_tokens) in list(self.going.items()):
            said += 1
            whole = said == len(text)
            answer = Said(text[:said], whole, said) if whole or said == most_tokens else None
            pieces.append(TextEvent(number, text[said - 1], answer))
            self.going[number] = (text, said, most_tokens)
            if answer:
                del self.going[number]
        return pieces

    def give_up(self) -> int:
        number = self._enormous()[0]
        del self.going[number]
        return number

    def _enormous(self) -> list[int]:
        return [number for number, (text, *_) in self.going.items() if text.startswith("enormous")]


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
) -> PromptTokens:
    """The last message, with the request's template arguments behind it."""
    if messages[-1]["role"] == "assistant":
        raise DataError("ends with an answer.")
    content = messages[-1]["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    more = json.dumps(template_kwargs) if template_kwargs else ""
    return PromptTokens([ord(letter) for letter in "".join(parts) + more])


class Running:
    def __init__(self, url: str, scheduler: Scheduler, engines: Mapping[str, Echo]) -> None:
        self.url, self.scheduler, self.engines = url, scheduler, engines
        self.client = httpx.Client(base_url=url, timeout=30)

    def chat(self, text: str, model: str = "model", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def wait(self, until: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, "it did not come to be"
            time.sleep(0.005)


@contextlib.contextmanager
def running(
    engines: Mapping[str, Echo],
    *,
    key: str | None = None,
    loopback: bool = True,
    seed_given: bool = False,
    **limits: Any,
) -> Iterator[Running]:
    short = {"seconds": 20.0, "grace": 0.5, "slots": 4, **limits}
    settings = ServeSettings(Drawn(), 64, seed_given, **short)
    for engine in engines.values():
        engine.slots = settings.slots
    scheduler = Scheduler(engines, settings)
    served = [
        ServedModel(name, POSITIONS, chat_prompt, lambda text: PromptTokens([*map(ord, text)]))
        for name in engines
    ]
    taken = BoundSocket(*bind(Address("127.0.0.1", 0)), key)
    at = taken.address
    app = application(served, scheduler, AccessPolicy(loopback, key), "echo")
    failed: list[BaseException] = []

    def go() -> None:
        try:
            serve(app, scheduler, taken, "echo")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    found = Running(at.url, scheduler, engines)
    try:
        found.wait(lambda: _answers(at.url))
        yield found
    finally:
        found.client.close()
        scheduler.close()
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server does not end"
    if not any(engine.broken for engine in engines.values()):
        assert not failed


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
