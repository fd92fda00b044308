"""Owns the time limit of calls: as `asyncio.timeout`, but one timer serves all of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType


class TimeLimit:
    """Blocks that end with TimeoutError after `limit_s`. All have the same limit, so they are over as they began."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: dict[_Block, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def block(self) -> _Block:
        """For a `with` statement around awaits of one task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None:
            raise RuntimeError("a time limit needs a task to end")
        block = _Block(self._running, task, task.cancelling(), loop.time() + self._limit_s)
        self._running[block] = None
        if self._timer is None:
            self._timer = loop.call_at(block.ends_at, self._end_blocks, loop)
        return block

    def _end_blocks(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for block in tuple(self._running):
            if block.ends_at > loop.time():
                self._timer = loop.call_at(block.ends_at, self._end_blocks, loop)
                return
            block.end()


@dataclass(eq=False, slots=True)
class _Block:
    """cancels: how often its task was cancelled before it began, and not uncancelled."""

    running: dict[_Block, None]
    task: asyncio.Task[object]
    cancels: int
    ends_at: float
    is_over: bool = False

    def end(self) -> None:
        del self.running[self]
        self.is_over = True
        self.task.cancel()

    def __enter__(self) -> None:
        """Its time runs already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_over:
            del self.running[self]
        elif self.task.uncancel() <= self.cancels and kind is asyncio.CancelledError:
            raise TimeoutError from error
