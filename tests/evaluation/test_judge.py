"""The judge over HTTP, against a server of known opinions on loopback."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from typing import Any

import pytest
from evaluation.judge_server import Reply, likes_the_first, likes_the_longer, serving

from jaxtune.config import ConfigError
from jaxtune.evaluation.judge import pairwise
from jaxtune.evaluation.judge.client import (
    Endpoint,
    RequestFailed,
    ask,
    open_endpoint,
)
from jaxtune.evaluation.judge.pairwise import Pair
from jaxtune.evaluation.judge.verdict import rubric

SECRET = "sk-never-to-be-seen-0123456789"
RUBRIC = rubric(None)
PAIRS = [
    Pair("Q1", "right", "short", "much longer"),  # tuned is longer: a win
    Pair("Q2", "right", "much longer", "short"),
    Pair("Q3", "right", "abc", "xyz"),
    Pair("Q4", "right", "1", "22"),
    Pair("Q5", "right", "the same", "the same "),
]


def endpoint(url: str, **more: Any) -> Endpoint:
    return open_endpoint(url, "tiny", key_name=None, **{"first_wait": 0.01, "timeout": 5.0, **more})


def points(url: str, **more: Any) -> list[float | None]:
    found = pairwise.judge(endpoint(url, **more), RUBRIC, PAIRS, concurrency=3)
    return [outcome.points for outcome in found]


def test_a_judge_who_likes_the_first_decides_nothing() -> None:
    two = threading.Barrier(2)

    def after_two_asked(number: int, a: str, b: str) -> str:
        if number < 2:
            two.wait(timeout=60)
        return likes_the_first(number, a, b)

    with serving(after_two_asked) as judge:
        found = pairwise.judge(endpoint(judge.url, timeout=60.0), RUBRIC, PAIRS, concurrency=3)
    assert [outcome.points for outcome in found] == [0.5] * 5
    assert [outcome.agreed for outcome in found] == [False] * 4 + [True]
    assert len(judge.seen) == 8  # equal answers are not asked about
    assert 1 < judge.most_at_once <= 3


def test_a_judge_who_likes_the_longer_gives_the_known_points() -> None:
    with serving(likes_the_longer) as judge:
        assert points(judge.url) == [1.0, 0.0, 0.5, 1.0, 0.5]
    assert {path for path, _, _ in judge.seen} == {"/v1/chat/completions"}
    body = judge.seen[0][2]
    assert (body["model"], body["temperature"]) == ("tiny", 0.0)
    assert "Authorization" not in judge.seen[0][1]
    with serving(likes_the_longer) as judge:
        assert points(f"{judge.url}/chat/completions/", temperature=None)[0] == 1.0
    assert {path for path, _, _ in judge.seen} == {"/v1/chat/completions"}
    assert "temperature" not in judge.seen[0][2]


def test_what_is_no_verdict_is_counted_and_not_guessed() -> None:
    def vague(number: int, a: str, b: str) -> str:
        return "A is better." if "much" in a + b else "VERDICT: B"

    with serving(vague) as judge:
        found = pairwise.judge(endpoint(judge.url), RUBRIC, PAIRS, concurrency=1)
    assert [outcome.why for outcome in found] == ["unparseable", "unparseable", "", "", ""]
    assert [outcome.points for outcome in found] == [None, None, 0.5, 0.5, 0.5]


def test_an_interrupt_is_the_last_request() -> None:
    """Those on their way end by themselves; none is sent after it, and it waits for none."""
    many = [Pair("Q", "right", f"a{n}", f"b{n}") for n in range(50)]
    held = threading.Event()

    def interrupts(number: int, a: str, b: str) -> str:
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 4:
            held.wait(timeout=60)
        return likes_the_first(number, a, b)

    with serving(interrupts) as judge:
        try:
            with pytest.raises(KeyboardInterrupt):
                pairwise.judge(endpoint(judge.url, timeout=60.0), RUBRIC, many, concurrency=2)
        finally:
            held.set()
        time.sleep(0.2)
        assert len(judge.seen) <= 6  # two at a time


def test_busy_and_broken_replies_are_asked_for_again() -> None:
    bad: list[Reply] = [
        (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.02"}),
        (503, b"", {}),
        (200, b"not json", {}),
        (200, b'{"choices": []}', {}),
    ]

    def flaky(number: int, a: str, b: str) -> Reply:
        return bad[number] if number < len(bad) else "VERDICT: TIE"

    with serving(flaky) as judge:
        assert ask(endpoint(judge.url), _prompt()) == "VERDICT: TIE"
    assert len(judge.seen) == 5


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((500, b"<html>oops</html>", {}), r"no reply after 2 tries: HTTP 500: <html>oops</html>"),
        ((429, b'{"error": {"message": "quota"}}', {}), "HTTP 429: quota"),
        ((200, b"[" * 100_000, {}), "no chat completion"),
        ((200, b'{"choices": [{"message": {"content": null}}]}', {}), "NoneType, not text"),
        ((200, b'{"choices": [{"message": {"content": "' + b"x" * 2**20, {}), "longer than"),
        ((200, b'{"choices": []}' * 200, {"X-Drops": "0.2"}), "within 0.5 seconds"),
    ],
)  # fmt: skip
def test_after_so_many_tries_it_has_failed(reply: Reply, said: str) -> None:
    with serving(lambda number, a, b: reply) as judge:
        start = time.monotonic()
        with pytest.raises(RequestFailed, match=said):
            ask(endpoint(judge.url, tries=2, timeout=0.5 if "0.5" in said else 30), _prompt())
        assert time.monotonic() - start < 15, "twice all drops are a minute"
    assert len(judge.seen) == 2


def test_a_server_that_says_nothing_is_left() -> None:
    def sleeps(number: int, a: str, b: str) -> Reply:
        time.sleep(1.5)
        return "VERDICT: A"

    with serving(sleeps) as judge, pytest.raises(RequestFailed, match="timed out"):
        ask(endpoint(judge.url, tries=1, timeout=0.2), _prompt())


def test_a_server_that_is_not_there() -> None:
    with serving(likes_the_first) as judge:
        gone = judge.url
    with pytest.raises(ConfigError, match=r"judge: .*no reply after 2 tries: .*Connection refused"):
        pairwise.check(endpoint(gone, tries=2), RUBRIC)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_is_final_and_shows_no_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    body = f'{{"error": {{"message": "Incorrect API key: {SECRET}"}}}}'.encode()
    with serving(lambda number, a, b: (status, body, {"Location": "/elsewhere"})) as judge:
        opened = endpoint(judge.url)
        with pytest.raises(ConfigError, match=f"refused with HTTP {status}: Incorrect") as raised:
            pairwise.check(opened, RUBRIC)
        found = pairwise.judge(opened, RUBRIC, PAIRS[:1], concurrency=1)
    assert found[0].points is None
    assert judge.seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert {path for path, _, _ in judge.seen} == {"/v1/chat/completions"}  # not /elsewhere
    assert len(judge.seen) == 3  # once each
    for text in (str(raised.value), repr(opened), found[0].why, *_traces(opened)):
        assert SECRET not in text
        assert "sk-" not in text


def test_where_the_key_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OTHER_KEY", "other")
    assert open_endpoint("https://a.example/v1", "m", key_name=None).key == SECRET
    assert open_endpoint("http://localhost:1/v1", "m", key_name=None).key == SECRET
    assert open_endpoint("http://[::1]:1", "m", key_name=None).key == SECRET
    assert open_endpoint("http://10.0.0.7:8000/v1", "m", key_name=None).key is None  # in the clear
    assert open_endpoint("http://10.0.0.7:8000/v1", "m", key_name="OTHER_KEY").key == "other"


@pytest.mark.parametrize(
    ("url", "model", "key", "said"),
    [
        ("ftp://a/v1", "m", None, "expected the address of an OpenAI-compatible endpoint"),
        ("file:///etc/passwd", "m", None, "expected the address"),
        ("a.example/v1", "m", None, "expected the address"),
        ("https://me:pw@a.example/v1", "m", None, "holds a user, a password or a query"),
        ("https://a.example/v1?key=pw", "m", None, "holds a user, a password or a query"),
        ("https://a.example/v1", None, None, "judge_model is not set. Name the model that a.exam"),
        ("https://a.example/v1", "m", "NOT_THERE", "there is no environment variable NOT_THERE"),
    ],
)
def test_what_is_no_endpoint(url: str, model: str | None, key: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        open_endpoint(url, model, key_name=key)
    assert "pw" not in str(raised.value)


def _prompt() -> str:
    return pairwise._prompt(RUBRIC, PAIRS[0])


def _traces(opened: Endpoint) -> list[str]:
    """What a traceback with local variables would show."""
    try:
        ask(opened._replace(url="http://127.0.0.1:9/v1", tries=1), "x")
    except RequestFailed as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        return list(shown.format())
    raise AssertionError("port 9 answered")
