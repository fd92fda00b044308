"""Queue of those who go on after something that all of them waited for: some in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, TypeVar

Result = TypeVar("Result")

PER_TURN = 32
"""What goes on in one turn of the event loop.

Each costs about 0.1 ms, most of it a write to a socket, so that thousands who wait for the same do not stop the others:
between two turns the event loop reads from all connections.
"""


class Waiter(Protocol):
    """One who waits. cost: how much goes on with it."""

    @property
    def cost(self) -> int: ...

    def go_on(self) -> None: ...


class TurnQueue:
    """Queue of waiters, first in first out."""

    def __init__(self) -> None:
        self._due: deque[Waiter] = deque()

    def add(self, waiter: Waiter) -> None:
        """Let a waiter go on in its turn, in the next turn of the event loop at the earliest."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._take_turn)
        self._due.append(waiter)

    async def result_of(self, shared: asyncio.Task[Result]) -> Result:
        """Return the result of a task that others wait for too, in this waiter's turn. Raises what the task raises."""
        if not shared.done():
            await asyncio.wait([shared])
            turn = _Turn()
            self.add(turn)
            await turn.come
        return shared.result()

    def _take_turn(self) -> None:
        """Let the first waiters go on, and the next ones in the next turn of the event loop."""
        due, room = self._due, PER_TURN
        while due and room > 0:
            room -= due[0].cost
            due.popleft().go_on()
        if due:
            asyncio.get_running_loop().call_soon(self._take_turn)


class _Turn:
    cost = 1

    def __init__(self) -> None:
        self.come = asyncio.get_running_loop().create_future()

    def go_on(self) -> None:
        if not self.come.done():
            self.come.set_result(None)
