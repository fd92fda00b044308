"""Threads for blocking work on image files and bytes, apart from those of name lookups and other work."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

from imagegen.turn_queue import PER_TURN

P = ParamSpec("P")
T = TypeVar("T")

MAX_QUEUED_S = 0.01
"""How long a call waits for a thread before another thread is started."""

PATIENCE_S = 0.002
"""How long the loop sleeps for a call of threads that are made for short calls, at most."""

RESTING_S = 0.05
"""How long the loop does not sleep after a call that took longer."""

MAX_HANGING = 32
"""Threads whose calls hang that are replaced by others."""


class WorkThreads:
    """A thread for short calls, and up to `max_count` while calls take long.

    Threads that run at the same time as the loop delay it and each other, since they share one interpreter lock, which
    changes hands twice for each system call of a thread. So one thread does all work that is quick, and the loop
    can sleep until it has ended. A small image costs a third less than with both running.

    patience_s: how long the loop sleeps for a call of an idle thread, before it goes on; 0: not at all.
    """

    def __init__(self, max_count: int, name: str, *, patience_s: float = 0.0) -> None:
        self._max_extra = max_count - 1
        self._name = name
        self._patience_s = patience_s
        self._no_sleep_until = 0.0
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._put = 0
        self._thread: threading.Thread | None = None
        self._busy = False
        self._extra: set[threading.Thread] = set()
        self._check: asyncio.TimerHandle | None = None
        self._checking_loop: asyncio.AbstractEventLoop | None = None
        self._late: set[_Call] = set()

    async def run_within(self, limit_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function as `run` does. Raises OSError, ETIMEDOUT, after `limit_s` seconds; it still runs to its end.

        Up to MAX_HANGING other threads take the place of those whose calls are late.
        """
        call = self._begin(partial(function, *args, **kwargs))
        if call.future is None:
            return cast(T, call.result())
        call.limit(asyncio.get_running_loop(), limit_s, self._late)
        return cast(T, await call.future)

    def put(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a function in a thread, without waiting for it. Its result and its error are dropped."""

        def run() -> None:
            with suppress(Exception):
                function(*args, **kwargs)

        self._begin(run, may_sleep=False)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in a thread. If the caller is cancelled, the function still runs to its end.

        Where the system has no thread left, the loop runs it: it may be the check of an image that is paid for.
        """
        call = self._begin(partial(function, *args, **kwargs))
        return cast(T, call.result() if call.future is None else await call.future)

    def _begin(self, function: Callable[[], Any], *, may_sleep: bool = True) -> _Call:
        """Return a call that has ended, or that has a future."""
        loop = asyncio.get_running_loop()
        if self._thread is None:
            thread = self._thread_of(self._work_forever, self._name)
            if not _start(thread):
                call = _Call(loop, function, sleeps=True)
                call.run()
                return call
            self._thread = thread
        is_idle = may_sleep and not self._busy and self._calls.empty()
        sleeps = is_idle and self._patience_s > 0 and loop.time() >= self._no_sleep_until
        call = _Call(loop, function, sleeps=sleeps)
        self._put += 1
        self._calls.put(call)
        if sleeps:
            if call.sleep(loop, self._patience_s):
                return call
            self._no_sleep_until = loop.time() + RESTING_S
        if self._max_extra or self._late:  # also if it seemed idle: the thread may just have taken a call that hangs
            self._check_later(loop)
        return call

    def _check_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._check is None or self._checking_loop is not loop or self._check.when() < loop.time():
            self._checking_loop = loop
            self._check = loop.call_later(MAX_QUEUED_S, self._add_thread, loop, self._put)

    def _add_thread(self, loop: asyncio.AbstractEventLoop, put: int) -> None:
        """Start another thread if one of the first `put` calls is still queued; look again while any is."""
        self._check = None
        queued = self._calls.qsize()
        max_extra = self._max_extra + min(len(self._late), MAX_HANGING)
        if self._put - queued < put and len(self._extra) < max_extra:
            thread = self._thread_of(self._work_while_queued, f"{self._name}-extra")
            self._extra.add(thread)  # before its start: it removes itself
            if not _start(thread):
                self._extra.discard(thread)
        if queued:
            self._check_later(loop)

    @staticmethod
    def _thread_of(work: Callable[[], None], name: str) -> threading.Thread:
        return threading.Thread(target=work, name=name, daemon=True)

    def _work_forever(self) -> None:
        while True:
            call = self._calls.get()
            self._busy = True
            call.run()
            del call
            self._busy = False

    def _work_while_queued(self) -> None:
        try:
            while True:
                self._calls.get_nowait().run()
        except Empty:
            self._extra.discard(threading.current_thread())


def _start(thread: threading.Thread) -> bool:
    """Start a thread. Return False if the system has none left, as under a limit of processes."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


class _Results:
    """Results that threads have for one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._calls: deque[_Call] = deque()
        self._woken = False

    def put(self, call: _Call) -> None:
        """Pass a call that has ended to the loop, from another thread."""
        self._calls.append(call)
        loop = self._loop()
        if not self._woken and loop is not None:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        """Settle the first results, and the next ones in the next turn: callers of many may resume at once."""
        self._woken = False  # before the results are taken: a result that comes meanwhile wakes the loop again
        for _ in range(min(len(self._calls), PER_TURN)):
            self._calls.popleft().settle()
        loop = self._loop()
        if self._calls and not self._woken and loop is not None:
            self._woken = True
            loop.call_soon(self._take)


_results: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Results] = weakref.WeakKeyDictionary()


class _Call:
    """A call on its way through a thread. Its result is passed by `sleep` or by the future, as decided by `_sleeper`.

    sleeps: whether the loop sleeps for it; if not, there is a future from the start.
    """

    __slots__ = ("_ended", "_error", "_function", "_late", "_result", "_results", "_sleeper", "_timer", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Any], *, sleeps: bool) -> None:
        results = _results.get(loop)
        if results is None:
            results = _results[loop] = _Results(loop)
        self._results = results
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self.future: asyncio.Future[Any] | None = None if sleeps else loop.create_future()
        self._ended = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._late: set[_Call] | None = None
        self._sleeper: list[None] = [None] if sleeps else []  # taken by the thread at its end, or by who sleeps no more
        if sleeps:
            self._ended.acquire()

    def sleep(self, loop: asyncio.AbstractEventLoop, patience_s: float) -> bool:
        """Sleep until the call has ended; return whether it has. If not, there is a future from now on."""
        if self._ended.acquire(timeout=patience_s):
            return True
        self.future = loop.create_future()
        try:
            self._sleeper.pop()
        except IndexError:  # it has ended just now
            self.future = None
            return True
        return False

    def limit(self, loop: asyncio.AbstractEventLoop, limit_s: float, late: set[_Call]) -> None:
        """Let the caller wait no longer than `limit_s`; after that, this call is in `late` until it ends."""
        self._late, self._timer = late, loop.call_later(limit_s, self._give_up)

    def _give_up(self) -> None:
        if self._late is not None:
            self._late.add(self)
        if self.future is not None and not self.future.done():
            self.future.set_exception(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def result(self) -> Any:
        """Return the result, or raise the error of the call."""
        error, self._error = self._error, None  # no cycle of an error and its frames
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error

    def run(self) -> None:
        """Run the call, in a thread."""
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            self._error = error
        try:
            self._sleeper.pop()
        except IndexError:
            self._results.put(self)
        else:
            self._ended.release()

    def settle(self) -> None:
        """Set the result of the future, in the loop.

        A future keeps its error, of which a frame of `run` keeps this call: with the future in it, they would be a
        cycle, and the bytes of an image that was refused would stay until a garbage collection.
        """
        if self._timer is not None and self._late is not None:
            self._timer.cancel()
            self._late.discard(self)
        future, self.future = self.future, None
        error, self._error = self._error, None
        if future is None or future.done():
            return
        if error is None:
            future.set_result(self._result)
        else:
            future.set_exception(error)
