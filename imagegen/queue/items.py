"""Owns what goes into the scripts for each task, and what comes back."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.codec import encode_entry, encode_task, final_record
from imagegen.tasks.task import Task


class SubmitItem(Struct, frozen=True, gc=False):
    """replaced: the generation that is to be replaced, finished or without an entry, or nothing."""

    task_id: str
    generation: int
    digest: str
    entry: bytes
    record: bytes
    replaced: int | None


def submit_item(task: Task, replaced: int | None = None) -> SubmitItem:
    """A pending task as a submit."""
    return SubmitItem(
        task.id, task.epoch, task.digest, encode_entry(task), encode_task(task, with_request=False), replaced
    )


class SubmitReply(Struct, frozen=True, gc=False):
    """kind: see submit.lua; known: the record that stands, where one does."""

    kind: Literal["new", "again", "known", "full", "collision", "newer", "gone"]
    entry_id: str
    generation: int
    known: bytes


class FinishItem(Struct, frozen=True, gc=False):
    """final: the task as it is to stand, and record: its bytes; entry_id: of the entry that carried it."""

    entry_id: str
    final: Task
    record: bytes


def finish_item(entry_id: str, final: Task) -> FinishItem:
    """A final task as a finish. It is made before the batch, so that one that can't be made spoils no other."""
    return FinishItem(entry_id, final, final_record(final))


class Finished(Struct, frozen=True, gc=False):
    """stands: `b''` where it was stored, else the record that stands; hooks: the log, where webhooks joined; billed:
    calls that may have been paid twice, where another instance knew of more of them, else 0."""

    stands: bytes
    hooks: bytes
    billed: int = 0


class CompareAndSetItem(Struct, frozen=True, gc=False):
    """known: what we believe to stand; value: what is to stand; purpose: what it is counted for."""

    task_id: str
    known: bytes
    value: bytes
    purpose: str = "start"


def raised(final: Task, answer: Finished) -> Task:
    """Return the final task with the count of calls that may have been paid twice as it was stored."""
    return replace(final, possibly_billed_twice=answer.billed) if answer.billed else final


class FencedStart(Struct, frozen=True, gc=False):
    """A run of a task that another instance may hold, or may have run before; billed: calls that may have been paid
    twice, known: the run that we believe to stand, value: the one to write."""

    task_id: str
    generation: int
    entry_id: str
    known: bytes
    value: bytes
    billed: int


class ReleaseItem(Struct, frozen=True, gc=False):
    task_id: str
    entry_id: str
    generation: int
    entry: bytes
    run: bytes


class WaitingEntryIds(Struct, frozen=True, gc=False):
    """ids: of the first unclaimed entries; behind: how many come after them, last: the id of the last one."""

    ids: list[str]
    behind: int = 0
    last: str = ""


class Consumer(Struct, frozen=True, gc=False):
    """A consumer of the group: how many entries it holds, and seconds since its last read or claim."""

    name: str
    pending: int
    idle_s: float


class PendingEntry(Struct, frozen=True, gc=False):
    """A claimed entry: who holds it, and since when it was not renewed."""

    entry_id: str
    consumer: str
    idle_s: float
