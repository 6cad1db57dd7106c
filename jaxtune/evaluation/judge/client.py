"""Requests to an OpenAI-compatible endpoint, repeated where that may help.

The key goes into one header, to the host that was named, and nowhere else: redirects are not
followed, and messages of an endpoint are shown without it.
"""

from __future__ import annotations

import contextlib
import email.message
import http.client
import ipaddress
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from jaxtune.config import ConfigError, JaxtuneError

DEFAULT_KEY = "OPENAI_API_KEY"
_AGAIN = {408, 409, 425, 429}  # and every 5xx: the same request may do better later
_LARGEST = 2**20  # bytes of a reply
_LONGEST_WAIT = 60.0  # seconds, also when Retry-After asks for more
_SHOWN = 300  # letters of an endpoint's message


class RequestFailed(JaxtuneError):
    """A request that the endpoint calls wrong, or without a usable reply after all its tries."""


class Endpoint(NamedTuple):
    """An endpoint whose `url` ends in /chat/completions. `timeout` is seconds for one try,
    `first_wait` seconds before the second; it doubles from there."""

    url: str
    model: str
    key: str | None = None
    temperature: float | None = 0.0
    timeout: float = 60.0
    tries: int = 5
    first_wait: float = 1.0

    def __repr__(self) -> str:  # a traceback shows no key
        return f"Endpoint({self.url!r}, {self.model!r})"


def open_endpoint(url: str, model: str | None, *, key_name: str | None, **more: Any) -> Endpoint:
    """Check an address with or without /chat/completions, and find its key.

    `key_name` is the environment variable that holds the key; None = `DEFAULT_KEY` where it is set,
    but not over plain http to another machine.

    Raises `ConfigError`.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "judge: expected the address of an OpenAI-compatible endpoint, as "
            "https://api.openai.com/v1 or http://127.0.0.1:8000/v1."
        )
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "judge: the address holds a user, a password or a query, which would end up in logs. "
            "Put the key into an environment variable, and name that with judge_key_env."
        )
    if not model:
        raise ConfigError(f"judge_model is not set. Name the model that {parts.hostname} serves.")
    if key_name is not None and not os.environ.get(key_name):
        raise ConfigError(
            f"judge_key_env: there is no environment variable {key_name}. Set it to the key, or "
            "leave judge_key_env out for an endpoint without one."
        )
    safe = parts.scheme == "https" or _is_here(parts.hostname)
    key = os.environ.get(key_name or DEFAULT_KEY) if key_name or safe else None
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    whole = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return Endpoint(whole, model, key or None, **more)


def ask(endpoint: Endpoint, prompt: str) -> str:
    """Send one message of a user and return the reply. Raises `RequestFailed`."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt}],
    }
    if endpoint.temperature is not None:
        body["temperature"] = endpoint.temperature
    wait, why = endpoint.first_wait, ""
    for number in range(endpoint.tries):
        if number:
            time.sleep(wait * random.uniform(0.75, 1.25))
        asked_wait = None
        try:
            return _text(_post(endpoint, json.dumps(body).encode()))
        except urllib.error.HTTPError as error:
            detail = _message(error, endpoint)
            if error.code not in _AGAIN and error.code < 500:
                raise RequestFailed(
                    f"{endpoint.url}: refused with HTTP {error.code}{detail}"
                ) from None
            why, asked_wait = f"HTTP {error.code}{detail}", _retry_after(error.headers)
        except (OSError, http.client.HTTPException) as error:  # no route, timeouts, torn replies
            reason = getattr(error, "reason", None) or error
            why = f"{type(error).__name__}: {reason}"
        except ValueError as error:
            why = f"the reply is no chat completion: {error}"
        wait = min(_LONGEST_WAIT, max(2 * wait if number else wait, asked_wait or 0))
    shown = _without_key(why, endpoint)[:_SHOWN]
    raise RequestFailed(f"{endpoint.url}: no reply after {endpoint.tries} tries: {shown}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host: it is an answer like any other refusal."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _post(endpoint: Endpoint, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(endpoint.url, body, headers)
    here = _is_here(urllib.parse.urlsplit(endpoint.url).hostname or "")
    handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if here else [])]
    deadline = time.monotonic() + endpoint.timeout
    content = b""
    with urllib.request.build_opener(*handlers).open(request, timeout=endpoint.timeout) as reply:
        # A socket's timeout is of each read: a reply in drops would never end.
        while piece := reply.read1(2**16):
            content += piece
            if len(content) > _LARGEST:
                raise ValueError(f"it is longer than {_LARGEST} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole reply within {endpoint.timeout:g} seconds")
        if reply.length:
            raise http.client.IncompleteRead(content, reply.length)
    return content


def _text(reply: bytes) -> str:
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, RecursionError):
        raise ValueError("it has no choices[0].message.content") from None
    if not isinstance(text, str):
        raise ValueError(f"content is {type(text).__name__}, not text")
    return text


def _message(error: urllib.error.HTTPError, endpoint: Endpoint) -> str:
    """Read what came with a status, on one line."""
    try:
        with error:
            text = error.read(_LARGEST).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    line = _without_key(" ".join(text.split()), endpoint)[:_SHOWN]
    return f": {line}" if line else f" ({error.reason})"


def _without_key(text: str, endpoint: Endpoint) -> str:
    return text.replace(endpoint.key, "***") if endpoint.key else text


def _retry_after(headers: email.message.Message | None) -> float | None:
    """Read seconds; a date, which few endpoints send, counts as none."""
    try:
        return float((headers or {})["Retry-After"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
