"""Watch of a save that may block without end, as on a disk of a network while its server is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from imagegen.timer_line import TimerLine

T = TypeVar("T")

LOOK_S = 0.5

_looks = TimerLine(LOOK_S)


class SaveLeft(Exception):
    """A save was abandoned: it may still succeed, and is to be repeated later."""


class SaveWatch:
    """Watch of one save of the current task, which it leaves only where `may_leave` returns True.

    look: called twice a second while the save runs.
    """

    def __init__(self, look: Callable[[], None], may_leave: Callable[[], bool]) -> None:
        self._look = look
        self._may_leave = may_leave
        self._task = asyncio.current_task()
        self._leaves = False

    async def run(self, save: Awaitable[T]) -> T:
        """Return the result of the save. Raises SaveLeft."""
        self._timer = _looks.begin(self._look_again)
        try:
            return await save
        except asyncio.CancelledError:
            if not self._leaves or self._task is None or self._task.uncancel():
                raise
            raise SaveLeft from None
        finally:
            self._timer.cancel()

    def _look_again(self) -> None:
        self._look()
        if self._task is not None and self._may_leave():
            self._leaves = self._task.cancel()
        else:
            self._timer = _looks.begin(self._look_again)
