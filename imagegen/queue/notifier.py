"""Pub/sub channel of the instances: which are there, which are busy, which task changes they wait for.

Without peers nothing is published after the hello. A lost message costs time only: leases are checked now and then,
and awaited tasks are read again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import orjson
from loguru import logger

from imagegen.backoff import Backoff
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import RedisError, channel_remedy, shown, unavailable
from imagegen.redis_client.subscription import ChannelSubscription

RETRY_S, MAX_RETRY_S = 60.0, 600.0
"""Seconds between tries of a channel that Redis refuses; they double."""

HELLO_AGAIN_S, MAX_HELLOS = 1.0, 10

_BROADCAST = ("hello", "lost", "pause")
"""Kinds that are published even without a peer."""

FRESH, MAX_UNSENT_IDS = "fresh", 1_000
"""Kind for tasks whose cached end does not hold any more; ids of them that are kept while Redis is away."""

_GREETINGS = ("hello", "here")
"""Kinds that describe their sender."""

MISSED = "missed"
"""Kind for peers that were not sent all messages: while one seemed to be gone, nothing is published for it."""

FLAT_FILE_NAMES = "flat-file-names"
_ABILITIES = (FLAT_FILE_NAMES,)
"""What instances of this version can do and those of former ones can't; each greeting names them."""

GREETING_S = 1.0
"""Seconds after a subscription within which the peers usually have answered."""

SILENT_S = 5.0
"""Seconds after a greeting within which a peer that lives answers."""

FIRST_GREETING_S = 2.0
"""Seconds from its start for which an instance waits for the answers to its first greeting."""

_OF_ANY_PROCESS = ("keys",)
"""Kinds that also processes publish which are no instances, and never peers."""

MAX_PEERS = 1_000
"""Instances remembered, whichever names are received."""

Message = Mapping[str, Any]
Handler = Callable[[Message], None]


class Notifier:
    """Publisher and subscriber of the channel.

    Attributes:
        peers: other instances that sent a message.
        alone_since: Unix time since when there was certainly no peer, infinite while there may be one.
        handlers: called by the kind of a message.
        silent: whether Redis refuses the channel; then peers are unknown, and instances poll.
        subscribed: whether there is a subscription.
        is_informed: whether this instance receives messages that are published now.
        on_join: called after each (re)connect, since messages may have been missed.
        on_peer: called for each new peer, which has received nothing yet.
        on_silence: called when a peer does not answer, which may have died.
        greeting: returns the content of greetings about this instance.
        greetings: contents of the peers' greetings; without those of earlier versions, and of peers not greeted yet.
    """

    def __init__(self, connection: Connection, keys: Keys, instance: str) -> None:
        self._connection = connection
        self._channel = keys.notifications
        self.instance = instance
        self._sending: set[asyncio.Task[int | None]] = set()
        self.peers: dict[str, float] = {}
        self.greeting: Callable[[], Mapping[str, Any]] = dict
        self.greetings: dict[str, Message] = {}
        self._ping_timer: asyncio.TimerHandle | None = None
        self.alone_since = self._doubted_at = 0.0
        self._refusals = Backoff(RETRY_S, MAX_RETRY_S)
        self.silent = self.subscribed = self.is_informed = False
        self._hellos = 0
        self._repeats_hello = self._has_unsent = False
        self._unsent_ids: dict[str, None] = {}
        self._repeat_timer: asyncio.TimerHandle | None = None
        self._subscribed_at, self._moved_at = 0.0, -math.inf
        self._others = math.inf
        self._forgotten: set[str] = set()
        self._met_all = asyncio.Event()
        self._heard = asyncio.Event()
        self._listening_since, self._was_greeted = math.inf, False
        self.handlers: dict[str, Handler] = {}
        self.on_join: list[Callable[[], None]] = []
        self.on_peer: list[Callable[[], None]] = []
        self.on_silence: Callable[[], None] = lambda: None
        self._reported_unreadable = False

    @property
    def alone(self) -> bool:
        """Whether there is no peer, although the channel works."""
        return not self.peers and not self.silent

    @property
    def has_met_peers(self) -> bool:
        """Whether all instances have answered the first greeting, or won't: without the channel, or in time.

        It stays true when a later subscription makes the peers uncertain again.
        """
        is_late = time.monotonic() > self._listening_since + FIRST_GREETING_S
        return self._was_greeted or self.silent or (is_late and self._connection.health.down_since is None)

    def add_peer(self, name: str) -> None:
        """Record that another instance is there."""
        self.peers[name] = time.monotonic()
        self._heard.set()
        self._count_peers()
        self._update_alone_since()

    def may_live(self, instance: str) -> bool:
        """Return whether an instance of this name may be there: this one, a peer, or any while peers are unknown."""
        return not self._knows_peers or instance == self.instance or instance in self.peers

    def all_can(self, ability: str) -> bool:
        """Return whether each instance that is there has an ability; False while that is unknown."""
        if not self._knows_peers:
            return False
        abilities = [self.greetings.get(peer, {}).get("can") for peer in self.peers]
        return all(isinstance(names, list) and ability in names for names in abilities)

    async def get_to_know(self, instance: str) -> None:
        """Wait until this instance has learned whether another one is a peer, at most `GREETING_S`."""
        if instance != self.instance and instance not in self.peers:
            await self.meet_peers()

    async def meet_peers(self) -> None:
        """Wait until all peers are known, at most `GREETING_S`."""
        if not self._knows_peers and not self.silent:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._met_all.wait(), GREETING_S)

    @property
    def _knows_peers(self) -> bool:
        has_waited = time.monotonic() >= self._subscribed_at + SILENT_S
        return self.subscribed and not self.silent and (self._met_all.is_set() or has_waited)

    def _count_peers(self) -> None:
        """Check whether all other subscribers have sent something; a peer from before may be gone."""
        if not self._met_all.is_set() and self._others <= sum(
            seen_at >= self._subscribed_at for seen_at in self.peers.values()
        ):
            self._met_all.set()
            self._was_greeted = True

    def no_peers_since(self, unix_s: float) -> bool:
        """Return whether there was no peer at any time since then."""
        return unix_s >= self.alone_since

    def _doubt_peers(self) -> None:
        """Stop assuming that there was no peer until now."""
        self._doubted_at = self._connection.clock()
        self._update_alone_since()

    def _update_alone_since(self) -> None:
        self.alone_since = self._doubted_at if self.alone else math.inf

    def on_new_server(self) -> None:
        """Keep the peers for a while: they may not have subscribed to the new server yet."""
        self._moved_at = time.monotonic()

    def _counts_all(self, receivers: int) -> bool:
        """Return whether the receivers of a message are all peers that live: after a failover some come later."""
        settled_at = max(self._subscribed_at, self._moved_at) + SILENT_S
        return self.subscribed and receivers > 0 and time.monotonic() >= settled_at

    def probe_peers(self) -> None:
        """Greet an instance that may be there, and stop assuming that there is none."""
        self._doubt_peers()
        self.publish("hello")

    def ping_peers(self) -> None:
        """Greet all peers, and forget those that do not answer: an instance that was killed publishes no `bye`."""
        if self._ping_timer is None and not self.silent:
            loop = asyncio.get_running_loop()
            self._ping_timer = loop.call_later(SILENT_S, self._forget_silent, time.monotonic())
            self.publish("hello")

    def _forget_silent(self, since: float) -> None:
        """Forget the peers that have sent nothing since a monotonic time, unless this instance missed messages."""
        self._ping_timer = None
        if not self.subscribed or self._subscribed_at >= since or self._connection.health.down_since is not None:
            return
        if silent := self.peers.keys() - self._seen_since(since):
            for name in silent:
                self._forget(name)
            self.on_silence()

    def _forget(self, peer: str) -> None:
        if self.peers.pop(peer, None) is not None and len(self._forgotten) < MAX_PEERS:
            self._forgotten.add(peer)
        self.greetings.pop(peer, None)
        self._doubt_peers()

    async def attending(self) -> frozenset[str] | None:
        """Return the peers that answer a greeting; None unless all that receive it answer. The others are forgotten."""
        since = time.monotonic()
        receivers = await self.request("hello", **self.greeting())
        if receivers is None:
            return None
        with suppress(TimeoutError):
            async with asyncio.timeout(SILENT_S):
                while len(self._seen_since(since)) < receivers:
                    self._heard.clear()
                    await self._heard.wait()
        attending = self._seen_since(since)
        if len(attending) < receivers or self._subscribed_at >= since:
            return None
        if self._counts_all(receivers + 1):
            for name in self.peers.keys() - attending:
                self._forget(name)
        return attending

    def _seen_since(self, since: float) -> frozenset[str]:
        """Return the peers that have sent something since a monotonic time."""
        return frozenset(name for name, seen_at in self.peers.items() if seen_at >= since)

    def publish(self, kind: str, **content: Any) -> None:
        """Publish to the peers, if there are any, without waiting; a failure is no error."""
        if kind in _GREETINGS:
            content |= self.greeting()
        if (self.peers and not self.silent) or kind in _BROADCAST:
            sending = asyncio.create_task(self._publish(kind, content), name=f"publish-{kind}")
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def request(self, kind: str, **content: Any) -> int | None:
        """Publish to the peers. Return how many receive it, None if Redis does not count them or can't be used."""
        return None if self.silent or not self.subscribed else await self._publish(kind, content)

    def in_script(self, kind: str, **content: Any) -> tuple[str, bytes]:
        """Return channel and message for a script that publishes them; empty if certainly no peer would receive it."""
        if self.silent or (not self.peers and self.subscribed):
            return "", b""
        return self._channel, self._message(kind, content)

    async def flush(self) -> None:
        """Wait until all messages are sent."""
        if self._sending:
            await asyncio.wait(self._sending)

    async def listen_forever(self) -> None:
        """Receive messages over one subscription, which is renewed after a loss."""
        losses = Backoff(0.1, 5.0)
        self._listening_since = time.monotonic()
        while True:
            try:
                async with self._connection.subscriptions.subscribed(self._channel) as subscription:
                    losses.reset()
                    await self._receive(subscription)
            except (RedisError, OSError, TimeoutError) as error:
                if self._refused(error):
                    await asyncio.sleep(self._refusals.next_s())
                    continue
                logger.debug("The control channel was lost: {}", error)
                await self._connection.health.wait(losses.next_s())

    async def _receive(self, subscription: ChannelSubscription) -> None:
        """Handle messages until the subscription is lost."""
        self.subscribed, self.is_informed = True, not self.silent
        try:
            self._connection.meter.redis_commands_sent("control", 1)
            self._on_subscribed()
            while True:
                self._on_message(await subscription.next())
        finally:
            self.subscribed = self.is_informed = False

    def _refused(self, error: Exception) -> bool:
        """Work without the channel if Redis refuses it: it lacks a command, or the user may not publish or subscribe.

        Return whether it does.
        """
        user = self._connection.servers.user
        to_do = channel_remedy(error, user, self._channel)
        if to_do is None or self.silent:
            return to_do is not None
        self.silent, self.is_informed = True, False
        self._forget_all()
        logger.warning(
            "REDIS_URL: Redis lets user {} not use the channel of the instances ({}). They poll instead, which is "
            "slower and costs more commands. To allow it: {}",
            *(user, shown(error), to_do),
        )
        for callback in self.on_join:
            callback()
        return True

    def _forget_all(self) -> None:
        self._forgotten |= set(list(self.peers)[: MAX_PEERS - len(self._forgotten)])
        self.peers.clear()
        self.greetings.clear()
        self._doubt_peers()

    def _on_subscribed(self) -> None:
        self._subscribed_at = time.monotonic()
        self._met_all.clear()
        self._others = math.inf
        self._doubt_peers()  # a peer may have come and gone unnoticed
        self.publish("hello")
        for callback in self.on_join:
            callback()

    def _on_message(self, data: bytes) -> None:
        try:
            message = orjson.loads(data)
            sender, kind = message["from"], message["kind"]
            if not (isinstance(sender, str) and isinstance(kind, str)):
                raise TypeError(kind)
            if sender != self.instance:
                self._handle(message, sender, kind)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a foreign message
            self._unreadable()

    def _handle(self, message: Message, sender: str, kind: str) -> None:
        if kind in _OF_ANY_PROCESS:
            self._call_handler(kind, message)
            return
        is_known = sender in self.peers and kind != "hello"
        if kind == "bye":
            self._forget(sender)
            self._forgotten.discard(sender)
        else:
            self.add_peer(sender)
            if sender in self._forgotten:
                self._forgotten.discard(sender)
                self.publish(MISSED)
        if kind in _GREETINGS:
            self.greetings[sender] = message
        if kind == "hello":
            self.publish("here")
        if not is_known and kind != "bye":
            for callback in self.on_peer:
                callback()
        while len(self.peers) > MAX_PEERS:
            self._forget(next(iter(self.peers)))
        self._call_handler(kind, message)

    def _call_handler(self, kind: str, message: Message) -> None:
        if handler := self.handlers.get(kind):
            handler(message)

    def _unreadable(self) -> None:
        """Log a foreign message once."""
        if not self._reported_unreadable:
            self._reported_unreadable = True
            logger.warning("A message on the channel of the instances can't be read; further ones are ignored silently")

    def _repeat(self, kind: str, content: Mapping[str, Any]) -> None:
        """Send a greeting again that was not sent: peers do not see this instance without it.

        The same with the message that tasks were enqueued again: peers that have cached their ends rely on it. Only
        their ids are kept, and of too many only that messages are missing.
        """
        if kind == "hello" and self._hellos < MAX_HELLOS:
            self._hellos += 1
            self._repeats_hello = True
        elif kind == MISSED:
            self._has_unsent = True
        elif kind == FRESH and not self._has_unsent:
            self._unsent_ids |= dict.fromkeys(content["ids"])
            self._has_unsent = len(self._unsent_ids) > MAX_UNSENT_IDS
        else:
            return
        if self._has_unsent:
            self._unsent_ids = {}
        if self._repeat_timer is None:
            self._repeat_timer = asyncio.get_running_loop().call_later(HELLO_AGAIN_S, self._publish_again)

    def _publish_again(self) -> None:
        self._repeat_timer = None
        repeats_hello, ids, has_unsent = self._repeats_hello, [*self._unsent_ids], self._has_unsent
        self._repeats_hello, self._unsent_ids, self._has_unsent = False, {}, False
        if repeats_hello:
            self.publish("hello")
        if has_unsent:
            self.publish(MISSED)
        elif ids:
            self.publish(FRESH, ids=ids)

    def _message(self, kind: str, content: Mapping[str, Any]) -> bytes:
        abilities = {"can": _ABILITIES} if kind in _GREETINGS else {}
        return orjson.dumps({"from": self.instance, "kind": kind, **abilities, **content})

    async def _publish(self, kind: str, content: Mapping[str, Any]) -> int | None:
        """Publish a message. Return how many others receive it, None if that is unknown."""
        try:
            receivers = await self._connection.commands.publish(self._channel, self._message(kind, content))
        except (RedisError, OSError, TimeoutError) as error:
            if not self._refused(error) and unavailable(error):
                self._connection.health.failed(error)
                self._repeat(kind, content)
            return None
        self._hellos = 0
        self._connection.meter.redis_commands_sent("control", 1)
        if self.silent and self.subscribed:
            self.silent, self.is_informed = False, True
            self._doubt_peers()
            logger.info("The instances can use their channel again")
        if self._connection.servers.clustered:  # then the count is that of one node
            return None
        if kind == "hello" and self.subscribed:
            self._others = receivers - 1
            self._count_peers()
        others = max(receivers - self.subscribed, 0)
        if receivers <= 1 and kind not in _BROADCAST and self._counts_all(receivers):
            has_left = bool(self.peers)
            self._forget_all()
            if has_left:
                self.on_silence()
        elif others < len(self.peers) and kind not in _GREETINGS:
            self.ping_peers()
        return others


def ids_of(message: Message) -> list[str]:
    """Return the task ids in a message."""
    ids = message.get("ids")
    return [task_id for task_id in ids if isinstance(task_id, str)] if isinstance(ids, list) else []
