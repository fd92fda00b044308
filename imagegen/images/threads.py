"""Threads for blocking work on image files and bytes, apart from those of name lookups and other work."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MAX_QUEUED_S = 0.01
"""How long a call waits for a thread before another thread is started."""

_Call = tuple["_Results", "asyncio.Future[Any]", Callable[[], Any]]


class WorkThreads:
    """A thread for short calls, and up to `max_count` while calls take long.

    Threads that run at the same time as the loop delay it and each other, since they share one interpreter lock. So one
    thread does all work that is quick, and it wakes the loop once for all results that the loop has not taken yet.
    A small image costs half a millisecond less than with a ThreadPoolExecutor.
    """

    def __init__(self, max_count: int, name: str) -> None:
        self._max_extra = max_count - 1
        self._name = name
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._extra: set[threading.Thread] = set()
        self._check: asyncio.TimerHandle | None = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in a thread. If the caller is cancelled, the function still runs to its end."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        results = _results.get(loop)
        if results is None:
            results = _results[loop] = _Results(loop)
        if self._thread is None:
            self._thread = self._thread_of(self._work_forever, self._name)
            self._thread.start()
        if self._max_extra and (self._busy or not self._calls.empty()):
            self._check_later(loop)
        self._calls.put((results, future, partial(function, *args, **kwargs)))
        return await future

    def _check_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._check is None or self._check.cancelled() or self._check.when() < loop.time():
            self._check = loop.call_later(MAX_QUEUED_S, self._add_thread, loop)

    def _add_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        self._check = None
        if self._calls.empty():
            return
        if len(self._extra) < self._max_extra:
            thread = self._thread_of(self._work_while_queued, f"{self._name}-extra")
            self._extra.add(thread)  # before its start: it removes itself
            thread.start()
        self._check_later(loop)

    @staticmethod
    def _thread_of(work: Callable[[], None], name: str) -> threading.Thread:
        return threading.Thread(target=work, name=name, daemon=True)

    def _work_forever(self) -> None:
        while True:
            call = self._calls.get()
            self._busy = True
            _run(*call)
            del call
            self._busy = False

    def _work_while_queued(self) -> None:
        try:
            while True:
                _run(*self._calls.get_nowait())
        except Empty:
            self._extra.discard(threading.current_thread())


class _Results:
    """Results that threads have for one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._results: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._woken = False

    def put(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        """Pass a result to the loop, from another thread."""
        self._results.append((future, result, error))
        loop = self._loop()
        if not self._woken and loop is not None:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._woken = False  # before the results are taken: a result that comes meanwhile wakes the loop again
        while self._results:
            future, result, error = self._results.popleft()
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


_results: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Results] = weakref.WeakKeyDictionary()


def _run(results: _Results, future: asyncio.Future[Any], function: Callable[[], Any]) -> None:
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - it belongs to the caller
        results.put(future, None, error)
    else:
        results.put(future, result, None)
