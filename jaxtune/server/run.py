"""A socket, a server on it, and signals: from `--serve ADDRESS` to the last answer.

The models run in the calling thread, which hears the signals; uvicorn has a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from starlette.types import ASGIApp

from jaxtune.cli import note
from jaxtune.config import ConfigError
from jaxtune.server.auth import is_loopback
from jaxtune.server.scheduler import Desk

KEY = "JAXTUNE_API_KEY"
_LOOPBACK = "127.0.0.1"


class Address(NamedTuple):
    host: str
    port: int

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class Taken(NamedTuple):
    """A socket that is bound, and the key that is asked for, if any."""

    socket: socket.socket
    address: Address
    key: str | None


def take(given: str) -> Taken:
    """What `--serve` and the environment say. Raises `ConfigError` when it cannot be had, or when
    what a server needs is not installed."""
    at = address(given)
    key = api_key()
    check_installed()
    return Taken(*bind(at), key)


def address(given: str) -> Address:
    """`:8000` or `8000` is loopback; `HOST:PORT` another. Port 0 is any that is free.

    >>> address(":8000")
    Address(host='127.0.0.1', port=8000)
    """
    host, _, port = given.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not port.isascii()
        or not port.isdigit()
        or int(port) > 65535
        or (":" in host) != (bare != host)
    ):
        raise ConfigError(
            f"serve: expected :PORT, HOST:PORT or [ADDRESS]:PORT, the port 0 to 65535; "
            f"got '{given}'."
        )
    return Address(bare or _LOOPBACK, int(port))


def bind(wanted: Address) -> tuple[socket.socket, Address]:
    """Taken before any model is loaded. Raises `ConfigError` when it cannot be had."""
    try:
        found = socket.getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(found[0], found[1], found[2])
    except OSError as error:
        raise ConfigError(f"serve: {wanted.host}: {error.strerror or error}.") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(found[4])
    except OSError as error:
        taken.close()
        raise ConfigError(
            f"serve: {wanted.host}:{wanted.port} cannot be had: {error.strerror}. "
            "Give another port, or 0 for any that is free."
        ) from None
    return taken, wanted._replace(port=taken.getsockname()[1])


def api_key() -> str | None:
    """From the environment, never from a flag: command lines are seen by every user."""
    key = os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
        raise ConfigError(f"{KEY}: is empty or not plain text. Set a key, or unset it.")
    return None if key is None else key.strip()


def check_installed() -> None:
    """Before a model is loaded. Raises `ConfigError` with the line that installs what is needed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "serve: needs starlette and uvicorn. Run: pip install 'jaxtune[serve]'"
        ) from None


def serve(app: ASGIApp, desk: Desk, taken: Taken, models: str) -> None:
    """Until a signal: then no more is taken, what is being answered ends or is told, and this
    returns. `models` are named in the announcement."""
    import uvicorn

    from jaxtune.server.connections import lines

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=lines(),
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
            server.run(sockets=[taken.socket])
        except BaseException as error:
            failed.append(error)
        finally:
            desk.close()
            desk.close()  # at once: nobody is there to be answered

    def stop(*_: Any) -> None:
        # uvicorn would wait for answers in its own way: it is told when the desk is empty.
        desk.close()

    thread = threading.Thread(target=http, name="http", daemon=True)
    with _signals(stop):
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not failed:
            _announce(taken, models)
        try:
            desk.run()
        finally:
            server.should_exit = True
            thread.join(timeout=10)
    if failed:
        raise failed[0]
    note("stopped")


def _announce(taken: Taken, models: str) -> None:
    at = taken.address
    note(f"serving {models} at {at.url}/ (API: {at.url}/v1)")
    if not at.loopback:
        who = (
            "who has the key" if taken.key else f"without a key; {KEY} in the environment sets one"
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
