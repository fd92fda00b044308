"""Owns the bounded pool: loops that claim, run an attempt, and turn its outcome into exactly one verb of the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from loguru import logger

from imagegen.queue.claim import Claim
from imagegen.queue.claims import Claims
from imagegen.tasks import task as edges
from imagegen.tasks.retry import Failed, Lost, Outcome, Retry, Succeeded
from imagegen.tasks.task import Reason, TaskError
from imagegen.worker.attempt import Attempts
from imagegen.worker.pacing import Pacing


class Pool:
    """`concurrency` loops, so that many calls at once and no more."""

    def __init__(
        self,
        claims: Claims,
        attempts: Attempts,
        pacing: Pacing,
        *,
        concurrency: int,
        result_ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = claims
        self._attempts = attempts
        self._pacing = pacing
        self._concurrency = concurrency
        self._result_ttl_s = result_ttl_s
        self._clock = clock
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> list[asyncio.Task[None]]:
        """Starts the loops; they end only after `drain`."""
        self._loops = [asyncio.create_task(self._loop(), name=f"loop-{i}") for i in range(self._concurrency)]
        return self._loops

    async def drain(self, deadline_s: float) -> None:
        """Quiet, wait for what runs, then hand the rest back."""
        self._claims.quiet()
        if self._loops:
            _, running = await asyncio.wait(self._loops, timeout=deadline_s)
            for loop in running:
                loop.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _loop(self) -> None:
        while True:
            await self._pacing.ready()
            claim = await self._claims.claim()
            if claim is None:
                return
            await self._work(claim)

    async def _work(self, claim: Claim) -> None:
        try:
            outcome = await self._attempts.run(claim)
        except Exception:  # noqa: BLE001 - one task may fail in ways nobody thought of; the pool lives on
            logger.bind(taskId=claim.task.id).exception("An attempt failed in an unforeseen way")
            outcome = Failed(TaskError("internal_error", "internal error", retryable=True))
        await self._settle(claim, outcome)

    async def _settle(self, claim: Claim, outcome: Outcome) -> None:
        now, task = self._clock(), claim.task
        task = replace(task, possibly_billed_twice=claim.run.ambiguous)
        log = logger.bind(taskId=task.id, attempt=claim.run.attempts)
        match outcome:
            case Lost():
                self._claims.drop(claim)
            case Retry():
                if outcome.reason is Reason.UPSTREAM_RATE_LIMITED:
                    self._pacing.pause(outcome.delay_s)
                claim.task = task
                await self._claims.retry(claim, outcome)
            case Failed():
                await self._claims.finish(claim, edges.failed(task, outcome.error, now=now, ttl_s=self._result_ttl_s))
                log.info("The task failed: {}", outcome.error.code)
            case Succeeded():
                done = edges.completed(task, outcome.images, outcome.warnings, now=now, ttl_s=self._result_ttl_s)
                await self._claims.finish(claim, done)
                log.info("The task is complete")
