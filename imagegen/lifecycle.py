"""Life of an instance: start, drain, stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.instance import QueueInstance
from imagegen.redis_client.redis_errors import RedisError
from imagegen.supervisor import Supervisor
from imagegen.worker.pool import Pool

SHUTDOWN_COMMAND_TIMEOUT_S = 2.5
"""Deadline of Redis commands while stopping."""


class Lifecycle:
    """The pool and the side loops of the queue. After `stop` the instance holds no claim."""

    def __init__(self, queue: QueueInstance, pool: Pool, supervisor: Supervisor) -> None:
        self._queue = queue
        self._pool = pool
        self._supervisor = supervisor
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._stopped = False

    def start(self) -> None:
        self._loops = {name: asyncio.create_task(loop, name=name) for name, loop in self._queue.loops().items()}
        self._supervisor.watch(self._loops.values())
        self._supervisor.watch(self._pool.start())

    async def drain(self, deadline_s: float) -> None:
        """Claim nothing new, release claims that do not run, and wait for those that do."""
        clock = asyncio.get_running_loop().time
        ends_at = clock() + deadline_s
        self._pool.quiet()
        await self._supervisor.stop([self._loops["reader"], self._loops["takeover"]])
        await self._with_deadline(self._queue.release_idle(self._pool.active_claims), "each waiting task")
        await self._pool.wait_idle(max(ends_at - clock(), 0.0))

    async def stop(self) -> None:
        """Stop running attempts and release their claims. Further calls do nothing."""
        if self._stopped:
            return
        self._stopped = True
        self._pool.quiet()
        await self._pool.stop()
        await self._supervisor.stop(self._loops.values())
        await self._with_deadline(self._queue.release_all(), "each running task")

    async def _with_deadline(self, command: Awaitable[None], description: str) -> None:
        try:
            async with asyncio.timeout(SHUTDOWN_COMMAND_TIMEOUT_S):
                await command
        except (QueueUnavailable, RedisError, TimeoutError):
            logger.warning("Redis did not answer while stopping; {} is taken over when its lease ends", description)
