"""Servers of others that speak the real protocols, on the loopback: moto's S3, an emulator of GCS.

Between them and us stands a wire that can be told to break.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gcsfs.core
import pytest
import s3fs
from multihost import runs
from multihost.runs import free_port

from jaxtune.storage import object_store

SERVERS = {
    "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p"),
    "gs": ("-m", "gcp_storage_emulator", "start", "--in-memory", "-H", "127.0.0.1", "--port"),
}


class Wire(ThreadingHTTPServer):
    """Hands every request on. `fault(method, path)` says what becomes of it instead: None for
    nothing, a status for an answer of that kind, "cut" for half of the real answer, "gone" for
    none at all. `asked` is what came."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Hand)
        self.port = port
        self.asked: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], object] = lambda method, path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left


class _Hand(BaseHTTPRequestHandler):
    server: Wire
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        self.server.asked.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        if fault == "gone":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        other = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        dropped = ("transfer-encoding", "content-length", "expect")
        kept = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        other.request(self.command, self.path, body=body, headers=kept)
        answer = other.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = len(data)
        if self.command == "HEAD":
            length = int(answer.getheader("Content-Length") or 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.close_connection = True
        other.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _pass_on


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs read: a model, examples, a config."""
    return runs.make_material(tmp_path_factory.mktemp("material") / "m")


@pytest.fixture(scope="session")
def ports() -> Iterator[dict[str, int]]:
    """Where the servers listen, by scheme."""
    found, running = {}, []
    for scheme, words in SERVERS.items():
        found[scheme] = free_port()
        command = [sys.executable, *words, str(found[scheme])]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running.append(subprocess.Popen(command, **quiet))
    try:
        for port in found.values():
            _wait_for(port)
        yield found
    finally:
        for server in running:
            server.kill()
            server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no server at port {port}")


@pytest.fixture(scope="session")
def wires(ports: dict[str, int]) -> dict[str, Wire]:
    return {scheme: Wire(port) for scheme, port in ports.items()}


@pytest.fixture
def wire(wires: dict[str, Wire], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Wire]]:
    """Everything that speaks to a store from here on does so over the wires."""
    values = {
        "AWS_ENDPOINT_URL": wires["s3"].url, "AWS_ACCESS_KEY_ID": "us", "NO_PROXY": "*",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": wires["gs"].url, "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_PAUSES", (0.05, 0.1))
    # The library waits half a minute in all before it gives up.
    at_once = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.01 * seconds))
    monkeypatch.setattr("gcsfs.retry.asyncio", at_once)
    _forget()
    yield wires
    for each in wires.values():
        each.fault = lambda method, path: None
    _forget()


def _forget() -> None:
    object_store._system.cache_clear()
    for system in (gcsfs.core.GCSFileSystem, s3fs.S3FileSystem):
        system.clear_instance_cache()


@pytest.fixture
def s3(wire: dict[str, Wire]) -> str:
    """The URL of a new bucket."""
    name = f"b{uuid.uuid4().hex[:12]}"
    object_store._system("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def gs(wire: dict[str, Wire]) -> str:
    name = f"b{uuid.uuid4().hex[:12]}"
    body = f'{{"name": "{name}"}}'
    made = http.client.HTTPConnection("127.0.0.1", wire["gs"].port)
    headers = {"Content-Type": "application/json"}
    made.request("POST", "/storage/v1/b?project=test", body=body, headers=headers)
    assert made.getresponse().status == 200
    return f"gs://{name}"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["memory", "s3", "gs"])
def place(request: pytest.FixtureRequest) -> str:
    """The URL of a folder that is empty, in each kind of store."""
    found: str = request.getfixturevalue(request.param)
    return f"{found}/some/where"


@pytest.fixture(autouse=True)
def _own_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> os.PathLike[str]:
    """What is fetched by one test is not there for the next."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JAXTUNE_CACHE", str(folder))
    return folder
