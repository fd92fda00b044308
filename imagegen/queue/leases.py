"""Owns the leases: renewing ours, and taking over claims that nobody renewed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from loguru import logger

from imagegen.queue.claim import Claim, inherit
from imagegen.queue.connection import Connection
from imagegen.queue.control import Control, Message
from imagegen.queue.holdings import Holdings
from imagegen.queue.items import PendingEntry
from imagegen.queue.scripts import Entry, Scripts

EARLY_S, EARLY_CHECK_S, CHECK_S = 120.0, 30.0, 180.0
"""Orphans are likely just after a start; later a check is there for the case that a peer's word was lost."""

STRAY_S = 1.0
"""An entry that is pending for us so long, and that we do not hold, got lost on its way to us."""


class Leases:
    """lease_s: how long a claim lives unrenewed."""

    def __init__(
        self, connection: Connection, scripts: Scripts, holdings: Holdings, control: Control, lease_s: float
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self.holdings = holdings
        self._lease_s = lease_s
        self._look = asyncio.Event()
        self._control = control
        self._told_busy_at = -math.inf
        self._peer_timer: asyncio.TimerHandle | None = None
        self._peer_until = -math.inf
        self.on_takeover: Callable[[], None] = lambda: None
        self.restore: Callable[[Sequence[Claim]], Awaitable[tuple[int, list[Claim]]]] | None = None
        self.on_loss: Callable[[], None] = lambda: None
        control.on["busy"] = self._heard_busy
        control.on_peer.append(self._met_peer)

    def look_soon(self) -> None:
        """Something may be there to take over."""
        self._look.set()

    async def hold(self, entries: Iterable[Entry]) -> list[Claim]:
        """Makes claims of entries; one that nobody can read goes to the dead-letter list."""
        claims, unreadable = self.holdings.hold(entries)
        for entry_id, what in unreadable:
            await self._connection.until_back(self._scripts.bury, entry_id, what)
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

    def _heard_busy(self, _message: Message) -> None:
        """A word that comes while we wait after an earlier one puts the look off no further, but asks for one more."""
        loop = asyncio.get_running_loop()
        self._peer_until = loop.time() + self._lease_s
        if self._peer_timer is None:
            self._peer_timer = loop.call_at(self._peer_until, self._look_at_peers)

    def _look_at_peers(self) -> None:
        self._peer_timer = None
        self._look.set()
        loop = asyncio.get_running_loop()
        if self._peer_until > loop.time():
            self._peer_timer = loop.call_at(self._peer_until, self._look_at_peers)

    async def renew_forever(self) -> None:
        """Renews what is held, three times a lease; costs nothing while nothing is held."""
        holdings = self.holdings
        while True:
            while not holdings.held:
                holdings.busy.clear()
                await holdings.busy.wait()
            await asyncio.sleep(self._lease_s / 3)
            if holdings.held:
                await self._connection.until_back(self._renew)

    async def take_over_forever(self) -> None:
        """Looks for expired claims: at start, when the earliest lease ends, and now and then."""
        began = time.monotonic()
        while True:
            next_s = await self._connection.until_back(self._take_over)
            regular_s = EARLY_CHECK_S if time.monotonic() - began < EARLY_S else CHECK_S
            try:
                async with asyncio.timeout(min(next_s, regular_s)):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()

    async def gather_strays(self) -> None:
        """Claims what was read for us and got lost on the way, so that it can be handed back."""
        _, strays = await self._scripts.renew(self.holdings.instance, self.holdings.named())
        await self.take(dict.fromkeys(strays, 0.0), min_idle_s=0.0)

    async def _renew(self) -> None:
        lost, unnamed = await self._scripts.renew(self.holdings.instance, self.holdings.named())
        gone = [claim for entry_id in lost if (claim := self.holdings.held.get(entry_id))]
        if gone and self.restore is not None:
            restored, gone = await self.restore(gone)
            if restored:
                self.on_loss()
        for claim in gone:
            self.holdings.abandon(claim)
        if set(unnamed) - self.holdings.left_alone:
            self._look.set()

    async def _take_over(self) -> float:
        """Claims what nobody renewed, as far as slots are free. Returns the seconds until there may be more."""
        holdings = self.holdings
        rows = [row for row in await self._scripts.pending() if row.entry_id not in holdings.left_alone]
        strays = [row for row in rows if row.consumer == holdings.instance and row.entry_id not in holdings.held]
        others = [row for row in rows if row.consumer != holdings.instance]
        expired = [row for row in others if row.idle_s >= self._lease_s]
        lost_ones = await self.take(_idle(row for row in strays if row.idle_s >= STRAY_S), min_idle_s=STRAY_S)
        taken = await self.take(_idle(expired[: holdings.free]), min_idle_s=self._lease_s)
        for claim in (*lost_ones, *taken):
            logger.bind(taskId=claim.task.id).info("Took over a task that nobody renewed")
            self._connection.meter.takeovers += 1
            holdings.offer(claim)
        if taken:
            self.on_takeover()
        if strays or len(expired) > len(taken):
            return STRAY_S
        return max(min((self._lease_s - row.idle_s for row in others), default=CHECK_S), 0.0) + 0.02

    async def take(self, idle_s: dict[str, float], *, min_idle_s: float) -> Sequence[Claim]:
        if not idle_s:
            return ()
        claims = await self.hold(await self._scripts.take(self.holdings.instance, list(idle_s), min_idle_s))
        if claims:
            runs = await self._scripts.runs([claim.task.id for claim in claims])
            for claim, stands in zip(claims, runs, strict=True):
                cut_off = inherit(claim, stands, idle_s[claim.entry_id], self._lease_s)
                self._connection.meter.ambiguous += cut_off
        return claims


def _idle(rows: Iterable[PendingEntry]) -> dict[str, float]:
    return {row.entry_id: row.idle_s for row in rows}
