"""Supervisor of the background loops: each is a named asyncio task, and a dead one ends the whole process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from loguru import logger

RECANCEL_INTERVAL_S = 0.2


class Supervisor:
    """Supervisor of loops that must not end. on_death: called with the name of a loop that died."""

    def __init__(self) -> None:
        self._loops: set[asyncio.Task[Any]] = set()
        self.failed = asyncio.Event()
        self.on_death: Callable[[str], None] = lambda _name: None

    def run(self, name: str, loop: Coroutine[Any, Any, None]) -> None:
        """Start a loop and watch it."""
        self.watch([asyncio.create_task(loop, name=name)])

    def watch(self, loops: Iterable[asyncio.Task[Any]]) -> None:
        for loop in loops:
            self._loops.add(loop)
            loop.add_done_callback(self._on_done)

    @property
    def alive(self) -> bool:
        return not self.failed.is_set()

    @property
    def names(self) -> list[str]:
        """Names of the loops that are alive."""
        return [loop.get_name() for loop in self._loops]

    async def stop(self, loops: Iterable[asyncio.Task[Any]] | None = None) -> None:
        """Cancel these loops, or all, and wait for their end.

        More than once: redis-py loses a cancellation that comes while it makes a connection.
        """
        stopping = set(self._loops if loops is None else loops)
        for loop in stopping:
            loop.remove_done_callback(self._on_done)
        running = stopping
        while running:
            for loop in running:
                loop.cancel()
            _, running = await asyncio.wait(running, timeout=RECANCEL_INTERVAL_S)
        await asyncio.gather(*stopping, return_exceptions=True)
        self._loops.difference_update(stopping)

    def _on_done(self, loop: asyncio.Task[Any]) -> None:
        self._loops.discard(loop)
        if loop.cancelled():
            return
        if error := loop.exception():
            logger.opt(exception=error).critical("The loop {} died", loop.get_name())
            self.on_death(loop.get_name())
            self.failed.set()
