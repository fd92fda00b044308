"""Verb `take_found_job`: ownership of a provider job that a task found in the provider's list.

A list shows the jobs of all tasks with the same key, and equal calls look alike in it. Each task keeps the ids of its
jobs, in its checkpoint and then in its record. They are read by one scan for all searches, which is rare: only after
lost responses. Checkpoints outlive their tasks by ten minutes, so that records are read only for older jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable
from typing import cast

import msgspec
from loguru import logger
from msgspec import Struct

from imagegen.errors import QueueUnavailable
from imagegen.queue.checkpoint import decode_checkpoint
from imagegen.queue.claim import MAX_OUTAGE_S
from imagegen.queue.codec import UnreadableRecord
from imagegen.queue.verbs.context import VerbContext, batched
from imagegen.redis_client.redis_errors import RedisError, ScanRefused
from imagegen.tasks.provider_job import JobHandle

OWNED_S = 86_400
"""Longer than a provider lists a job that a search may find."""

SCAN_COUNT, MAX_SCANS = 2_000, 150
"""Keys of one page, and pages of one scan. In a larger database no job is taken: its call counts as lost."""

READ_COUNT = 200

CLOCK_TOLERANCE_S = 10.0
"""Between the clocks of a provider and of Redis, and until the job of a read response is in the checkpoint."""

LOOK_AGAIN_S = 1.0

_UNFINISHED = re.compile(rb"\d+ (pending|processing) ")
_JOBS = re.compile(rb'"jobs":(\["[^\]]*\])')
_read_ids = msgspec.json.Decoder(tuple[str, ...]).decode


class _SentCall(Struct, frozen=True, gc=False):
    """A call of a task that had no response yet. sent_at: Unix time."""

    sent_at: float
    channel: str
    account: str


class _Owners(Struct):
    """Result of a scan. owners: task by job. calls: by task; those of finished tasks have ended, as their records show.
    unfinished: tasks with an unfinished record. began_at: Unix time. has_records: or only checkpoints.
    """

    began_at: float = 0.0
    has_records: bool = True
    owners: dict[str, str] = msgspec.field(default_factory=dict)
    calls: dict[str, _SentCall] = msgspec.field(default_factory=dict)
    unfinished: set[str] = msgspec.field(default_factory=set)


class TakeFoundJob:
    """Taker of jobs for this instance."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context
        self._last: _Owners | None = None
        self._reading: asyncio.Task[_Owners] | None = None
        self._warned = False

    async def __call__(self, task_id: str, job: JobHandle, within_s: float) -> bool | None:
        """Let a task own a job. Return False if another task has it, or if Redis does not let us look.

        Return None if that stays open for some seconds: Redis is away, or a call of another task that may have
        begun the job has no response yet.
        """
        try:
            async with asyncio.timeout(within_s):
                return await self._take(task_id, job)
        except ScanRefused as error:
            if not self._warned:
                self._warned = True
                text = "A job that the provider lists is not used, since its task can't be looked up: {}"
                logger.warning(text, error)
            return False
        except (TimeoutError, QueueUnavailable, RedisError, OSError) as error:
            logger.debug("The task of a job can't be looked up now: {}", error)
            return None

    async def stop(self) -> None:
        """End the scan."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _take(self, task_id: str, job: JobHandle) -> bool:
        now = self._context.connection.clock()
        began_at = job.accepted_at or now
        is_old = now - began_at > MAX_OUTAGE_S - CLOCK_TOLERANCE_S
        scanned = await self._read_since(min(now, began_at + CLOCK_TOLERANCE_S), has_records=is_old)
        if scanned.owners.get(job.id, task_id) != task_id:
            return False
        calls = {
            other: call
            for other, call in scanned.calls.items()
            if other != task_id and (call.channel == job.channel or call.account == job.account)
        }
        while calls:
            owners = await self._owners_among(calls)
            if owners.owners.get(job.id, task_id) != task_id:
                return False
            calls = {task: call for task, call in calls.items() if owners.calls.get(task) == call}
            calls = {task: call for task, call in calls.items() if task in owners.unfinished}
            if calls:
                await asyncio.sleep(LOOK_AGAIN_S)
        return await self._own(task_id, job.id)

    async def _own(self, task_id: str, job_id: str) -> bool:
        context = self._context
        name = context.keys.found_job(hashlib.sha256(job_id.encode()).hexdigest()[:32])
        async with context.connection.deadline():
            reply = await context.connection.commands.set(name, task_id, nx=True, get=True, ex=OWNED_S)
        context.count("read", 1)
        owner = cast(bytes | None, reply)
        return owner is None or owner == task_id.encode()

    async def _read_since(self, began_at: float, *, has_records: bool) -> _Owners:
        """Return what a scan found that began at this Unix time or later; several searches share one."""
        while True:
            last = self._last
            if last and last.began_at >= began_at and last.has_records >= has_records:
                return last
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._scan(has_records=has_records), name="owners of jobs")
                self._reading.add_done_callback(_mark_retrieved)
            self._last = await asyncio.shield(self._reading)

    async def _scan(self, *, has_records: bool) -> _Owners:
        """Read the checkpoints of all tasks, or their records too. Raises ScanRefused, QueueUnavailable."""
        context, keys, cursor = self._context, self._context.keys, 0
        owners = _Owners(context.connection.clock(), has_records)
        pattern = keys.all if has_records else keys.checkpoints
        prefixes = (keys.checkpoint(""), keys.record(""))
        for _ in range(MAX_SCANS):
            cursor, page = await context.connection.scan(cursor, pattern, SCAN_COUNT)
            context.count("read", 1)
            names = [name for key in page if (name := key.decode(errors="replace")).startswith(prefixes)]
            for batch in batched(names, READ_COUNT):
                await self._read(batch, owners)
            if not cursor:
                return owners
        raise ScanRefused(f"there are more than {MAX_SCANS * SCAN_COUNT} keys")

    async def _owners_among(self, task_ids: Iterable[str]) -> _Owners:
        """Read some tasks again."""
        keys, owners = self._context.keys, _Owners()
        for batch in batched(list(task_ids), READ_COUNT // 2):
            await self._read([name for task in batch for name in (keys.checkpoint(task), keys.record(task))], owners)
        return owners

    async def _read(self, names: list[str], owners: _Owners) -> None:
        """Add what keys of checkpoints and records have."""
        context, checkpoint_prefix = self._context, self._context.keys.checkpoint("")
        async with context.connection.deadline():
            values = cast(list[bytes | None], await context.connection.commands.mget(names))
        context.count("read", 1)
        for name, value in zip(names, values, strict=True):
            task_id = name.rpartition(":")[2]
            if value is not None and name.startswith(checkpoint_prefix):
                _add_checkpoint(owners, task_id, value)
            elif value is not None:
                if _UNFINISHED.match(value):
                    owners.unfinished.add(task_id)
                for ids in _JOBS.findall(value):
                    owners.owners |= dict.fromkeys(_ids_of(ids), task_id)


def _add_checkpoint(owners: _Owners, task_id: str, value: bytes) -> None:
    try:
        checkpoint = decode_checkpoint(value)[1]
    except UnreadableRecord:
        return
    owners.owners |= dict.fromkeys(checkpoint.begun_jobs, task_id)
    if checkpoint.job is not None:
        owners.owners[checkpoint.job.handle.id] = task_id
    elif checkpoint.phase == "calling" and checkpoint.sent is not None:
        owners.calls[task_id] = _SentCall(checkpoint.sent.sent_at, checkpoint.channel, checkpoint.account)


def _ids_of(value: bytes) -> tuple[str, ...]:
    try:
        return _read_ids(value)
    except msgspec.DecodeError:  # of a field of the client
        return ()


def _mark_retrieved(reading: asyncio.Task[_Owners]) -> None:
    """Read the error of a scan that nothing may wait for any more, so that it is not reported as unread."""
    if not reading.cancelled():
        reading.exception()
