"""Memory of the calls of `/v1` clients: which variant of its request each call gets.

Several SDKs make n images by n equal calls, and repeat a call after its answer was lost. A request does not show for
certain which of the two it is, so this process remembers which equal calls of a client are open, and which ended
without a delivered answer.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum

from imagegen.tasks.validation import MAX_VARIANT

MAX_GROUPS = 10_000
MAX_REFUSALS = 1_000

REPEAT_S = 180.0
"""Longest time between two POSTs of one call of a client: our longest wait for an SDK and our longest delay."""

UNSURE_REPEAT_S = 30.0
"""The same for a POST that may also be a new call."""

REFUSAL_S = 70.0
"""How long a refused call may come again: the longest delay that clients honour, and some seconds."""

PLAIN_STEPS = 4
"""Taken variants that are tried one by one; then the steps double, so that a thousand of them cost a few commands."""


class Marking(Enum):
    """How far the headers of a POST mark it as a repeat.

    REPEAT: it is one. UNSURE: of a client that may repeat without a mark. NEW: of any other client.
    """

    REPEAT = "repeat"
    UNSURE = "unsure"
    NEW = "new"


class Ending(Enum):
    """How a call ended. LOST: without its answer delivered, so that the next equal call is its repeat."""

    DELIVERED = "delivered"
    FAILED = "failed"
    LOST = "lost"


class _Group:
    """Equal calls of one client.

    next: the lowest variant above those of the client's calls here. open: number of open calls by variant.
    lost: variants of calls that ended without an answer, oldest first. failed: variants without images, with the
    time at which the failure was delivered. delivered: the last variant that was delivered, and when.
    """

    __slots__ = ("delivered", "failed", "lost", "next", "open")

    def __init__(self) -> None:
        self.next = 0
        self.open: dict[int, int] = {}
        self.lost: list[int] = []
        self.failed: dict[int, float] = {}
        self.delivered: tuple[int, float] | None = None

    def enter(self, variant: int) -> None:
        self.next = max(self.next, variant + 1)
        self.open[variant] = self.open.get(variant, 0) + 1
        self.failed.pop(variant, None)
        if variant in self.lost:
            self.lost.remove(variant)

    def leave(self, variant: int) -> bool:
        """Return whether no other call of this variant is open."""
        left = self.open[variant] - 1
        if left:
            self.open[variant] = left
        else:
            del self.open[variant]
        return not left

    def to_repeat(self, marking: Marking, now: float) -> int | None:
        """Return the variant that a call joins as a repeat, None if it is a new call."""
        if self.lost:
            return self.lost[0]
        within_s = {Marking.REPEAT: REPEAT_S, Marking.UNSURE: UNSURE_REPEAT_S, Marking.NEW: -1.0}[marking]
        return next((variant for variant, at in self.failed.items() if now - at <= within_s), None)

    def assumed_lost(self, now: float) -> int | None:
        """Return the variant of a marked repeat if its first call is open, or was answered a moment ago."""
        if self.open:
            return min(self.open, key=lambda variant: (self.open[variant], variant))
        if self.delivered is not None and now - self.delivered[1] <= UNSURE_REPEAT_S:
            return self.delivered[0]
        return None

    def unused(self) -> int:
        """Return the variant of a new call: a failed one without an open call, else the next."""
        return next((variant for variant in self.failed if variant not in self.open), self.next)


class Call:
    """One call of a client, from its POST to its end.

    variant: of the request. is_repeat: it joins the task of an earlier call. is_known: this process has memory of
    equal calls of the client, or of why there is none.
    """

    def __init__(self, group: _Group, variant: int, clock: Callable[[], float], *, is_repeat: bool) -> None:
        self.variant, self.is_repeat = variant, is_repeat
        self.is_known = True
        self._group, self._clock = group, clock
        self._skips = 0
        group.enter(variant)

    def join(self, variant: int) -> None:
        """Become a repeat of the call that has this variant."""
        self._move(variant)
        self.is_repeat = True

    def skip(self) -> None:
        """Take a higher variant, since the task of this one exists."""
        self._skips += 1
        step = 1 << max(0, self._skips - PLAIN_STEPS)
        variant = max(self._group.next, self.variant + step)
        self._move(variant if variant <= MAX_VARIANT else 0)

    def end(self, ending: Ending) -> None:
        """Remember how the call ended. Only the last open call of a variant decides whether it was lost."""
        group, variant, now = self._group, self.variant, self._clock()
        is_last = group.leave(variant)
        if ending is Ending.DELIVERED:
            group.delivered = variant, now
        elif ending is Ending.FAILED:
            group.failed[variant] = now
        elif is_last:
            group.lost.append(variant)

    def _move(self, variant: int) -> None:
        self._group.leave(self.variant)
        self.variant = variant
        self._group.enter(variant)


class ClientCalls:
    """Calls by client and request, for up to `MAX_GROUPS` pairs, least recently used first out.

    clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: OrderedDict[tuple[str, str], _Group] = OrderedDict()
        self._refused: deque[tuple[str, float]] = deque(maxlen=MAX_REFUSALS)

    def begin(self, client: str, request_id: str, marking: Marking, fixed: int | None = None) -> Call:
        """Return the call for a POST; it is open until its `end`.

        Args:
            client: name of the client.
            request_id: fingerprint of the request as its first variant.
            marking: what its headers show.
            fixed: the only variant of the request, None if another call is another image.
        """
        group, is_known = self._group(client, request_id)
        now = self._clock()
        variant = group.to_repeat(marking, now)
        is_marked = marking is Marking.REPEAT
        if variant is None and is_marked:
            if self._was_refused(client, now):
                is_known, is_marked = True, False
            else:
                variant = group.assumed_lost(now)
        is_repeat = variant is not None or (is_marked and fixed is not None)
        if variant is None:
            variant = group.unused() if fixed is None else fixed
        call = Call(group, variant, self._clock, is_repeat=is_repeat)
        call.is_known = is_known
        return call

    def refuse(self, client: str, marking: Marking) -> None:
        """Remember that a call was refused before its request was read: its repeat has no task to join."""
        now = self._clock()
        if marking is not Marking.REPEAT or self._was_refused(client, now):
            self._refused.append((client, now + REFUSAL_S))

    def _was_refused(self, client: str, now: float) -> bool:
        """Return whether a refused call of the client may come again now, once for each."""
        while self._refused and self._refused[0][1] <= now:
            self._refused.popleft()
        match = next((refusal for refusal in self._refused if refusal[0] == client), None)
        if match is not None:
            self._refused.remove(match)
        return match is not None

    def _group(self, client: str, request_id: str) -> tuple[_Group, bool]:
        """Return the group of equal calls, and whether it existed."""
        key = (client, request_id)
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
            return group, True
        group = self._groups[key] = _Group()
        if len(self._groups) > MAX_GROUPS:
            idle = next((name for name, other in self._groups.items() if not other.open and other is not group), None)
            if idle is not None:
                del self._groups[idle]
        return group, False
