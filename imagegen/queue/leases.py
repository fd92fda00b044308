"""Leases of the claims that this instance holds, and their renewal."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from redis.exceptions import RedisError

from imagegen.queue.claim import Claim
from imagegen.queue.connection import Connection
from imagegen.queue.control import Control
from imagegen.queue.holdings import Holdings
from imagegen.queue.scripts import Entry, Scripts


class Leases:
    """Claims of this instance and their renewal. lease_s: how long a claim lives unrenewed; look: set when something
    may be there to take over."""

    def __init__(
        self, connection: Connection, scripts: Scripts, holdings: Holdings, control: Control, lease_s: float
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self.holdings = holdings
        self._lease_s = lease_s
        self.look = asyncio.Event()
        self._control = control
        self._told_busy_at = -math.inf
        self.restore: Callable[[Sequence[Claim]], Awaitable[tuple[int, list[Claim]]]] | None = None
        self.on_loss: Callable[[], None] = lambda: None
        control.on_peer.append(self._met_peer)

    def look_soon(self) -> None:
        """Something may be there to take over."""
        self.look.set()

    async def hold(self, entries: Iterable[Entry]) -> list[Claim]:
        """Makes claims of entries; one that nobody can read goes to the dead-letter list."""
        claims, unreadable = self.holdings.hold(entries)
        for entry_id, what in unreadable:
            await self._connection.until_back(self._scripts.mended, self._scripts.bury, entry_id, what)
        if claims:
            self._tell_busy()
        return claims

    def _tell_busy(self) -> None:
        """The peers look after a lease's time whether we still live; so a word each lease is enough."""
        now = time.monotonic()
        if now - self._told_busy_at > self._lease_s * 0.8:
            self._told_busy_at = -math.inf if self._control.alone else now
            self._control.tell("busy")

    def _met_peer(self) -> None:
        """One that came later has to know, too."""
        if self.holdings.held:
            self._told_busy_at = -math.inf
            self._tell_busy()

    async def renew_forever(self) -> None:
        """Renews what is held, three times a lease; costs nothing while nothing is held."""
        holdings = self.holdings
        while True:
            while not holdings.held:
                holdings.busy.clear()
                await holdings.busy.wait()
            await asyncio.sleep(self._lease_s / 3)
            if holdings.held:
                try:
                    await self._connection.until_back(self._scripts.mended, self._renew)
                except RedisError as error:
                    self._scripts.unreadable.report("renewal", type(error).__name__, error)

    async def _renew(self) -> None:
        sent_at, renewed = time.monotonic(), list(self.holdings.held.values())
        lost, unnamed = await self._scripts.renew(self.holdings.instance, self.holdings.named())
        for held in renewed:
            if held.entry_id not in lost:
                held.confirmed_at = sent_at
        gone = [claim for entry_id in lost if (claim := self.holdings.held.get(entry_id))]
        if gone and self.restore is not None:
            restored, gone = await self.restore(gone)
            if restored:
                self.on_loss()
        for claim in gone:
            self.holdings.abandon(claim)
        if set(unnamed) - self.holdings.left_alone:
            self.look.set()
