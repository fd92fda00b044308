"""Connection on which this process receives the messages of one channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from imagegen.redis_client.multiplexer import ReplyProtocol
from imagegen.redis_client.replies import decoding
from imagegen.redis_client.topology import Servers, take_over

PING_S = 30.0
"""How long a subscription may be silent before it is tested; PING is not billed."""


class ChannelSubscription:
    """Messages of a channel, in order. A connection that answers no PING within `deadline_s` is lost."""

    def __init__(self, connection: Any, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._replies: asyncio.Queue[Any] = asyncio.Queue()
        self._protocol = ReplyProtocol(self._replies.put_nowait, self._replies.put_nowait)
        self._transport = take_over(connection, self._protocol)

    async def next(self) -> bytes:
        """Return the next message. Raises RedisError or OSError when the connection is lost."""
        while True:
            try:
                reply = await self._reply(PING_S)
            except RedisTimeoutError:
                self._send("PING")
                reply = await self._reply(self._deadline_s)
            with decoding():
                if reply[0] == b"message":
                    return bytes(reply[2])

    async def subscribe(self, channel: str) -> None:
        """Return once the server has confirmed the subscription. Raises RedisError, OSError."""
        self._send("SUBSCRIBE", channel)
        await self._reply(self._deadline_s)

    def hang_up(self) -> None:
        """End the connection; a wait for a message ends with an error."""
        self._transport.abort()
        self._protocol.end(RedisConnectionError("Hung up"))

    def _send(self, *command: str) -> None:
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]

    async def _reply(self, within_s: float) -> Any:
        try:
            async with asyncio.timeout(within_s):
                reply = await self._replies.get()
        except TimeoutError as error:
            raise RedisTimeoutError("No answer in time") from error
        if isinstance(reply, Exception):
            raise reply
        return reply


class Subscriptions:
    """Open subscription, which other parts can end. on_silent: called when one answers no PING."""

    def __init__(self, servers: Servers, on_silent: Callable[[], None]) -> None:
        self._servers = servers
        self._on_silent = on_silent
        self._open: ChannelSubscription | None = None

    @asynccontextmanager
    async def subscribed(self, channel: str) -> AsyncIterator[ChannelSubscription]:
        """Hold a subscription to the channel. Raises RedisError, OSError, TimeoutError."""
        async with asyncio.timeout(self._servers.deadline_s):
            with decoding():
                connection = await self._servers.connect()
        self._open = subscription = ChannelSubscription(connection, self._servers.deadline_s)
        try:
            await subscription.subscribe(channel)
            yield subscription
        except RedisTimeoutError:
            self._on_silent()
            raise
        finally:
            self._open = None
            subscription.hang_up()

    @property
    def active(self) -> bool:
        """Whether there is a subscription."""
        return self._open is not None

    def hang_up(self) -> None:
        """End the open subscription, so that it is opened again."""
        if self._open is not None:
            self._open.hang_up()
