"""Encoding of tasks, entries and delivery logs in Redis, each with a schema version.

A record is a head that the scripts read (`1 pending <entry id> <epoch> <sequence> <digest>`), a newline, and JSON. The
head of a task with added webhooks ends in ` +`. An entry carries the version, the epoch and JSON with the request: a
claim needs no second read. A delivery log is `1 <epoch>`, a newline, and a JSON list.

Values of a newer version are not touched, since deploys overlap for minutes. So each task is written in the lowest
version that is able to run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import orjson
from msgspec import Meta, Raw, Struct
from msgspec.structs import replace

from imagegen.tasks.cost import Cost
from imagegen.tasks.image import StoredImage
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import UPLOAD_PREFIX
from imagegen.tasks.task import State, Task, TaskError, WaitReason
from imagegen.tasks.webhook import Delivery, merge_deliveries

FIRST_VERSION = 1
INPUTS_VERSION = 2
"""Adds fields to requests, more images, uploads, and images that a task has before its first call."""

VERSION = 2
"""The highest version that this service reads and writes."""

_LOG_VERSION = 1

MAX_SKEW_S = 5.0
"""Longest delay of a submit; a larger difference to the entry's id means that the clocks differ."""

_encode = msgspec.json.Encoder().encode

UNREADABLE = (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that decoding a foreign value raises."""

_ABSENT = msgspec.Raw()

_READABLE = frozenset(b"%d" % version for version in range(FIRST_VERSION, VERSION + 1))


class UnreadableRecord(ValueError):
    """A value that this service does not write."""


class NewerRecord(ValueError):
    """A value that a newer version of this service wrote."""


class _Record(Struct, omit_defaults=True, gc=False):
    """JSON of a record. The request is left out while the entry carries it.

    Scripts change `billed` and `cost`, which come before the request, the only part that a client writes.
    """

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
    cost: Cost | None = None
    request: msgspec.Raw = _ABSENT
    details: ReplyDetails | None = None
    client: str = ""
    scope: str | None = None
    counted: str = ""
    upstream: bool = False
    channel: str = ""
    by: str = ""
    jobs: tuple[str, ...] = ()


class _Entry(Struct, omit_defaults=True, gc=False):
    """JSON of an entry: enough to run the task.

    images: of the epoch before, shown until the new ones are stored.
    queued: time of the submit by the server's clock if an earlier entry carried the task; else the entry's id has it.
    reused: images that the task has before its first call.
    begun: calls that were made before a release, see `Task.begun_calls`.
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
    client: str = ""
    scope: str | None = None
    by: str = ""
    sandbox: bool | None = None
    begun: int = 0
    cost: Cost | None = None  # the last one: scripts find the client before it


_read_record = msgspec.json.Decoder(_Record).decode
_read_entry = msgspec.json.Decoder(_Entry).decode
_read_cost = msgspec.json.Decoder(Cost).decode

NO_ENTRY = "-"
"""In the place of an entry's id, in the head of a task that has none."""


class RecordHeader(NamedTuple):
    """Part of a record that scripts read."""

    state: State
    entry_id: str
    epoch: int
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
            task.cost,
            msgspec.Raw(task.request_json) if with_request and task.request_json else _ABSENT,
            task.details,
            task.client,
            task.scope,
            task.counted_in,
            task.cancelled_upstream,
            task.channel,
            task.submitter,
            task.jobs,
        )
    )


def encode_cost_if_sent(cost: Cost | None) -> bytes:
    """Return the JSON of a task's cost if its call in flight is paid, with the reserved part; empty for none."""
    return b"" if cost is None else _encode(replace(cost.ended(), reserved=cost.reserved))


def decode_cost(value: bytes) -> Cost | None:
    """Return a cost as a script copied it from a record; None if it is unreadable."""
    try:
        return _read_cost(value)
    except UNREADABLE:
        return None


def final_record(task: Task) -> bytes:
    """Return the whole record of a finished task."""
    return _head(task) + encode_task(task, with_request=True)


def broadcast_record(task: Task) -> bytes:
    """Return a task in the form that instances publish to each other; it is never stored."""
    return _head(task, task.entry_id) + encode_task(task, with_request=False)


def _head(task: Task, entry_id: str = "") -> bytes:
    entry = entry_id or NO_ENTRY
    return f"{version_of(task)} {task.state} {entry} {task.epoch} {task.sequence} {task.digest}\n".encode()


def decode_head(value: bytes) -> RecordHeader:
    """Decode a record's first line. Raises NewerRecord or UnreadableRecord."""
    try:
        version, *parts = value.partition(b"\n")[0].decode().split(" ")
        if int(version) > VERSION:
            raise NewerRecord(version)
        state, entry_id, epoch, sequence, digest, *_ = parts
        return RecordHeader(State(state), entry_id, int(epoch), int(sequence), digest)
    except NewerRecord:
        raise
    except ValueError as error:
        raise UnreadableRecord(repr(value[:80])) from error


def decode_record(value: bytes) -> tuple[RecordHeader, Task]:
    """Decode a record. Raises NewerRecord or UnreadableRecord."""
    head = decode_head(value)
    try:
        return head, _task(head, _read_record(value.partition(b"\n")[2]))
    except UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def _task(head: RecordHeader, record: _Record) -> Task:
    pending = head.state is State.PENDING
    return Task(
        id=record.id,
        epoch=head.epoch,
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
        entry_id=head.entry_id if pending and head.entry_id != NO_ENTRY else "",
        deliveries=_deliveries(record.webhooks),
        details=record.details,
        client=record.client,
        scope=record.scope,
        cost=record.cost,
        counted_in=record.counted,
        cancelled_upstream=record.upstream,
        channel=record.channel,
        submitter=record.by,
        jobs=record.jobs,
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
            task.client,
            task.scope,
            task.submitter,
            task.sandbox,
            task.begun_calls,
            task.cost,
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
        epoch = int(fields[b"g"])
        entry = _read_entry(fields[b"d"])
        return Task(
            id=entry.id,
            epoch=epoch,
            sequence=epoch,
            digest=entry.digest,
            model=entry.model,
            request_json=bytes(entry.request),
            created_at=_submitted_at(entry, entry_id),
            images=entry.images or entry.reused,
            stale_images=bool(entry.images),
            reason=WaitReason.QUEUED,
            entry_id=entry_id,
            deliveries=_deliveries(entry.webhooks),
            client=entry.client,
            scope=entry.scope,
            cost=entry.cost,
            sandbox=entry.sandbox,
            submitter=entry.by,
            begun_calls=entry.begun,
        )
    except NewerRecord:
        raise
    except UNREADABLE as error:
        raise UnreadableRecord(repr(fields)[:200]) from error


def _submitted_at(entry: _Entry, entry_id: str) -> float:
    """Return the time of a submit: by the submitter's clock, or the server's if the entry's id differs from it."""
    if entry.queued is not None:
        return entry.queued
    if not entry_id:
        return entry.created
    added_at = int(entry_id.partition("-")[0]) / 1000
    return entry.created if abs(entry.created - added_at) <= MAX_SKEW_S else added_at


def encode_delivery_log(epoch: int, deliveries: Iterable[Delivery]) -> bytes:
    """Return the delivery log of an epoch."""
    return f"{_LOG_VERSION} {epoch}\n".encode() + orjson.dumps([delivery.stored() for delivery in deliveries])


def decode_delivery_log(value: bytes) -> tuple[int, tuple[Delivery, ...]]:
    """Return epoch and deliveries. Raises NewerRecord or UnreadableRecord."""
    try:
        line, _, rest = value.partition(b"\n")
        version, epoch = map(int, line.split(b" "))
        if version > _LOG_VERSION:
            raise NewerRecord(version)
        return epoch, _deliveries(orjson.loads(rest))
    except NewerRecord:
        raise
    except UNREADABLE as error:
        raise UnreadableRecord(repr(value[:80])) from error


def with_delivery_log(task: Task, value: bytes | None) -> Task:
    """Return the task with the deliveries of its log. A log that is unreadable or of another epoch is ignored."""
    if not value:
        return task
    try:
        epoch, logged = decode_delivery_log(value)
    except (NewerRecord, UnreadableRecord):
        return task
    if epoch != task.epoch:
        return task
    return replace(task, deliveries=merge_deliveries(task.deliveries, logged))


class _FirstRequest(Struct, forbid_unknown_fields=True, gc=False):
    """Request as the first version reads it; it fails a task with any other field. `Raw` values need no decoding."""

    prompt: Raw
    model: Raw
    width: Raw
    height: Raw
    n: Annotated[int, Meta(ge=1, le=8)]
    steps: Raw = _ABSENT
    seed: Raw = _ABSENT
    negative_prompt: Raw = _ABSENT
    guidance_scale: Raw = _ABSENT
    output_format: Raw = _ABSENT
    image_url: str | None = None
    reference_images: tuple[str, ...] | None = None


_read_first = msgspec.json.Decoder(_FirstRequest).decode


def request_version(request_json: bytes) -> int:
    """Return the lowest schema version that runs a stored request rightly."""
    try:
        request = _read_first(request_json)
    except msgspec.MsgspecError:
        return INPUTS_VERSION
    if request.image_url is None and request.reference_images is None:
        return FIRST_VERSION
    inputs = (request.image_url or "", *(request.reference_images or ()))
    return INPUTS_VERSION if any(address.startswith(UPLOAD_PREFIX) for address in inputs) else FIRST_VERSION


def version_of(task: Task) -> int:
    """Return the version that a task is written in. Every version shows a completed task rightly."""
    if task.state is State.COMPLETED or not task.request_json:
        return FIRST_VERSION
    return INPUTS_VERSION if reused_images(task) else request_version(task.request_json)


def reused_images(task: Task) -> tuple[StoredImage, ...]:
    """Return the images of an unfinished task that another task made."""
    if not task.images or task.stale_images:
        return ()
    return tuple([image for image in task.images if image.reused])
