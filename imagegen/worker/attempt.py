"""Owns one attempt: named steps to an outcome value."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import orjson
from loguru import logger

from imagegen.errors import StoreUnavailable, UpstreamError
from imagegen.providers.protocol import Call, Provider, Reply
from imagegen.queue.claim import Claim, Start
from imagegen.queue.claims import Claims
from imagegen.tasks.image import ImageBytes, ImageLink, StoredImage
from imagegen.tasks.plan import Share, second_shares, shares
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import MAX_AMBIGUOUS, Failed, Lost, Outcome, RetryPolicy, Succeeded
from imagegen.tasks.task import SENT_PROGRESS, TaskError, image_progress

NEEDED_PARAMETERS = frozenset({"prompt", "model", "n"})
"""What a model may refuse but a call can't go without."""


class Keeper(Protocol):
    """Keeps a picture; raises UpstreamError where it is none, StoreUnavailable where it can't be kept."""

    async def keep(
        self, task_id: str, index: int, picture: ImageLink | ImageBytes, seed: int | None
    ) -> StoredImage: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """deadline_s: seconds from the submit to the end of the last attempt."""

    policy: RetryPolicy
    deadline_s: float


class Attempts:
    """Runs claims against one provider."""

    def __init__(
        self,
        claims: Claims,
        provider: Provider,
        keeper: Keeper,
        rules: Rules,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = claims
        self._provider = provider
        self._keeper = keeper
        self._rules = rules
        self._clock = clock

    async def run(self, claim: Claim) -> Outcome:
        """One attempt, from the start write to the outcome. Says nothing to the queue but start and checkpoints."""
        while True:
            if spent := self._spent(claim):
                return spent
            match await self._claims.start(claim):
                case Start.LOST:
                    return Lost()
                case Start.STARTED:
                    break
        request = GenerationRequest.restore(orjson.loads(claim.task.request_json))
        try:
            with _abandonable(claim):
                await self._collect(claim, request)
        except UpstreamError as error:
            return self._judge(claim, error)
        except StoreUnavailable as error:
            logger.bind(taskId=claim.task.id).error("A picture could not be kept: {}", error)
            return self._judge(claim, UpstreamError("internal_error", "the picture could not be kept", retryable=True))
        except _Abandoned:
            return Lost()
        return self._succeeded(claim, request)

    def _spent(self, claim: Claim) -> Failed | None:
        """A task that must not be called for again, whatever its error was."""
        run, task = claim.run, claim.task
        if run.ambiguous >= MAX_AMBIGUOUS or run.attempts >= self._rules.policy.max_attempts:
            return Failed(TaskError("interrupted", "the service stopped while the task ran", retryable=True))
        if self._clock() >= task.created_at + self._rules.deadline_s:
            detail = f"the task could not be finished within {self._rules.deadline_s:g} s"
            return Failed(TaskError("upstream_timeout", detail, retryable=True))
        return None

    async def _collect(self, claim: Claim, request: GenerationRequest) -> None:
        """Makes the calls that are still needed; what a call leaves out is asked for once more."""
        per_call = self._provider.max_images_per_call
        last = None
        for share in shares(request.n, _places(claim), per_call, request.seed):
            last = await self._one_share(claim, request, share) or last
        if len(claim.run.images) < request.n and not claim.run.asked_again:
            claim.run = replace(claim.run, asked_again=True)
            for share in second_shares(request.n, _places(claim), per_call, request.seed):
                last = await self._one_share(claim, request, share) or last
        if not claim.run.images:
            raise last or UpstreamError("upstream_bad_response", "the upstream answered without a picture")

    async def _one_share(self, claim: Claim, request: GenerationRequest, share: Share) -> UpstreamError | None:
        """One call and its pictures. A bad answer is no end yet and is returned: the pictures are asked for again."""
        try:
            reply = await self._call(claim, request, share)
        except UpstreamError as error:
            if error.code != "upstream_bad_response":
                raise
            return error
        fault = None
        for index, picture in zip(share.indexes, reply.images, strict=False):
            try:
                await self._keep(claim, request, index, picture, share.seed)
            except UpstreamError as error:
                fault = error
        return fault

    async def _call(self, claim: Claim, request: GenerationRequest, share: Share) -> Reply:
        """A paid call, repeated at once without the one parameter that the model may refuse."""
        while True:
            if claim.run is not claim.written and not await self._claims.checkpoint(claim, claim.run):
                raise _Abandoned
            without = frozenset(claim.run.without)
            call = Call(request, len(share.indexes), share.indexes[0], share.seed, without)
            try:
                watcher = _Watcher(self._claims, claim, request.n, len(share.indexes))
                reply = await self._provider.generate(call, watcher)
            except UpstreamError as error:
                if error.parameter is None or error.parameter in NEEDED_PARAMETERS or without:
                    raise
                warning = f"{error.parameter} was left out: the model does not support it"
                claim.run = replace(claim.run, without=(error.parameter,), warnings=(*claim.run.warnings, warning))
            else:
                claim.run = replace(claim.run, warnings=(*claim.run.warnings, *reply.warnings))
                return reply

    async def _keep(
        self, claim: Claim, request: GenerationRequest, index: int, picture: ImageLink | ImageBytes, seed: int | None
    ) -> None:
        kept = len(claim.run.images)
        self._claims.progress(claim, image_progress(kept + 1, kept, request.n))
        stored = await self._keeper.keep(claim.task.id, index, picture, seed)
        images = tuple(sorted((*claim.run.images, stored), key=lambda image: image.index))
        claim.run = replace(claim.run, images=images)
        self._claims.progress(claim, image_progress(kept + 1, kept + 1, request.n))

    def _succeeded(self, claim: Claim, request: GenerationRequest) -> Succeeded:
        warnings = claim.run.warnings
        if len(claim.run.images) < request.n:
            warnings += (f"only {len(claim.run.images)} of {request.n} images came",)
        return Succeeded(claim.run.images, warnings)

    def _judge(self, claim: Claim, error: UpstreamError) -> Outcome:
        if error.ambiguous:
            claim.run = replace(claim.run, ambiguous=claim.run.ambiguous + 1)
        outcome = self._rules.policy.judge(
            error,
            attempts=claim.run.attempts,
            ambiguous=claim.run.ambiguous,
            left_s=claim.task.created_at + self._rules.deadline_s - self._clock(),
            random=random.random,
        )
        log = logger.bind(taskId=claim.task.id, attempt=claim.run.attempts)
        log.info("The attempt brought {}: {}", error.code, outcome)
        return outcome


class _Abandoned(Exception):
    """The claim was lost in the middle of the attempt."""


@contextmanager
def _abandonable(claim: Claim) -> Iterator[None]:
    """What is inside is dropped at once when the claim is lost."""
    task, inside = asyncio.current_task(), True

    def abandon() -> None:
        if inside and task:
            task.cancel()

    claim.abandon = abandon
    try:
        yield
    except asyncio.CancelledError:
        if claim.lost and task and task.uncancel() == 0:
            raise _Abandoned from None
        raise
    finally:
        inside = False
        claim.abandon = None


@dataclass(slots=True)
class _Watcher:
    """Turns what really happened in a call into the task's progress."""

    claims: Claims
    claim: Claim
    wanted: int
    count: int

    def sent(self) -> None:
        self.claims.progress(self.claim, SENT_PROGRESS)

    def progress(self, fraction: float) -> None:
        kept = len(self.claim.run.images)
        received = kept + self.count * min(max(fraction, 0.0), 1.0)
        self.claims.progress(self.claim, image_progress(received, kept, self.wanted))


def _places(claim: Claim) -> set[int]:
    return {image.index for image in claim.run.images}
