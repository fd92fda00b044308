"""Look-up of the uploads that unfinished tasks need: the store may not remove these to make space."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from typing import cast

from imagegen.errors import QueueUnavailable
from imagegen.images.disk_index import DiskIndex
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.redis_errors import RedisError

MAX_READ_BYTES = 2**20
"""Bytes of tasks after which a script call looks at no further one: they take Redis 5 to 10 ms."""

SUBMITTING_S = 60.0
"""How long an upload counts as needed after its last use in a submit: its entry may not be written yet."""

FOUND_S = 10.0
"""How long an upload counts as needed after a task was found that needs it. Without this, each image that is saved into
a full store would read all unfinished tasks again."""

SHA256_CHARS = 64
"""Task ids are shorter."""

FindNeeded = Callable[[Collection[str]], Awaitable[Collection[str]]]
"""Returns those of some uploads, by SHA-256, that unfinished tasks need."""


class NeededUploads:
    """Uploads that the entries of unfinished tasks name, or that were submitted here a moment ago.

    A look-up costs a command for 16 unfinished tasks, and at least two for each line of tasks that wait for the stream.
    It is made only when uploads are the oldest in a full store, and for an upload that is needed only once in
    `FOUND_S`.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._find = load_script(__package__, "needed_uploads")
        self._find_in_line = load_script(__package__, "uploads_in_line")
        self._submitted: dict[str, float] = {}
        self._found: dict[str, float] = {}

    def note(self, sha256: str) -> None:
        """Record that a task that needs this upload is being submitted."""
        now = time.monotonic()
        self._submitted.pop(sha256, None)
        self._submitted[sha256] = now
        while self._submitted[oldest := next(iter(self._submitted))] < now - SUBMITTING_S:
            del self._submitted[oldest]

    async def among(self, uploads: Collection[str]) -> Collection[str]:
        """Return those of some uploads that are needed; all of them if Redis can't be read."""
        oldest = time.monotonic() - FOUND_S
        self._found = {sha256: at for sha256, at in self._found.items() if at > oldest}
        known = {sha256 for sha256 in uploads if sha256 in self._found or self._submitted_just_now(sha256)}
        try:
            # Tasks move from lines to the stream meanwhile, so the stream is read last.
            in_lines = await self._in_lines(set(uploads) - known)
            found = in_lines | await self._in_stream(set(uploads) - known - in_lines)
        except (QueueUnavailable, RedisError):  # also a value of another type in the place of a line
            return uploads
        self._found |= dict.fromkeys(found, time.monotonic())
        return known | found

    def _submitted_just_now(self, sha256: str) -> bool:
        at = self._submitted.get(sha256)
        return at is not None and at > time.monotonic() - SUBMITTING_S

    async def _in_lines(self, uploads: set[str]) -> set[str]:
        if not uploads:
            return set()
        async with self._connection.deadline():
            clients = await self._connection.commands.smembers(self._keys.lines)
        self._connection.meter.redis_commands_sent("pictures", 1)
        needed: set[str] = set()
        for client in cast(set[bytes], clients):
            needed |= await self._in_line(client.decode(errors="replace"), uploads)
        return needed

    async def _in_line(self, client: str, uploads: set[str]) -> set[str]:
        needed, passed = set[str](), 0
        while passed >= 0:  # from its end, where no task leaves it
            async with self._connection.deadline():
                reply = await self._connection.commands.run_script(
                    self._find_in_line, [self._keys.line(client)], [passed, MAX_READ_BYTES, *uploads]
                )
                passed, names, commands = reply
                needed |= {name.decode() for name in names}
            self._connection.meter.redis_commands_sent("pictures", commands)
        return needed

    async def _in_stream(self, uploads: set[str]) -> set[str]:
        needed: set[str] = set()
        last = ""
        while uploads:
            async with self._connection.deadline():
                reply = await self._connection.commands.run_script(
                    self._find, [self._keys.stream], [last, MAX_READ_BYTES, *uploads]
                )
                next_id, hashes, commands = reply
                last, names = next_id.decode(), {sha256.decode() for sha256 in hashes}
            self._connection.meter.redis_commands_sent("pictures", commands)
            needed |= names
            uploads = uploads - names
            if not last:
                break
        return needed


async def nothing_needed(_uploads: Collection[str]) -> Collection[str]:
    """Return that no upload is needed, for a store without uploads."""
    return ()


def is_upload(task_id: str) -> bool:
    """Return whether a store's task id is that of an upload."""
    return len(task_id) == SHA256_CHARS


async def take_over_cap(index: DiskIndex, task_of: Callable[[str], str], find_needed: FindNeeded) -> list[str]:
    """Take the oldest files or objects off an index until the rest fits; return them. Needed uploads stay.

    task_of: returns the task id in a name.
    """
    needed, checked = set[str](), set[str]()

    def is_needed(name: str) -> bool:
        return task_of(name) in needed

    names = index.over_cap(is_needed)
    while unchecked := set(filter(is_upload, map(task_of, names))) - checked:
        checked |= unchecked
        needed |= set(await find_needed(unchecked))
        names = index.over_cap(is_needed)
    for name in names:
        index.forget(name)
    return names
