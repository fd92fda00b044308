"""Clients that have closed their own side of a connection: each may still read its response, or has left.

Both look the same until something is sent to the client: the system of one that has left answers with a reset.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from aiohttp import web

PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Any number of informational responses may come before a response: https://www.rfc-editor.org/rfc/rfc9110#section-15.2"""

PROBES_S = (0.1, 5.0, 15.0, 45.0, 135.0)
"""Seconds after the end of the client's side at which it is probed. Go's client reads five of them at most, and what is
answered at once needs none."""

_CHECKS_S = (0.01, 0.05, 0.2, 1.0)
"""Seconds after a probe at which the reset may have come."""

_Message = TypeVar("_Message")

_CALLBACKS = web.RequestKey[list[Callable[[], None]]]("on_half_close")


class HalfClosedWatch:
    """Watch of a connection that its client has closed on its own side; it is aborted once the client has left.

    can_probe: returns whether no response has begun, into which a probe would fall.
    """

    def __init__(self, transport: asyncio.Transport, can_probe: Callable[[], bool]) -> None:
        self._transport = transport
        self._can_probe = can_probe
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(at, self._probe) for at in PROBES_S]
        self._timers += [loop.call_later(at + after, self._check) for at in PROBES_S for after in _CHECKS_S]

    def stop(self) -> None:
        """Cancel the timers."""
        for timer in self._timers:
            timer.cancel()

    def _probe(self) -> None:
        if not self._transport.is_closing() and self._can_probe():
            self._transport.write(PROBE)

    def _check(self) -> None:
        connected = self._transport.get_extra_info("socket")
        if not self._transport.is_closing() and connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()


class RequestsToTheEnd(deque[_Message]):
    """Requests that came before the end of their client's side; all are answered in order.

    https://www.rfc-editor.org/rfc/rfc9112#section-9.3.2

    on_last: called when the last one is taken out: the connection is closed after its response.
    """

    def __init__(self, messages: Iterable[_Message], on_last: Callable[[], None]) -> None:
        super().__init__(messages)
        self._on_last = on_last

    def popleft(self) -> _Message:
        message = super().popleft()
        if not self:
            self._on_last()
        return message


def on_half_close(request: web.Request, act: Callable[[], None]) -> None:
    """Call `act` once the client has closed its own side, also if it has already."""
    request.setdefault(_CALLBACKS, []).append(act)
    if is_half_closed(request):
        act()


def notify_half_close(request: web.BaseRequest | None) -> None:
    """Call what waits for the end of the client's side."""
    if isinstance(request, web.Request):
        for act in request.get(_CALLBACKS, ()):
            act()


def is_half_closed(request: web.Request) -> bool:
    """Return whether the client has closed its own side, so that it may have left."""
    return getattr(request.protocol, "half_closed", False)
