"""Disconnects of clients while their request waits, so that no wait goes on without its client."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

_WAKE = web.RequestKey[Callable[[], None]]("wake_on_disconnect")
_RESUMABLE = web.RequestKey[bool]("is_resumable")
_WAITING = web.RequestKey[bool]("is_waiting")
_SENDING = web.RequestKey[bool]("is_sending")


def on_disconnect(request: web.Request, wake: Callable[[], None]) -> None:
    """Have `wake` called once the client's connection is lost."""
    request[_WAKE] = wake


def notify_disconnect(request: web.BaseRequest) -> None:
    """Wake the wait of a request; the connection calls it when it is lost."""
    if isinstance(request, web.Request) and (wake := request.get(_WAKE)):
        wake()


def is_disconnected(request: web.Request) -> bool:
    """Return whether the client has left."""
    return request.transport is None or request.transport.is_closing()


def begin_sending(request: web.Request) -> None:
    """Note that a response is sent past the transport's buffer, which shows nothing of it."""
    request[_SENDING] = True


def is_sending(request: web.BaseRequest | None) -> bool:
    """Return whether a response is sent past the transport's buffer."""
    return isinstance(request, web.Request) and request.get(_SENDING, False)


def begin_resumable(request: web.Request) -> None:
    """Note that a client continues this response after a reconnect, and loses nothing of it."""
    request[_RESUMABLE] = True


def is_resumable(request: web.BaseRequest | None) -> bool:
    """Return whether a client continues this response after a reconnect."""
    return isinstance(request, web.Request) and request.get(_RESUMABLE, False)


def begin_wait(request: web.Request) -> None:
    """Note that the client waits for a change, and repeats the request if it is answered before."""
    request[_WAITING] = True


def end_wait(request: web.BaseRequest | None) -> None:
    """End a wait that has begun, if it has not ended: the present state is the answer."""
    if isinstance(request, web.Request) and request.get(_WAITING):
        request[_WAITING] = False
        notify_disconnect(request)


def is_waiting(request: web.BaseRequest | None) -> bool:
    """Return whether a client waits for a change."""
    return isinstance(request, web.Request) and request.get(_WAITING, False)


def is_wait_ended(request: web.Request) -> bool:
    """Return whether a wait that had begun was ended."""
    return not request.get(_WAITING, True)
