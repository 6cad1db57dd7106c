"""`chat --serve` as a process, asked by the real `openai` client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxtune import chat
from jaxtune.server.bound_socket import KEY, Address, BoundSocket, parse_address
from jaxtune.terminal.text import printable

SAID = "Yes, you can"
# As in conftest.py, for processes: what was compiled once is not compiled again.
CACHE = Path(__file__).resolve().parents[2] / ".jax_cache"
_COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class Server:
    """A server process; `url` once it has said where it is."""

    def __init__(self, *argv: object, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "jaxtune.chat", *map(str, argv)]
        kept = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), **_COMPILED}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **kept, **(env or {})}
        )
        self.said = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"serving .* at (http\S+)/ ", line):
                self.url = found[1]
                break
        else:
            raise AssertionError(self.said)
        self.rest = threading.Thread(target=self._read, daemon=True)
        self.rest.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=300)
        self.rest.join(timeout=10)
        return code


@contextlib.contextmanager
def server(*argv: object, env: dict[str, str] | None = None) -> Iterator[Server]:
    found = Server(*argv, "--serve", "127.0.0.1:0", env=env)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@pytest.fixture(scope="module")
def both(parrot: Any, contrary: Any) -> Iterator[Server]:
    model = ("--model_name_or_path", parrot.folder, "--base", contrary.folder)
    with server(*model) as found:
        yield found


HI: Any = [{"role": "user", "content": "Can I?"}]


def test_the_openai_client_gets_what_chat_answers(
    both: Server, parrot: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streamed or not, greedy or drawn."""
    client = both.client()
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    for drawn in ({}, {"temperature": 20, "top_p": 0.9, "seed": 7, "max_tokens": 20}):
        flags = {"max_tokens": "max_new_tokens", "seed": "sample_seed"}
        words = [f"--{flags.get(name, name)}={value}" for name, value in drawn.items()]
        argv = ["--model_name_or_path", str(parrot.folder), "--prompt", "Can I?", *words]
        assert chat.main(argv) == 0
        expected = capsys.readouterr().out
        pieces = client.chat.completions.create(
            model="tuned", messages=HI, stream=True, stream_options={"include_usage": True}, **drawn
        )
        text, usage = "", None
        for piece in pieces:
            usage = piece.usage or usage
            text += "".join(choice.delta.content or "" for choice in piece.choices)
        whole = client.chat.completions.create(model="tuned", messages=HI, **drawn)
        assert f"{printable(text)}\n" == expected
        assert whole.choices[0].message.content == text
        assert usage == whole.usage
        assert (text == SAID) == (not drawn)
        if not drawn:
            assert whole.choices[0].finish_reason == "stop"
    said = client.chat.completions.create(model="base", messages=HI)
    assert said.choices[0].message.content == "Sorry"


def test_stop_and_length_and_a_prompt_as_it_stands(both: Server) -> None:
    client = both.client()
    cut = client.chat.completions.create(model="tuned", messages=HI, stop=[" you"])
    assert cut.choices[0].message.content == "Yes,"
    assert cut.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model="tuned", messages=HI, max_completion_tokens=1)
    assert short.choices[0].message.content == "Yes"
    assert short.choices[0].finish_reason == "length"
    # The parrot goes on from any newline as it does from the template's.
    text = client.completions.create(model="tuned", prompt="Well\n")
    assert text.choices[0].text == SAID


def test_a_blank_of_the_template_is_no_part_of_an_answer(vicuna: Any) -> None:
    """But of a text that goes on behind a prompt it is."""
    with server("--model_name_or_path", vicuna.folder) as found:
        client = found.client()
        ask = client.chat.completions.create
        assert ask(model="model", messages=HI).choices[0].message.content == SAID
        pieces = [p.choices[0].delta.content for p in ask(model="model", messages=HI, stream=True)]
        assert "".join(piece or "" for piece in pieces) == SAID
        assert next(filter(None, pieces)).startswith("Yes")
        text = client.completions.create(model="model", prompt="Well:")
        assert text.choices[0].text == f" {SAID}"


def test_what_the_client_raises(both: Server) -> None:
    client = both.client()
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is base, tuned"):
        ask(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="presence_penalty: cannot be served"):
        ask(model="tuned", messages=HI, presence_penalty=1)
    with pytest.raises(openai.BadRequestError, match="there are 256 positions"):
        ask(model="tuned", messages=[{"role": "user", "content": "laptop " * 300}])
    with pytest.raises(openai.BadRequestError, match="256 positions"):
        ask(model="tuned", messages=HI, max_tokens=256)
    with pytest.raises(openai.BadRequestError, match="no question"):
        ask(model="tuned", messages=[*HI, {"role": "assistant", "content": "Yes"}])
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="reads no tools"):
        ask(model="tuned", messages=HI, tools=[tool])
    assert ask(model="tuned", messages=HI).choices[0].message.content == SAID


def test_a_request_there_is_no_memory_for_ends_alone(parrot: Any, tmp_path: Path) -> None:
    """A model with more positions than any machine has room for; only so many are served."""
    folder = shutil.copytree(parrot.folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 2_000_000_000})
    )
    model = ("--model_name_or_path", folder, "--serve_length", 1_900_000_000)
    with server(*model) as found:
        ask = found.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match="there are 1900000000 positions"):
            ask(model="model", messages=HI, max_tokens=1_900_000_000)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="no memory for") as caught:
                ask(model="model", messages=HI, max_tokens=1_800_000_000)
            assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
            assert ask(model="model", messages=HI).choices[0].message.content == SAID
        assert found.end(signal.SIGTERM) == 0
        assert "--serve_length" in found.said


def test_many_at_a_time(both: Server) -> None:
    """The short form of benchmarks/serve.py: no error, everybody's own answer, nobody left out."""
    wrong: list[object] = []
    counts = dict.fromkeys(range(20), 0)
    end = time.monotonic() + 3

    def ask(number: int) -> None:
        try:
            with both.client() as client:
                while time.monotonic() < end:
                    name, expected = ("tuned", SAID) if number % 2 else ("base", "Sorry")
                    pieces = client.chat.completions.create(model=name, messages=HI, stream=True)
                    text = "".join(p.choices[0].delta.content or "" for p in pieces)
                    if text != expected:
                        wrong.append(text)
                    counts[number] += 1
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for kind in (0, 1):
        found = [count for number, count in counts.items() if number % 2 == kind]
        assert min(found) > 0
        assert max(found) - min(found) <= max(3, min(found))


def test_a_signal_lets_answers_end_and_leaves_with_0(parrot: Any) -> None:
    with server("--model_name_or_path", parrot.folder) as found:
        body = {"model": "model", "messages": HI, "stream": True}
        with httpx.stream(
            "POST", f"{found.url}/v1/chat/completions", json=body, timeout=60
        ) as response:
            found.process.send_signal(signal.SIGTERM)
            came = [line for line in response.iter_lines() if line]
        assert found.process.wait(timeout=300) == 0
        said = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in came[:-1]
        )
        assert (said, came[-1]) == (SAID, "data: [DONE]")
        found.rest.join(timeout=10)
        assert found.said.endswith("stopped\n")
        assert "Traceback" not in found.said


def test_a_key_from_the_environment_is_asked_for_and_never_shown(parrot: Any) -> None:
    env = {KEY: "sesame-4711"}
    with server("--model_name_or_path", parrot.folder, env=env) as found:
        with pytest.raises(openai.AuthenticationError):
            found.client("guess").models.list()
        assert found.client("sesame-4711").models.list().data[0].id == "model"
        assert found.end(signal.SIGINT) == 0
        assert found.said.endswith("stopped\n")
        assert "sesame" not in found.said


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert chat.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_refusals(
    parrot: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model_name_or_path", parrot.folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(capsys, *model, "--serve", f":{port}")
    assert f"127.0.0.1:{port} cannot be had: Address already in use" in said
    assert said.count("\n") == 1
    for odd in (":", "80a", ":70000", "localhost", "::1:80", "[::1]", ":-1"):
        assert "expected :PORT" in refusal(capsys, *model, "--serve", odd)
    assert "nowhere.invalid" in refusal(capsys, *model, "--serve", "nowhere.invalid:80")
    both = ("--serve", ":0", "--prompt", "Hi")
    assert "serve and prompt exclude each other" in refusal(capsys, *model, *both)
    with monkeypatch.context() as patch:
        patch.setenv(KEY, " ")
        assert f"{KEY}: is empty" in refusal(capsys, *model, "--serve", ":0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)
        said = refusal(capsys, *model, "--serve", ":0")
        assert "pip install 'jaxtune[serve]'" in said


def test_addresses() -> None:
    assert parse_address(":8000") == ("127.0.0.1", 8000)
    assert parse_address("8000") == ("127.0.0.1", 8000)
    assert parse_address("[::1]:0").url == "http://[::1]:0"
    assert parse_address("0.0.0.0:80").loopback is False
    assert parse_address("localhost:80").loopback is True


def test_another_host_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    from jaxtune.server import run as listen

    with socket.create_server(("0.0.0.0", 0)) as anywhere:
        at = Address("0.0.0.0", anywhere.getsockname()[1])
        listen._announce(BoundSocket(anywhere, at, None), "model")
        said = capsys.readouterr().err
        assert "whoever reaches 0.0.0.0 may ask, without a key" in said
        listen._announce(BoundSocket(anywhere, at, "sesame"), "model")
        said = capsys.readouterr().err
        assert "who has the key" in said
        assert "sesame" not in said
