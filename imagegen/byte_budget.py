"""Budget for bytes that are held in memory at once."""

from __future__ import annotations

import asyncio
from collections import deque
from threading import Lock

MAX_BYTES_IN_FLIGHT = 32 * 1024 * 1024


class ByteBudget:
    """Counter of bytes up to a limit; one holder alone may have more. `try_take` and `give` may run in any thread."""

    def __init__(self, limit: int = MAX_BYTES_IN_FLIGHT) -> None:
        self._limit = limit
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: deque[asyncio.Event] = deque()
        self.held = 0

    def try_take(self, size: int, *, force: bool = False) -> bool:
        """Reserve `size` bytes if they fit; force: also if they don't. Returns whether they are reserved."""
        with self._lock:
            if self.held and self.held + size > self._limit and not force:
                return False
            self.held += size
            return True

    async def take(self, size: int, within_s: float) -> None:
        """Reserve `size` bytes, in order of request; after `within_s` seconds also over the limit."""
        if not await self.take_in_time(size, within_s):
            self.try_take(size, force=True)

    async def take_in_time(self, size: int, within_s: float) -> bool:
        """Reserve `size` bytes, in order of request; return whether that was possible within `within_s` seconds."""
        if not self._waiters and self.try_take(size):
            return True
        self._loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._waiters.append(changed)
        try:
            async with asyncio.timeout(within_s):
                while self._waiters[0] is not changed or not self.try_take(size):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._waiters.remove(changed)
            self._wake()

    def give(self, size: int) -> None:
        """Return reserved bytes."""
        with self._lock:
            self.held -= size
        if self._waiters and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiters:
            self._waiters[0].set()
