"""Access: checked before a request reaches anything else.

- On loopback the Host header must be a name of this machine's loopback: a web page whose own name
  was pointed here (DNS rebinding) has another.
- A request that a browser makes for another site's page carries that site as its Origin: refused.
- With a key, everything but the page and /health needs it.

The headers for a browser are the same everywhere: no other site may read, embed or sniff an answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxtune.server.bound_socket import is_loopback
from jaxtune.server.openai_schema import DENIED, Refused

OPEN = ("/", "/health")  # without a key
_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class AccessPolicy(NamedTuple):
    """A rule of access: `loopback` is this machine only; without `key` no request needs one."""

    loopback: bool
    key: str | None = None


def check(policy: AccessPolicy, path: str, headers: Headers) -> None:
    """Raise `Refused`."""
    hosts = headers.getlist("host")
    name = _name(hosts[0]) if len(hosts) == 1 else None
    if name is None:
        raise Refused(400, "expected one Host header, with the name of this server.")
    if policy.loopback and not is_loopback(name):
        raise Refused(403, "Host: this server answers to localhost alone.", code="host")
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) != hosts[0].lower():
        raise Refused(403, "Origin: pages of other sites may not ask this server.", code="origin")
    if policy.key is not None and path not in OPEN:
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        fits = hmac.compare_digest(credentials.strip().encode(), policy.key.encode())
        if kind.lower() != "bearer" or not fits:
            raise Refused(
                401,
                "expected 'Authorization: Bearer KEY' with the key of this server.",
                kind=DENIED,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _name(host: str) -> str | None:
    """Parse a host: `localhost:8000` -> localhost, `[::1]:8000` -> ::1, None for another text."""
    if not host or any(c in host for c in "/@?#\\ \t,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _host_of(origin: str) -> str | None:
    """Parse an origin: `http://localhost:8000` -> localhost:8000, None for another text."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class AuthMiddleware:
    """A middleware that checks `policy`, and adds the headers that every response has."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

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
                check(self.policy, scope["path"], Headers(scope=scope))
            except Refused as refusal:
                app = as_response(refusal)
        await app(scope, receive, send_with_headers)


def as_response(refusal: Refused) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
