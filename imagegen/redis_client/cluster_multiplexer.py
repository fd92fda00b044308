"""Multiplexer that follows the redirects of a cluster, so a moved slot or a failed node costs time only."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

import hiredis
from redis.exceptions import AskError, MovedError, TryAgainError
from redis.exceptions import TimeoutError as RedisTimeoutError

from imagegen.redis_client.multiplexer import CommandBatch, InFlight, Multiplexer, MultiplexerEvents
from imagegen.redis_client.redis_errors import OtherServer
from imagegen.redis_client.topology import Address, Servers

MAX_REDIRECTS = 40
"""Redirects of one command by a cluster; a slot replies TRYAGAIN until all its keys have moved."""

MAX_QUICK_REDIRECTS, TRY_AGAIN_S = 5, 0.05
"""Redirects to another owner that are followed at once; seconds before later ones, and after TRYAGAIN."""


class ClusterMultiplexer(Multiplexer):
    """Multiplexer of a cluster, or of any other server. Each command is redirected separately."""

    def __init__(self, servers: Servers, *, sends: int = 3, events: MultiplexerEvents | None = None) -> None:
        super().__init__(servers, sends=sends, events=events)
        self._nodes: dict[Address, Multiplexer] = {}

    async def close(self) -> None:
        """Close the connections for good: fail unanswered commands, and later ones."""
        await super().close()
        nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            await node.close()

    def drop(self) -> None:
        """Fail unanswered commands, and end the connections. A later command opens others."""
        super().drop()
        for node in self._nodes.values():
            node.drop()

    def withdraw(self) -> None:
        """Fail the unsent batches that hold only for the server before: another one, which lacks writes, answers."""
        withdrawn = [exchange for exchange in self._unsent if exchange.batch.one_server]
        self._unsent = deque(exchange for exchange in self._unsent if not exchange.batch.one_server)
        for exchange in withdrawn:
            exchange.done(OtherServer())

    def _refused(self, exchange: InFlight, error: Exception) -> None:
        if any(isinstance(reply, AskError | TryAgainError) for reply in exchange.replies):
            self._redirect(exchange, error)
        else:
            super()._refused(exchange, error)

    def _redirect(self, exchange: InFlight, error: Exception) -> None:
        """Send again the commands that another node, or the same one later, has to answer; no other runs twice."""
        if exchange.redirects >= MAX_REDIRECTS:
            self._fail((exchange,), error)
            return
        replies = exchange.replies
        again = {i: reply for i, reply in enumerate(replies) if isinstance(reply, AskError | TryAgainError)}

        def place(index: int, result: list[Any] | Exception) -> None:
            replies[index] = result if isinstance(result, Exception) else result[0]
            del again[index]
            if not again:
                self._answered(exchange)

        for index, reply in list(again.items()):
            command = exchange.batch.commands[index]
            batch = CommandBatch([command], exchange.batch.script, exchange.batch.no_resend)
            packed = hiredis.pack_command(command)  # type: ignore[arg-type]
            done = partial(place, index)
            resent = InFlight(packed, batch, done, exchange.deadline, redirects=exchange.redirects + 1, refusal=reply)
            self._send_elsewhere(resent, reply)

    def _send_elsewhere(self, exchange: InFlight, reply: Exception) -> None:
        if isinstance(reply, MovedError):
            self._servers.moved(reply.host, reply.port)
            self.leave()
            if exchange.redirects > MAX_QUICK_REDIRECTS:  # two nodes name each other for a moment
                asyncio.get_running_loop().call_later(TRY_AGAIN_S, self._enqueue, exchange)
            else:
                self._enqueue(exchange)
        elif isinstance(reply, AskError):
            self._send_after_asking((reply.host or self._servers.address[0], reply.port), exchange)
        else:
            asyncio.get_running_loop().call_later(TRY_AGAIN_S, self._enqueue, exchange)

    def _send_after_asking(self, address: Address, exchange: InFlight) -> None:
        """Send a command to the node that takes over its slot; the node serves one command after `ASKING`."""
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = Multiplexer(self._servers, address=address, sends=self._sends)

        def done(result: list[Any] | Exception) -> None:
            if isinstance(result, RedisTimeoutError):
                self._fail((exchange,))
                return
            exchange.replies = [result if isinstance(result, Exception) else result[1]]
            self._answered(exchange)

        command = exchange.batch.commands[0]
        node.send(CommandBatch([("ASKING",), command], no_resend=exchange.batch.no_resend), done, exchange.deadline)
