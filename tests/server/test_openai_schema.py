"""Requests of every wrong kind are refused with the field's name, and never with what was sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxtune.server.openai_schema import ChatRequest, CompletionRequest, Refused, parse

HI = [{"role": "user", "content": "Hi"}]


def refusal(body: Any, shape: Any = ChatRequest) -> tuple[str | None, str]:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as caught:
        parse(shape, sent)
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["message"]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, **more}


def test_what_a_client_may_send() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {
        "role": "assistant", "content": None, "tool_calls": [call], "refusal": None,
        "annotations": [], "audio": None, "function_call": None,
    }  # fmt: skip
    messages = [
        *({"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}),
        *(answer, {"role": "tool", "tool_call_id": "c1", "content": "3"}),
    ]
    asked = parse(
        ChatRequest,
        json.dumps(
            chat(
                messages=messages, temperature=1, top_p=0.9, seed=-1, stop="END", stream=True, n=1,
                stream_options={"include_usage": True}, presence_penalty=0, frequency_penalty=0.0,
                logit_bias={}, logprobs=False, response_format={"type": "text"}, user="me",
                metadata={"a": "b"}, tool_choice="auto", parallel_tool_calls=True,
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            )
        ).encode(),
    )  # fmt: skip
    assert asked.stops == ("END",)
    assert asked.usage_asked
    assert asked.temperature == 1
    assert asked.messages[2].tool_calls is not None
    assert parse(
        CompletionRequest, b'{"model": "m", "prompt": "Once", "stop": ["a", "b"]}'
    ).stops == (*("a", "b"),)


def test_a_stop_may_be_long_and_there_may_be_sixteen() -> None:
    for stop in ("a text that is longer than sixteen characters", ["x" * 99] * 16):
        expected = (stop,) if isinstance(stop, str) else tuple(stop)
        assert parse(ChatRequest, json.dumps(chat(stop=stop)).encode()).stops == expected


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", "valid array"),
        ({"messages": [{"role": "me", "content": "a"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
        ({"messages": [{**HI[0], "weight": 1}]}, "messages.0.weight", "no such"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content", "a part with image cannot be served; this model reads text"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": 3}, "stop", "valid"),
        ({"stop": ["x", 3]}, "stop.1", "valid string"),
        ({"stop": ""}, "stop", "empty text"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"n": 2}, "n", "expected 1, or leave it out"),
        ({"n": True}, "n", "expected 1"),
        ({"presence_penalty": 0.5}, "presence_penalty", "expected 0"),
        ({"frequency_penalty": -1}, "frequency_penalty", "expected 0"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "cannot be served"),
        ({"logprobs": True}, "logprobs", "expected false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be served"),
        ({"tool_choice": "required"}, "tool_choice", "'auto' or 'none'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"min_p": 0.1}, "min_p", "no such field"),
    ],
)  # fmt: skip
def test_refused_by_name(more: dict[str, Any], param: str, said: str) -> None:
    place, message = refusal(chat(**more))
    assert place is not None
    assert place.startswith(param)
    assert said in message


def test_what_is_no_request() -> None:
    assert "not JSON" in refusal(b"{")[1]
    assert "not JSON" in refusal(b"\xff\xfe")[1]
    assert "not JSON" in refusal(b"[" * 100_000)[1]
    assert "not JSON" in refusal(b'{"model": "\\ud800"}')[1]
    assert "object" in refusal(b"[]")[1]
    assert refusal({"messages": HI}) == ("model", "model: field required.")
    nan = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}'
    assert "temperature" in refusal(nan)[1]
    assert refusal({"model": "m", "prompt": ["a", "b"]}, CompletionRequest)[0] == "prompt"
    assert (
        "expected false"
        in refusal({"model": "m", "prompt": "a", "echo": True}, CompletionRequest)[1]
    )


def test_a_refusal_never_repeats_what_was_said() -> None:
    secret = "the code is 4711"
    for body in (
        chat(messages=[{"role": "user", "content": {"text": secret}}]),
        chat(temperature=secret),
        chat(logit_bias={secret: 1}),
    ):
        assert "4711" not in refusal(body)[1]
