"""Pause of claiming on all instances: no task starts until it ends, running ones go on, and submits are accepted.

One string in Redis has it. It is read at the start, after each connection to the channel of the instances, and after
each message there; an instance without that channel reads it now and then.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Protocol, cast

import msgspec
from loguru import logger
from msgspec import Meta, Struct

from imagegen.errors import QueueUnavailable
from imagegen.formats import rfc3339
from imagegen.queue.notifier import Message, Notifier
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import RedisError, ResponseError, shown, wrong_type

PAUSE_MESSAGE = "pause"
"""Kind of the message on the channel of the instances."""

UNPROMPTED_READ_S = 10.0
"""Interval of the reads while no message would announce a change."""

MAX_SINCE_S = 253_402_300_800
"""Unix time of the year 10000, which RFC 3339 can't express."""


class PauseState(Struct, frozen=True, gc=False):
    """State: whether claiming is paused, and since when (Unix time). A newer state has a higher version."""

    version: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    paused: bool = False
    since: Annotated[float, Meta(ge=0, lt=MAX_SINCE_S)] = 0.0


class OnChange(Protocol):
    """Callback with whether no claim may start now."""

    def __call__(self, *, paused: bool) -> None: ...


class ClaimingPause:
    """The pause as this instance last read it. While its state was never read, no claim may start."""

    def __init__(self, connection: Connection, keys: Keys, notifier: Notifier) -> None:
        self._connection = connection
        self._key = keys.pause
        self._notifier = notifier
        self.on_change: OnChange = _do_nothing
        self._needed = asyncio.Event()
        self.state = PauseState()

    @property
    def since(self) -> float | None:
        """Unix time since when claiming is paused, None if it is not."""
        return self.state.since if self.state.paused else None

    async def start(self) -> None:
        """Read the state before the first claim; if Redis is away, hold all claims until it was read."""
        try:
            await self._read()
        except (QueueUnavailable, RedisError):
            self.on_change(paused=True)
            self._needed.set()

    async def set(self, *, paused: bool) -> PauseState:
        """Pause claiming on all instances, or let it go on; costs three commands at most. Raises QueueUnavailable."""
        await self._read()
        if paused != self.state.paused:
            now = self._connection.clock()
            state = PauseState(max(self.state.version + 1, int(now * 1000)), paused, now)
            await self._write(state)
            self._use(state)
        else:  # another instance may have missed it, if the answer to its write was lost
            self._publish(self.state)
        return self.state

    async def read_forever(self) -> None:
        """Read the state whenever it may have changed."""
        while True:
            try:
                async with asyncio.timeout(UNPROMPTED_READ_S if self._notifier.silent else None):
                    await self._needed.wait()
            except TimeoutError:
                pass
            self._needed.clear()
            try:
                await self._connection.retry_until_available(self._read)
            except RedisError as error:
                logger.error("Whether claiming is paused can't be read from Redis: {}", shown(error))
                self.on_change(paused=self.state.paused)

    def read_soon(self) -> None:
        """Read the state soon: a message may have been missed, or Redis has lost it."""
        self._needed.set()

    def on_message(self, message: Message) -> None:
        """Use the state that another instance has written."""
        try:
            self._use(msgspec.convert(message.get("state"), PauseState))
        except msgspec.ValidationError:
            self._needed.set()

    async def _read(self) -> None:
        """Read the state. If Redis has lost it, write back the one from before the read, not one set since."""
        known = self.state
        state = _decode(await self._stored())
        if state.version < known.version:
            await self._write(known)
            state = known
        if state.version < self.state.version:  # set during the read
            return
        self.on_change(paused=state.paused)
        self._use(state)

    async def _stored(self) -> bytes | None:
        """Return the stored value, empty if it is of another type: the next write replaces it."""
        self._connection.meter.redis_commands_sent("control", 1)
        try:
            async with self._connection.deadline():
                return cast(bytes | None, await self._connection.commands.get(self._key))
        except ResponseError as error:
            if not wrong_type(error):
                raise
            return b""

    async def _write(self, state: PauseState) -> None:
        async with self._connection.deadline():
            await self._connection.commands.set(self._key, msgspec.json.encode(state))
        self._connection.meter.redis_commands_sent("control", 1)
        self._publish(state)

    def _publish(self, state: PauseState) -> None:
        self._notifier.publish(PAUSE_MESSAGE, state=msgspec.to_builtins(state))

    def _use(self, state: PauseState) -> None:
        if state.version <= self.state.version:
            return
        was_paused, self.state = self.state.paused, state
        self.on_change(paused=state.paused)
        if state.paused:
            text = "Claiming is paused on all instances since {}: no task starts until POST /api/admin/resume"
            logger.warning(text, rfc3339(state.since))
        elif was_paused:
            logger.info("Claiming is resumed")


def _do_nothing(*, paused: bool) -> None:
    pass


def _decode(stored: bytes | None) -> PauseState:
    if stored is None:
        return PauseState()
    try:
        return msgspec.json.decode(stored, type=PauseState)
    except msgspec.MsgspecError:
        logger.error("The pause of claiming in Redis can't be read, and does not count")
        return PauseState()
