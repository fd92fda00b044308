"""Places of a task's images: which have one, and which are still to be requested, for the first time or once more."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from imagegen.errors import ImageRejected
from imagegen.queue.claim import Claim
from imagegen.worker.saving import ReceivedImage


class ImagePlaces:
    """Places 0 to n - 1 of one attempt. An image that is missing is requested once more, and never again.

    The checkpoint of the claim holds for the next attempt which places lack an image for the first time (`short`), and
    which are given up.

    Args:
        claim: of the task.
        count: n of the request.

    Attributes:
        paid_without_result: whether a response of this attempt had fewer images than requested.
        fault: of an image of the last response; None if each could be used.
    """

    def __init__(self, claim: Claim, count: int) -> None:
        self._claim = claim
        self._count = count
        self._unusable: set[int] = set()
        self._wasted = set(claim.checkpoint.short)
        self._again = False
        self.paid_without_result = False
        self.fault: ImageRejected | None = None

    @property
    def filled(self) -> set[int]:
        """Places that have an image."""
        return {image.index for image in self._claim.checkpoint.images}

    @property
    def missing(self) -> int:
        """Number of places without an image."""
        return self._count - len(self._claim.checkpoint.images)

    @property
    def requested(self) -> set[int]:
        """Places that a response was about, with an image or without."""
        checkpoint = self._claim.checkpoint
        return self.filled.union(checkpoint.short, checkpoint.given_up)

    @property
    def settled(self) -> set[int]:
        """Places that are not to be requested once more."""
        checkpoint = self._claim.checkpoint
        settled = self.filled.union(checkpoint.given_up)
        if checkpoint.has_new_images and not checkpoint.missing_requested:
            settled -= self._unusable  # other images are usable, so the fault may not repeat
        return settled

    def count_repeat(self, places: Collection[int], number: int = 1) -> None:
        """Count a call for places of which an earlier response may be paid for without a usable image.

        number: -1 to take it back, since it was certainly not paid.
        """
        if not self._wasted.isdisjoint(places):
            checkpoint = self._claim.checkpoint
            self._claim.checkpoint = replace(checkpoint, repeated=checkpoint.repeated + number)

    def got_no_image(self, places: Collection[int], *, again: bool) -> None:
        """Record a response without any usable image, which may be paid for."""
        self.paid_without_result = True
        self._wasted.update(places)
        self._left_out(places, again=again)

    def received(self, places: Collection[int], missing: Collection[int], *, is_useless: bool, again: bool) -> None:
        """Record a response, before its images are saved, that has no image for the `missing` ones of its places.

        is_useless: whether none of its images is needed. again: whether the places were requested before.
        """
        if missing:
            self._wasted.update(places if is_useless else ())
            self._left_out(missing, again=again)

    def begin_saving(self, *, again: bool) -> None:
        """Expect the images of one response. again: whether they were requested before."""
        self.fault, self._again = None, again

    def rejected(self, image: ReceivedImage, error: ImageRejected) -> None:
        """Record an image that can't be used. It is requested again only if that may help.

        It never is if its provider job was polled again for a fresh link: then it is certainly paid for.
        """
        self.fault, job = error, self._claim.checkpoint.job or self._claim.checkpoint.links_job
        if error.renewable and job and job.renewals:
            self.give_up([image.index])
        elif error.lasting:
            self._unusable.add(image.index)
            self.give_up([image.index])
        else:
            self._wasted.add(image.index)
            self._left_out([image.index], again=self._again)

    def link_died(self, places: Iterable[int]) -> None:
        """Give up images with dead links and no fresh ones from their provider job: another call would pay again."""
        if lost := set(places).difference(self.filled):
            self.fault = ImageRejected("The image's link died, and the provider's job has no fresh one", lasting=True)
            self.give_up(lost)

    def saved(self, places: Collection[int]) -> None:
        """Record that all usable images of a response are saved. places: of its call."""
        if self.missing and not self.filled.issuperset(places):
            self.paid_without_result = True

    def _left_out(self, places: Collection[int], *, again: bool) -> None:
        if again:
            self.give_up(places)
        else:
            checkpoint = self._claim.checkpoint
            self._claim.checkpoint = replace(checkpoint, short=tuple(sorted({*checkpoint.short, *places})))

    def give_up(self, places: Iterable[int]) -> None:
        """Record that these images are not to be requested once more."""
        checkpoint = self._claim.checkpoint
        self._claim.checkpoint = replace(checkpoint, given_up=tuple(sorted({*checkpoint.given_up, *places})))
