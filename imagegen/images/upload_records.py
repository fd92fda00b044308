"""Records of uploads in Redis: what an uploaded image is, and how long it lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec
from msgspec import Struct

from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.redis_errors import wrong_type_ignored
from imagegen.tasks.image import StoredImage

KEPT_LONGER_MS = 60_000
"""A record outlives its image's last use by this: an attempt that begins late still finds it."""

MAX_KNOWN = 10_000
"""Records in memory."""

WRITE_COMMANDS = 3


class UploadRecord(Struct, frozen=True, gc=False):
    """One uploaded image. Times are Unix times in seconds.

    needed_until: by then, each task that was submitted with it has ended.
    """

    image: StoredImage
    expires_at: float
    needed_until: float = 0.0

    @property
    def ends_at(self) -> float:
        """When the image may be removed."""
        return max(self.expires_at, self.needed_until)


class UploadRecords:
    """Records by the SHA-256 of the image. All methods raise QueueUnavailable.

    A record costs three commands to write and one to read; those of recent use are in memory. Times in it only grow.
    clock: Unix time.
    """

    def __init__(self, connection: Connection, keys: Keys, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._keys = keys
        self.clock = clock
        self._cached: dict[str, UploadRecord] = {}
        self._write = load_script(__package__, "record_upload")

    async def write(self, record: UploadRecord) -> UploadRecord:
        """Write a record, with the later times of the new record and of an existing one; return it."""
        sha256 = record.image.sha256
        args = (
            int(record.expires_at * 1000),
            int(record.needed_until * 1000),
            msgspec.json.encode(record.image),
            KEPT_LONGER_MS,
        )
        async with self._connection.deadline():
            written = _parse(await self._connection.commands.run_script(self._write, [self._keys.upload(sha256)], args))
        self._count(WRITE_COMMANDS)
        return self._remember(sha256, written or record)

    async def read(self, sha256: str) -> UploadRecord | None:
        """Return a record; None if there is none."""
        cached = self._cached.pop(sha256, None)
        if cached is not None and self.clock() < cached.expires_at:
            return self._remember(sha256, cached)
        stored: bytes | None = None
        with wrong_type_ignored():
            async with self._connection.deadline():
                stored = cast(bytes | None, await self._connection.commands.get(self._keys.upload(sha256)))
        self._count(1)
        record = _parse(stored) if stored is not None else None
        return record and self._remember(sha256, record)

    def forget(self, sha256: str) -> None:
        """Drop a record from memory."""
        self._cached.pop(sha256, None)

    def _remember(self, sha256: str, record: UploadRecord) -> UploadRecord:
        if len(self._cached) >= MAX_KNOWN:
            del self._cached[next(iter(self._cached))]
        self._cached[sha256] = record
        return record

    def _count(self, commands: int) -> None:
        self._connection.meter.redis_commands_sent("pictures", commands)


def _parse(written: bytes) -> UploadRecord | None:
    """Return a record as `record_upload.lua` writes it; None for anything else."""
    try:
        expires_ms, needed_ms, described = written.split(b" ", 2)
        image = msgspec.json.decode(described, type=StoredImage)
        return UploadRecord(image, int(expires_ms) / 1000, int(needed_ms) / 1000)
    except ValueError:
        return None
