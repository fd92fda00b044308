"""Alerts for the operator: what happened, and which alerts were sent already. They never delay what they report."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

import orjson
from loguru import logger
from msgspec import Struct

from imagegen.errors import QueueUnavailable
from imagegen.formats import rfc3339
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import RedisError

BUDGET_WARNING, BUDGET_EXHAUSTED = "budget.warning", "budget.exhausted"
KEY_REFUSED, STORE_UNAVAILABLE, WORKERS_DEAD = "provider.key_refused", "store.unavailable", "workers.dead"
TYPES = (BUDGET_WARNING, BUDGET_EXHAUSTED, KEY_REFUSED, STORE_UNAVAILABLE, WORKERS_DEAD)

MAX_WAITING = 100
"""Alerts that wait; more are dropped, since the receiver does not answer."""

MAX_REMEMBERED = 1_000

CLAIM_TIMEOUT_S = 2.0


class Alert(Struct, frozen=True):
    """One alert. name: equal for equal alerts of all instances; life_s: how long it is not repeated.

    at: Unix time. shared: whether one instance sends it for all.
    """

    type: str
    name: str
    data: Mapping[str, Any]
    at: float
    life_s: float
    shared: bool

    @property
    def message_id(self) -> str:
        """The `webhook-id`: the same on every try."""
        moment = "" if self.shared else f"{self.at:.3f}"
        return "msg_" + hashlib.sha256(f"{self.type} {self.name} {moment}".encode()).hexdigest()[:32]

    def encode(self) -> bytes:
        """Return the body to send."""
        return orjson.dumps({"type": self.type, "timestamp": rfc3339(self.at), "data": self.data})


class Alerts:
    """Alerts of this instance, each at most once in its life.

    Args:
        instance: name of this instance.
        enabled: whether there is a receiver.
    """

    def __init__(self, connection: Connection, keys: Keys, instance: str, *, enabled: bool) -> None:
        self._connection = connection
        self._keys = keys
        self._instance = instance
        self._enabled = enabled
        self._waiting: asyncio.Queue[Alert] = asyncio.Queue(MAX_WAITING)
        self._until: dict[tuple[str, str], float] = {}
        self._untried = 0
        self._all_tried = asyncio.Event()
        self._all_tried.set()

    def report(self, kind: str, name: str, *, life_s: float, shared: bool = False, **data: object) -> None:
        """Add an alert unless it was reported in its life. It does not wait.

        Args:
            name: what it is about; one alert of each type and name is sent in `life_s` seconds.
            shared: whether it is sent once for all instances.
            data: shown to the receiver, without secrets.
        """
        now = self._connection.clock()
        if not self._enabled or self._until.get((kind, name), 0.0) > now:
            return
        if len(self._until) >= MAX_REMEMBERED:
            self._until.clear()
        self._until[kind, name] = now + life_s
        alert = Alert(kind, name, {"instance": self._instance} | data, now, life_s, shared)
        try:
            self._waiting.put_nowait(alert)
        except asyncio.QueueFull:
            logger.warning("An alert is dropped, since {} others wait: {}", MAX_WAITING, kind)
            return
        self._untried += 1
        self._all_tried.clear()

    async def next(self) -> Alert:
        """Wait for an alert that no other instance sends, and return it."""
        while True:
            alert = await self._waiting.get()
            if not alert.shared or await self._claim(alert):
                return alert
            self.mark_tried()

    def mark_tried(self) -> None:
        """Record that an alert was sent once, successfully or not."""
        self._untried -= 1
        if not self._untried:
            self._all_tried.set()

    async def all_tried(self) -> None:
        """Wait until each alert so far was sent once."""
        await self._all_tried.wait()

    async def _claim(self, alert: Alert) -> bool:
        """Return whether this instance sends a shared alert; without Redis each instance does."""
        name = hashlib.sha256(f"{alert.type} {alert.name}".encode()).hexdigest()[:32]
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT_S), self._connection.deadline():
                taken = await self._connection.commands.set(
                    self._keys.alert(name), self._instance, nx=True, ex=max(int(alert.life_s), 1)
                )
                self._connection.meter.redis_commands_sent("alerts", 1)
                return bool(taken)
        except (QueueUnavailable, RedisError, TimeoutError):
            return True
