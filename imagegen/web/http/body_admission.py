"""Admission of large request bodies: the memory of all together is bounded, and they are parsed in turns."""

from __future__ import annotations

from aiohttp import web

from imagegen.byte_budget import ByteBudget
from imagegen.errors import TooManyConnections
from imagegen.turn_queue import TurnQueue

QUICK_BODY_BYTES = 8 * 1024
"""A body up to this size needs no admission."""

MAX_BYTES = 16 * 1024 * 1024
MAX_WAITING = 256
"""Bodies that wait for memory. The first 256 KiB of each may have come, and are not read."""

STREAMED_BYTES = 128 * 1024
"""Memory that is reserved at once of a body with images, or of unknown length."""

WAIT_S = 10.0
"""As long as a body may stall, after which it gives its memory back."""

_RETRY_AFTER_S = "5"
_BYTES_PER_COST = 2 * 1024
"""Of a turn's cost: to parse and check them takes about 0.1 ms if they are small members, as `"f1":1`."""


class BodyAdmission:
    """Memory and turns of the large bodies of one application.

    turns: hundreds of bodies that are complete at the same moment are handled in as many turns of the event loop as
    they need, so that they do not delay other clients.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, *, wait_s: float = WAIT_S) -> None:
        self.turns = TurnQueue()
        self._memory = ByteBudget(max_bytes)
        self._wait_s = wait_s
        self._waiting = 0

    async def reserve(self, size: int) -> None:
        """Reserve the memory of a body, in order of request; it is to be given back.

        Raises TooManyConnections if others take it for too long, or if too many wait for it.
        """
        if self._waiting >= MAX_WAITING:
            raise _refusal()
        self._waiting += 1
        try:
            if not await self._memory.take_in_time(size, self._wait_s):
                raise _refusal()
        finally:
            self._waiting -= 1

    def reserve_more(self, size: int) -> None:
        """Reserve more for a body without a declared length. Raises TooManyConnections if there is none now."""
        if not self._memory.try_take(size):
            raise _refusal()

    def give(self, size: int) -> None:
        """Give the memory of a body back."""
        self._memory.give(size)

    async def turn(self, size: int) -> None:
        """Wait for the turn in which a body of this size is parsed."""
        await self.turns.turn(1 + size // _BYTES_PER_COST)


class HeldMemory:
    """Memory of one large body, which is reserved while the body grows, until `end`."""

    __slots__ = ("_admission", "_size")

    def __init__(self, admission: BodyAdmission) -> None:
        self._admission, self._size = admission, 0

    async def begin(self, size: int) -> None:
        """Wait for the first bytes. Raises TooManyConnections."""
        await self._admission.reserve(size)
        self._size = size

    def grow_to(self, size: int) -> None:
        """Reserve up to this number of bytes in all. Raises TooManyConnections."""
        while size > self._size:
            self._admission.reserve_more(STREAMED_BYTES)
            self._size += STREAMED_BYTES

    def end(self) -> None:
        """Give all of it back."""
        if self._size:
            self._admission.give(self._size)
            self._size = 0


BODY_ADMISSION = web.AppKey("body_admission", BodyAdmission)


def _refusal() -> TooManyConnections:
    return TooManyConnections(headers={"Retry-After": _RETRY_AFTER_S})
