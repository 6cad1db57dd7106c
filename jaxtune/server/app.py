"""The HTTP side: routes, limits, streams. No path of a request is ever opened as a file.

    /                       the page                /health     what is going on
    /v1/chat/completions    streamed or not         /v1/models  the names that may be asked
    /v1/completions         a prompt as it stands

Prompts are neither logged nor kept.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxtune.config import JaxtuneError
from jaxtune.server import openai_schema
from jaxtune.server.auth import Door, Guard, as_response
from jaxtune.server.openai_schema import BROKEN, ChatAsked, Ended, Refused, Reply, TextAsked
from jaxtune.server.page import page
from jaxtune.server.scheduler import Desk, Event, Job, Wanted

if TYPE_CHECKING:
    from jaxtune.data.templating.template import Template
    from jaxtune.inference.generate import Generation
    from jaxtune.inference.sampling import Sampling

_BODY_SECONDS = 20.0  # for a client to send what it has announced
_SPARE = 64  # requests beyond those that may wait or be answered: pages, /health, refusals
_READERS = 1  # threads that make ids of prompts: with two, who asked later could come earlier


class Served(NamedTuple):
    """A name in /v1/models. `positions` are those of a prompt and its answer. Both functions make
    the ids that are fed, and raise `JaxtuneError`; `template` is that of conversations."""

    name: str
    positions: int
    chat_ids: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], list[int]]
    text_ids: Callable[[str], list[int]]
    template: Template | None = None


class Defaults(NamedTuple):
    """What holds where a request says nothing. Without `seed_given` the seed of `sampling` is
    nobody's wish, and every request that draws has one of its own."""

    sampling: Sampling
    max_new_tokens: int
    seed_given: bool = False


def application(
    models: Sequence[Served], desk: Desk, defaults: Defaults, door: Door, title: str
) -> ASGIApp:
    """The ASGI application. `desk` answers in another thread."""
    room = _Room({m.name: m for m in models}, desk, defaults, int(time.time()))
    html, policy = page(title, [m.name for m in models], key=door.key is not None)
    headers = {"Content-Security-Policy": policy}

    async def show(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    app = Starlette(
        routes=[
            Route("/", show),
            Route("/health", room.health),
            Route("/v1/models", room.models),
            Route("/v1/models/{name}", _told(room.model)),
            Route("/v1/chat/completions", _told(room.chat), methods=["POST"]),
            Route("/v1/completions", _told(room.text), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _no_such},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return Guard(_Crowd(app, desk.places + _SPARE), door)


class _Crowd:
    """Of those the guard lets in, `most` requests at a time; connections that ask nothing do not
    count."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._count = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._count >= self._most:
            full = Refused(
                503,
                f"{self._count} requests are here already, which is the limit. Ask again later.",
                kind=BROKEN,
                code="overloaded",
                headers={"Retry-After": "1"},
            )
            await as_response(full)(scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1


class _Room:
    def __init__(
        self, models: Mapping[str, Served], desk: Desk, defaults: Defaults, created: int
    ) -> None:
        self._models, self._desk, self._defaults = models, desk, defaults
        self._created = created
        self._readers = CapacityLimiter(_READERS)

    async def health(self, _: Request) -> Response:
        waiting, answering = self._desk.counts()
        said = {"status": "ok", "models": [*self._models]}
        return JSONResponse({**said, "waiting": waiting, "answering": answering})

    async def models(self, _: Request) -> Response:
        return JSONResponse(openai_schema.models(dict.fromkeys(self._models, self._created)))

    async def model(self, request: Request) -> Response:
        name = self._named(request.path_params["name"]).name
        return JSONResponse(openai_schema.model(name, self._created))

    async def chat(self, request: Request) -> Response:
        asked = openai_schema.parse(ChatAsked, await self._body(request))
        if len(asked.messages) > self._desk.limits.messages:
            most = self._desk.limits.messages
            raise Refused(400, f"messages: {len(asked.messages)} of them; at most {most}.",
                          param="messages")  # fmt: skip
        both = {n for n in (asked.max_tokens, asked.max_completion_tokens) if n is not None}
        if len(both) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens differ; give one.",
                          param="max_tokens")  # fmt: skip
        model = self._named(asked.model)
        messages = [
            m.model_dump(exclude_none=True, exclude={"annotations"}) for m in asked.messages
        ]
        given = asked.tools if asked.tool_choice != "none" else None
        tools = [tool.model_dump(exclude_none=True) for tool in given or ()]
        ids = await self._ids(partial(model.chat_ids, messages, tools), "messages")
        return await self._answer(request, asked, model, ids, max(both, default=None))

    async def text(self, request: Request) -> Response:
        asked = openai_schema.parse(TextAsked, await self._body(request))
        model = self._named(asked.model)
        ids = await self._ids(partial(model.text_ids, asked.prompt), "prompt")
        return await self._answer(request, asked, model, ids, asked.max_tokens)

    # -- a request in --

    def _named(self, name: str) -> Served:
        if name not in self._models:
            raise Refused(
                404,
                f"model: '{name[:80]}' is not served here; there is {', '.join(self._models)}.",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def _body(self, request: Request) -> bytes:
        """Raises `Refused` for another type, for too much, and for what does not come."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site may send any other type without asking the browser's leave.
        if kind != "application/json":
            raise Refused(415, "expected 'Content-Type: application/json'.")
        most = self._desk.limits.body_bytes
        large = Refused(413, f"the body is larger than {most:,} bytes, the limit of this server.")
        claimed = request.headers.get("content-length", "")
        if claimed.isdigit() and int(claimed) > most:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise large
        except ClientDisconnect:
            raise Refused(400, "the body ended early.") from None
        except TimeoutError:
            raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} s.") from None
        return bytes(body)

    async def _ids(self, make: Callable[[], list[int]], param: str) -> list[int]:
        """In a thread: a long prompt takes longer to cut into tokens than others like to wait."""
        try:
            ids = await to_thread.run_sync(make, limiter=self._readers)
        except JaxtuneError as error:
            raise Refused(400, f"{param}: {error}", param=param) from None
        if not ids:
            raise Refused(400, f"{param}: no tokens; there is nothing to continue.", param=param)
        return ids

    def _wanted(
        self, asked: openai_schema._Asked, model: Served, ids: list[int], most: int | None
    ) -> Wanted:
        left = model.positions - len(ids)
        if left < 1 or (most or 1) > left:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens and {most or 'at least 1'} are asked for; "
                f"there are {model.positions} positions. Shorten the prompt or ask for less.",
                param="messages" if isinstance(asked, ChatAsked) else "prompt",
                code="context_length_exceeded",
            )
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(asked, name)) is not None}
        if "seed" in given:
            given["seed"] %= 2**64
        try:
            sampling = replace(self._defaults.sampling, **given)
            if sampling.temperature > 0 and "seed" not in given and not self._defaults.seed_given:
                sampling = replace(sampling, seed=secrets.randbits(64))
        except JaxtuneError as error:
            raise Refused(400, str(error)) from None
        most = most or min(self._defaults.max_new_tokens, left)
        template = model.template if isinstance(asked, ChatAsked) else None
        return Wanted(model.name, ids, most, sampling, asked.stops, template)

    # -- an answer out --

    async def _answer(
        self,
        request: Request,
        asked: openai_schema._Asked,
        model: Served,
        ids: list[int],
        most: int | None,
    ) -> Response:
        wanted = self._wanted(asked, model, ids, most)
        came: asyncio.Queue[Event | Refused] = asyncio.Queue()
        job = self._desk.ask(wanted, _into(asyncio.get_running_loop(), came))
        to = openai_schema.reply(model.name, chat=isinstance(asked, ChatAsked))
        if asked.stream:
            events = _events(job, came, to, with_usage=asked.usage_asked)
            return _Stream(events, partial(self._desk.cancel, job))
        leaving = asyncio.create_task(_left(request))
        ended = asyncio.create_task(_all(came, len(ids)))
        try:
            await asyncio.wait((ended, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                return Response(status_code=499)  # to nobody: the client has gone
            return JSONResponse(openai_schema.whole(to, ended.result()))
        finally:
            ended.cancel()
            leaving.cancel()
            self._desk.cancel(job)


class _Stream(StreamingResponse):
    """Server-sent events; `leave` is called when they end, also for a client that has gone, and
    also before the first."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _events(
    job: Job, came: asyncio.Queue[Event | Refused], to: Reply, *, with_usage: bool
) -> AsyncIterator[str]:
    try:
        if to.chat:
            yield _event(openai_schema.part(to, "", first=True, with_usage=with_usage))
        while True:
            event = await came.get()
            if isinstance(event, Refused):
                yield _event(event.body)
                return
            if event.text:
                yield _event(openai_schema.part(to, event.text, with_usage=with_usage))
            if event.ended is not None:
                break
        ended = _ended(event.ended, len(job.wanted.prompt))
        yield _event(openai_schema.part(to, "", reason=ended.reason, with_usage=with_usage))
        if with_usage:
            yield _event(openai_schema.usage_part(to, ended))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_mistake(error).body)


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _into(
    loop: asyncio.AbstractEventLoop, came: asyncio.Queue[Event | Refused]
) -> Callable[[Event | Refused], None]:
    def deliver(event: Event | Refused) -> None:
        if not loop.is_closed():  # the server has stopped; nobody listens any more
            loop.call_soon_threadsafe(came.put_nowait, event)

    return deliver


async def _all(came: asyncio.Queue[Event | Refused], prompt_tokens: int) -> Ended:
    while True:
        event = await came.get()
        if isinstance(event, Refused):
            raise event
        if event.ended is not None:
            return _ended(event.ended, prompt_tokens)


def _ended(answer: Generation, prompt_tokens: int) -> Ended:
    return Ended(answer.text, answer.stopped, prompt_tokens, answer.tokens)


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        message = f"{request.method} is not what this takes."
    else:
        message = "there is nothing here; see /v1/models, /v1/chat/completions."
    headers = dict(error.headers or {})
    return as_response(Refused(error.status_code, message, headers=headers))


Handler = Callable[[Request], Awaitable[Response]]


def _told(handler: Handler) -> Handler:
    """Whatever goes wrong is an error object, and the connection lives on."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as refusal:
            return as_response(refusal)
        except Exception as error:
            return as_response(_mistake(error))

    return handle


def _mistake(error: Exception) -> Refused:
    """Where it happened goes to stderr; what was said to the model does not."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"{frames}{type(error).__name__}", file=sys.stderr, flush=True)
    return Refused(500, "the server made a mistake; its log says where.", kind=BROKEN)
