"""Owns the working life of an instance: start, quiet, drain, leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.instance import QueueInstance
from imagegen.supervisor import Supervisor
from imagegen.worker.pool import Pool

SHUTDOWN_COMMAND_TIMEOUT_S = 2.5
"""For what is said to Redis while stopping; a Redis that does not answer by then is left."""


class Lifecycle:
    """The pool and the side loops of the queue. After `leave` nothing is held here any more."""

    def __init__(self, room: QueueInstance, pool: Pool, supervisor: Supervisor) -> None:
        self._room = room
        self._pool = pool
        self._supervisor = supervisor
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._stopped = False

    def start(self) -> None:
        self._loops = {name: asyncio.create_task(loop, name=name) for name, loop in self._room.loops().items()}
        self._supervisor.watch(self._loops.values())
        self._supervisor.watch(self._pool.start())

    async def drain(self, deadline_s: float) -> None:
        """Takes nothing new, gives back at once what does not run, and waits for what does."""
        self._pool.quiet()
        await self._supervisor.stop([self._loops["reader"], self._loops["takeover"]])
        await self._with_deadline(self._room.release_idle(self._pool.active_claims), "what waits")
        await self._pool.wait_idle(deadline_s)

    async def stop(self) -> None:
        """Stops what still runs and hands it back. Once is enough."""
        if self._stopped:
            return
        self._stopped = True
        self._pool.quiet()
        await self._pool.stop()
        await self._supervisor.stop(self._loops.values())
        await self._with_deadline(self._room.release_all(), "what runs")

    async def _with_deadline(self, saying: Awaitable[None], what: str) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_COMMAND_TIMEOUT_S):
                await saying
        except (QueueUnavailable, TimeoutError):
            logger.warning("Redis did not answer while stopping; {} here is taken over when its lease ends", what)
