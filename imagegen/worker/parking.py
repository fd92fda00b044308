"""Claims that wait without a slot because the upstream, or the limits of channels, allow their model no call now."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Container
from itertools import chain

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim
from imagegen.queue.eta import entry_order
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.task import Task
from imagegen.worker.dead_models import DeadModels
from imagegen.worker.permits import PermitLine

MAX_PARKED = 2_000
"""Claims of one instance. The stream is read in order, so what waits behind more than these of a model that takes no
calls waits too: in front of it, further ones keep their slots. Each costs a renewal three times a lease, in pages."""

MAX_LIMITED = 200
"""The same for models without trouble, with channels that are full or paced, if there is no other instance."""

KEPT_PER_SLOT = 2
"""When a model takes calls again, or is only limited, and there are other instances, those get the claims parked here
beyond this."""

LIMITED_TURN = 4
"""Of so many probes one is of a claim that met a rate limit, so that those wait behind newer ones, not for ever."""

RELEASED_AT_ONCE = 200
GIVEN_PER_SLOT, GIVE_INTERVAL_S = 8, 0.9
"""Claims that other instances get at once, for each call slot, and seconds until the next ones; the lines are checked
once a second."""

RECHECK_S = 1.0
PUBLISH_AGAIN_S = 60.0


class Parking:
    """Parked claims, and when they are resumed, so that a model that rests, or is limited, takes no slot from others.

    While the upstream is on trial, one call probes it, then 2, 4, 8 at once. A claim that never failed is resumed
    first, from the front and from the back of the line by turns, and a claim of a suspect task last: so a few tasks
    that always fail do not decide for the upstream. One that met a rate limit has each fourth turn. Claims of a model
    that is only limited by its channels are resumed in the order of their entries, those that failed each fourth turn.
    If the upstream is dead here, other instances at which it is not get the claims, some each second.

    ends_at: a task's deadline, Unix time; it is offered again then. dead: models that get no answers here.
    """

    def __init__(
        self,
        claims: WorkerQueue,
        permits: PermitLine,
        ends_at: Callable[[Task], float],
        dead: DeadModels,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._claims = claims
        self._permits = permits
        self._ends_at = ends_at
        self._alone = dead.others.alone
        self._dead = dead
        self._give_at = -math.inf
        self._clock = clock
        self._lines: dict[str, ParkedClaims] = {}
        self._parked: set[Claim] = set()
        self._resumed: dict[Claim, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._releases: set[asyncio.Task[None]] = set()
        self._stopped = False

    def __len__(self) -> int:
        return len(self._parked)

    def admits(self, claim: Claim) -> bool:
        """Return whether this claim may use its slot now; if not, it is parked. Paid images need no call."""
        model, permits = claim.task.model, self._permits
        if self._parked:
            self._parked.discard(claim)
        resumed = bool(self._resumed) and self._resumed.pop(claim, None) is not None
        allowed = permits.capacity(model)
        if allowed == math.inf or permits.is_quiet or claim.checkpoint.is_paid:
            return True
        if allowed >= 1 and (resumed or (model not in self._lines and self._resumable(model) >= 1)):
            return True
        if self._is_full(model) or self._ends_at(claim.task) <= self._clock():
            return True
        self._park(claim)
        self.wake()
        return False

    async def stop(self) -> None:
        """Resume nothing any more, and wait for releases that are under way."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    def _park(self, claim: Claim) -> None:
        task = claim.task
        has_failed = claim.checkpoint.attempts > 0 or self._permits.has_failed(task.id)
        line = self._lines.setdefault(task.model, ParkedClaims(self._clock()))
        is_suspect, is_limited = self._permits.is_suspect(task.id), self._permits.limited_tasks.was_limited(task.id)
        line.add(claim, has_failed=has_failed, is_suspect=is_suspect, is_limited=is_limited)
        self._parked.add(claim)
        self._claims.park(claim, *self._permits.closed(task.model), until=self._ends_at(task))

    def _is_full(self, model: str) -> bool:
        most = MAX_PARKED if self._permits.is_on_trial(model) else self._most_limited
        if len(self._parked) >= most:
            self._parked = {claim for claim in self._parked if not claim.lost}
        return len(self._parked) >= most

    @property
    def _most_limited(self) -> int:
        return MAX_LIMITED if self._alone() else KEPT_PER_SLOT * self._claims.slots

    def _resumable(self, model: str) -> float:
        """Return how many claims may be resumed: calls that may begin, less those about to, a slot for each."""
        if any(claim.lost for claim in self._resumed):
            self._resumed = {claim: its for claim, its in self._resumed.items() if not claim.lost}
        about_to = sum(its == model for its in self._resumed.values())
        allowed = min(self._permits.capacity(model) - about_to, self._permits.upstream_capacity() - len(self._resumed))
        return allowed if allowed == math.inf else min(allowed, self._claims.slots - len(self._resumed))

    def wake(self) -> None:
        """Resume the claims that may call now, and run again when more may."""
        if self._stopped or self._permits.is_quiet:
            return
        self._dead.check(self._lines)
        if not self._lines:
            return
        next_s = RECHECK_S
        self._give_away()
        for model, line in tuple(self._lines.items()):
            allowed = self._resumable(model)
            if allowed == math.inf:
                self._resume_all(line)
            is_limited = allowed < math.inf and not self._permits.is_on_trial(model)
            pop = line.pop_oldest if is_limited else line.pop
            while allowed >= 1 and (claim := pop(self._parked)):
                self._parked.discard(claim)
                self._resumed[claim] = model
                self._claims.resume(claim)
                allowed -= 1
            if is_limited and len(self._parked) > self._most_limited:
                self._release_soon(line.take_newest(self._parked, self._most_limited))
            if line.is_empty(self._parked):
                del self._lines[model]
                continue
            self._publish_again(model, line)
            if (opens_in_s := self._permits.opens_in_s(model)) > 0:
                next_s = min(next_s, opens_in_s)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(next_s, self.wake) if self._lines else None

    def _give_away(self) -> None:
        """Give some claims of models that are dead here to instances at which they are not."""
        dead = [line for model, line in self._lines.items() if model in self._dead]
        now = asyncio.get_running_loop().time()
        if not dead or now < self._give_at or self._claims.is_paused:
            return
        self._give_at = now + GIVE_INTERVAL_S
        claims = [claim for line in dead for claim in line.all(self._parked)]
        for claim in claims[: GIVEN_PER_SLOT * self._claims.slots]:
            if self._dead.give(claim):
                self._parked.discard(claim)

    def _resume_all(self, line: ParkedClaims) -> None:
        """Resume the claims of a model that is out of trouble, and release to other instances what they could run."""
        claims = line.take_all(self._parked)
        self._parked.difference_update(claims)
        kept_count = len(claims) if self._alone() else KEPT_PER_SLOT * self._claims.slots
        for claim in claims[:kept_count]:
            self._claims.resume(claim)
        self._release_soon(claims[kept_count:])

    def _release_soon(self, surplus: list[Claim]) -> None:
        self._parked.difference_update(surplus)
        if surplus:
            release = asyncio.create_task(self._release(surplus), name="release-parked")
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def _release(self, claims: list[Claim]) -> None:
        """Release in pieces that no other script has to wait long for."""
        for first in range(0, len(claims), RELEASED_AT_ONCE):
            try:
                await self._claims.release(claims[first : first + RELEASED_AT_ONCE])
            except QueueUnavailable:
                logger.info("Parked tasks could not be released; they are taken again when Redis is back")

    def _publish_again(self, model: str, line: ParkedClaims) -> None:
        """Publish again, now and then, when the claims are checked next: the first published time may be past."""
        now = self._clock()
        if now - line.published_at >= PUBLISH_AGAIN_S:
            line.published_at = now
            for claim in line.all(self._parked):
                self._claims.mark_waiting(claim, *self._permits.closed(model))


class ParkedClaims:
    """The parked claims of one model, in order of arrival; claims that are parked no more stay in it until passed."""

    def __init__(self, published_at: float) -> None:
        self.published_at = published_at
        self._untried: deque[Claim] = deque()
        self._limited: deque[Claim] = deque()
        self._failed: deque[Claim] = deque()
        self._suspect: deque[Claim] = deque()
        self._queues = (self._untried, self._limited, self._failed, self._suspect)
        self._from_back = False
        self._taken = 0

    def add(self, claim: Claim, *, has_failed: bool, is_suspect: bool, is_limited: bool = False) -> None:
        queue = self._failed if has_failed else self._limited if is_limited else self._untried
        (self._suspect if is_suspect else queue).append(claim)

    def pop(self, parked: Container[Claim]) -> Claim | None:
        """Take the claim that is the best probe of the upstream; None if there is none."""
        self._taken += 1
        for queue in (self._limited, *self._queues) if self._taken % LIMITED_TURN == 0 else self._queues:
            while queue:
                from_back = queue is self._untried and self._from_back
                claim = queue.pop() if from_back else queue.popleft()
                if _waits(claim, parked):
                    self._from_back = not self._from_back
                    return claim
        return None

    def pop_oldest(self, parked: Container[Claim]) -> Claim | None:
        """Take the claim with the oldest entry, most often of those that never failed; None if there is none."""
        if self.is_empty(parked):
            return None
        self._taken += 1
        if self._untried and self._taken % LIMITED_TURN:
            return self._untried.popleft()
        return min(filter(None, self._queues), key=lambda queue: entry_order(queue[0].entry_id)).popleft()

    def take_newest(self, parked: Container[Claim], keep: int) -> list[Claim]:
        """Take the claims that never failed but for the oldest `keep` ones."""
        claims = [claim for claim in self._untried if _waits(claim, parked)]
        self._untried.clear()
        self._untried.extend(claims[:keep])
        return claims[keep:]

    def all(self, parked: Container[Claim]) -> list[Claim]:
        return list(dict.fromkeys(claim for claim in chain(*self._queues) if _waits(claim, parked)))

    def take_all(self, parked: Container[Claim]) -> list[Claim]:
        claims = self.all(parked)
        for queue in self._queues:
            queue.clear()
        return claims

    def is_empty(self, parked: Container[Claim]) -> bool:
        for queue in self._queues:
            while queue and not _waits(queue[0], parked):
                queue.popleft()
        return not any(self._queues)


def _waits(claim: Claim, parked: Container[Claim]) -> bool:
    return claim in parked and not claim.lost
