"""Limits of connections before their first request, which is before any key is checked.

uvicorn waits for the head of a request for ever. Here it has `_HEAD_SECONDS`, and when there are
too many connections without a request the one that has waited longest makes room for the next.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 20.0  # for the whole head of a request
_IDLE = 512  # connections; a process often may have 1,024 files open


class Connection(H11Protocol):
    """A uvicorn connection. `idle` are those of one server that have no request."""

    idle: dict[Connection, asyncio.TimerHandle | None]  # the one that waits longest is first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.idle) >= _IDLE:
            next(iter(self.idle)).end()
        self._waits()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._rests():
            self._no_longer_waits()
        elif self.idle.get(self) is None:  # a head has begun
            self._waits()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or not self._rests():
            return
        if self.conn.their_state is h11.IDLE:
            self.idle.setdefault(self, None)  # uvicorn lets it go if nothing comes for a while
        else:
            self._waits()  # for the rest of a body that was refused

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_longer_waits()
        super().connection_lost(exc)

    def end(self) -> None:
        self._no_longer_waits()
        self.timeout_keep_alive_handler()

    def _rests(self) -> bool:
        """Tell whether no request is read or answered: before one, or after an early answer."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _waits(self) -> None:
        self.idle[self] = self.loop.call_later(_HEAD_SECONDS, self.end)

    def _no_longer_waits(self) -> None:
        timer = self.idle.pop(self, None)
        if timer is not None:
            timer.cancel()


def connection_class() -> type[Connection]:
    """Make the class of one server's connections."""
    return type("Connection", (Connection,), {"idle": {}})
