"""Owns when calls may be made: a rate limit that the upstream told pauses every loop."""

from __future__ import annotations

import asyncio


class Pacing:
    """One for each provider."""

    def __init__(self) -> None:
        self._paused_until = 0.0

    def pause(self, seconds: float) -> None:
        """No call starts for so long; a longer pause that runs already stands."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)

    async def ready(self) -> None:
        """Waits until a call may be made."""
        loop = asyncio.get_running_loop()
        while (left_s := self._paused_until - loop.time()) > 0:  # noqa: ASYNC110 - it is time that is waited for
            await asyncio.sleep(left_s)
