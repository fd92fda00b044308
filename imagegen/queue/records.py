"""Owns how tasks, entries and runs are written in Redis, with a schema version each.

A record is a head that the scripts read (`1 pending <entry id> <generation> <sequence> <digest>`), a newline, and
JSON. An entry carries the version, the generation and JSON with the request: a claim needs no second read. A run is
the entry id, a space, and JSON; hooks are `1 <generation>`, a newline, and a JSON list. What has a newer version than
ours is left alone: deploys overlap for minutes. The head of a task that webhooks joined ends in ` +`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from msgspec import Struct
from msgspec.structs import replace

from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Reason, State, Task, TaskError
from imagegen.tasks.webhook import Delivery, merged

VERSION = 1

_encode = msgspec.json.Encoder().encode

_WHERE_SET = (
    ("progress", "progress"),
    ("attempts", "attempts"),
    ("started", "started_at"),
    ("finished", "finished_at"),
    ("expires", "expires_at"),
    ("images", "images"),
    ("stale", "stale_images"),
    ("error", "error"),
    ("warnings", "warnings"),
    ("billed", "possibly_billed_twice"),
    ("retry", "retry_at"),
)
"""Names in a record's JSON, and the attributes of a task."""


class UnreadableRecord(ValueError):
    """It is not what we write."""


class NewerRecord(ValueError):
    """A newer version of this service wrote it."""


@dataclass(frozen=True, slots=True)
class Head:
    """The part of a record that scripts read."""

    state: State
    entry_id: str
    generation: int
    sequence: int
    digest: str

    def encode(self) -> bytes:
        return f"{VERSION} {self.state} {self.entry_id} {self.generation} {self.sequence} {self.digest}\n".encode()


def encode_task(task: Task, *, with_request: bool) -> bytes:
    """The JSON of a record. The request is left out while the entry carries it."""
    fields: dict[str, Any] = {"id": task.id, "model": task.model, "created": task.created_at}
    if task.sequence != task.generation or task.images:  # else it was just submitted
        for name, attribute in _WHERE_SET:
            if value := getattr(task, attribute):
                fields[name] = value
    if task.reason is not Reason.QUEUED and task.reason:
        fields["reason"] = task.reason
    if task.deliveries:
        fields["webhooks"] = [delivery.stored() for delivery in task.deliveries]
    if with_request and task.request_json:
        fields["request"] = msgspec.Raw(task.request_json)
    return _encode(fields)


def final_record(task: Task) -> bytes:
    """The whole record of a finished task."""
    head = Head(task.state, "-", task.generation, task.sequence, task.digest)
    return head.encode() + encode_task(task, with_request=True)


def seen_record(task: Task) -> bytes:
    """A task as another instance is told of it; read by `decode_record`, but never stored."""
    head = Head(task.state, "-", task.generation, task.sequence, task.digest)
    return head.encode() + encode_task(task, with_request=False)


def decode_head(value: bytes) -> Head:
    """Reads a record's first line. Raises NewerRecord or UnreadableRecord."""
    try:
        version, *parts = value.partition(b"\n")[0].decode().split(" ")
        if int(version) > VERSION:
            raise NewerRecord(version)
        state, entry_id, generation, sequence, digest, *_ = parts
        return Head(State(state), entry_id, int(generation), int(sequence), digest)
    except NewerRecord:
        raise
    except ValueError as error:
        raise UnreadableRecord(repr(value[:80])) from error


def decode_record(value: bytes) -> tuple[Head, Task]:
    """Reads a record. Raises NewerRecord or UnreadableRecord."""
    head = decode_head(value)
    try:
        return head, _task(head, orjson.loads(value.partition(b"\n")[2]))
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableRecord(repr(value[:80])) from error


def _task(head: Head, fields: Mapping[str, Any]) -> Task:
    error = fields.get("error")
    return Task(
        id=fields["id"],
        generation=head.generation,
        sequence=head.sequence,
        digest=head.digest,
        model=fields["model"],
        request_json=_encode(fields["request"]) if "request" in fields else b"",
        created_at=fields["created"],
        state=head.state,
        progress=fields.get("progress", 0),
        attempts=fields.get("attempts", 0),
        started_at=fields.get("started"),
        finished_at=fields.get("finished"),
        expires_at=fields.get("expires"),
        images=images(fields.get("images", ())),
        stale_images=fields.get("stale", False),
        error=TaskError(**error) if error else None,
        warnings=tuple(fields.get("warnings", ())),
        possibly_billed_twice=fields.get("billed", 0),
        reason=Reason(fields.get("reason", Reason.QUEUED)) if head.state is State.PENDING else None,
        retry_at=fields.get("retry"),
        entry_id=head.entry_id if head.state is State.PENDING else "",
        deliveries=_deliveries(fields.get("webhooks", ())),
    )


def _deliveries(stored: Any) -> tuple[Delivery, ...]:
    return tuple(Delivery.restore(one) for one in stored)


def images(stored: Any) -> tuple[StoredImage, ...]:
    return tuple(StoredImage(**image) for image in stored)


def encode_entry(task: Task) -> bytes:
    """The JSON of an entry: all that an instance needs to run the task."""
    fields = {
        "id": task.id,
        "digest": task.digest,
        "model": task.model,
        "created": task.created_at,
        "request": msgspec.Raw(task.request_json),
    }
    if task.stale_images:
        fields["images"] = task.images
    if task.deliveries:
        fields["webhooks"] = [delivery.stored() for delivery in task.deliveries]
    return _encode(fields)


def named_in_entry(fields: Mapping[bytes, bytes]) -> str:
    """The task id of an entry as we write it, without reading all of it; of another's making it is any text."""
    return fields.get(b"d", b"")[7:39].decode(errors="replace") if fields.get(b"v") == b"1" else ""


def decode_entry(fields: Mapping[bytes, bytes], entry_id: str = "") -> Task:
    """The pending task of a stream entry. Raises NewerRecord or UnreadableRecord."""
    try:
        if int(fields[b"v"]) > VERSION:
            raise NewerRecord(fields[b"v"].decode())
        generation = int(fields[b"g"])
        stored = orjson.loads(fields[b"d"])
        previous = images(stored.get("images", ()))
        return Task(
            id=stored["id"],
            generation=generation,
            sequence=generation,
            digest=stored["digest"],
            model=stored["model"],
            request_json=_encode(stored["request"]),
            created_at=stored["created"],
            images=previous,
            stale_images=bool(previous),
            reason=Reason.QUEUED,
            entry_id=entry_id,
            deliveries=_deliveries(stored.get("webhooks", ())),
        )
    except NewerRecord:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableRecord(repr(fields)[:200]) from error


class Run(Struct, frozen=True, gc=False):
    """How far a task's generation has come, written before each paid call.

    owner: the instance that runs it; phase: `calling` (a call may be under way), `waiting` (before a retry),
    `released` (handed back) or `cancelled`. starts counts every start, attempts those that count, ambiguous the
    calls that were sent and brought no answer; asked_again: the missing pictures were asked for once more.
    """

    owner: str
    phase: str = "calling"
    starts: int = 0
    attempts: int = 0
    ambiguous: int = 0
    images: tuple[StoredImage, ...] = ()
    warnings: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    asked_again: bool = False
    started_at: float | None = None
    reason: str | None = None
    retry_at: float | None = None

    def encode(self, entry_id: str) -> bytes:
        return entry_id.encode() + b" " + _encode(self)


CANCELLED_RUN = _encode(Run(owner="", phase="cancelled"))
"""What a start finds where the task was cancelled just before, without the entry id."""


def decode_run(value: bytes) -> tuple[str, Run]:
    """Entry id and run. Raises UnreadableRecord."""
    try:
        entry_id, _, rest = value.partition(b" ")
        fields = orjson.loads(rest)
        fields["images"] = images(fields.get("images", ()))
        for name in ("warnings", "without"):
            fields[name] = tuple(fields.get(name, ()))
        return entry_id.decode(), Run(**fields)
    except (ValueError, TypeError) as error:
        raise UnreadableRecord(repr(value[:80])) from error


def shown_images(task: Task, run: Run) -> tuple[StoredImage, ...]:
    """What an unfinished task shows: the pictures of before stand until the new ones are all there."""
    return task.images if task.stale_images else run.images


def as_seen(task: Task, run: Run) -> Task:
    """The unfinished task of a record as its run makes it: what another instance can know of it."""
    calling = run.phase == "calling"
    return replace(
        task,
        state=State.PROCESSING if calling else State.PENDING,
        sequence=task.generation + run.starts * 1_000 + (0 if calling else 999),
        attempts=run.attempts,
        started_at=run.started_at,
        progress=5 if calling else 0,
        images=shown_images(task, run),
        possibly_billed_twice=run.ambiguous,
        reason=None if calling else Reason(run.reason or Reason.QUEUED),
        retry_at=run.retry_at,
    )


def encode_hooks(generation: int, deliveries: Iterable[Delivery]) -> bytes:
    """The delivery log of a generation."""
    return f"{VERSION} {generation}\n".encode() + orjson.dumps([delivery.stored() for delivery in deliveries])


def decode_hooks(value: bytes) -> tuple[int, tuple[Delivery, ...]]:
    """Generation and deliveries. Raises NewerRecord or UnreadableRecord."""
    try:
        line, _, rest = value.partition(b"\n")
        version, generation = map(int, line.split(b" "))
        if version > VERSION:
            raise NewerRecord(version)
        return generation, _deliveries(orjson.loads(rest))
    except NewerRecord:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableRecord(repr(value[:80])) from error


def with_hooks(task: Task, value: bytes | None) -> Task:
    """The task with what the delivery log says; a log of another generation, or that can't be read, says nothing."""
    if not value:
        return task
    try:
        generation, told = decode_hooks(value)
    except (NewerRecord, UnreadableRecord):
        return task
    if generation != task.generation:
        return task
    return replace(task, deliveries=merged(task.deliveries, told))
