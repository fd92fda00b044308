"""Images of the replies of one attempt, from a reply to the store."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from imagegen.providers.protocol import Reply
from imagegen.queue.claim import Claim
from imagegen.tasks.call_plan import PlannedCall
from imagegen.tasks.provider_job import AcceptedJob
from imagegen.tasks.reply_details import ReplyDetails, add_details
from imagegen.worker.image_places import ImagePlaces
from imagegen.worker.saving import (
    ClaimImageSaver,
    DeadlinePassed,
    LinksDied,
    ReceivedImage,
    SavingDelayed,
    received_again,
)


class ReplyImages(Struct, frozen=True):
    """Saver of the images of replies at their places.

    The job of a reply stays in the checkpoint of the claim until nothing of it can be lost. clock: Unix time.
    """

    claim: Claim
    places: ImagePlaces
    saver: ClaimImageSaver
    clock: Callable[[], float]

    async def save(self, share: PlannedCall, reply: Reply, *, again: bool) -> None:
        """Save the images of a reply to a call for the places of `share`. Raises as `ClaimImageSaver.save`.

        again: whether they were requested before.
        """
        job = self.claim.checkpoint.job
        is_renewed = job is not None and job.renewals > 0
        images, missing = self._at_free_places(share, reply, job), share.indexes[len(reply.images) :]
        if is_renewed:
            self.places.link_died(missing)
        else:
            self.places.received(share.indexes, missing, is_useless=not images, again=again)
            if not reply.images:
                self.saver.record_useless()
        details = self.claim.checkpoint.details
        if reply.details and not is_renewed:
            details = add_details(details, reply.details)
            self.claim.task = replace(self.claim.task, details=details)
        try:
            await self._save(images, again=again)
        except LinksDied:
            self.claim.checkpoint = replace(self.claim.checkpoint, details=details)
            raise
        except (SavingDelayed, DeadlinePassed):
            self._collected(details)
            raise
        self._collected(details)
        self.places.saved(share.indexes)

    async def save_linked(self) -> None:
        """Save the images of the links in the checkpoint, which an earlier attempt paid for. Raises as `save`."""
        links, again = self.claim.checkpoint.links, self.claim.checkpoint.missing_requested
        await self._save([received_again(paid) for paid in links], again=again)

    def _at_free_places(self, share: PlannedCall, reply: Reply, job: AcceptedJob | None) -> list[ReceivedImage]:
        """Return the images of a reply with the places that they are for, without those that have one already."""
        now, filled = self.clock(), self.places.filled
        if job is not None and job.renewals > 0:
            filled.update(self.claim.checkpoint.given_up)
        return [
            ReceivedImage(index, image, share.seed, job.handle.accepted_at if job and job.had_link(image) else now)
            for index, image in zip(share.indexes, reply.images, strict=False)
            if index not in filled
        ]

    def _save(self, images: Sequence[ReceivedImage], *, again: bool) -> Coroutine[Any, Any, None]:
        self.places.begin_saving(again=again)
        return self.saver.save(images)

    def _collected(self, details: ReplyDetails | None) -> None:
        """Record that nothing of a reply can be lost any more. details: of it and those before."""
        checkpoint = self.claim.checkpoint
        if checkpoint.job or details is not checkpoint.details:
            links_job = checkpoint.job if checkpoint.links else None
            self.claim.checkpoint = replace(checkpoint, job=None, details=details, links_job=links_job)
