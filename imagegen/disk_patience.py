"""Calls for files at the start, which may never end: on a disk of a network while its server is away."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_S = 5.0
"""Time for the disk of DATA_DIR to answer, after which the start goes on without it."""


class _Call(Generic[T]):
    """A call in a thread of its own, which does not keep the process from its end."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.on_end: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="start-files", daemon=True)

    def start(self) -> None:
        """Begin; where the system has no thread left, the call is made at once."""
        try:
            self._thread.start()
        except RuntimeError:
            self._run()

    def ends_within(self, limit_s: float) -> bool:
        """Wait for the end in the caller's thread; return whether it came."""
        if self._thread.ident is not None:
            self._thread.join(limit_s)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return the result of a call that has ended, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            self._error = error
        self.on_end()


def answer_soon(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a function. Raises TimeoutError if it takes longer than ANSWER_S; it goes on. Blocks."""
    call = _Call(partial(function, *args, **kwargs))
    call.start()
    if not call.ends_within(ANSWER_S):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return call.result()


async def until_answered(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a function, however long it takes, while the event loop goes on."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    call = _Call(partial(function, *args, **kwargs))

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    call.on_end = wake
    call.start()
    await ended.wait()
    return call.result()
