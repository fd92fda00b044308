"""Bounded pool of loops that claim, run an attempt and turn its outcome into exactly one verb of the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.line_limit import LineLimit
from imagegen.queue.claim import Claim
from imagegen.queue.dispatcher import CLAIMS_PER_SLOT, MAX_AWAY
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.redis_client.redis_errors import RedisError, shown
from imagegen.tasks import transitions
from imagegen.tasks.retry import ClaimLost, Failed, NotStarted, Outcome, Retry, Succeeded
from imagegen.tasks.task import Task, TaskError, WaitReason
from imagegen.worker.attempt import AttemptRunner
from imagegen.worker.found_images import with_saved_images
from imagegen.worker.parking import Parking
from imagegen.worker.permits import PermitLine
from imagegen.worker.unserved import UnservedTasks

UNFORESEEN_RETRY_S = 5.0
"""Delay of the next attempt after an unforeseen error, where paid images are not saved yet."""


class Pool:
    """Loops that fill the queue's slots: at most one call at once for each slot.

    active_claims: the claims that the loops run.
    """

    def __init__(
        self,
        claims: WorkerQueue,
        attempts: AttemptRunner,
        permits: PermitLine,
        *,
        result_ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = claims
        self._attempts = attempts
        self._permits = permits
        self._result_ttl_s = result_ttl_s
        self._clock = clock
        self._loops: list[asyncio.Task[None]] = []
        others = attempts.dead.others
        self.parking = Parking(claims, permits, attempts.rules.deadline, attempts.dead, clock=clock)
        self._unserved = UnservedTasks(claims, attempts.routes, attempts.rules, others, clock=clock)
        self.active_claims: set[Claim] = set()
        self._refusals = LineLimit(lambda _, count: logger.error("Redis refused the end of {} more attempts", count))

    def start(self) -> list[asyncio.Task[None]]:
        """Start the loops; they end only after `quiet`."""
        count = CLAIMS_PER_SLOT * self._claims.slots + MAX_AWAY
        self._loops = [asyncio.create_task(self._loop(), name=f"loop-{i}") for i in range(count)]
        return self._loops

    def quiet(self) -> None:
        """Let no loop take a claim or start a call any more."""
        self._claims.quiet()
        self._permits.quiet()

    async def wait_idle(self, within_s: float) -> None:
        """Wait until the loops have finished their attempts, after `quiet`."""
        if self._loops:
            await asyncio.wait(self._loops, timeout=within_s)

    async def stop(self) -> None:
        """Cancel the attempts that still run."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.parking.stop()

    async def _loop(self) -> None:
        while (claim := await self._claims.claim()) is not None:
            if not await self._unserved.runs_here(claim):
                if failed := await self._unserved.leave(claim):
                    await self._report(claim, with_saved_images(claim, failed))
            elif self.parking.admits(claim):
                self.active_claims.add(claim)
                try:
                    await self._report(claim, await self._outcome(claim))
                finally:
                    self.active_claims.discard(claim)

    async def _outcome(self, claim: Claim) -> Outcome:
        try:
            return await self._attempts.run(claim)
        except Exception:  # noqa: BLE001 - one task may fail in unforeseen ways; the pool lives on
            logger.bind(taskId=claim.task.id).exception("An attempt failed in an unforeseen way")
            if claim.checkpoint.is_paid and claim.checkpoint.attempts < self._attempts.rules.policy.max_attempts:
                return Retry(UNFORESEEN_RETRY_S, WaitReason.RETRYING)  # its images are paid for: they are fetched again
            return Failed(TaskError("internal_error", "internal error", retryable=True))

    async def _report(self, claim: Claim, outcome: Outcome) -> None:
        """Turn the outcome of an attempt into exactly one verb of the queue."""
        try:
            await self._write(claim, outcome)
        except RedisError as error:  # about the command, so no outage; the claim is taken over as below
            if self._refusals.admits():
                logger.bind(taskId=claim.task.id).error("Redis refused the end of an attempt: {}", shown(error))
            self._claims.drop(claim)
        except Exception:  # noqa: BLE001 - as above; the claim is taken over again, from what it last wrote
            logger.bind(taskId=claim.task.id).exception("The end of an attempt could not be written")
            self._claims.drop(claim)

    async def _write(self, claim: Claim, outcome: Outcome) -> None:
        now, ttl_s, cost, checkpoint = self._clock(), self._result_ttl_s, claim.cost, claim.checkpoint
        task = replace(
            claim.task,
            attempts=checkpoint.attempts,
            possibly_billed_twice=checkpoint.billed_again,
            cost=cost if isinstance(outcome, Retry) else cost.ended(),
            channel=checkpoint.channel or claim.task.channel,
            jobs=checkpoint.begun_jobs,
        )
        match outcome:
            case Succeeded(images, warnings, details):
                task = replace(task, details=details, attempts=_attempts_at_end(claim))
                await self._finish(claim, transitions.completed(task, images, warnings, now=now, ttl_s=ttl_s))
            case NotStarted() if self._claims.is_paused:
                self._claims.put_back(claim)
            case NotStarted():
                pass
            case ClaimLost():
                self._permits.finished(task.id)
                await self._claims.give_up(claim)
            case Retry():
                claim.task = task
                await self._claims.retry(claim, outcome)
            case Failed(error) if task.stale_images:
                warning = f"fresh images could not be generated ({error.code}); these are from before"
                warnings = (*checkpoint.warnings, warning)
                await self._keep_previous_images(task)
                await self._finish(claim, transitions.completed(task, task.images, warnings, now=now, ttl_s=ttl_s))
            case Failed(error):
                attempts = max(_attempts_at_end(claim), checkpoint.ambiguous_calls)  # stops release uncounted
                failed = transitions.failed(replace(task, attempts=attempts), error, now=now, ttl_s=ttl_s)
                await self._finish(claim, failed)

    async def _keep_previous_images(self, task: Task) -> None:
        """Extend the life of the previous images, which are the result once more."""
        try:
            await self._attempts.image_saver.extend_expiry(task.id, task.images)
        except StoreUnavailable as error:
            logger.bind(taskId=task.id).warning("The previous images may expire before their task: {}", error)

    async def _finish(self, claim: Claim, final: Task) -> None:
        self._permits.finished(final.id)
        stored = await self._claims.finish(claim, final)
        if (job := claim.checkpoint.job) and not job.renewals:
            self._claims.on_job_dropped(claim, job.handle, 0)  # the deadline came before its images
        fault = f": {stored.error.code}" if stored.error else ""
        logger.info("{}{}", stored.state, fault, taskId=final.id, attempt=claim.checkpoint.attempts)


def _attempts_at_end(claim: Claim) -> int:
    """Return the attempts of a task that ends: at least one if a call was paid, also while its image was waited for."""
    checkpoint, cost = claim.checkpoint, claim.cost
    is_paid = checkpoint.has_new_images or cost.charged or cost.unpriced
    return max(checkpoint.attempts, 1 if is_paid else 0)
