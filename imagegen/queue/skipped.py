"""Entries that the group has passed and no instance holds, so that no read delivers them.

An operator leaves such entries with XGROUP SETID or DELCONSUMER, XACK, or a group that is created again at `$`. A live
owner writes its claim back with its next renewal, so an entry is taken only after a lease without a claim.
"""

from __future__ import annotations

import math
import time

from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.redis_client.redis_health import Health


class SkippedEntries:
    """Search for skipped entries, which costs nothing until some are suspected.

    look_at: monotonic time of the next search, infinite if none is needed.
    """

    def __init__(self, verbs: QueueVerbs, health: Health, lease_s: float) -> None:
        self._verbs = verbs
        self._health = health
        self._lease_s = lease_s
        self._seen_at: dict[str, float] = {}
        self.look_at = math.inf

    def suspect(self) -> None:
        """Search now, unless a search is due already."""
        if self.look_at == math.inf:
            self.look_at = -math.inf

    async def find(self) -> list[str]:
        """Return the entries that had no claim for a lease in which Redis was available. Raises QueueUnavailable."""
        now = time.monotonic()
        if self._health.back_at > self.look_at - self._lease_s:
            self._seen_at.clear()  # the owners could not renew either
        self._seen_at = {entry_id: self._seen_at.get(entry_id, now) for entry_id in await self._verbs.find_skipped()}
        unseen = [seen_at + self._lease_s for seen_at in self._seen_at.values() if seen_at + self._lease_s > now]
        self.look_at = min(unseen, default=math.inf)
        return [entry_id for entry_id, seen_at in self._seen_at.items() if seen_at + self._lease_s <= now]

    def keep(self) -> None:
        """Search again soon, since entries that were found are not taken yet."""
        self.look_at = min(self.look_at, time.monotonic() + 1.0)
