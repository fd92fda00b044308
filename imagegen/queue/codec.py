"""Encoding of tasks, entries, checkpoints and delivery logs in Redis, each with a schema version.

A record is a head that the scripts read (`1 pending <entry id> <generation> <sequence> <digest>`), a newline, and
JSON. An entry carries the version, the generation and JSON with the request: a claim needs no second read. A
checkpoint is the entry id, a space, and JSON; a delivery log is `1 <generation>`, a newline, and a JSON list. Values of
a newer version are not touched: deploys overlap for minutes. So each task is written in the lowest version that is able
to run it. The head of a task with added webhooks ends in ` +`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import orjson
from msgspec import Struct
from msgspec.structs import replace

from imagegen.tasks.image import PaidImage, StoredImage
from imagegen.tasks.provider_job import AcceptedJob
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.retry import MAX_AMBIGUOUS
from imagegen.tasks.stored_version import FIRST_VERSION, reused_images, version_of
from imagegen.tasks.task import State, Task, TaskError, WaitReason
from imagegen.tasks.webhook import Delivery, merge_deliveries

VERSION = 2
"""The highest version that this service reads and writes."""

_LOG_VERSION = 1

MAX_SKEW_S = 5.0
"""Longest delay of a submit; a larger difference to the entry's id means that the clocks differ."""

_encode = msgspec.json.Encoder().encode

_UNREADABLE = (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that decoding a foreign value raises."""

_NO_REQUEST = msgspec.Raw()

_READABLE = frozenset(b"%d" % version for version in range(FIRST_VERSION, VERSION + 1))

_ENTRY_ID = re.compile(rb"[0-9]{1,20}-[0-9]{1,20}")


class UnreadableRecord(ValueError):
    """A value that this service does not write."""


class NewerRecord(ValueError):
    """A value that a newer version of this service wrote."""


class _Record(Struct, omit_defaults=True, gc=False):
    """JSON of a record. The request is left out while the entry carries it."""

    id: str
    model: str
    created: float
    progress: int = 0
    attempts: int = 0
    started: float | None = None
    finished: float | None = None
    expires: float | None = None
    images: tuple[StoredImage, ...] = ()
    stale: bool = False
    error: TaskError | None = None
    warnings: tuple[str, ...] = ()
    billed: int = 0
    retry: float | None = None
    reason: WaitReason = WaitReason.QUEUED
    webhooks: tuple[dict[str, Any], ...] = ()
    request: msgspec.Raw = _NO_REQUEST
    details: ReplyDetails | None = None


class _Entry(Struct, omit_defaults=True, gc=False):
    """JSON of an entry: enough to run the task.

    images: of the epoch before, shown until the new ones are stored.
    queued: time of the submit by the server's clock if an earlier entry carried the task; else the entry's id has it.
    reused: images that the task has before its first call.
    """

    id: str
    digest: str
    model: str
    created: float
    request: msgspec.Raw
    images: tuple[StoredImage, ...] = ()
    webhooks: tuple[dict[str, Any], ...] = ()
    queued: float | None = None
    reused: tuple[StoredImage, ...] = ()


_read_record = msgspec.json.Decoder(_Record).decode
_read_entry = msgspec.json.Decoder(_Entry).decode


class RecordHeader(NamedTuple):
    """Part of a record that scripts read."""

    state: State
    entry_id: str
    generation: int
    sequence: int
    digest: str


def encode_task(task: Task, *, with_request: bool) -> bytes:
    """Return the JSON of a record."""
    return _encode(
        _Record(
            task.id,
            task.model,
            task.created_at,
            task.progress,
            task.attempts,
            task.started_at,
            task.finished_at,
            task.expires_at,
            task.images,
            task.stale_images,
            task.error,
            task.warnings,
            task.possibly_billed_twice,
            task.retry_at,
            task.reason or WaitReason.QUEUED,
            _stored(task.deliveries),
            msgspec.Raw(task.request_json) if with_request and task.request_json else _NO_REQUEST,
            task.details,
        )
    )


def final_record(task: Task) -> bytes:
    """Return the whole record of a finished task."""
    return _ownerless_head(task) + encode_task(task, with_request=True)


def broadcast_record(task: Task) -> bytes:
    """Return a task in the form that instances publish to each other; it is never stored."""
    return _ownerless_head(task) + encode_task(task, with_request=False)


def _ownerless_head(task: Task) -> bytes:
    return f"{version_of(task)} {task.state} - {task.epoch} {task.sequence} {task.digest}\n".encode()


def decode_head(value: bytes) -> RecordHeader:
    """Decode a record's first line. Raises NewerRecord or UnreadableRecord."""
    try:
        version, *parts = value.partition(b"\n")[0].decode().split(" ")
        if int(version) > VERSION:
            raise NewerRecord(version)
        state, entry_id, generation, sequence, digest, *_ = parts
        return RecordHeader(State(state), entry_id, int(generation), int(sequence), digest)
    except NewerRecord:
        raise
    except ValueError as error:
        raise UnreadableRecord(repr(value[:80])) from error


def decode_record(value: bytes) -> tuple[RecordHeader, Task]:
    """Decode a record. Raises NewerRecord or UnreadableRecord."""
    head = decode_head(value)
    try:
        return head, _task(head, _read_record(value.partition(b"\n")[2]))
    except _UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def _task(head: RecordHeader, record: _Record) -> Task:
    pending = head.state is State.PENDING
    return Task(
        id=record.id,
        epoch=head.generation,
        sequence=head.sequence,
        digest=head.digest,
        model=record.model,
        request_json=bytes(record.request),
        created_at=record.created,
        state=head.state,
        progress=record.progress,
        attempts=record.attempts,
        started_at=record.started,
        finished_at=record.finished,
        expires_at=record.expires,
        images=record.images,
        stale_images=record.stale,
        error=record.error,
        warnings=record.warnings,
        possibly_billed_twice=record.billed,
        reason=record.reason if pending else None,
        retry_at=record.retry,
        entry_id=head.entry_id if pending else "",
        deliveries=_deliveries(record.webhooks),
        details=record.details,
    )


def _stored(deliveries: tuple[Delivery, ...]) -> tuple[dict[str, Any], ...]:
    return tuple([delivery.stored() for delivery in deliveries]) if deliveries else ()


def _deliveries(stored: Iterable[Any]) -> tuple[Delivery, ...]:
    return tuple([Delivery.restore(fields) for fields in stored]) if stored else ()


def encode_entry(task: Task) -> bytes:
    """Return the JSON of an entry."""
    request = msgspec.Raw(task.request_json)
    return _encode(
        _Entry(
            task.id,
            task.digest,
            task.model,
            task.created_at,
            request,
            task.images if task.stale_images else (),
            _stored(task.deliveries),
            task.created_at if task.entry_id else None,
            reused_images(task),
        )
    )


def peek_task_id(fields: Mapping[bytes, bytes]) -> str:
    """Return the task id of an entry without decoding it; any text for a foreign entry."""
    return fields.get(b"d", b"")[7:39].decode(errors="replace") if fields.get(b"v") in _READABLE else ""


def decode_entry(fields: Mapping[bytes, bytes], entry_id: str = "") -> Task:
    """Return the pending task of a stream entry. Raises NewerRecord or UnreadableRecord."""
    try:
        if int(fields[b"v"]) > VERSION:
            raise NewerRecord(fields[b"v"].decode())
        generation = int(fields[b"g"])
        entry = _read_entry(fields[b"d"])
        return Task(
            id=entry.id,
            epoch=generation,
            sequence=generation,
            digest=entry.digest,
            model=entry.model,
            request_json=bytes(entry.request),
            created_at=_came_at(entry, entry_id),
            images=entry.images or entry.reused,
            stale_images=bool(entry.images),
            reason=WaitReason.QUEUED,
            entry_id=entry_id,
            deliveries=_deliveries(entry.webhooks),
        )
    except NewerRecord:
        raise
    except _UNREADABLE as error:
        raise UnreadableRecord(repr(fields)[:200]) from error


def _came_at(entry: _Entry, entry_id: str) -> float:
    if entry.queued is not None:
        return entry.queued
    return server_time(entry.created, entry_id) if entry_id else entry.created


def server_time(created_at: float, entry_id: str) -> float:
    """Return the time of a submit: by the submitter's clock, or the server's if the entry's id differs from it."""
    added_at = int(entry_id.partition("-")[0]) / 1000
    return created_at if abs(created_at - added_at) <= MAX_SKEW_S else added_at


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
        details: what the upstream reported with the images.
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

    @property
    def billed_again(self) -> int:
        """Calls that may have been paid for more than once."""
        return self.ambiguous_calls + self.repeated

    @property
    def has_new_images(self) -> bool:
        """Whether a call of this task returned an image."""
        return not all(image.reused for image in self.images)

    @property
    def calling(self) -> bool:
        """Whether a paid call may be in flight, or its images may be only in its owner's memory."""
        return self.phase == "calling" and not self.links and self.job is None

    def encode(self, entry_id: str) -> bytes:
        """Return the stored form.

        With a job it counts `MAX_AMBIGUOUS` ambiguous calls more: versions that can't resume jobs then fail the task
        as interrupted, instead of paying for it again.
        """
        run = self if self.job is None else replace(self, ambiguous_calls=self.ambiguous_calls + MAX_AMBIGUOUS)
        return entry_id.encode() + b" " + _encode(run)


_read_run = msgspec.json.Decoder(Checkpoint).decode

CANCELLED_RUN = _encode(Checkpoint(owner="", phase="cancelled"))
"""Checkpoint, without the entry id, that a start finds if the task was cancelled just before."""


def decode_checkpoint(value: bytes) -> tuple[str, Checkpoint]:
    """Return entry id and checkpoint. Raises UnreadableRecord."""
    try:
        entry_id, _, rest = value.partition(b" ")
        if not _ENTRY_ID.fullmatch(entry_id):
            raise ValueError(entry_id)
        run = _read_run(rest)
        if run.job is not None:
            run = replace(run, ambiguous_calls=run.ambiguous_calls - MAX_AMBIGUOUS)
        return entry_id.decode(), run
    except _UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def readable_run(value: bytes) -> bool:
    """Return whether `decode_checkpoint` can decode a value."""
    try:
        decode_checkpoint(value)
    except UnreadableRecord:
        return False
    return True


def calls_under_way(stored: bytes | None) -> int:
    """Return how many calls of a stored checkpoint may have been paid, a running one included."""
    if stored is None:
        return 0
    try:
        _, run = decode_checkpoint(stored)
    except UnreadableRecord:
        return 1
    return run.billed_again + (run.phase == "calling" or run.job is not None)


def shown_images(task: Task, run: Checkpoint) -> tuple[StoredImage, ...]:
    """Return the images of an unfinished task: the stale ones until all new ones are stored."""
    return task.images if task.stale_images else run.images


def with_checkpoint(task: Task, run: Checkpoint) -> Task:
    """Return an unfinished task with the state of its checkpoint, as another instance sees it."""
    calling = run.phase == "calling"
    return replace(
        task,
        state=State.PROCESSING if calling else State.PENDING,
        sequence=task.epoch + run.starts * 1_000 + (0 if calling else 999),
        attempts=run.attempts,
        started_at=run.started_at,
        progress=5 if calling else 0,
        images=shown_images(task, run),
        possibly_billed_twice=max(run.billed_again, task.possibly_billed_twice),
        reason=None if calling and not run.reason else _reason(run.reason),
        retry_at=run.retry_at,
    )


def _reason(reason: str | None) -> WaitReason:
    """Return the reason; one of a newer version becomes RETRYING."""
    try:
        return WaitReason(reason or WaitReason.QUEUED)
    except ValueError:
        return WaitReason.RETRYING


def encode_hooks(generation: int, deliveries: Iterable[Delivery]) -> bytes:
    """Return the delivery log of an epoch."""
    return f"{_LOG_VERSION} {generation}\n".encode() + orjson.dumps([delivery.stored() for delivery in deliveries])


def decode_hooks(value: bytes) -> tuple[int, tuple[Delivery, ...]]:
    """Return epoch and deliveries. Raises NewerRecord or UnreadableRecord."""
    try:
        line, _, rest = value.partition(b"\n")
        version, generation = map(int, line.split(b" "))
        if version > _LOG_VERSION:
            raise NewerRecord(version)
        return generation, _deliveries(orjson.loads(rest))
    except NewerRecord:
        raise
    except _UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def with_delivery_log(task: Task, value: bytes | None) -> Task:
    """Return the task with the deliveries of its log. A log that is unreadable or of another epoch is ignored."""
    if not value:
        return task
    try:
        generation, logged = decode_hooks(value)
    except (NewerRecord, UnreadableRecord):
        return task
    if generation != task.epoch:
        return task
    return replace(task, deliveries=merge_deliveries(task.deliveries, logged))
