"""Saving of the images that a claim has paid for, however long the image host or the store is away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import DownloadFailed, ImageRejected, StoreUnavailable, forget_frames
from imagegen.images.image_links import expires_at
from imagegen.images.store import Describe, VerifiedImage, file_threads
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.image import GivenImage, ImageLink, PaidImage, StoredImage
from imagegen.tasks.provider_job import AcceptedJob
from imagegen.tasks.retry import Outcome, Retry
from imagegen.tasks.task import WaitReason, image_progress
from imagegen.worker.permits import PermitLine
from imagegen.worker.slow_saving import LOOK_S, SaveLeft, SaveWatch

SLOW_AFTER_S = 1.0
"""Downloads of an answer that take longer in all leave their slot to other tasks, since their host may never answer,
and are written to the checkpoint, so that a crash does not lose a paid image."""

UNSAVED_AFTER_S = 5.0
"""Age at which an image that can't be fetched yet counts against its host: some need seconds to publish it."""

MIN_RETRY_S, MAX_RETRY_S = 1.0, 20.0
"""Delay before a link is tried again: half of its age within these bounds."""

MAX_RENEWALS = 3
"""How often a provider job that has ended is polled again for fresh links; many sign them at each poll."""

MAX_STALL_S = 5.0
"""Longest wait between two tries to save an image in a store that works for others; the first wait for one that does
not, doubled each time: its health should notice before that it works again."""

QUIET_CHECK_S = 0.5


class ImageSaver(Protocol):
    """Saver of images."""

    @property
    def writable(self) -> bool:
        """Whether images of new calls could be saved."""
        ...

    async def wait_writable(self, within_s: float) -> None:
        """Wait until images can be saved, `within_s` seconds at most."""
        ...

    def passthrough(self, index: int, image: GivenImage, seed: int | None) -> StoredImage | None:
        """Return an image that needs no saving; None if it is for `fetch` and `save`. Raises ImageRejected."""
        ...

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        """Return the checked image. Raises ImageRejected, DownloadFailed, StoreUnavailable."""
        ...

    async def save(
        self, task_id: str, index: int, image: VerifiedImage, seed: int | None, describe: Describe
    ) -> StoredImage:
        """Save a fetched image, with its description in the file if that is set. Raises StoreUnavailable."""
        ...

    async def find(self, task_id: str, since_s: float) -> Sequence[StoredImage]:
        """Return images of a task in the store that were saved since a Unix time. Raises StoreUnavailable."""
        ...

    def discard(self, image: VerifiedImage) -> None:
        """Forget a fetched image, saved or not."""
        ...

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage]) -> None:
        """Let images live as long as if they were saved now."""
        ...


class ReceivedImage(Struct, frozen=True, gc=False):
    """An image of a call's response for a place in the task."""

    index: int
    image: GivenImage
    seed: int | None
    received_at: float


def received_again(paid: PaidImage) -> ReceivedImage:
    """Return an image of a checkpoint as it was given."""
    return ReceivedImage(paid.index, ImageLink(paid.url), paid.seed, paid.received_at)


def _link_of(received: ReceivedImage) -> str:
    """Return the address of an image, empty if its bytes are in the answer."""
    return received.image.url if isinstance(received.image, ImageLink) else ""


class AttemptEnded(Exception):
    """The attempt ends here."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class SavingDelayed(AttemptEnded):
    """The attempt can't go on now and gives up its slot; the checkpoint lists the missing images."""


class DeadlinePassed(Exception):
    """The task's deadline came while its images could not be saved."""


class LinksDied(Exception):
    """Links of paid images died, and their provider job may have fresh ones: it is in the checkpoint again."""


class ClaimImageSaver(Struct, eq=False):
    """Saver of the paid images of one claim. wanted: images of the task; ends_at: returns its deadline.

    permits: receives whether images come, and has whether the instance is stopping. on_rejected: called with images
    that can't be used; describe: returns the text for the metadata of an image; model: returns the one that is called.
    """

    claims: WorkerQueue
    image_saver: ImageSaver
    claim: Claim
    wanted: int
    ends_at: Callable[[], float]
    permits: PermitLine
    on_rejected: Callable[[ReceivedImage, ImageRejected], None]
    describe: Describe
    model: Callable[[], str]
    clock: Callable[[], float] = time.time
    jitter: Callable[[], float] = random.random
    _writing: asyncio.Task[bool] | None = None
    _stalled: bool = False
    _slow_at_s: float = 0.0
    _timer: asyncio.TimerHandle | None = None

    async def save(self, images: Sequence[ReceivedImage]) -> None:
        """Save images. Those that can't be used are passed to `on_rejected`.

        Raises:
            SavingDelayed: links failed in a way that may pass, or the instance stops and nothing would be lost.
            DeadlinePassed: the deadline came.
            LinksDied: links died, and their provider job may have fresh ones.
        """
        rest: list[ReceivedImage] = []
        image_count = len(self.claim.checkpoint.images)
        for received in images:
            try:
                stored = self.image_saver.passthrough(received.index, received.image, received.seed)
            except ImageRejected as error:
                self.on_rejected(received, error)
                continue
            if stored is None:
                rest.append(received)
            else:
                self._add(received, stored)
        if rest:
            await self._save_bytes(rest)
        if images and len(self.claim.checkpoint.images) == image_count:
            self.record_useless()

    def record_useless(self) -> None:
        """Record a response, which may be paid for, without an image that can be used."""
        claim = self.claim
        self.permits.images_useless(claim.task.id, claim.checkpoint.channel, self.model())

    async def _save_bytes(self, images: Sequence[ReceivedImage]) -> None:
        """Save images, first those with bytes in the answer: their loss would be final."""
        links = [received for received in images if isinstance(received.image, ImageLink)]
        failures: list[tuple[ReceivedImage, DownloadFailed]] = []
        died: list[ReceivedImage] = []
        self._slow_at_s = asyncio.get_running_loop().time() + SLOW_AFTER_S
        for received in sorted(images, key=lambda received: isinstance(received.image, ImageLink)):
            if links and received is links[0]:
                self._note_links(links)
            image_count = len(self.claim.checkpoint.images)
            self.claims.progress(self.claim, image_progress(image_count + 1, image_count, self.wanted))
            try:
                self._add(received, await self._into_store(received))
            except ImageRejected as error:
                forget_frames(error)
                self._give_up(received, error, died)
            except DownloadFailed as error:
                forget_frames(error)
                if self.clock() < self._link_end(received):
                    failures.append((received, error))
                else:
                    detail = f"The image's link died: {error}"
                    self._give_up(received, ImageRejected(detail, lasting=True, renewable=True), died)
        if died:
            self._return_to_job(died)
            raise LinksDied
        if failures:
            raise SavingDelayed(self._later(failures))

    def _give_up(self, received: ReceivedImage, error: ImageRejected, died: list[ReceivedImage]) -> None:
        """Add an image to those that died if its provider job may have a fresh link to it; else reject it."""
        job = self._links_job
        if error.renewable and job and job.renewals < MAX_RENEWALS and _link_of(received) not in job.dead_links:
            died.append(received)
        else:
            self.on_rejected(received, error)
            self._forget_link(received)

    @property
    def _links_job(self) -> AcceptedJob | None:
        return self.claim.checkpoint.job or self.claim.checkpoint.links_job

    def _return_to_job(self, died: Sequence[ReceivedImage]) -> None:
        """Put the provider job of links back into the checkpoint in place of them; no call is made."""
        logger.bind(taskId=self.claim.task.id).info("The link to a paid image died; its job is polled for a fresh one")
        if job := self._links_job:
            dead_links = tuple({*job.dead_links, *map(_link_of, died)})
            job = replace(job, renewals=job.renewals + 1, dead_links=dead_links)
            self.claim.checkpoint = replace(self.claim.checkpoint, job=job, links=(), links_job=None)

    def _add(self, received: ReceivedImage, stored: StoredImage) -> None:
        claim = self.claim
        images = (*claim.checkpoint.images, stored)
        if len(images) > 1:
            images = tuple(sorted(images, key=attrgetter("index")))
        claim.checkpoint = replace(claim.checkpoint, images=images)
        for model in {claim.task.model, self.model()}:
            self.permits.image_saved(claim.checkpoint.channel, model)
        self._forget_link(received)
        self.claims.progress(claim, image_progress(len(images), len(images), self.wanted))

    async def _into_store(self, received: ReceivedImage) -> StoredImage:
        image, tries = None, 0
        try:
            while True:
                try:
                    if image is None and not self.image_saver.writable and not isinstance(received.image, ImageLink):
                        raise StoreUnavailable  # the bytes are in the answer: decoded they would take memory twice
                    image = image or await self._fetch(received)
                    stored = await self._save_watched(received, image)
                except StoreUnavailable as error:
                    if image is not None and await self._comes_again(received, image):
                        self.image_saver.discard(image)
                        image = None
                    await self._stall(tries, error)
                    tries += 1
                else:
                    self._resume()
                    return stored
        except (ImageRejected, DownloadFailed):  # the store works, or is not what this image waits for
            self._resume()
            raise
        finally:
            if image is not None:
                self.image_saver.discard(image)

    async def _save_watched(self, received: ReceivedImage, image: VerifiedImage) -> StoredImage:
        """Save an image. While the store does not answer, the task shows why it waits."""
        save = self.image_saver.save(self.claim.task.id, received.index, image, received.seed, self.describe)
        try:
            return await SaveWatch(self._look, self._may_leave).run(save)
        except SaveLeft as error:
            raise StoreUnavailable from error
        finally:
            if self._writing is not None:
                await self._finish_writing(self._writing)

    def _look(self) -> None:
        if not self.image_saver.writable and not self._stalled:
            self._show_stall("it does not answer")
            if self.claim.checkpoint.links:
                self._checkpoint_soon()

    def _may_leave(self) -> bool:
        is_over = self.clock() >= self.ends_at() or (self.permits.is_quiet and bool(self.claim.checkpoint.links))
        return self._stalled and is_over

    async def _comes_again(self, received: ReceivedImage, image: VerifiedImage) -> bool:
        """Return whether a fetched image need not be held: its bytes are in the answer, or its file is gone.

        A file counts as gone if its disk does not return it though the store works, as in a cache that hangs.
        """
        if image.path is None:
            return not isinstance(received.image, ImageLink)
        try:
            return not await file_threads.run_within(LOOK_S, image.path.exists)
        except OSError:
            return self.image_saver.writable

    async def _fetch(self, received: ReceivedImage) -> VerifiedImage:
        """Return the checked image; a link with a long download is checkpointed meanwhile, without a slot."""
        age_s = max(self.clock() - received.received_at, 0.0)
        if not self.claim.checkpoint.links:
            return await self.image_saver.fetch(received.image, age_s=age_s)
        self._timer = asyncio.get_running_loop().call_at(self._slow_at_s, self._download_is_slow, age_s)
        try:
            return await self.image_saver.fetch(received.image, age_s=age_s)
        finally:
            self._timer.cancel()
            if self._writing is not None:
                await self._finish_writing(self._writing)

    async def _finish_writing(self, writing: asyncio.Task[bool]) -> None:
        self._writing = None
        await writing

    def _download_is_slow(self, age_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(UNSAVED_AFTER_S - age_s, 0.0), self._images_wait)
        self.claims.go_away(self.claim)
        if self.claim.checkpoint is not self.claim.stored_checkpoint:
            self._checkpoint_soon()

    def _images_wait(self) -> None:
        """Record that images of this task can't be fetched yet, so that not ever more such calls are paid."""
        task = self.claim.task
        self.permits.images_wait(task.id, self.claim.checkpoint.channel, task.model)

    def _checkpoint_soon(self) -> None:
        self._writing = asyncio.create_task(self.claims.checkpoint(self.claim, self.claim.checkpoint))

    async def _stall(self, tries: int, error: StoreUnavailable) -> None:
        """Wait in the slot until the store may work again: no other claim could use the slot meanwhile."""
        claim, now = self.claim, self.clock()
        if now >= self.ends_at():
            raise DeadlinePassed
        if not self._stalled:
            self._show_stall(str(error.__cause__ or error))
            if claim.checkpoint.links:
                await self.claims.checkpoint(claim, claim.checkpoint)
        if claim.checkpoint.links and self.permits.is_quiet:
            raise SavingDelayed(Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False))
        await self._wait(tries)

    def _show_stall(self, cause: str) -> None:
        self._stalled = True
        logger.bind(taskId=self.claim.task.id).info("The image waits for its store: {}", cause)
        retry_at = self.clock() + MAX_STALL_S
        self.claim.checkpoint = replace(self.claim.checkpoint, reason=WaitReason.STORE_UNAVAILABLE, retry_at=retry_at)
        self.claims.stall(self.claim, WaitReason.STORE_UNAVAILABLE, retry_at)

    async def _wait(self, tries: int) -> None:
        """Wait for the store, and look now and then whether the instance stops."""
        if self.image_saver.writable:  # it works for others, so the cause may be this image's own
            await asyncio.sleep(min(0.25 * 2 ** min(tries, 10), MAX_STALL_S, max(self.ends_at() - self.clock(), 0.0)))
        until = min(self.clock() + MAX_STALL_S * 2 ** min(tries, 10), self.ends_at())
        while not self.image_saver.writable and (left_s := until - self.clock()) > 0:
            if self.claim.checkpoint.links and self.permits.is_quiet:
                return
            await self.image_saver.wait_writable(min(left_s, QUIET_CHECK_S))

    def _resume(self) -> None:
        """Show that the task waits for its store no more, if it did."""
        if not self._stalled:
            return
        self._stalled = False
        self.claim.checkpoint = replace(self.claim.checkpoint, reason=None, retry_at=None)
        self.claims.stall(self.claim, None, None)

    def _note_links(self, links: Sequence[ReceivedImage]) -> None:
        """Put links into the checkpoint's next state; once they are there, no call is under way."""
        paid = [
            PaidImage(received.index, received.image.url, received.received_at, received.seed)
            for received in links
            if isinstance(received.image, ImageLink)
        ]
        if tuple(paid) != self.claim.checkpoint.links:
            self.claim.checkpoint = replace(self.claim.checkpoint, links=tuple(paid))

    def _forget_link(self, received: ReceivedImage) -> None:
        links = self.claim.checkpoint.links
        if links:
            links = tuple([paid for paid in links if paid.index != received.index])
            links_job = self.claim.checkpoint.links_job if links else None
            self.claim.checkpoint = replace(self.claim.checkpoint, links=links, links_job=links_job)

    def _link_end(self, received: ReceivedImage) -> float:
        link = _link_of(received)
        return expires_at(link, received.received_at) if link else 0.0

    def _later(self, failures: Sequence[tuple[ReceivedImage, DownloadFailed]]) -> Retry:
        """Return when the links are tried again: the longer they fail the later, but before the first one dies."""
        now = self.clock()
        age_s = now - min(received.received_at for received, _ in failures)
        if age_s >= UNSAVED_AFTER_S:
            self._images_wait()
        requested_s = max((error.retry_after_s or 0.0 for _, error in failures), default=0.0)
        delay_s = min(max(age_s / 2, MIN_RETRY_S), MAX_RETRY_S) * (0.75 + 0.5 * self.jitter())
        left_s = min(self._link_end(received) for received, _ in failures) - now
        delay_s = min(max(delay_s, min(requested_s, MAX_RETRY_S)), max(left_s - 1.0, 0.5))
        log = logger.bind(taskId=self.claim.task.id)
        log.info("Paid images can't be fetched now, {:.1f} s until the next try: {}", delay_s, failures[0][1])
        return Retry(delay_s, WaitReason.RETRYING, counts_as_attempt=False)
