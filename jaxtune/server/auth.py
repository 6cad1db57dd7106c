"""Who may ask: checked before a request reaches anything else.

- On loopback the Host header must be a name of this machine's loopback: a web page whose own name
  was pointed here (DNS rebinding) has another.
- A request that a browser makes for another site's page carries that site as its Origin: refused.
- With a key, everything but the page and /health needs it.

What a browser is told is the same everywhere: no other site may read, embed or sniff an answer.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtune.server.openai_schema import DENIED, Refused

OPEN = ("/", "/health")  # without a key
_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Door(NamedTuple):
    """`loopback`: only this machine can reach it. `key`: None lets everybody in who can."""

    loopback: bool
    key: str | None = None


def is_loopback(host: str) -> bool:
    """
    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(door: Door, path: str, headers: Headers) -> None:
    """Raises `Refused`."""
    hosts = headers.getlist("host")
    name = _name(hosts[0]) if len(hosts) == 1 else None
    if name is None:
        raise Refused(400, "expected one Host header, with the name of this server.")
    if door.loopback and not is_loopback(name):
        raise Refused(403, "Host: this server answers to localhost alone.", code="host")
    origin = headers.get("origin")
    if origin is not None and _place(origin) != hosts[0].lower():
        raise Refused(403, "Origin: pages of other sites may not ask this server.", code="origin")
    if door.key is not None and path not in OPEN:
        kind, _, given = headers.get("authorization", "").partition(" ")
        fits = hmac.compare_digest(given.strip().encode(), door.key.encode())
        if kind.lower() != "bearer" or not fits:
            raise Refused(
                401,
                "expected 'Authorization: Bearer KEY' with the key of this server.",
                kind=DENIED,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _name(host: str) -> str | None:
    """`localhost:8000` -> localhost, `[::1]:8000` -> ::1; None for what is no host."""
    if not host or any(c in host for c in "/@?#\\ \t,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _place(origin: str) -> str | None:
    """`http://localhost:8000` -> localhost:8000; None for what is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class Guard:
    """The application behind `door`, and the headers that every response carries."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        app = self.app
        if scope["type"] == "http":
            try:
                check(self.door, scope["path"], Headers(scope=scope))
            except Refused as refusal:
                app = as_response(refusal)
        await app(scope, receive, send_with_headers)


def as_response(refusal: Refused) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
