"""The HTTP side: routes, limits, streams. No path of a request is ever opened as a file.

    /                       the page                /health     how many wait and are answered
    /v1/chat/completions    streamed or not         /v1/models  the names of the models
    /v1/completions         a prompt as it stands

Prompts are neither logged nor stored.
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
from typing import Any, NamedTuple

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxtune.config import JaxtuneError, kwargs_mistake
from jaxtune.inference.generate import Generation, TextEvent
from jaxtune.server import openai_schema
from jaxtune.server.auth import AccessPolicy, AuthMiddleware, as_response
from jaxtune.server.openai_schema import BROKEN, ChatRequest, CompletionRequest, Refused, Reply
from jaxtune.server.page import page
from jaxtune.server.prompts import PromptTokens
from jaxtune.server.scheduler import GenerationRequest, Scheduler

_BODY_SECONDS = 20.0  # for a client to send what it has announced
_SPARE = 64  # requests beyond those that may wait or be answered: pages, /health, refusals
_READERS = 1  # threads that tokenize: with two, a later request could come earlier


class ServedModel(NamedTuple):
    """A model by its name in /v1/models, with `positions` for a prompt and its answer.

    Both functions tokenize, messages with tools and template arguments, or a text, and raise
    `JaxtuneError`.
    """

    name: str
    positions: int
    chat_prompt: Callable[
        [Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], Mapping[str, Any]], PromptTokens
    ]
    completion_prompt: Callable[[str], PromptTokens]


def application(
    models: Sequence[ServedModel],
    scheduler: Scheduler,
    access: AccessPolicy,
    title: str,
) -> ASGIApp:
    """Make the ASGI application. `scheduler` runs in another thread."""
    routes = _Routes({m.name: m for m in models}, scheduler, int(time.time()))
    html, policy = page(title, [m.name for m in models], key=access.key is not None)
    headers = {"Content-Security-Policy": policy}

    async def show(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    app = Starlette(
        routes=[
            Route("/", show),
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name}", _errors_as_json(routes.model)),
            Route("/v1/chat/completions", _errors_as_json(routes.chat), methods=["POST"]),
            Route("/v1/completions", _errors_as_json(routes.text), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False
    return AuthMiddleware(_RequestLimit(app, scheduler.places + _SPARE), access)


class _RequestLimit:
    """A limit of `most` requests at a time, of those with access; idle connections do not count."""

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


class _Routes:
    """The handlers of the API."""

    def __init__(
        self, models: Mapping[str, ServedModel], scheduler: Scheduler, created: int
    ) -> None:
        self._models, self._scheduler, self._created = models, scheduler, created
        self._settings = scheduler.settings
        self._readers = CapacityLimiter(_READERS)

    async def health(self, _: Request) -> Response:
        waiting, answering = self._scheduler.counts()
        state = {"status": "ok", "models": [*self._models]}
        return JSONResponse({**state, "waiting": waiting, "answering": answering})

    async def models(self, _: Request) -> Response:
        return JSONResponse(openai_schema.models(dict.fromkeys(self._models, self._created)))

    async def model(self, request: Request) -> Response:
        name = self._model(request.path_params["name"]).name
        return JSONResponse(openai_schema.model(name, self._created))

    async def chat(self, request: Request) -> Response:
        body = openai_schema.parse(ChatRequest, await self._read_body(request))
        if len(body.messages) > (most := self._settings.messages):
            raise Refused(400, f"messages: {len(body.messages)} of them; at most {most}.",
                          param="messages")  # fmt: skip
        both = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
        if len(both) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens differ; give one.",
                          param="max_tokens")  # fmt: skip
        model = self._model(body.model)
        messages = [m.model_dump(exclude_none=True, exclude={"annotations"}) for m in body.messages]
        declared = body.tools if body.tool_choice != "none" else None
        tools = [tool.model_dump(exclude_none=True) for tool in declared or ()]
        kwargs = body.chat_template_kwargs or {}
        if mistake := kwargs_mistake(kwargs):
            raise Refused(400, f"chat_template_kwargs: {mistake}.", param="chat_template_kwargs")
        make = partial(model.chat_prompt, messages, tools, kwargs)
        prompt = await self._prompt(make, "messages")
        return await self._answer(request, body, model, prompt, max(both, default=None))

    async def text(self, request: Request) -> Response:
        body = openai_schema.parse(CompletionRequest, await self._read_body(request))
        model = self._model(body.model)
        prompt = await self._prompt(partial(model.completion_prompt, body.prompt), "prompt")
        return await self._answer(request, body, model, prompt, body.max_tokens)

    # -- a request in --

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            raise Refused(
                404,
                f"model: '{name[:80]}' is not served here; there is {', '.join(self._models)}.",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def _read_body(self, request: Request) -> bytes:
        """Read the body. Raises: Refused for another type, a large body, or a slow client."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site may send any other type without asking the browser's leave.
        if kind != "application/json":
            raise Refused(415, "expected 'Content-Type: application/json'.")
        most = self._settings.body_bytes
        large = Refused(413, f"the body is larger than {most:,} bytes, the limit of this server.")
        claimed = request.headers.get("content-length", "")
        if claimed.isdigit() and int(claimed) > most:
            raise large
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise large
        except ClientDisconnect:
            raise Refused(400, "the body ended early.") from None
        except TimeoutError:
            raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} s.") from None
        return bytes(data)

    async def _prompt(self, make: Callable[[], PromptTokens], param: str) -> PromptTokens:
        """Tokenize in a thread: a long prompt takes time."""
        try:
            prompt = await to_thread.run_sync(make, limiter=self._readers)
        except JaxtuneError as error:
            raise Refused(400, f"{param}: {error}", param=param) from None
        if not prompt.ids:
            raise Refused(400, f"{param}: no tokens; there is nothing to continue.", param=param)
        return prompt

    def _generation_request(
        self,
        body: openai_schema._Request,
        model: ServedModel,
        prompt: PromptTokens,
        most: int | None,
    ) -> GenerationRequest:
        left = model.positions - len(prompt.ids)
        if left < 1 or (most or 1) > left:
            raise Refused(
                400,
                f"the prompt has {len(prompt.ids)} tokens and {most or 'at least 1'} are asked "
                f"for; there are {model.positions} positions. Shorten the prompt or ask for less.",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
        fields = {name: value for name in names if (value := getattr(body, name)) is not None}
        if "seed" in fields:
            fields["seed"] %= 2**64
        try:
            sampling = replace(self._settings.sampling, **fields)
            if sampling.temperature > 0 and "seed" not in fields and not self._settings.seed_given:
                sampling = replace(sampling, seed=secrets.randbits(64))
        except JaxtuneError as error:
            raise Refused(400, str(error)) from None
        most = most or min(self._settings.max_new_tokens, left)
        return GenerationRequest(
            model.name, prompt.ids, most, sampling, body.stops, prompt.template
        )

    # -- an answer out --

    async def _answer(
        self,
        request: Request,
        body: openai_schema._Request,
        model: ServedModel,
        prompt: PromptTokens,
        most: int | None,
    ) -> Response:
        generation_request = self._generation_request(body, model, prompt, most)
        events: _Events = asyncio.Queue()
        deliver = _deliver_to(asyncio.get_running_loop(), events)
        pending = self._scheduler.submit(generation_request, deliver)
        chat = isinstance(body, ChatRequest)
        reply = openai_schema.reply(model.name, chat=chat, prompt_tokens=len(prompt.ids))
        if body.stream:
            lines = _sse_lines(events, reply, with_usage=body.usage_asked)
            return _Stream(lines, partial(self._scheduler.cancel, pending))
        leaving = asyncio.create_task(_left(request))
        ended = asyncio.create_task(_whole(events))
        try:
            await asyncio.wait((ended, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                return Response(status_code=499)  # to nobody: the client has gone
            return JSONResponse(openai_schema.whole(reply, ended.result()))
        finally:
            ended.cancel()
            leaving.cancel()
            self._scheduler.cancel(pending)


class _Stream(StreamingResponse):
    """A stream of server-sent events; `leave` is called at its end, also if the client has gone."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _sse_lines(events: _Events, reply: Reply, *, with_usage: bool) -> AsyncIterator[str]:
    try:
        if reply.chat:
            yield _event(openai_schema.part(reply, "", first=True, with_usage=with_usage))
        while True:
            event = await events.get()
            if isinstance(event, Refused):
                yield _event(event.body)
                return
            if event.text:
                yield _event(openai_schema.part(reply, event.text, with_usage=with_usage))
            if event.generation is not None:
                break
        ended = event.generation
        reason = openai_schema.finish_reason(ended)
        yield _event(openai_schema.part(reply, "", reason=reason, with_usage=with_usage))
        if with_usage:
            yield _event(openai_schema.usage_part(reply, ended))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_mistake(error).body)


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _deliver_to(
    loop: asyncio.AbstractEventLoop, events: _Events
) -> Callable[[TextEvent | Refused], None]:
    def deliver(event: TextEvent | Refused) -> None:
        if not loop.is_closed():  # the server has stopped; nobody listens any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    return deliver


async def _whole(events: _Events) -> Generation:
    while True:
        event = await events.get()
        if isinstance(event, Refused):
            raise event
        if event.generation is not None:
            return event.generation


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        message = f"{request.method} is not what this takes."
    else:
        message = "there is nothing here; see /v1/models, /v1/chat/completions."
    headers = dict(error.headers or {})
    return as_response(Refused(error.status_code, message, headers=headers))


_Events = asyncio.Queue[TextEvent | Refused]
Handler = Callable[[Request], Awaitable[Response]]


def _errors_as_json(handler: Handler) -> Handler:
    """Answer with an error object if the handler fails; the connection lives on."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as refusal:
            return as_response(refusal)
        except Exception as error:
            return as_response(_mistake(error))

    return handle


def _mistake(error: Exception) -> Refused:
    """Log where it happened; prompts do not reach the log."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"{frames}{type(error).__name__}", file=sys.stderr, flush=True)
    return Refused(500, "the server made a mistake; its log says where.", kind=BROKEN)
