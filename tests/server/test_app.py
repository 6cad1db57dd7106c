"""The server over a real socket: answers, streams, refusals, limits; it lives on after each."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from echo import POSITIONS, Echo, Running, running

from jaxtune.server import app, connections


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if "[DONE]" in line else json.loads(line[6:]) for line in lines]


def test_an_answer(echo: Running) -> None:
    found = echo.chat("Hello").json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {
        "role": "assistant", "content": "Hello", "refusal": None
    }  # fmt: skip
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    cut = echo.chat("Hello", max_completion_tokens=2).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("He", "length")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = echo.client.post(
        "/v1/chat/completions",
        json={"model": "model", "messages": [{"role": "user", "content": parts}]},
    )
    assert said.json()["choices"][0]["message"]["content"] == "ab"


def test_template_arguments_of_a_request(echo: Running) -> None:
    """Under vLLM's name; what the conversation itself sets is refused."""
    said = echo.chat("q", chat_template_kwargs={"loud": True})
    assert said.json()["choices"][0]["message"]["content"] == 'q{"loud": true}'
    refused = echo.chat("q", chat_template_kwargs={"tools": []})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs"
    assert "tools is set by jaxtune itself" in refused.json()["error"]["message"]


def test_a_stream(echo: Running) -> None:
    body = {
        "model": "model", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "née €"}],
    }  # fmt: skip
    with echo.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first, *pieces, last, usage, done = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [p["choices"][0]["delta"]["content"] for p in pieces] == list("née €")
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert done == "[DONE]"
    assert len({p["id"] for p in [first, *pieces, last, usage]}) == 1


def test_a_prompt_without_a_template(echo: Running) -> None:
    body = {"model": "model", "prompt": "Once"}
    found = echo.client.post("/v1/completions", json=body).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == "Once"
    with echo.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        *pieces, last, _ = events(response)
    assert "".join(p["choices"][0]["text"] for p in pieces) == "Once"
    assert last["choices"][0]["finish_reason"] == "stop"


def test_models_and_health(echo: Running) -> None:
    found = echo.client.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == ["model"]
    assert echo.client.get("/v1/models/model").json()["object"] == "model"
    assert "nobody" in error(echo.client.get("/v1/models/nobody"), 404)["message"]
    said = error(echo.chat("Hi", model="gpt-4"), 404)
    assert said["code"] == "model_not_found"
    assert "there is model" in said["message"]
    health = echo.client.get("/health").json()
    assert health == {"status": "ok", "models": ["model"], "waiting": 0, "answering": 0}


def test_settings_reach_the_engine_and_the_rest_is_the_default(echo: Running) -> None:
    echo.chat("Hi", temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.2, seed=-1,
              stop=["x", "y"], max_tokens=7)  # fmt: skip
    most, sampling, stop = echo.engines["model"].settings[-1]
    assert (most, tuple(stop)) == (7, ("x", "y"))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
    assert (sampling.repetition_penalty, sampling.seed) == (1.2, 2**64 - 1)
    echo.chat("Hi")
    most, sampling, stop = echo.engines["model"].settings[-1]
    assert (most, sampling.temperature, sampling.seed, tuple(stop)) == (64, 0.0, 0, ())
    echo.chat("H" * (POSITIONS - 3))
    assert echo.engines["model"].settings[-1][0] == 3  # no more positions are left


@pytest.mark.parametrize("given", [False, True])
def test_a_draw_without_a_seed_is_another_one_unless_the_server_was_given_one(given: bool) -> None:
    engine = Echo()

    def seeds(**more: Any) -> list[int]:
        for _ in range(4):
            assert found.chat("Hi", **more).status_code == 200
        return [sampling.seed for _, sampling, _ in engine.settings[-4:]]

    with running({"model": engine}, seed_given=given) as found:
        assert len(set(seeds(temperature=1))) == (1 if given else 4)
        assert seeds(temperature=1, seed=7) == [7] * 4
        assert seeds() == [0] * 4  # nothing is drawn


def test_refusals(echo: Running) -> None:
    assert error(echo.chat("Hi", n=2), 400)["param"] == "n"
    assert "differ" in error(echo.chat("Hi", max_tokens=1, max_completion_tokens=2), 400)["message"]
    long = error(echo.chat("x" * POSITIONS), 400)
    assert long["code"] == "context_length_exceeded"
    assert f"there are {POSITIONS} positions" in long["message"]
    assert error(echo.chat("Hi", max_tokens=POSITIONS), 400)["code"] == "context_length_exceeded"
    assert "no tokens" in error(echo.chat(""), 400)["message"]
    assert "cannot be said" in error(echo.chat("unspeakable"), 400)["message"]
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body: dict[str, Any] = {"model": "model", "messages": answered}
    place = "/v1/chat/completions"
    assert "ends with an answer" in error(echo.client.post(place, json=body), 400)["message"]
    many = {"model": "model", "messages": [{"role": "user", "content": "a"}] * 1001}
    assert "at most 1000" in error(echo.client.post(place, json=many), 400)["message"]
    plain = echo.client.post(place, content=b"{}", headers={"Content-Type": "text/plain"})
    assert "application/json" in error(plain, 415)["message"]
    assert "there is nothing here" in error(echo.client.get("/v1/files"), 404)["message"]
    assert "GET is not" in error(echo.client.get(place), 405)["message"]
    assert echo.chat("Hello").status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_too_large_a_body(echo: Running, announced: bool) -> None:
    """Said beforehand or found on the way, it is not kept."""
    body = b'{"model": "' + b"x" * (3 << 20) + b'"}'
    content: Any = body if announced else iter([body[:100_000]] * 30)
    response = echo.client.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert "larger than 1,048,576 bytes" in error(response, 413)["message"]
    assert echo.chat("Hello").status_code == 200


def test_a_body_that_does_not_come(echo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.2)
    parts = urlsplit(echo.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as line:
        line.sendall(head.encode())
        assert b" 408 " in line.recv(65536).split(b"\r\n")[0]
    assert echo.chat("Hello").status_code == 200


def closed(line: socket.socket) -> bool:
    """Whether the server hangs up without a word, soon."""
    line.settimeout(5)
    with contextlib.suppress(ConnectionError):
        return line.recv(1) == b""
    return True


def test_a_head_that_does_not_come(echo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a new connection, on one that was answered before, and behind a body refused early."""
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.3)
    parts = urlsplit(echo.url)
    place = (parts.hostname, parts.port)
    head = f"GET /health HTTP/1.1\r\nHost: {parts.netloc}\r\n".encode()
    for sent in (b"", b"GET", head):
        with socket.create_connection(place) as line:
            line.sendall(sent)
            assert closed(line)
    early = head.replace(b"GET /health", b"POST /v1/completions") + b"Content-Length: 99\r\n\r\n{"
    for sent, status, then in ((head + b"\r\n", b"200", head), (early, b"415", b" ")):
        with socket.create_connection(place, timeout=5) as line:
            line.sendall(sent)
            got = b""
            while not got.endswith(b"}"):
                got += line.recv(65536)
            assert got.startswith(b"HTTP/1.1 " + status)
            line.sendall(then)
            assert closed(line)


def test_connections_without_a_request_block_nobody(
    echo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that has waited longest is closed where there are too many."""
    parts = urlsplit(echo.url)
    place = (parts.hostname, parts.port)
    with contextlib.ExitStack() as stack:
        for _ in range(echo.scheduler.places + 64):
            stack.enter_context(socket.create_connection(place))
        assert echo.chat("Hello").status_code == 200
    monkeypatch.setattr(connections, "_IDLE", 5)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(place)) for _ in range(20)]
        assert closed(held[0])
        assert httpx.get(f"{echo.url}/health").status_code == 200


def test_too_many_requests_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the guard refuses do not count."""
    monkeypatch.setattr(app, "_SPARE", 0)
    with running({"model": Echo()}, slots=1, queue=1, key="sesame") as found:
        parts = urlsplit(found.url)
        place, right = (parts.hostname, parts.port), {"Authorization": "Bearer sesame"}
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n"
        with contextlib.ExitStack() as stack:
            for key in ("guess", "sesame", "guess", "sesame"):
                line = stack.enter_context(socket.create_connection(place))
                line.sendall(f"{head}Authorization: Bearer {key}\r\n\r\n{{".encode())
            found.wait(lambda: httpx.get(f"{found.url}/health").status_code == 503)
            full = found.client.get("/v1/models", headers=right)
            assert error(full, 503)["code"] == "overloaded"
            assert full.headers["retry-after"] == "1"
            assert error(found.client.get("/v1/models"), 401)
        found.wait(lambda: found.client.get("/v1/models", headers=right).status_code == 200)


def raw(url: str, request: bytes) -> bytes:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as line:
        line.sendall(request)
        got = b""
        while piece := line.recv(65536):
            got += piece
    return got


@pytest.mark.parametrize(
    "path",
    [
        *("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd"),
        *("//etc/passwd", "/v1/models/../../etc/passwd", "/v1/models/%2fetc%2fpasswd"),
        *("/static/page.css", "/page.js", "/etc/passwd%00.html", "file:///etc/passwd"),
    ],
)
def test_no_path_is_a_file(echo: Running, path: str) -> None:
    at = urlsplit(echo.url).netloc
    got = raw(echo.url, f"GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n".encode())
    assert got.split(b" ", 2)[1] in (b"404", b"400")
    assert b"root:" not in got


@pytest.mark.parametrize(
    "sent",
    [
        *(b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 50),
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_request(echo: Running, sent: bytes) -> None:
    parts = urlsplit(echo.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as line:
        got = b""
        with contextlib.suppress(OSError):  # it may hang up while more is sent
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            got = line.recv(65536)
    assert got == b"" or got.split(b" ", 2)[1].startswith(b"4")
    assert echo.chat("Hello").status_code == 200


def ask_as(url: str, host: str, **headers: str) -> int:
    parts = urlsplit(url)
    line = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    line.putrequest("GET", "/v1/models", skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        line.putheader(name, value)
    line.endheaders()
    status = line.getresponse().status
    line.close()
    return status


def test_the_host_header_names_this_machine(echo: Running) -> None:
    port = urlsplit(echo.url).port
    for fine in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask_as(echo.url, fine) == 200, fine
    for odd in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "8.8.8.8"):
        assert ask_as(echo.url, odd) == 403, odd
    for none in ("", "localhost@evil.example", "localhost/x", "localhost:port", "localhost, evil"):
        assert ask_as(echo.url, none) == 400, none


def test_pages_of_other_sites_may_not_ask(echo: Running) -> None:
    own = urlsplit(echo.url).netloc
    assert ask_as(echo.url, own, Origin=echo.url) == 200
    for other in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        assert ask_as(echo.url, own, Origin=other) == 403, other
    asked = echo.client.options("/v1/chat/completions", headers={"Origin": echo.url})
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_a_key() -> None:
    with running({"model": Echo()}, key="sesame-4711") as found:
        said = error(found.chat("Hi"), 401)
        assert (said["type"], said["code"]) == ("authentication_error", "invalid_api_key")
        for wrong in ("Bearer sesame", "Basic sesame-4711", "sesame-4711", "Bearer", "Bearer é"):
            sent = {"Authorization": wrong.encode()}
            assert error(found.client.get("/v1/models", headers=sent), 401)
        right = {"Authorization": "Bearer sesame-4711"}
        assert found.client.get("/v1/models", headers=right).status_code == 200
        assert found.client.get("/health").status_code == 200
        page = found.client.get("/")
        assert page.status_code == 200
        assert 'id="key"' in page.text
        assert "sesame" not in page.text


def test_behind_another_host_names_are_not_checked() -> None:
    with running({"model": Echo()}, loopback=False) as found:
        assert ask_as(found.url, "box.example:80") == 200
        assert ask_as(found.url, "box.example:80", Origin="https://evil.example") == 403


def test_too_many_wait() -> None:
    engine = Echo(0.1)
    with running({"model": engine}, slots=1, queue=1) as found:
        body = {
            "model": "model",
            "stream": True,
            "messages": [{"role": "user", "content": "a" * 99}],
        }
        ask = ("POST", "/v1/chat/completions")
        with (
            httpx.Client(base_url=found.url, timeout=30) as other,
            found.client.stream(*ask, json=body),
            other.stream(*ask, json=body),
        ):
            found.wait(lambda: found.scheduler.counts() == (1, 1))
            response = found.chat("Hi")
            assert error(response, 429)["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1
        found.wait(lambda: bool(engine.cancelled))
        found.wait(lambda: found.scheduler.counts() == (0, 0))
        assert found.chat("Hi").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream: bool) -> None:
    engine = Echo(0.01)
    with running({"model": engine}, slots=1) as found:
        body = json.dumps(
            {"model": "model", "stream": stream, "max_tokens": 100,
             "messages": [{"role": "user", "content": "a" * 100}]}
        ).encode()  # fmt: skip
        parts = urlsplit(found.url)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((parts.hostname, parts.port)) as line:
            line.sendall(head.encode() + body)
            found.wait(lambda: bool(engine.going))
        found.wait(lambda: not engine.going, seconds=0.6)  # 100 tokens would take a second
        assert engine.cancelled == [0]
        assert found.chat("Hi").json()["choices"][0]["message"]["content"] == "Hi"


def test_an_answer_that_takes_too_long() -> None:
    with running({"model": Echo(0.05)}, slots=1, seconds=0.3) as found:
        said = error(found.chat("a" * 50), 504)
        assert said["code"] == "timeout"
        body = {
            "model": "model",
            "stream": True,
            "messages": [{"role": "user", "content": "a" * 50}],
        }
        with found.client.stream("POST", "/v1/chat/completions", json=body) as response:
            *_, last = events(response)
        assert last["error"]["code"] == "timeout"


def test_a_model_that_fails_is_told_without_what_was_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = Echo()
    with running({"model": engine}) as found:
        engine.broken = True
        assert error(found.chat("a secret question"), 500)["type"] == "server_error"
    shown = capfd.readouterr()
    assert "secret" not in shown.out + shown.err


def test_want_of_memory_is_told_and_the_server_lives_on(echo: Running) -> None:
    said = error(echo.chat("enormous"), 503)
    assert (said["type"], said["code"]) == ("server_error", "out_of_memory")
    body = {"model": "model", "prompt": "enormous", "stream": True}
    with echo.client.stream("POST", "/v1/completions", json=body) as response:
        assert events(response)[-1]["error"]["code"] == "out_of_memory"
    assert echo.chat("Hello").status_code == 200


def test_a_mistake_of_ours_is_500_and_says_where_not_what(
    echo: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from jaxtune.server import openai_schema

    def broken(_: Any, body: bytes) -> Any:
        raise ZeroDivisionError(body.decode())

    with monkeypatch.context() as patch:
        patch.setattr(openai_schema, "parse", broken)
        assert error(echo.chat("a secret question"), 500)["type"] == "server_error"
    shown = capfd.readouterr().err
    assert "ZeroDivisionError" in shown
    assert "app.py" in shown
    assert "secret" not in shown
    assert echo.chat("Hello").status_code == 200


def test_nothing_that_was_said_is_logged(echo: Running, capfd: pytest.CaptureFixture[str]) -> None:
    assert echo.chat("a secret question").status_code == 200
    assert echo.chat("a secret question", n=2).status_code == 400
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
