"""The shapes of OpenAI's chat and text completions: requests checked, responses and errors built.

Fields that would change an answer and cannot be served are refused by name, unless they hold what
changes nothing; so is a field that nobody knows. What only concerns OpenAI's own service (`user`,
`metadata`, ...) is taken and ignored. Knows no HTTP, no queue and no model.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from jaxtune.config import nearest
from jaxtune.data.messages import MEDIA
from jaxtune.inference.generate import Generation

INVALID, DENIED, BUSY, BROKEN = (
    *("invalid_request_error", "authentication_error", "rate_limit_error", "server_error"),
)


class Refused(Exception):
    """A refusal of a request: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: dict[str, Any] = {"error": error}


class _Shape(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class TextPart(_Shape):
    type: Literal["text"]
    text: str


class ThinkingPart(_Shape):
    type: Literal["thinking"]
    thinking: str


class CalledFunction(_Shape):
    name: str
    arguments: str


class ToolCall(_Shape):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Shape):
    """A message. What a client sends back of an answer may carry OpenAI's other keys, empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ThinkingPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # of an answer, as vLLM and others give it
    reasoning: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)

    @pydantic.field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else ()
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        if media := [m for m in MEDIA if any(m in str(kind) for kind in kinds)]:
            message = "a part with {medium} cannot be served; this model reads text"
            raise PydanticCustomError("unsupported_value", message, {"medium": media[0]})
        return content


class Function(_Shape):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Shape):
    type: Literal["function"]
    function: Function


class StreamOptions(_Shape):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def neutral(*values: Any) -> pydantic.AfterValidator:
    """Refuse what would change an answer and cannot be served: all but null and `values`."""
    texts = [str(v).lower() if isinstance(v, bool) else repr(v) for v in values] or ["null"]
    expected = {"expected": " or ".join(texts)}

    def check(value: Any) -> Any:
        # A bool is a number to Python, and not to a client.
        same = (value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
        if value is None or any(same):
            return value
        message = "cannot be served; expected {expected}, or leave it out"
        raise PydanticCustomError("unsupported_value", message, expected)

    return pydantic.AfterValidator(check)


class _Request(_Shape):
    """The fields of both kinds of request."""

    model: str
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[str], Field(max_length=16)] | str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Any, neutral(1)] = None
    presence_penalty: Annotated[Any, neutral(0)] = None
    frequency_penalty: Annotated[Any, neutral(0)] = None
    logit_bias: Annotated[Any, neutral({})] = None
    user: Any = None  # concerns OpenAI's service, not the answer

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_asked(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Request):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, neutral("auto", "none")] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    logprobs: Annotated[Any, neutral(False)] = None
    top_logprobs: Annotated[Any, neutral(0)] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class CompletionRequest(_Request):
    """A prompt that is continued as it stands, without a template."""

    prompt: str
    logprobs: Annotated[Any, neutral()] = None
    best_of: Annotated[Any, neutral(1)] = None
    echo: Annotated[Any, neutral(False)] = None
    suffix: Annotated[Any, neutral("")] = None


A = TypeVar("A", bound=_Request)


def parse(shape: type[A], body: bytes) -> A:
    """Parse the request in `body`, JSON. Raises: Refused with the first mistake."""
    try:
        request = shape.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refusal(shape, error) from None
    if any(not text for text in request.stops):
        raise Refused(400, "stop: holds an empty text, which is everywhere.", param="stop")
    return request


def _refusal(shape: type[_Request], error: pydantic.ValidationError) -> Refused:
    """Describe the first mistake by its place, without quoting what was sent."""
    detail = error.errors(include_input=False, include_url=False)[0]
    if detail["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {detail['msg']}.")
    # pydantic adds the branch of a union that it tried; a client knows its own fields alone.
    place = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    name = ".".join(map(str, place))
    message = f"{name or 'the body'}: {detail['msg'][:1].lower()}{detail['msg'][1:]}."
    if detail["type"] == "extra_forbidden":
        known = list(shape.model_fields) if len(place) == 1 else []
        message = f"{name[:80]}: no such field is known.{nearest(str(place[-1])[:80], known)}"
    code = "unsupported_value" if detail["type"] == "unsupported_value" else None
    return Refused(400, message, param=name[:80] or None, code=code)


class Reply(NamedTuple):
    """The fields that every part of one response repeats, and the size of its prompt."""

    id: str
    created: int
    model: str
    chat: bool
    prompt_tokens: int


def reply(model: str, *, chat: bool, prompt_tokens: int) -> Reply:
    """Begin a response, with a new id."""
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    return Reply(name, int(time.time()), model, chat, prompt_tokens)


def finish_reason(generation: Generation) -> str:
    """Return OpenAI's `finish_reason`."""
    return "stop" if generation.stopped else "length"


def whole(to: Reply, generation: Generation) -> dict[str, Any]:
    """Build the body of a response that is not streamed."""
    message = {"role": "assistant", "content": generation.text, "refusal": None}
    content = {"message": message} if to.chat else {"text": generation.text}
    reason = finish_reason(generation)
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
    return {
        **_head(to, "chat.completion" if to.chat else "text_completion"),
        "choices": [choice],
        "usage": usage(to, generation),
    }


def part(to: Reply, text: str, *, first: bool = False, reason: str | None = None,
         with_usage: bool = False) -> dict[str, Any]:  # fmt: skip
    """Build one event of a stream. `first` has the role, `reason` ends it."""
    if to.chat:
        role = {"role": "assistant"} if first else {}
        content: dict[str, Any] = {"delta": {**role, **({"content": text} if not reason else {})}}
    else:
        content = {"text": text}
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
    head = _head(to, "chat.completion.chunk" if to.chat else "text_completion")
    return {**head, "choices": [choice], **({"usage": None} if with_usage else {})}


def usage_part(to: Reply, generation: Generation) -> dict[str, Any]:
    head = _head(to, "chat.completion.chunk" if to.chat else "text_completion")
    return {**head, "choices": [], "usage": usage(to, generation)}


def usage(to: Reply, generation: Generation) -> dict[str, int]:
    """Count the tokens of a response."""
    return {
        "prompt_tokens": to.prompt_tokens,
        "completion_tokens": generation.tokens,
        "total_tokens": to.prompt_tokens + generation.tokens,
    }


def _head(to: Reply, kind: str) -> dict[str, Any]:
    return {"id": to.id, "object": kind, "created": to.created, "model": to.model}


def models(names: Mapping[str, int]) -> dict[str, Any]:
    """`names`: name -> when it was loaded, in seconds since 1970."""
    return {"object": "list", "data": [model(name, created) for name, created in names.items()]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "jaxtune"}
