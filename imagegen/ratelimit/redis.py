"""Rate limits that instances share: moving windows in Redis, counted by one script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from msgspec import Struct

from imagegen.ratelimit.stores import LimitState, Window
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Batcher, CommandBatch


class _Hit(Struct, frozen=True):
    windows: Sequence[Window]
    cost: int


class RedisRateLimitStore:
    """Store of RATE_LIMIT_STORE=redis. The hits of one turn go together and are judged in turn, by the server's clock.

    One hit costs three commands, and one more for each window it spends from. A hit with a lost reply
    is sent again and may be counted twice.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._meter = connection.meter
        self._keys = keys
        self._script = load_script(__package__, "rate_limit")
        self._hits = Batcher[_Hit, list[LimitState]](connection.multiplexer, self._encode, self._decode)

    async def hit(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Spend `cost` from each of the windows, or from none; return one state a window. Raises QueueUnavailable."""
        return await self._hits(_Hit(windows, cost))

    def _encode(self, hits: list[_Hit]) -> CommandBatch:
        places: dict[str, int] = {}
        args: list[int] = []
        for hit in hits:
            args += (hit.cost, len(hit.windows))
            for name, limit, window_s in hit.windows:
                place = places.setdefault(self._keys.rate_limit(name), len(places) + 1)
                args += (place, limit, max(round(window_s * 1000), 1))
        return self._script.batch(list(places), args)

    def _decode(self, hits: list[_Hit], replies: list[Any]) -> list[list[LimitState]]:
        rows = cast(list[list[tuple[int, int, int]]], replies[0])
        spending = [(hit, reply) for hit, reply in zip(hits, rows, strict=True) if hit.cost]
        passed = [hit for hit, reply in spending if not any(retry for _, _, retry in reply)]
        self._meter.redis_commands_sent("limits", 3 + len({name for hit in passed for name, _, _ in hit.windows}))
        return [
            [LimitState(remaining, reset / 1000, retry / 1000) for remaining, reset, retry in reply] for reply in rows
        ]
