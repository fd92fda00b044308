"""Connection that many calls share: commands of one turn go out together, and replies arrive in order.

redis-py opens it. Items of one turn can go to Redis in one batch: each caller gets its own result.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import hiredis
from msgspec import Struct
from redis.exceptions import ClusterDownError, InvalidResponse, NoScriptError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from imagegen.redis_client.redis_errors import parse_error
from imagegen.redis_client.redis_health import Health
from imagegen.redis_client.replies import DECODE_ERRORS, unreadable, unreadable_reply
from imagegen.redis_client.topology import Address, Servers, take_over

Item = TypeVar("Item")
Reply = TypeVar("Reply")

MAX_ITEMS = 200
MAX_BYTES = 2**20
"""Limits of a batch. All calls share one connection, and small ones wait behind a large one."""

MAX_IN_FLIGHT = 4
MAX_AT_ONCE = MAX_ITEMS * MAX_IN_FLIGHT
"""Items in flight together."""

STOOD_STILL_S, GRACE_S = 0.1, 1.0
"""How late a check is if the process stood still, as in a paused container, and the time for replies after that."""

Arg = str | bytes | int | float
Command = tuple[Arg, ...]
Callback = Callable[[list[Any] | Exception], None]
"""Receives one reply for each command, or the error of the batch. It must not raise."""


@dataclass(frozen=True, slots=True)
class Script:
    """Lua script, and the hash by which Redis finds it after its first run."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())

    def batch(self, keys: Sequence[str], args: Sequence[Arg]) -> CommandBatch:
        return CommandBatch([("EVALSHA", self.sha, len(keys), *keys, *args)], self)


class CommandBatch(NamedTuple):
    """Commands that are sent together.

    script: run by the only command; no_resend: a repeat would do harm; one_server: see `ClusterMultiplexer.withdraw`.
    """

    commands: Sequence[Command]
    script: Script | None = None
    no_resend: bool = False
    one_server: bool = False


class InFlight(Struct, eq=False):
    """Batch in flight. deadline: event-loop time; sends, redirects: how often; refusal: of the last redirect."""

    packed: bytes
    batch: CommandBatch
    done: Callback
    deadline: float
    sends: int = 0
    redirects: int = 0
    refusal: Exception | None = None
    replies: list[Any] = []


class MultiplexerEvents(Struct, frozen=True):
    """Callbacks of a multiplexer.

    Attributes:
        greet: awaited with each new connection of redis-py before anything else is sent on it.
        health: notified of each success during an outage.
        on_failure: returns the error that callers get.
        on_silent: called when the server leaves a command without a reply.
    """

    greet: Callable[[Any], Awaitable[None]] | None = None
    health: Health | None = None
    on_failure: Callable[[Exception], Exception] = lambda error: error
    on_silent: Callable[[], None] = lambda: None


class Multiplexer:
    """Connection that is opened on first use, and again after a loss; unanswered commands are then sent again.

    Commands that can't be repeated must set `no_resend`.

    Args:
        servers: open the connections.
        address: of the one node to connect to, regardless of redirects.
        sends: how often a batch is sent at most.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        address: Address | None = None,
        sends: int = 3,
        events: MultiplexerEvents | None = None,
    ) -> None:
        self._servers, self._address, self.deadline_s = servers, address, servers.deadline_s
        self._sends, self._events = sends, events or MultiplexerEvents()
        self.to_client_error = self._events.on_failure
        self._flushes: list[Callable[[], None]] = []
        self._unsent: deque[InFlight] = deque()
        self._sent: deque[InFlight] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._grace_until = -math.inf
        self._connecting: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._protocol: ReplyProtocol | None = None
        self._scheduled = self._leaving = self._closed = False
        if address is None:
            servers.on_change.append(self.leave)

    @property
    def under_way(self) -> int:
        """Number of batches without a reply yet."""
        return len(self._sent) + len(self._unsent)

    def on_turn_end(self, flush: Callable[[], None]) -> None:
        """Call `flush` once at the end of this turn of the event loop, to send the collected items."""
        self._flushes.append(flush)
        self._schedule()

    def send(self, batch: CommandBatch, done: Callback, deadline: float) -> None:
        """Send commands with others of this turn; call `done` after all replies, or at the deadline.

        A batch that is late already is not sent: that would end the connection for all others.
        """
        packed = b"".join(map(hiredis.pack_command, batch.commands))  # type: ignore[arg-type]
        self._enqueue(InFlight(packed, batch, done, deadline))

    def _enqueue(self, exchange: InFlight) -> None:
        loop = asyncio.get_running_loop()
        now, deadline = loop.time(), exchange.deadline
        if deadline <= now < self._grace_until:
            deadline = exchange.deadline = self._grace_until
        if self._closed or deadline <= now:
            loop.call_soon(self._fail, (exchange,), RedisConnectionError("Closed") if self._closed else None)
            return
        self._unsent.append(exchange)
        self._schedule()
        if self._timer is None or deadline < self._timer.when():
            self._check_at(deadline)

    def execute_batch(self, batch: CommandBatch, within_s: float | None = None) -> asyncio.Future[list[Any]]:
        """Return a future of the replies. within_s: in place of `deadline_s`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()

        def done(replies: list[Any] | Exception) -> None:
            if not future.done():
                future.set_exception(replies) if isinstance(replies, Exception) else future.set_result(replies)

        self.send(batch, done, loop.time() + (self.deadline_s if within_s is None else within_s))
        return future

    async def execute(self, *command: Arg, within_s: float | None = None) -> Any:
        """Return the reply to one command."""
        return (await self.execute_batch(CommandBatch([command]), within_s))[0]

    async def evalsha(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Return the reply of a script."""
        return (await self.execute_batch(script.batch(keys, args)))[0]

    def abort(self) -> None:
        """End the connection; unanswered commands are sent again if they allow it."""
        if self._transport is not None and self._protocol is not None:
            self._transport.abort()
            self._protocol.end(RedisConnectionError("Hung up"))

    def leave(self) -> None:
        """Send nothing more on this connection, and end it after the last reply."""
        self._leaving = self._transport is not None
        if self._leaving and not self._sent:
            self.abort()

    async def close(self) -> None:
        """Close the connection for good: fail unanswered commands, and later ones."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        self.drop()

    def drop(self) -> None:
        """Fail unanswered commands, and end the connection. A later command opens another one."""
        unanswered, self._sent, self._unsent = (*self._sent, *self._unsent), deque(), deque()
        self.abort()
        for exchange in unanswered:
            exchange.done(RedisConnectionError("Closed"))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if self._unsent:
            self._send()
        flushes, self._flushes = self._flushes, []
        for flush in flushes:
            flush()
        self._scheduled = False
        if self._unsent:
            self._send()

    def _send(self) -> None:
        if self._leaving:
            return
        if self._transport is None:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._connect(), name="redis-connect")
            return
        for exchange in self._unsent:
            exchange.sends += 1
        packed = b"".join([exchange.packed for exchange in self._unsent])
        self._sent += self._unsent
        self._unsent.clear()
        self._transport.write(packed)

    async def _connect(self) -> None:
        connection: Any = None
        try:
            async with asyncio.timeout(self.deadline_s):
                servers, address = self._servers, self._address
                connection = await (servers.connect() if address is None else servers.connect_to(address))
                if self._events.greet is not None:
                    await self._events.greet(connection)
        except Exception as error:  # noqa: BLE001 - every error goes to the callers
            self._servers.doubt()
            waiting, self._unsent = self._unsent, deque()
            self._fail(waiting, unreadable(error) if isinstance(error, DECODE_ERRORS) else error)
        else:
            self._protocol = ReplyProtocol(self._on_reply, self._on_loss)
            self._transport = take_over(connection, self._protocol)
        finally:
            self._connecting = None
            if connection is not None:
                await connection.disconnect(nowait=True)
        if self._unsent:
            self._send()

    def _on_reply(self, reply: Any) -> None:
        exchange = self._sent[0]
        exchange.replies.append(reply)
        if len(exchange.replies) == len(exchange.batch.commands):
            if exchange.batch.script is None and (fault := unreadable_reply(exchange.batch.commands, exchange.replies)):
                raise fault  # ends the connection, and the batch is sent again
            self._sent.popleft()
            self._answered(exchange)
        if self._leaving and not self._sent:
            self.abort()

    def _answered(self, exchange: InFlight) -> None:
        for reply in exchange.replies:
            if isinstance(reply, Exception):
                self._refused(exchange, reply)
                return
        health = self._events.health
        if health is not None and health.down_since is not None:
            health.succeeded()
        exchange.done(exchange.replies)

    def _refused(self, exchange: InFlight, error: Exception) -> None:
        if isinstance(error, NoScriptError) and (script := exchange.batch.script):
            ((_, _, *rest),) = exchange.batch.commands
            batch = exchange.batch._replace(commands=[("EVAL", script.text, *rest)], script=None)
            self.send(batch, exchange.done, exchange.deadline)
            return
        self._fail((exchange,), error)
        if isinstance(error, ReadOnlyError | ClusterDownError):  # after a failover another server accepts it
            self._servers.doubt()
            self.leave()

    def _on_loss(self, error: Exception) -> None:
        transport, self._protocol, self._transport, self._leaving = self._transport, None, None, False
        if transport is not None:
            transport.abort()
        cut, self._sent = self._sent, deque()
        for exchange in cut:
            exchange.replies.clear()
        ended = [exchange for exchange in cut if exchange.batch.no_resend or exchange.sends >= self._sends]
        self._unsent.extendleft(exchange for exchange in reversed(cut) if exchange not in ended)
        self._fail(ended, error)
        if self._unsent:
            self._schedule()

    def _check_at(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._fail_late)

    def _fail_late(self) -> None:
        """Fail late batches. Their replies may still come, so the connection can't be used any more."""
        now = asyncio.get_running_loop().time()
        due = now if self._timer is None else self._timer.when()
        if now - due > STOOD_STILL_S and due > self._grace_until:  # once: a loop that is always late fails calls too
            self._grace_until = now + GRACE_S
            for exchange in (*self._sent, *self._unsent):
                exchange.deadline = max(exchange.deadline, self._grace_until)
        late = [exchange for exchange in (*self._sent, *self._unsent) if exchange.deadline <= now]
        self._unsent = deque(exchange for exchange in self._unsent if exchange.deadline > now)
        in_time = deque(exchange for exchange in self._sent if exchange.deadline > now)
        if len(in_time) < len(self._sent):
            self._sent = in_time
            self.abort()
            self._events.on_silent()
        self._timer = None
        if deadlines := [exchange.deadline for exchange in (*self._sent, *self._unsent)]:
            self._check_at(min(deadlines))
        self._fail(late)

    def _fail(self, exchanges: Sequence[InFlight] | deque[InFlight], error: Exception | None = None) -> None:
        if exchanges:  # without an error they are late
            error = error or next((exchange.refusal for exchange in exchanges if exchange.refusal), None)
            client_error = self._events.on_failure(error or RedisTimeoutError("No answer in time"))
            for exchange in exchanges:
                exchange.done(client_error)


class ReplyProtocol(asyncio.Protocol):
    """Protocol that passes on each reply until it is ended, from here or by the other side.

    redis-py's own way to a reply (a pool, a stream and some coroutines for each call) costs more than all else that
    is done for a task. writer: kept, since a stream's writer closes the transport when nothing refers to it.
    """

    def __init__(self, on_reply: Callable[[Any], None], on_loss: Callable[[Exception], None]) -> None:
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=parse_error)
        self._on_reply = on_reply
        self._on_loss = on_loss
        self._ended = False
        self.writer: asyncio.StreamWriter | None = None

    def end(self, error: Exception) -> None:
        """Report the loss, once."""
        if not self._ended:
            self._ended = True
            self._on_loss(error)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while not self._ended and (reply := self._reader.gets()) is not False:
                self._on_reply(reply)
        except InvalidResponse as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.end(error or RedisConnectionError("Connection closed by server"))


class Batcher(Generic[Item, Reply]):
    """Collector of the items of a turn, sent in one batch; with four batches in flight, items wait for the next.

    A result or an error is set within the `deadline_s` of the multiplexer, from the first item's arrival.

    Args:
        encode: returns the commands for some items.
        decode: returns one result for each item, in order, from the replies.
        size: returns the approximate bytes of an item; only needed for large ones.
    """

    def __init__(
        self,
        multiplexer: Multiplexer,
        encode: Callable[[list[Item]], CommandBatch],
        decode: Callable[[list[Item], list[Any]], Sequence[Reply]],
        size: Callable[[Item], int] | None = None,
    ) -> None:
        self._multiplexer = multiplexer
        self._encode, self._decode, self._size = encode, decode, size
        self._futures: list[asyncio.Future[Reply]] = []
        self._items, self._deadlines = list[Item](), list[float]()
        self._in_flight = 0

    def __call__(self, item: Item) -> asyncio.Future[Reply]:
        """Add an item. Return a future of its result, or of the error of the whole batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        if not self._items and self._in_flight < MAX_IN_FLIGHT:
            self._multiplexer.on_turn_end(self._flush)
        self._items.append(item)
        self._futures.append(future)
        self._deadlines.append(loop.time() + self._multiplexer.deadline_s)
        return future

    def _flush(self) -> None:
        while self._items and self._in_flight < MAX_IN_FLIGHT:
            count = self._count() if len(self._items) > 1 else 1
            items, futures, deadline = self._items[:count], self._futures[:count], self._deadlines[0]
            del self._items[:count], self._futures[:count], self._deadlines[:count]
            self._in_flight += 1
            try:
                self._multiplexer.send(self._encode(items), partial(self._answered, items, futures), deadline)
            except Exception as error:  # noqa: BLE001 - every error goes to the callers
                self._answered(items, futures, error)

    def _count(self) -> int:
        """Return how many waiting items fit into the next batch."""
        if self._size is None:
            return MAX_ITEMS
        size = 0
        for count, item in enumerate(self._items[:MAX_ITEMS]):
            if size >= MAX_BYTES:
                return count
            size += self._size(item)
        return MAX_ITEMS

    def _answered(
        self, items: list[Item], futures: list[asyncio.Future[Reply]], replies: list[Any] | Exception
    ) -> None:
        self._in_flight -= 1
        if self._items:
            self._multiplexer.on_turn_end(self._flush)
        try:
            if isinstance(replies, Exception):
                raise replies
            for future, result in list(zip(futures, self._decode(items, replies), strict=True)):
                if not future.done():
                    future.set_result(result)
        except Exception as error:  # noqa: BLE001
            cause = unreadable(error) if isinstance(error, DECODE_ERRORS) and error is not replies else error
            for future in futures:
                if not future.done():
                    future.set_exception(self._multiplexer.to_client_error(cause))
                    future.exception()
