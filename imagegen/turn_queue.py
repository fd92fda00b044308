"""Queue of waiters that one event wakes: only some of them resume in each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, TypeVar

Result = TypeVar("Result")

PER_TURN = 32
"""Cost that one turn of the event loop takes at most.

One costs about 0.1 ms, most of it a write to a socket. Thousands of clients that wait for the same event do not delay
the others: between two turns the event loop reads from all connections.
"""


class Waiter(Protocol):
    """Waiter. cost: of its part, against `PER_TURN`."""

    @property
    def cost(self) -> int: ...

    def resume(self) -> None: ...


class TurnQueue:
    """Queue of waiters, first in first out."""

    def __init__(self) -> None:
        self._due: deque[Waiter] = deque()

    def add(self, waiter: Waiter) -> None:
        """Resume a waiter in its turn, in the next turn of the event loop at the earliest."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._take_turn)
        self._due.append(waiter)

    async def result_of(self, shared: asyncio.Task[Result]) -> Result:
        """Return the result of a task that others wait for too, in this waiter's turn. Raises what the task raises."""
        if not shared.done():
            await asyncio.wait([shared])
            await self.turn()
        return shared.result()

    async def turn(self, cost: int = 1) -> None:
        """Wait for this waiter's turn. cost: of what it does then, before it waits for anything."""
        turn = _Turn(cost)
        self.add(turn)
        await turn.has_come

    def _take_turn(self) -> None:
        """Resume the first waiters, and schedule the next ones in the next turn of the event loop."""
        due, left = self._due, PER_TURN
        while due and left > 0:
            left -= due[0].cost
            due.popleft().resume()
        if due:
            asyncio.get_running_loop().call_soon(self._take_turn)


class TurnLimit:
    """Limit of what begins in one turn of the event loop; the rest waits for later turns.

    The caller adds one to `begun`, and calls `is_reached` if that is `noticed` or more: one at a time costs no call.

    per_turn: begins at once, and as much again of what has waited.
    """

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self.begun = 0
        self.noticed = per_turn // 2
        self._per_turn = per_turn
        self._waiting = TurnQueue()

    def is_reached(self) -> bool:
        """Return whether what begins now has to wait."""
        if self.begun == self.noticed:
            asyncio.get_running_loop().call_soon(self._begin_turn)
        return self.begun > self._per_turn

    async def wait(self) -> None:
        """Wait for a turn, first in first out."""
        await self._waiting.turn(max(1, PER_TURN // self._per_turn))

    def _begin_turn(self) -> None:
        self.begun = 0


class _Turn:
    def __init__(self, cost: int) -> None:
        self.cost = cost
        self.has_come = asyncio.get_running_loop().create_future()

    def resume(self) -> None:
        if not self.has_come.done():
            self.has_come.set_result(None)
