"""The real huggingface_hub against a small hub in this process: cut off, resumed, refused."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from golden.cases import write_folder
from huggingface_hub import errors

from jaxtune.config import DataError, ModelError
from jaxtune.data import sources
from jaxtune.hf.load import open_model
from jaxtune.storage import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 100_000,  # more than two of the library's chunks
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"print('code')",
    "nested/config.json": b"{}",
    "more/named.jinja": b"{{ messages }}",
}
PATTERNS = ("*.json", "model*.safetensors")


class Hub(ThreadingHTTPServer):
    """A hub of one model, acme/tiny; `asked` is what came, as METHOD PATH [RANGE]."""

    daemon_threads = True
    cut_at: int | None = None  # the weights end there once, however much was announced
    broken = False  # the weights cannot be had

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        span = self.headers.get("Range", "")
        self.server.asked.append(f"{self.command} {path} {span}".strip())
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        error = {"acme/gone": ("404", "RepoNotFound"), "acme/gated": ("403", "GatedRepo")}.get(name)
        if path == "/":
            self._send(200, b"", body)
        elif error:
            self._send(int(error[0]), b"{}", body, {"X-Error-Code": error[1]})
        elif path.startswith("/api/models/acme/tiny/tree/"):
            self._json([self._entry(file) for file in FILES], body)
        elif path.startswith("/api/models/acme/tiny"):
            if path.endswith("/revision/v9"):
                self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": file} for file in FILES]
            self._json({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}, body)
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            self._file(path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/"), span, body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def _entry(self, file: str) -> dict[str, object]:
        digest = hashlib.sha1(FILES[file]).hexdigest()
        return {"type": "file", "path": file, "size": len(FILES[file]), "oid": digest}

    def _file(self, file: str, span: str, body: bool) -> None:
        content = FILES[file]
        if body and file == "model.safetensors" and self.server.broken:
            self._send(500, b"", body)
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        begin = 0
        if span:
            begin = int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = None
        if body and file == "model.safetensors" and self.server.cut_at is not None:
            cut, self.server.cut_at = self.server.cut_at - begin, None
        self._send(206 if span else 200, content[begin:], body, headers, cut)

    def _json(self, content: object, body: bool) -> None:
        self._send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        content: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content if cut is None else content[: max(0, cut)])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub_:
        thread = threading.Thread(target=hub_.serve_forever, daemon=True)
        thread.start()
        yield hub_
        hub_.shutdown()
        thread.join()


def test_a_subfolder_comes_where_a_pattern_names_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PATTERNS", (*PATTERNS, "more/*.jinja"))
    (found,) = _download(server.url, tmp_path, ("acme/tiny", None))
    assert found == ["config.json", "model.safetensors", "more", "more/named.jinja"]


CODE = """
import json, sys
from jaxtune.config import ModelError
from jaxtune.storage import hub
hub.ANSWER_SECONDS = 1.5
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = hub.download(name, revision=revision, patterns=sys.argv[2:])
        print(json.dumps(sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


def _download(url: str, home: Path, *wanted: tuple[str, str | None], **environment: str) -> list:
    """What a process of its own gets: the hub's address is read when its library is imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(wanted), *PATTERNS],
        env={
            **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1", **environment,
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_is_asked_for_comes_and_every_refusal_is_told(server, tmp_path):
    found, again, gone, gated, revision = _download(
        server.url,
        tmp_path,
        ("acme/tiny", None),
        ("acme/tiny", "v2"),
        ("acme/gone", None),
        ("acme/gated", None),
        ("acme/tiny", "v9"),
    )
    assert found == again == ["config.json", "model.safetensors"]
    gets = [asked for asked in server.asked if asked.startswith("GET /acme")]
    assert [asked.rpartition("/")[2] for asked in sorted(gets)] == found  # once each; no code
    assert gone == ("acme/gone: no such folder, nor is it on the hub (if private, set HF_TOKEN).")
    assert "acme/gated: a gated model. Accept its terms at https://huggingface.co/acme" in gated
    assert revision == "acme/tiny: the hub has no revision 'v9' of it."


def test_what_was_cut_off_is_resumed(server, tmp_path):
    """A cut connection goes on behind what has come; a failed download keeps its whole files."""
    weights = f"GET /acme/tiny/resolve/{COMMIT}/model.safetensors"
    half = len(FILES["model.safetensors"]) // 2
    server.cut_at = half
    (found,) = _download(server.url, tmp_path / "a", ("acme/tiny", None))
    assert found == ["config.json", "model.safetensors"]
    (file,) = tmp_path.glob("a/hub/models--acme--tiny/snapshots/*/model.safetensors")
    assert file.read_bytes() == FILES["model.safetensors"]
    first, second = (asked for asked in server.asked if asked.startswith(weights))
    assert first == weights
    assert 0 < int(second.removeprefix(f"{weights} bytes=").removesuffix("-")) <= half

    server.broken = True
    (failed,) = _download(server.url, tmp_path, ("acme/tiny", None))
    assert "downloading it from the hub failed" in failed
    assert "Files that have come whole are kept: run the same command again." in failed
    server.broken = False
    server.asked.clear()
    (found,) = _download(server.url, tmp_path, ("acme/tiny", None))
    assert found == ["config.json", "model.safetensors"]
    assert [asked for asked in server.asked if asked.startswith("GET /acme")] == [weights]

    with contextlib.closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()  # takes the connection and never answers
        start = time.monotonic()
        cached, absent = _download(
            f"http://127.0.0.1:{deaf.getsockname()[1]}",
            tmp_path,
            ("acme/tiny", None),
            ("acme/other", None),
        )
    assert cached == found  # from the cache alone
    assert absent.startswith("acme/other: no such folder, and the hub cannot be reached nor is")
    assert time.monotonic() - start < 15


# -- what no small server shows ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be asked .* nor is the model"),
        (errors.RepositoryNotFoundError, "no such folder, nor is it on the hub"),
        (errors.GatedRepoError, "a gated model. Accept its terms"),
        (errors.RevisionNotFoundError, "the hub has no revision 'v2' of it"),
        (errors.HFValidationError("no id"), "no such folder, and not a hub id"),
        (OSError(28, "No space left"), "downloading it from the hub failed: No space left. Files"),
    ],
)
def test_errors_are_told(monkeypatch, error, message):
    def refuse(*args, **options):
        response = SimpleNamespace(headers={}, request=None)
        raise error("refused", response=response) if isinstance(error, type) else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        hub.download("acme/model", revision="v2", patterns=PATTERNS)


@pytest.mark.parametrize("name", ["./model", "../up", "a/b/c", "acme/", "", "a b", "/abs/model"])
def test_a_path_is_no_id(name):
    with pytest.raises(ModelError, match="no such folder, and not a hub id"):
        hub.download(name, revision=None, patterns=PATTERNS)


def test_a_model_comes_without_pickles_and_without_weights_where_none_are_wanted(
    monkeypatch, tmp_path
):
    asked = {}

    def download(name, *, revision, allow_patterns, **options):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(write_folder("llama", tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("acme/model", revision="v2").folder == tmp_path
    assert (asked["name"], asked["revision"]) == ("acme/model", "v2")
    assert "model*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["patterns"])
    open_model("acme/model", weights=False)
    assert "model*.safetensors" not in asked["patterns"]


def test_offline_for_real():
    with pytest.raises(ModelError, match=r"nowhere/nothing: no such folder, and the hub cannot be"):
        open_model("nowhere/nothing")


def test_a_mistyped_data_file_is_told_in_seconds_without_a_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    pytest.importorskip("datasets")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"data/trian: no such file .*the hub cannot"):
        sources.find("data/trian")
    assert time.monotonic() - start < hub.ANSWER_SECONDS + 3
