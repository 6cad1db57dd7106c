"""Loaded models, a socket, a server on it, and signals: from `--serve ADDRESS` to the last answer.

The models run in the calling thread, which hears the signals; uvicorn has a thread of its own.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jaxtune.cli import note
from jaxtune.inference.generate import TextGenerator
from jaxtune.inference.kv_capacity import longest_text
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.server.app import ServedModel, application
from jaxtune.server.auth import AccessPolicy
from jaxtune.server.bound_socket import KEY, BoundSocket
from jaxtune.server.connections import connection_class
from jaxtune.server.prompts import chat_prompt, completion_prompt
from jaxtune.server.scheduler import Scheduler, ServeSettings

__all__ = ["ServeSettings", "serve", "start"]


def start(
    models: Mapping[str, GenerationModel],
    codec: TextCodec,
    settings: ServeSettings,
    bound: BoundSocket,
    *,
    length: int | None = None,
) -> None:
    """Serve until a signal. A model alone with an unmerged adapter is served beside its base.

    `length` is the most tokens of prompt and answer; None is what memory allows.
    Raises: ConfigError if no model has so many positions."""
    names = list(models)
    title = "/".join(Path(models[names[-1]].name).parts[-2:])
    if len(models) == 1 and models[names[0]].lora is not None:
        models = {"base": models[names[0]].without_adapters(), "adapter": models[names[0]]}
    longest = longest_text(list(models.values()), settings.slots, length)
    served = [
        ServedModel(
            name,
            min(longest, model.spec.max_positions),
            partial(chat_prompt, model, codec),
            partial(completion_prompt, model, codec),
        )
        for name, model in models.items()
    ]
    generators = {
        name: TextGenerator(model, codec, slots=settings.slots, max_length=longest)
        for name, model in models.items()
    }
    scheduler = Scheduler(generators, settings)
    policy = AccessPolicy(bound.address.loopback, bound.key)
    serve(application(served, scheduler, policy, title), scheduler, bound, ", ".join(models))


def serve(app: ASGIApp, scheduler: Scheduler, bound: BoundSocket, models: str) -> None:
    """Serve until a signal, after which running requests end or are refused.

    `models` are named in the announcement.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=connection_class(),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            # Its errors quote what was raised, and that may quote a prompt; `app` says where.
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )
    )
    failed: list[BaseException] = []

    def http() -> None:
        try:
            server.run(sockets=[bound.socket])
        except BaseException as error:
            failed.append(error)
        finally:
            scheduler.close()
            scheduler.close()  # at once: nobody is there to be answered

    def stop(*_: Any) -> None:
        # uvicorn would wait for answers in its own way: it stops when the scheduler is empty.
        scheduler.close()

    thread = threading.Thread(target=http, name="http", daemon=True)
    with _signals(stop):
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not failed:
            _announce(bound, models)
        try:
            scheduler.run()
        finally:
            server.should_exit = True
            thread.join(timeout=10)
    if failed:
        raise failed[0]
    note("stopped")


def _announce(bound: BoundSocket, models: str) -> None:
    at = bound.address
    note(f"serving {models} at {at.url}/ (API: {at.url}/v1)")
    if not at.loopback:
        who = (
            "who has the key" if bound.key else f"without a key; {KEY} in the environment sets one"
        )
        note(f"not only for this machine: whoever reaches {at.host} may ask, {who}")


@contextlib.contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop`; in a notebook's other thread nothing can be heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
