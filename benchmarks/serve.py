"""Many clients at a time on one server: errors, order, requests a second.

    python benchmarks/serve.py [--model FOLDER] [--clients 50] [--seconds 60] [--slots 8]

Starts `python -m jaxtune.chat --serve` in a process of its own on a free port of this machine, with
FOLDER (default: the quickstart's model, weights random by seed), asks each question once alone, and
then lets every client, the real `openai` one, stream one answer after the other. Counted are

- errors: anything the client raises, and any answer that is not, letter by letter, the one that
  the same question got alone;
- order: a request is overtaken when another, whose first byte was sent at least 50 ms after its own
  last byte, has its first token at least 50 ms earlier. The server is first come, first served, so
  nobody should be;
- requests per client: the most and the fewest that one client had answered.

Before that the clients ask for `--warm` seconds that are not counted: prompts are read in batches
of several shapes, and each is compiled when it first comes. Client and server share this machine's
cores; what the clients take is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "model"
QUESTIONS = [
    "Can I return a laptop that I opened?",
    "My order has not come.",
    "What does shipping cost?",
    "The screen is broken, and I have lost the receipt. What can I do about it now?",
    "Hello",
    "How long is the warranty of a phone that was bought in spring?",
    "Do you have a shop?",
]
CLEARLY = 0.05  # seconds; below, two requests may reach the server, and two tokens us, either way


class Asked(NamedTuple):
    client: int
    begun: float  # when it began to be sent
    sent: float
    first: float
    ended: float
    tokens: int


def start(args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "jaxtune.chat", "--model_name_or_path", str(args.model)]
    words += ["--serve", "127.0.0.1:0", "--serve_slots", str(args.slots)]
    words += ["--init", "random"] if args.model == QUICKSTART else []
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* at (http\S+)/ ", line):
            return process, f"{found[1]}/v1"
        print(line, end="", file=sys.stderr)
    raise SystemExit("the server did not start")


class Client(NamedTuple):
    """`times`: when its newest request began to be sent, and when the last byte was."""

    openai: openai.AsyncOpenAI
    times: dict[str, float]


def client(url: str) -> Client:
    times: dict[str, float] = {}

    async def note(event: str, _: Any) -> None:
        times[event] = time.monotonic()

    async def trace(request: httpx.Request) -> None:
        request.extensions["trace"] = note

    http = httpx.AsyncClient(event_hooks={"request": [trace]}, timeout=600)
    made = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
    return Client(made, times)


async def ask(client: Client, question: str, most: int) -> tuple[str, float, int]:
    """The answer, when its first token came, and how many tokens it has."""
    messages: Any = [{"role": "user", "content": question}]
    options: Any = {"include_usage": True}
    pieces = await client.openai.chat.completions.create(
        model="model", messages=messages, max_tokens=most, stream=True, stream_options=options
    )
    text, first, tokens = "", 0.0, 0
    async for piece in pieces:
        for choice in piece.choices:
            if choice.delta.content or choice.finish_reason:
                first = first or time.monotonic()
            text += choice.delta.content or ""
        if piece.usage:
            tokens = piece.usage.completion_tokens
    return text, first, tokens


async def measure(url: str, args: argparse.Namespace) -> tuple[list[Asked], list[str], float]:
    clients = [client(url) for _ in range(args.clients)]
    # Twice: the second time everything is compiled.
    await asyncio.gather(*(ask(clients[0], q, args.max_tokens) for q in QUESTIONS))
    expected = {q: (await ask(clients[0], q, args.max_tokens))[0] for q in QUESTIONS}
    found: list[Asked] = []
    wrong: list[str] = []
    began = time.monotonic() + args.warm

    async def go(number: int, client: Client) -> None:
        for turn in itertools.count():
            if time.monotonic() - began > args.seconds:
                return
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            try:
                text, first, tokens = await ask(client, question, args.max_tokens)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
                continue
            if text != expected[question]:
                wrong.append(f"another answer to {question!r}")
            begun = client.times["http11.send_request_headers.started"]
            sent = client.times["http11.send_request_body.complete"]
            if begun >= began:
                found.append(Asked(number, begun, sent, first, time.monotonic(), tokens))

    await asyncio.gather(*(go(number, client) for number, client in enumerate(clients)))
    return found, wrong, time.monotonic() - began


def overtaken(found: list[Asked]) -> list[int]:
    """For each request, how many that were sent clearly later had their first token earlier."""
    by_begun = sorted(found, key=lambda asked: asked.begun)
    begun = [asked.begun for asked in by_begun]
    counts = []
    for asked in by_begun:
        later = bisect.bisect_left(begun, asked.sent + CLEARLY)
        until = bisect.bisect_left(begun, asked.first)
        counts.append(sum(other.first < asked.first - CLEARLY for other in by_begun[later:until]))
    return counts


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=QUICKSTART)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm", type=float, default=15.0)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    process, url = start(args)
    try:
        found, wrong, seconds = asyncio.run(measure(url, args))
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    per_client = [sum(a.client == number for a in found) for number in range(args.clients)]
    passed = overtaken(found)
    waits = [asked.first - asked.sent for asked in found]
    server = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = resource.getrusage(resource.RUSAGE_SELF)
    print(f"| clients | {args.clients}, {args.slots} answered at a time |\n|---|--:|")
    print(f"| requests | {len(found):,} in {seconds:.1f} s |")
    print(f"| requests a second | {len(found) / seconds:.1f} |")
    print(f"| tokens a second | {sum(a.tokens for a in found) / seconds:,.0f} |")
    print(f"| errors and other answers | {len(wrong)} |")
    print(f"| requests per client, fewest to most | {min(per_client)} to {max(per_client)} |")
    print(
        f"| first token after, median, p99, longest | {at(waits, 0.5):.2f}, {at(waits, 0.99):.2f}, "
        f"{max(waits):.2f} s |"
    )
    print(f"| requests overtaken | {sum(p > 0 for p in passed)}, at most by {max(passed)} |")
    print(f"| CPU seconds, server and clients | {server.ru_utime + server.ru_stime:.0f} and "
          f"{ours.ru_utime + ours.ru_stime:.0f} |")  # fmt: skip
    print(f"| the server's exit code | {code} |")
    for each in wrong[:5]:
        print(each, file=sys.stderr)
    return int(bool(wrong) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
