"""Checkpoint: the progress of a task's epoch. In Redis it is the entry id, a space, and JSON."""

from __future__ import annotations

import re
from typing import Self

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.codec import UNREADABLE, UnreadableRecord
from imagegen.tasks.cost import Cost
from imagegen.tasks.image import PaidImage, StoredImage
from imagegen.tasks.provider_job import AcceptedJob, SentCall
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.retry import MAX_AMBIGUOUS
from imagegen.tasks.task import State, Task, WaitReason

_encode = msgspec.json.Encoder().encode

MAX_BEGUN_JOBS = 32

_ENTRY_ID = re.compile(rb"[0-9]{1,20}-[0-9]{1,20}")


class Checkpoint(
    Struct,
    frozen=True,
    gc=False,
    rename={"dropped_params": "without", "missing_requested": "asked_again", "ambiguous_calls": "ambiguous"},
):
    """Progress of a task's epoch, written before each paid call.

    Attributes:
        owner: the instance that runs it.
        phase: `calling` (a call may be in flight), `waiting` (before a retry), `released` or `cancelled`.
        starts: all starts. attempts: those that count. ambiguous_calls: calls that were sent and never answered.
        missing_requested: whether the missing images were requested once more.
        links: paid images that are not fetched yet; while there are any, no call is in flight.
        short: indexes that a reply left empty, not requested again yet. given_up: indexes that are not requested again.
        repeated: calls made again because the reply, which may be paid, held no usable image.
        job: a provider job that was paid and is not collected yet; while there is one, no call is in flight.
        links_job: the provider job that `links` came from; it has fresh links if these die.
        details: what the upstream reported with the images.
        cost: None until it differs from that of the entry.
        sent: the call in flight, or the last one if it counts as ambiguous and its job was not searched for yet.
        begun_jobs: ids of the last provider jobs of this epoch.
        channel, account: name of the channel of the last call, and fingerprint of its key.
    """

    owner: str
    phase: str = "calling"
    starts: int = 0
    attempts: int = 0
    ambiguous_calls: int = 0
    images: tuple[StoredImage, ...] = ()
    warnings: tuple[str, ...] = ()
    dropped_params: tuple[str, ...] = ()
    missing_requested: bool = False
    started_at: float | None = None
    reason: str | None = None
    retry_at: float | None = None
    links: tuple[PaidImage, ...] = ()
    short: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    repeated: int = 0
    job: AcceptedJob | None = None
    details: ReplyDetails | None = None
    cost: Cost | None = None
    sent: SentCall | None = None
    begun_jobs: tuple[str, ...] = ()
    channel: str = ""
    account: str = ""
    links_job: AcceptedJob | None = None

    @property
    def billed_again(self) -> int:
        """Calls that may have been paid for more than once."""
        return self.ambiguous_calls + self.repeated

    @property
    def has_new_images(self) -> bool:
        """Whether a call of this task returned an image."""
        for image in self.images:  # noqa: SIM110 - a generator takes three times as long
            if not image.reused:
                return True
        return False

    @property
    def calling(self) -> bool:
        """Whether a paid call may be in flight, or its images may be only in its owner's memory."""
        return self.phase == "calling" and not self.is_paid

    @property
    def is_paid(self) -> bool:
        """Whether an attempt can fetch images that are paid for, by their links or from their job."""
        return bool(self.links) or self.job is not None

    def with_job(self, job: AcceptedJob) -> Self:
        """Return the checkpoint with the job of the call that was sent."""
        begun = (*self.begun_jobs, job.handle.id)[-MAX_BEGUN_JOBS:]
        return replace(self, job=job, sent=None, begun_jobs=begun)

    def without_owner(self) -> Self:
        """Return the checkpoint as it is after the death of its owner, until another instance takes the task over.

        Its attempt is over then. The owner's progress was in its memory: shown as running, the task would fall behind
        what the owner showed last.
        """
        return self if self.phase != "calling" else replace(self, phase="waiting", reason=WaitReason.RETRYING)

    def encode(self, entry_id: str) -> bytes:
        """Return the stored form.

        With a job it counts `MAX_AMBIGUOUS` ambiguous calls more: versions that can't resume jobs then fail the task
        as interrupted, instead of paying for it again.
        """
        checkpoint = self if self.job is None else replace(self, ambiguous_calls=self.ambiguous_calls + MAX_AMBIGUOUS)
        return entry_id.encode() + b" " + _encode(checkpoint)


_decode_json = msgspec.json.Decoder(Checkpoint).decode


def cancelled_checkpoint(jobs: tuple[str, ...]) -> bytes:
    """Return the checkpoint, without the entry id, that a start finds if the task was cancelled just before.

    jobs: ids of the provider jobs of the task.
    """
    return _encode(Checkpoint(owner="", phase="cancelled", begun_jobs=jobs))


def decode_checkpoint(value: bytes) -> tuple[str, Checkpoint]:
    """Return entry id and checkpoint. Raises UnreadableRecord."""
    try:
        entry_id, _, rest = value.partition(b" ")
        if not _ENTRY_ID.fullmatch(entry_id):
            raise ValueError(entry_id)
        checkpoint = _decode_json(rest)
        if checkpoint.job is not None:
            checkpoint = replace(checkpoint, ambiguous_calls=checkpoint.ambiguous_calls - MAX_AMBIGUOUS)
        return entry_id.decode(), checkpoint
    except UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def is_readable_checkpoint(value: bytes) -> bool:
    """Return whether `decode_checkpoint` can decode a value."""
    try:
        decode_checkpoint(value)
    except UnreadableRecord:
        return False
    return True


def owner_of(value: bytes | None) -> str | None:
    """Return the instance that runs an attempt according to a stored checkpoint, None if there is no such attempt."""
    if value is None:
        return None
    try:
        _, checkpoint = decode_checkpoint(value)
    except UnreadableRecord:
        return None
    return checkpoint.owner if checkpoint.phase == "calling" else None


def is_released(value: bytes, entry_id: str) -> bool:
    """Return whether a value is the checkpoint that was released with an entry."""
    try:
        of_entry, checkpoint = decode_checkpoint(value)
    except UnreadableRecord:
        return False
    return of_entry == entry_id and checkpoint.phase == "released"


def calls_under_way(stored: bytes | None) -> int:
    """Return how many calls of a stored checkpoint may have been paid, a running one included."""
    if stored is None:
        return 0
    try:
        _, checkpoint = decode_checkpoint(stored)
    except UnreadableRecord:
        return 1
    return checkpoint.billed_again + (checkpoint.phase == "calling" or checkpoint.job is not None)


def shown_images(task: Task, checkpoint: Checkpoint) -> tuple[StoredImage, ...]:
    """Return the images of an unfinished task: the stale ones until all new ones are stored."""
    return task.images if task.stale_images else checkpoint.images


def with_checkpoint(task: Task, checkpoint: Checkpoint) -> Task:
    """Return an unfinished task with the state of its checkpoint, as another instance sees it."""
    calling = checkpoint.phase == "calling"
    return replace(
        task,
        state=State.PROCESSING if calling else State.PENDING,
        sequence=task.epoch + checkpoint.starts * 1_000 + (0 if calling else 999),
        attempts=checkpoint.attempts,
        started_at=checkpoint.started_at,
        progress=5 if calling else 0,
        images=shown_images(task, checkpoint),
        possibly_billed_twice=max(checkpoint.billed_again, task.possibly_billed_twice),
        cost=checkpoint.cost or task.cost,
        reason=None if calling and not checkpoint.reason else _reason(checkpoint.reason),
        retry_at=checkpoint.retry_at,
        channel=checkpoint.channel,
    )


def _reason(reason: str | None) -> WaitReason:
    """Return the reason; one of a newer version becomes RETRYING."""
    try:
        return WaitReason(reason or WaitReason.QUEUED)
    except ValueError:
        return WaitReason.RETRYING
