"""Images in the store that the record of a claim's task lacks, since it is older than they are.

An instance was killed before it wrote that it had them, or Redis was restored from a backup while all were stopped.
"""

from __future__ import annotations

import time
from contextlib import suppress

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.queue.claim import Claim
from imagegen.tasks.cost import Cost
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import Failed, NotStarted, Outcome, Retry, Succeeded
from imagegen.tasks.task import WaitReason, missing_images_warning
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.inputs import UNAVAILABLE_RETRY_S
from imagegen.worker.permit_waiting import PermitWaiting, Stopping
from imagegen.worker.saving import DeadlinePassed


class FoundImages(Struct, frozen=True):
    """Search for one attempt. began_at: Unix time from which on this instance knows the tasks that are submitted."""

    waiting: PermitWaiting
    rules: AttemptLimits
    began_at: float

    async def outcome(self, claim: Claim) -> Outcome | None:
        """Add images to the checkpoint of a claim for which `may_have_some` is true, and count their call as paid.

        Return the outcome of an attempt for which that is enough, or that can't be made since the store can't be read.
        A store that can't be written is waited for in the slot: its images may be away too, as those of a volume.
        """
        count = GenerationRequest.from_json(claim.task.request_json).n
        try:
            with suppress(DeadlinePassed):
                await self.waiting.store_writable()
            new = await self._unnamed(claim, count)
        except Stopping:
            return NotStarted()
        except StoreUnavailable as error:
            if self.waiting.clock() >= self.waiting.ends_at():
                return with_saved_images(claim, self.rules.deadline_failure(claim.task))
            logger.bind(taskId=claim.task.id).info("The store can't be searched for images of a task: {!r}", error)
            return Retry(UNAVAILABLE_RETRY_S, WaitReason.STORE_UNAVAILABLE, counts_as_attempt=False)
        if new:
            _add(claim, new, count)
            logger.bind(taskId=claim.task.id).info("The store has {} images that the task did not name", len(new))
        checkpoint = claim.checkpoint
        if not new or len(checkpoint.images) < count:
            return None
        return Succeeded(checkpoint.images, checkpoint.warnings, checkpoint.details)

    async def _unnamed(self, claim: Claim, count: int) -> list[StoredImage]:
        """Return the images of a task that its claim does not name. Raises StoreUnavailable."""
        saver, have = self.waiting.image_saver, {image.index for image in claim.checkpoint.images}
        server_ahead_s = self.waiting.clock() - time.time()  # files have times of this machine
        saved = await saver.find(claim.task.id, claim.task.epoch / 1e6 - server_ahead_s)
        new = [image for image in saved if image.index < count and image.index not in have]
        if sent := claim.checkpoint.sent:  # the call that made those at its places
            new = [replace(image, seed=sent.seed) if image.index in sent.indexes else image for image in new]
        if new:
            await saver.extend_expiry(claim.task.id, new)
        return new

    def may_have_some(self, claim: Claim) -> bool:
        """Return whether a claim may lack images. Those of a task that is generated again are its former ones."""
        checkpoint, task = claim.checkpoint, claim.task
        if task.stale_images or checkpoint.is_paid:
            return False
        entered_at = min(entry_time(claim.entry_id), task.created_at)  # an entry of a client's line is made late
        return claim.contested or entered_at < self.began_at


def with_saved_images(claim: Claim, outcome: Outcome) -> Outcome:
    """Complete a task that only lacks time or budget with the images that it has: they are paid for."""
    images = claim.checkpoint.images
    if not isinstance(outcome, Failed) or not outcome.keeps_images:
        return outcome
    if claim.task.stale_images or not claim.checkpoint.has_new_images:
        return outcome
    count = GenerationRequest.from_json(claim.task.request_json).n
    why = outcome.error.detail or outcome.error.code
    warning = missing_images_warning(len(images), count, why)
    return Succeeded(images, (*claim.checkpoint.warnings, warning), claim.checkpoint.details)


def entry_time(entry_id: str) -> float:
    """Return the Unix time of a stream entry, by the server's clock."""
    return int(entry_id.partition("-")[0]) / 1000


def _add(claim: Claim, new: list[StoredImage], count: int) -> None:
    checkpoint = claim.checkpoint
    images = tuple(sorted((*checkpoint.images, *new), key=lambda image: image.index))
    claim.checkpoint = replace(checkpoint, images=images)
    places, sent = {image.index for image in images}, checkpoint.sent
    if not checkpoint.ambiguous_calls:
        claim.checkpoint = replace(claim.checkpoint, cost=_with_paid(claim.cost, len(new), count))
    elif places.issuperset(sent.indexes if sent else range(count)):  # that call was answered
        cost = claim.cost.found(sent.price).paid(None if sent.price < 0 else sent.price) if sent else claim.cost
        calls = checkpoint.ambiguous_calls - 1
        cost = cost if calls else replace(cost, unsure=0)
        claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=calls, sent=None, cost=cost)


def _with_paid(cost: Cost, images: int, count: int) -> Cost:
    return cost.paid(None if cost.total is None else cost.total * images // count)
