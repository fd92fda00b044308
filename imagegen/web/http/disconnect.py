"""Owns the knowledge that a client has left while its answer is waited for, so that nothing waits on without it."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

_WAKE = web.RequestKey[Callable[[], None]]("wake_when_gone")


def on_disconnect(request: web.Request, wake: Callable[[], None]) -> None:
    """Has `wake` called once the client's connection is lost."""
    request[_WAKE] = wake


def notify_disconnect(request: web.BaseRequest) -> None:
    """Called by the connection when it is lost."""
    if isinstance(request, web.Request) and (wake := request.get(_WAKE)):
        wake()


def is_disconnected(request: web.Request) -> bool:
    """Whether nobody is there to be answered."""
    return request.transport is None or request.transport.is_closing()
