"""Handover of claims to other instances, without a new entry that any instance might read.

The entry stays pending for this instance until the other one claims it. What that one does not claim within `CHECK_S`,
since it died or a message was lost, is found among the entries that are pending for us, and comes back here.
"""

from __future__ import annotations

import asyncio

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim
from imagegen.queue.eta import is_entry_id
from imagegen.queue.leases import Leases
from imagegen.queue.notifier import Message, Notifier, ids_of
from imagegen.queue.takeover import MAX_TAKEN, Takeover
from imagegen.queue.verbs.context import batched
from imagegen.redis_client.redis_errors import RedisError

KIND = "yours"
"""Kind of the message, as instances of 0.5.0 send and receive it."""

RECEIVED_KINDS = ("handover", KIND)
"""Kinds that are received, so that a later version can send the plain word."""

CHECK_S = 2.5
"""Until entries that were not claimed come back."""

STOP_S = 1.0
"""How long the drain waits for claims that are on their way here."""

MAX_READY = 2_000
"""Claims that wait for a slot here, beyond which none is taken from another instance; each costs renewals."""


class Handover:
    """Sender and receiver of claims."""

    def __init__(self, leases: Leases, takeover: Takeover, notifier: Notifier) -> None:
        self._leases = leases
        self._dispatcher = leases.dispatcher
        self._takeover = takeover
        self._notifier = notifier
        self._given: dict[str, list[Claim]] = {}
        self._taking: set[asyncio.Task[None]] = set()
        self._check: asyncio.TimerHandle | None = None
        notifier.handlers |= dict.fromkeys(RECEIVED_KINDS, self._on_message)

    def give(self, claim: Claim, peer: str) -> None:
        """Let another instance claim a task that is not begun here. All of one turn of the event loop go together."""
        self._dispatcher.forget(claim)
        if not self._given:
            asyncio.get_running_loop().call_soon(self._send)
        self._given.setdefault(peer, []).append(claim)

    async def stop(self) -> None:
        """Wait until the claims that were taken are held here with what their givers had done. Call it while draining.

        What Redis does not answer in time stays pending for us, unheld.
        """
        if self._check is not None:
            self._check.cancel()
            self._check = None
        if self._taking:
            await asyncio.wait(self._taking, timeout=STOP_S)
        for taking in self._taking:
            taking.cancel()
        await asyncio.gather(*self._taking, return_exceptions=True)

    def _send(self) -> None:
        claims_by_peer, self._given = self._given, {}
        for peer, claims in claims_by_peer.items():
            for batch in batched(claims, MAX_TAKEN, lambda claim: len(claim.task.request_json)):
                contested = [claim.entry_id for claim in batch if claim.contested]
                self._notifier.publish(KIND, to=peer, ids=[claim.entry_id for claim in batch], contested=contested)
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(CHECK_S, self._look)

    def _look(self) -> None:
        self._check = None
        self._leases.check_now()

    def _on_message(self, message: Message) -> None:
        if message.get("to") != self._notifier.instance or not self._dispatcher.takes_claims:
            return
        entry_ids = [entry_id for entry_id in ids_of(message)[:MAX_TAKEN] if is_entry_id(entry_id)]
        entry_ids = [entry_id for entry_id in entry_ids if entry_id not in self._dispatcher.held]
        if entry_ids and self._dispatcher.ready + len(entry_ids) <= MAX_READY:
            taking = asyncio.create_task(self._take(message, entry_ids), name="handover")
            self._taking.add(taking)
            taking.add_done_callback(self._taking.discard)

    async def _take(self, message: Message, entry_ids: list[str]) -> None:
        try:
            claims = await self._takeover.take_given(message["from"], entry_ids)
        except (QueueUnavailable, RedisError, OSError, TimeoutError) as error:
            logger.debug("Claims of another instance could not be taken: {}", error)
            return
        contested = message.get("contested")
        for claim in claims:
            if claim.stored_bytes is None and isinstance(contested, list) and claim.entry_id not in contested:
                claim.contested = False  # its only owner has not begun it, and does not begin it any more
            self._dispatcher.put(claim)
