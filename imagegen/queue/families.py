"""Index of the request families that have a task with images, so that only their submits read sibling records."""

from __future__ import annotations

import asyncio
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_record
from imagegen.queue.notifier import Notifier
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import RedisError, ScanRefused
from imagegen.redis_client.server_info import ServerInfo
from imagegen.tasks.task import State, Task

MAX_FAMILIES = 50_000
"""About 5 MB."""

MAX_SCANS, SCAN_COUNT = 30, 1_000
"""A database with more keys is not read: its records expire while this instance receives new ones."""

READ_COUNT = 100
"""Records that one command reads: about 200 kB."""

MIN_RELOAD_S, RELOAD_S_PER_COMMAND = 60.0, 10.0
"""Shortest time between two reads of all records: after peers left, or the connection was lost."""


_COUNT = re.compile(rb',"n":[0-9]+')
"""In a stored request no string contains it, since quotes are escaped, and no other object comes before it."""


class FamiliesWithImages:
    """Families with a finished task that has images: those of this instance, and those that it read from Redis.

    These are all of them while there is no other instance. Otherwise any family may have one.

    ttl_s: life of a finished task's record.
    """

    def __init__(self, connection: Connection, keys: Keys, notifier: Notifier, *, ttl_s: float) -> None:
        self._connection = connection
        self._keys = keys
        self._notifier = notifier
        self._ttl_s = ttl_s
        self._clock = connection.clock
        self._expiries: OrderedDict[int, float] = OrderedDict()
        self._needed = asyncio.Event()
        self._commands = 0
        self._loaded_at, self._load_after = -1.0, math.inf
        self._unknown_until = self._clock() + ttl_s
        """When the last record that was in Redis before the start, or before a peer left, has expired."""
        self._dropped_until = -1.0

    def add(self, task: Task) -> None:
        """Add the family of a task that is completed, or has ended otherwise with images."""
        if not has_images(task) or not task.request_json:
            return
        key = family_key(task.request_json, task.scope)
        self._expiries[key] = max(task.expires_at or 0.0, self._expiries.pop(key, 0.0))
        now = self._clock()
        while self._expiries:
            oldest, expires_at = next(iter(self._expiries.items()))
            if expires_at > now:
                if len(self._expiries) <= MAX_FAMILIES:
                    break
                self._dropped_until = max(self._dropped_until, expires_at)
            del self._expiries[oldest]

    def may_include(self, request_json: bytes, scope: str | None = None) -> bool:
        """Return whether a family may have such a task. Costs no command."""
        if family_key(request_json, scope) in self._expiries:
            return True
        if self._is_complete():
            return False
        if self._notifier.alone and self._clock() >= max(self._load_after, self._dropped_until):
            self._needed.set()
        return True

    def _is_complete(self) -> bool:
        now, alone_since = self._clock(), self._notifier.alone_since
        if now < self._dropped_until:
            return False
        return self._loaded_at >= alone_since or (now >= self._unknown_until and now - self._ttl_s >= alone_since)

    def on_joined(self) -> None:
        """Allow the first read of the records: from now on a peer does not come and go unnoticed."""
        self._load_after = min(self._load_after, self._clock())

    def on_new_server(self, _known: ServerInfo, _new: ServerInfo) -> None:
        """Read the records again: another server may have others."""
        self._loaded_at, self._load_after = -1.0, self._clock()
        self._unknown_until = self._clock() + self._ttl_s

    async def load_forever(self) -> None:
        """Read the records in Redis, each time that they are needed."""
        while True:
            await self._needed.wait()
            self._needed.clear()
            began, self._commands = self._clock(), 0
            self._load_after = began + MIN_RELOAD_S
            try:
                is_loaded = await self._load()
            except (RedisError, QueueUnavailable, OSError, TimeoutError) as error:
                logger.debug("Completed tasks can't be read from Redis now: {}", error)
                continue
            if is_loaded:
                self._loaded_at = began
                self._load_after = began + max(MIN_RELOAD_S, self._commands * RELOAD_S_PER_COMMAND)
            else:
                self._load_after = began + self._ttl_s

    async def _load(self) -> bool:
        """Add the families of all records; return False if there are too many keys, or Redis refuses."""
        cursor = 0
        for _ in range(MAX_SCANS):
            try:
                cursor, names = await self._connection.scan(cursor, self._keys.records, SCAN_COUNT)
            except ScanRefused:
                return False
            self._count()
            for first in range(0, len(names), READ_COUNT):
                await self._read(names[first : first + READ_COUNT])
            if not cursor:
                return True
        return False

    async def _read(self, names: Sequence[bytes | str]) -> None:
        async with self._connection.deadline():
            values = cast(list[bytes | None], await self._connection.commands.mget(names))
        self._count()
        for value in values:
            if value is None:
                continue
            try:
                self.add(decode_record(value)[1])
            except (NewerRecord, UnreadableRecord):
                continue

    def _count(self) -> None:
        self._commands += 1
        self._connection.meter.redis_commands_sent("list", 1)


def has_images(task: Task) -> bool:
    """Return whether a task is finished and may have images for others."""
    return task.state is State.COMPLETED or (task.state.is_final and bool(task.images) and not task.stale_images)


def family_key(request_json: bytes, scope: str | None = None) -> int:
    """Return a number that is the same for the stored requests of a family in a scope; rarely for others."""
    count = _COUNT.search(request_json)
    if count is None:
        return hash((request_json, scope))
    return hash((request_json[: count.start()], request_json[count.end() :], scope))
