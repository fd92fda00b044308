"""Owns the connection that many calls share: what is asked in one turn goes out together, answers come in order.

redis-py makes and greets it. Then it is spoken to from here, since redis-py's own way to an answer (a pool, a stream
and some coroutines for each call) costs more than all else that is done for a task.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

DEADLINE_S = 2.0
"""Over connecting, repeats and reply, so that no HTTP answer hangs on Redis."""

Word = str | bytes | int | float
Command = tuple[Word, ...]
Done = Callable[[list[Any] | Exception], None]
"""Gets the replies, one a command, or what stands in their way. It must not raise."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the name by which Redis knows it once it has run."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())

    def asked(self, keys: Sequence[str], args: Sequence[Word]) -> Asked:
        return Asked([("EVALSHA", self.sha, len(keys), *keys, *args)], self)


class Asked(NamedTuple):
    """Commands that are sent together; script: the one that the only command runs; once: a repeat would do harm."""

    commands: Sequence[Command]
    script: Script | None = None
    once: bool = False


@dataclass(eq=False, slots=True)
class _Exchange:
    """deadline: event-loop time; sends: how often it was sent; replies: those that have come."""

    packed: bytes
    asked: Asked
    done: Done
    deadline: float
    sends: int = 0
    replies: list[Any] = field(default_factory=list)


class Wire:
    """Made when it is first needed, and again after a loss; what was sent and not answered is then sent again.

    So what can't be repeated without harm has to say so. pool: whose settings it is made with; sends: how often
    something is sent at most. greet: awaited with each new connection of redis-py before anything else is sent on it.
    on_answer: called with each success; on_failure: turns an error into what `done` gets.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        sends: int = 3,
        greet: Callable[[Any], Awaitable[None]] | None = None,
        on_answer: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        self._pool = pool
        self._sends = sends
        self._greet = greet
        self._on_answer = on_answer
        self._on_failure = on_failure
        self._flushes: list[Callable[[], None]] = []
        self._scheduled = False
        self._unsent: deque[_Exchange] = deque()
        self._sent: deque[_Exchange] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._protocol: _Protocol | None = None

    def soon(self, flush: Callable[[], None]) -> None:
        """Calls `flush` once all that this turn of the event loop brings is there, to ask what has gathered."""
        self._flushes.append(flush)
        self._schedule()

    def ask(self, asked: Asked, done: Done, deadline: float) -> None:
        """Sends with what else is asked now; `done` is called when all replies are there, or at the deadline at last.

        What is late already is not sent: that would end the connection for all others.
        """
        loop = asyncio.get_running_loop()
        packed = b"".join(map(hiredis.pack_command, asked.commands))  # type: ignore[arg-type]
        exchange = _Exchange(packed, asked, done, deadline)
        if deadline <= loop.time():
            loop.call_soon(self._fail, (exchange,), RedisTimeoutError("No answer in time"))
            return
        self._unsent.append(exchange)
        self._schedule()
        if self._timer is None or deadline < self._timer.when():
            self._look_at(deadline)

    def answers(self, asked: Asked, within_s: float = DEADLINE_S) -> asyncio.Future[list[Any]]:
        """The replies, as a future."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()

        def done(replies: list[Any] | Exception) -> None:
            if not future.done():
                future.set_exception(replies) if isinstance(replies, Exception) else future.set_result(replies)

        self.ask(asked, done, loop.time() + within_s)
        return future

    async def call(self, *command: Word, within_s: float = DEADLINE_S) -> Any:
        """The reply to one command."""
        return (await self.answers(Asked([command]), within_s))[0]

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Word]) -> Any:
        """The reply of a script."""
        return (await self.answers(script.asked(keys, args)))[0]

    def hang_up(self) -> None:
        """Ends the connection; what was sent and not answered is sent again as far as that is allowed."""
        if self._writer is not None and self._protocol is not None:
            self._writer.transport.abort()
            self._protocol.end(RedisConnectionError("Hung up"))

    async def close(self) -> None:
        """Fails what is not answered yet."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        left, self._sent, self._unsent = (*self._sent, *self._unsent), deque(), deque()
        self.hang_up()
        for exchange in left:
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
        if self._writer is None:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._connect(), name="redis-wire")
            return
        out = []
        for exchange in self._unsent:
            exchange.sends += 1
            out.append(exchange.packed)
        self._sent += self._unsent
        self._unsent.clear()
        self._writer.transport.write(out[0] if len(out) == 1 else b"".join(out))

    async def _connect(self) -> None:
        connection: Any = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(DEADLINE_S):
                await connection.connect()
                if self._greet is not None:
                    await self._greet(connection)
        except (RedisError, OSError, TimeoutError) as error:
            waiting, self._unsent = self._unsent, deque()
            self._fail(waiting, error)
        else:
            self._take(connection)
        finally:
            self._connecting = None
            await connection.disconnect(nowait=True)
        if self._unsent:
            self._send()

    def _take(self, connection: Any) -> None:
        """Takes the stream from redis-py's connection, which has nothing to close then."""
        at_end = connection._reader.at_eof()  # noqa: SLF001
        self._writer, connection._reader, connection._writer = connection._writer, None, None  # noqa: SLF001
        self._protocol = _Protocol(self._got, self._lost)
        self._writer.transport.set_protocol(self._protocol)
        if at_end or self._writer.transport.is_closing():  # it was lost before we could be told
            self._writer.transport.abort()
            self._protocol.end(RedisConnectionError("Connection closed by server"))

    def _got(self, reply: Any) -> None:
        exchange = self._sent[0]
        exchange.replies.append(reply)
        if len(exchange.replies) == len(exchange.asked.commands):
            self._sent.popleft()
            self._answered(exchange)

    def _answered(self, exchange: _Exchange) -> None:
        error = next((reply for reply in exchange.replies if isinstance(reply, Exception)), None)
        script = exchange.asked.script
        if error is None:
            self._on_answer()
            exchange.done(exchange.replies)
        elif isinstance(error, NoScriptError) and script is not None:
            ((_, _, *rest),) = exchange.asked.commands
            self.ask(Asked([("EVAL", script.text, *rest)]), exchange.done, exchange.deadline)
        else:
            self._fail((exchange,), error)
            if isinstance(error, ReadOnlyError):  # after a failover another server may answer under this name
                self.hang_up()

    def _lost(self, error: Exception) -> None:
        self._protocol = self._writer = None
        cut, self._sent = self._sent, deque()
        for exchange in cut:
            exchange.replies.clear()
        ended = [one for one in cut if one.asked.once or one.sends >= self._sends]
        self._unsent.extendleft(one for one in reversed(cut) if one not in ended)
        self._fail(ended, error)
        if self._unsent:
            self._schedule()

    def _look_at(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._look_at_clock)

    def _look_at_clock(self) -> None:
        """Fails what is late. The reply to it may still come, so the connection can't be used any more."""
        now = asyncio.get_running_loop().time()
        late = [one for one in (*self._sent, *self._unsent) if one.deadline <= now]
        self._unsent = deque(one for one in self._unsent if one.deadline > now)
        in_time = deque(one for one in self._sent if one.deadline > now)
        if len(in_time) < len(self._sent):
            self._sent = in_time
            self.hang_up()
        self._timer = None
        if left := [one.deadline for one in (*self._sent, *self._unsent)]:
            self._look_at(min(left))
        self._fail(late, RedisTimeoutError("No answer in time"))

    def _fail(self, exchanges: Sequence[_Exchange] | deque[_Exchange], error: Exception) -> None:
        if exchanges:
            told = self._on_failure(error)
            for exchange in exchanges:
                exchange.done(told)


class _Protocol(asyncio.Protocol):
    """One connection: reads replies until it is ended, from here or by the other side."""

    def __init__(self, got: Callable[[Any], None], lost: Callable[[Exception], None]) -> None:
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=DefaultParser.parse_error)
        self._got = got
        self._lost = lost
        self._ended = False

    def end(self, error: Exception) -> None:
        if not self._ended:
            self._ended = True
            self._lost(error)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while not self._ended and (reply := self._reader.gets()) is not False:
                self._got(reply)
        except InvalidResponse as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.end(error or RedisConnectionError("Connection closed by server"))
