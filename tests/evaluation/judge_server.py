"""A judge on this machine whose opinions are known: an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes, dict[str, str]] | str
_ANSWERS = re.compile(r"<answer_A>\n(.*)\n</answer_A>.*<answer_B>\n(.*)\n</answer_B>", re.DOTALL)


class Judge:
    """`opinion(number of the request, answer A, answer B)` is a reply's text, or a status with a
    body and headers. `seen` are (path, headers, body) of every request."""

    def __init__(self, opinion: Callable[[int, str, str], Reply]) -> None:
        self.opinion = opinion
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""


@contextlib.contextmanager
def serving(opinion: Callable[[int, str, str], Reply]) -> Iterator[Judge]:
    judge = Judge(opinion)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                number = len(judge.seen)
                judge.seen.append((self.path, dict(self.headers), body))
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            found = _ANSWERS.search(body["messages"][0]["content"])
            time.sleep(0.01)  # so that those who ask at once meet here
            reply = judge.opinion(number, found[1], found[2]) if found else "no answers"
            if isinstance(reply, str):
                text = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                reply = (200, json.dumps(text).encode(), {})
            status, sent, headers = reply
            with judge.lock:
                judge.at_once -= 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if "X-Drops" not in headers:
                    self.wfile.write(sent)
                    return
                for start in range(0, len(sent), 20):
                    self.wfile.write(sent[start : start + 20])
                    time.sleep(float(headers["X-Drops"]))

        def do_GET(self) -> None:  # what a followed redirect would become
            with judge.lock:
                judge.seen.append((self.path, dict(self.headers), {}))
            self.send_error(500)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def likes_the_first(number: int, a: str, b: str) -> str:
    return "The first.\nVERDICT: A"


def likes_the_longer(number: int, a: str, b: str) -> str:
    longer = "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"Longer is better.\nVERDICT: {longer}"
