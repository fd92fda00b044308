"""Owns the control channel, on which instances talk: who is there, who is busy, who watches what, what changed.

Alone, nothing is published after the hello. A lost message costs time and nothing else: leases are looked at now and
then, and what is watched is read again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from loguru import logger
from redis.exceptions import RedisError

from imagegen.errors import QueueUnavailable
from imagegen.queue.connection import Connection
from imagegen.queue.keys import Keys

PING_S = 30.0
"""How often a silent subscription is asked whether it lives; PING is not billed."""

_TO_ANYBODY = ("hello", "lost")
"""Kinds that are published also where no peer is known."""

Message = Mapping[str, Any]
Handler = Callable[[Message], None]


class Control:
    """peers: other instances heard of. Handlers are put in `on` by kind before `listen_forever` runs.

    on_join: called after each (re)connect, for messages may have been missed. on_peer: called for each new peer, which
    has heard nothing yet.
    """

    def __init__(self, connection: Connection, keys: Keys, instance: str) -> None:
        self._connection = connection
        self._channel = keys.control
        self._instance = instance
        self._sending: set[asyncio.Task[None]] = set()
        self.peers: dict[str, float] = {}
        self._alone_since = 0.0
        self.on: dict[str, Handler] = {}
        self.on_join: list[Callable[[], None]] = []
        self.on_peer: list[Callable[[], None]] = []

    @property
    def alone(self) -> bool:
        """Whether no other instance is known."""
        return not self.peers

    def alone_since(self, unix_s: float) -> bool:
        """Whether no other instance was known at any time from then on."""
        return not self.peers and unix_s >= self._alone_since

    def tell(self, kind: str, **content: Any) -> None:
        """Publishes to the peers where there are any; it is not waited for, and a failure is no fault."""
        if self.peers or kind in _TO_ANYBODY:
            sending = asyncio.create_task(self._publish(kind, content), name=f"tell-{kind}")
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def said(self) -> None:
        """Waits until all that was told is out."""
        if self._sending:
            await asyncio.wait(self._sending)

    async def listen_forever(self) -> None:
        """One subscription for this process; after a loss it is made again."""
        delay_s = 0.1
        while True:
            try:
                async with self._connection.blocking.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    self._connection.meter.spent("control", 1)
                    self._joined()
                    delay_s = 0.1
                    while True:
                        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=PING_S)
                        if message is None:
                            await pubsub.ping()
                        elif message["type"] == "message":
                            self._heard(message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                logger.debug("The control channel was lost: {}", error)
                await self._connection.health.wait(delay_s)
                delay_s = min(delay_s * 2, 5.0)

    def _joined(self) -> None:
        self._alone_since = time.time()  # another one may have come and gone unheard
        self.tell("hello")
        for hook in self.on_join:
            hook()

    def _heard(self, data: bytes) -> None:
        try:
            message = orjson.loads(data)
            sender, kind = message["from"], message["kind"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            logger.warning("A message on the control channel can't be read")
            return
        if sender == self._instance:
            return
        known = sender in self.peers and kind != "hello"
        if kind == "bye":
            self.peers.pop(sender, None)
            self._alone_since = time.time()
        else:
            self.peers[sender] = time.monotonic()
        if kind == "hello":
            self.tell("here")
        if not known and kind != "bye":
            for hook in self.on_peer:
                hook()
        if handler := self.on.get(kind):
            handler(message)

    async def _publish(self, kind: str, content: Mapping[str, Any]) -> None:
        message = orjson.dumps({"from": self._instance, "kind": kind, **content})
        try:
            async with self._connection.guarded():
                heard = await self._connection.commands.publish(self._channel, message)
                self._connection.meter.spent("control", 1)
        except QueueUnavailable:
            return
        if heard <= 1 and kind not in _TO_ANYBODY:
            self.peers.clear()
            self._alone_since = time.time()


def ids_of(message: Message) -> Iterable[str]:
    """The task ids that a message names."""
    ids = message.get("ids")
    return [one for one in ids if isinstance(one, str)] if isinstance(ids, list) else []
