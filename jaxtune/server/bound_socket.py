"""The socket of `--serve ADDRESS` and its API key. Needs no library of a server."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import NamedTuple

from jaxtune.config import ConfigError

KEY = "JAXTUNE_API_KEY"
_LOOPBACK = "127.0.0.1"


class Address(NamedTuple):
    """A host and a port."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class BoundSocket(NamedTuple):
    """A socket that is bound, and the API key that requests need, if any."""

    socket: socket.socket
    address: Address
    key: str | None


def bind_socket(text: str) -> BoundSocket:
    """Bind the address of `--serve`, with the key of the environment.

    Raises: ConfigError, also if what a server needs is not installed.
    """
    at = parse_address(text)
    key = api_key()
    check_installed()
    return BoundSocket(*bind(at), key)


def parse_address(text: str) -> Address:
    """Parse `:8000` or `8000`, which is loopback, or `HOST:PORT`. Port 0 is any that is free.

    >>> parse_address(":8000")
    Address(host='127.0.0.1', port=8000)
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not port.isascii()
        or not port.isdigit()
        or int(port) > 65535
        or (":" in host) != (bare != host)
    ):
        raise ConfigError(
            f"serve: expected :PORT, HOST:PORT or [ADDRESS]:PORT, the port 0 to 65535; "
            f"got '{text}'."
        )
    return Address(bare or _LOOPBACK, int(port))


def bind(address: Address) -> tuple[socket.socket, Address]:
    """Bind an address; port 0 becomes one that is free. Raises: ConfigError."""
    try:
        info = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(info[0], info[1], info[2])
    except OSError as error:
        raise ConfigError(f"serve: {address.host}: {error.strerror or error}.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(info[4])
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"serve: {address.host}:{address.port} cannot be had: {error.strerror}. "
            "Give another port, or 0 for any that is free."
        ) from None
    return bound, address._replace(port=bound.getsockname()[1])


def api_key() -> str | None:
    """Read the key from the environment, not from a flag: every user sees command lines."""
    key = os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
        raise ConfigError(f"{KEY}: is empty or not plain text. Set a key, or unset it.")
    return None if key is None else key.strip()


def check_installed() -> None:
    """Refuse early, with the line that installs what a server needs. Raises: ConfigError."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "serve: needs starlette and uvicorn. Run: pip install 'jaxtune[serve]'"
        ) from None


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
