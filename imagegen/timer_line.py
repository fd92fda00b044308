"""Timers of one duration, for waits that nearly always end before them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType


class TimerLine:
    """Timers of one duration, which end in the order in which they begin: the loop has only a timer of the first.

    Each timer of the loop has a handle, and a place in a heap until it would have ended. Those of a task with a small
    image, of which none ends, would be 4 % of its instructions.

    It is for one loop at a time: the first timer of another loop drops those before it.

    timers: those that run, in order.
    """

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self.timers: dict[_LineTimer, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None

    def begin(self, on_end: Callable[[], object]) -> LineTimer:
        """Begin a timer that calls `on_end` after the duration, unless it is cancelled before."""
        timer = LineTimer(self, on_end)
        self.add(timer)
        return timer

    def add(self, timer: _LineTimer) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._handle = loop, None
            self.timers.clear()
        timer.ends_at = loop.time() + self.duration_s
        self.timers[timer] = None
        if self._handle is None:
            self._handle = loop.call_at(timer.ends_at, self._end_due, loop)

    def _end_due(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        try:
            while self.timers and (first := next(iter(self.timers))).ends_at <= now:
                del self.timers[first]
                first.end()  # it may begin a timer, which is behind those that are left
        finally:
            left = next(iter(self.timers), None)
            self._handle = None if left is None else loop.call_at(left.ends_at, self._end_due, loop)


class _LineTimer(ABC):
    """A timer of a line. ends_at: event-loop time."""

    __slots__ = ("_line", "ends_at")

    _line: TimerLine
    ends_at: float

    @abstractmethod
    def end(self) -> None:
        """Do what is due."""


class LineTimer(_LineTimer):
    """A timer that calls a function."""

    __slots__ = ("_on_end",)

    def __init__(self, line: TimerLine, on_end: Callable[[], object]) -> None:
        self._line = line
        self._on_end: Callable[[], object] | None = on_end

    def end(self) -> None:
        if self._on_end is not None:
            self._on_end()

    def cancel(self) -> None:
        self._on_end = None  # it may refer to what this timer is of, which would be a cycle
        self._line.timers.pop(self, None)


class TimeLimit(_LineTimer):
    """Context with the duration of a line as its time limit. It raises TimeoutError as `asyncio.timeout` does."""

    __slots__ = ("_cancels", "_is_over", "_task")

    def __init__(self, line: TimerLine) -> None:
        self._line = line

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a time limit is for a task")
        self._task, self._cancels, self._is_over = task, task.cancelling(), False
        self._line.add(self)

    def end(self) -> None:
        self._is_over = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.timers.pop(self, None)
        if self._is_over and self._task.uncancel() <= self._cancels and kind is asyncio.CancelledError:
            raise TimeoutError from error
