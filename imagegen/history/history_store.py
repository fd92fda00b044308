"""Minutes of all instances in one stream of Redis; entries older than a day are trimmed with each new one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from loguru import logger

from imagegen.history.minutes import Minute, merge_into
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import ResponseError, wrong_type

KEPT_S = 86_400
LIFE_S, RENEW_AFTER_S = 26 * 3600, 3600.0
"""Life of the stream, and how often an instance renews it."""

ASIDE_LIFE_S = 7 * 86_400

READ_COUNT = 2_000
MIN_READ_INTERVAL_S = 5.0

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[Minute]).decode


class HistoryStore:
    """Stream of minutes, and those of all instances as last read. All methods raise QueueUnavailable.

    An entry has the name of its writer. Minutes that its entry before has too were written twice, since a reply was
    lost.
    """

    def __init__(
        self, connection: Connection, keys: Keys, writer: str, *, min_interval_s: float = MIN_READ_INTERVAL_S
    ) -> None:
        self._connection = connection
        self._key = keys.history
        self._writer = writer
        self._min_interval_s = min_interval_s
        self._renewed_at = -RENEW_AFTER_S
        self._minutes: dict[int, Minute] = {}
        self._last_of: dict[str, dict[int, Minute]] = {}
        self._last_id = "-"
        self._read_at = -min_interval_s
        self._lock = asyncio.Lock()

    async def add(self, minutes: Sequence[Minute]) -> int:
        """Write minutes of this instance; return the cost: one command, two if the life of the stream is renewed.

        A key of another type, which another program wrote, is renamed first.
        """
        fields: dict[Any, Any] = {"writer": self._writer, "minutes": _encode(minutes)}
        commands = self._connection.commands
        try:
            await self._append(fields)
        except ResponseError as error:
            if not wrong_type(error):
                raise
            await self._move_aside()
            await self._append(fields)
        cost, now = 1, time.monotonic()
        self._connection.meter.redis_commands_sent("stats", 1)
        if now - self._renewed_at >= RENEW_AFTER_S:
            self._renewed_at = now
            async with self._connection.deadline():
                await commands.expire(self._key, LIFE_S)
            self._connection.meter.redis_commands_sent("stats", 1)
            cost += 1
        return cost

    async def _append(self, fields: dict[Any, Any]) -> None:
        oldest = int((self._connection.clock() - KEPT_S) * 1000)
        async with self._connection.deadline():
            await self._connection.commands.xadd(self._key, fields, minid=str(oldest), approximate=True)

    async def _move_aside(self) -> None:
        """Rename the key; an operator finds its value there for a week."""
        aside = f"{self._key}:aside"
        logger.error("The history in Redis is of another type, and is moved to {}", aside)
        async with self._connection.deadline():
            await self._connection.commands.rename(self._key, aside)
            await self._connection.commands.expire(aside, ASIDE_LIFE_S)
        self._connection.meter.redis_commands_sent("stats", 3)
        self._renewed_at = -RENEW_AFTER_S

    async def read(self) -> dict[int, Minute]:
        """Return the minutes of the last day by their time; costs one command, none if they were just read."""
        async with self._lock:
            if time.monotonic() - self._read_at >= self._min_interval_s:
                try:
                    await self._read_new()
                except ResponseError as error:
                    if not wrong_type(error):  # the next write moves the key aside
                        raise
                self._read_at = time.monotonic()
            oldest = self._connection.clock() - KEPT_S
            for at in [at for at in self._minutes if at < oldest]:
                del self._minutes[at]
            return self._minutes

    async def _read_new(self) -> None:
        while True:
            async with self._connection.deadline():
                rows: Any = await self._connection.commands.xrange(self._key, self._last_id, "+", count=READ_COUNT)
            self._connection.meter.redis_commands_sent("stats", 1)
            for entry_id, fields in cast(list[tuple[bytes, dict[bytes, bytes]]], rows):
                self._last_id = f"({entry_id.decode()}"
                self._use(fields)
            if len(rows) < READ_COUNT:
                return

    def _use(self, fields: dict[bytes, bytes]) -> None:
        try:
            writer, minutes = fields[b"writer"].decode(), _decode(fields[b"minutes"])
        except (KeyError, ValueError, msgspec.MsgspecError):
            logger.debug("An entry of the history can't be read and is left out")
            return
        merge_into(self._minutes, self._unseen(writer, minutes))

    def _unseen(self, writer: str, minutes: Sequence[Minute]) -> list[Minute]:
        before, last = self._last_of.get(writer, {}), {minute.at: minute for minute in minutes}
        self._last_of[writer] = last
        return [minute for minute in minutes if before.get(minute.at) != minute]
