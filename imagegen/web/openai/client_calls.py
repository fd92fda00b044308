"""Memory of the calls of `/v1` clients: which variant of its request each call gets.

Several SDKs make n images by n equal calls, and repeat a call after its answer was lost. A request does not show for
certain which of the two it is, so this process remembers which equal calls of a client are open, and which ended
without a delivered answer.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

from imagegen.tasks.validation import MAX_VARIANT

MAX_GROUPS = 10_000
MAX_REFUSALS = 1_000

REPEAT_S = 180.0
"""Longest time between two POSTs of one call of a client: our longest wait for an SDK and our longest delay."""

UNSURE_REPEAT_S = 30.0
"""The same for a POST that may also be a new call."""

REFUSAL_S = 70.0
"""How long a refused call may come again: the longest delay that clients honour, and some seconds."""

MAX_DELIVERED = 64
"""Answers of equal calls that are remembered as delivered a moment ago."""

PLAIN_STEPS = 4
"""Taken variants that are tried one by one; then the steps double, so that a thousand of them cost a few commands."""


class Marking(Enum):
    """Degree to which the headers of a POST mark it as a repeat.

    REPEAT: it is one. UNSURE: of a client that may repeat without a mark. NEW: of any other client.
    """

    REPEAT = "repeat"
    UNSURE = "unsure"
    NEW = "new"


class Mark(NamedTuple):
    """Mark in the headers of a POST. number: of the repeat, 0 for the first POST of a call."""

    marking: Marking
    number: int = 0


class Ending(Enum):
    """End of a call. LOST: without its answer delivered, so that the next equal call is its repeat."""

    DELIVERED = "delivered"
    FAILED = "failed"
    LOST = "lost"


class _Group:
    """Equal calls of one client.

    next: the lowest variant above those of the client's calls here. open: numbers of the open POSTs by variant.
    lost: variants of calls that ended without an answer, oldest first. failed: variants without images, with the
    time at which the failure was delivered. delivered: when, and to the POST of which number, by variant.
    unbegun: variants of calls whose first POST has arrived at no instance.
    is_known: whether the calls before the first one here are none, or were looked up.
    """

    __slots__ = ("delivered", "failed", "is_known", "lost", "next", "open", "unbegun")

    def __init__(self, *, is_known: bool) -> None:
        self.is_known = is_known
        self.next = 0
        self.open: dict[int, list[int]] = {}
        self.lost: list[int] = []
        self.failed: dict[int, float] = {}
        self.delivered: dict[int, tuple[float, int]] = {}
        self.unbegun: set[int] = set()

    def enter(self, variant: int, count: int) -> None:
        self.next = max(self.next, variant + 1)
        self.open.setdefault(variant, []).append(count)
        self.failed.pop(variant, None)
        if variant in self.lost:
            self.lost.remove(variant)

    def leave(self, variant: int, count: int) -> bool:
        """Return whether no other call of this variant is open."""
        counts = self.open[variant]
        counts.remove(count)
        if not counts:
            del self.open[variant]
        return not counts

    def deliver(self, variant: int, count: int, now: float) -> None:
        """Note that the POST of this number got its answer, as far as this process can see."""
        self.delivered.pop(variant, None)
        self.delivered[variant] = now, count
        oldest = next(iter(self.delivered))
        if len(self.delivered) > MAX_DELIVERED or now - self.delivered[oldest][0] > UNSURE_REPEAT_S:
            del self.delivered[oldest]

    def to_repeat(self, marking: Marking, now: float) -> int | None:
        """Return the variant that a call joins as a repeat, None if it is a new call."""
        if self.lost:
            return self.lost[0]
        within_s = {Marking.REPEAT: REPEAT_S, Marking.UNSURE: UNSURE_REPEAT_S, Marking.NEW: -1.0}[marking]
        return next((variant for variant, at in self.failed.items() if now - at <= within_s), None)

    def assumed_lost(self, count: int, now: float) -> int | None:
        """Return the variant of a marked repeat if its last POST here is open, or was answered a moment ago.

        Numbers are missing where a POST did not arrive. A call whose first POST did not arrive either is one of
        several that are repeated through an outage, so only the next number is its repeat.
        """
        last_numbers = {variant: last for variant, (at, last) in self.delivered.items() if now - at <= UNSURE_REPEAT_S}
        last_numbers |= {variant: max(counts) for variant, counts in self.open.items()}
        before = [each for each, last in last_numbers.items() if self._precedes(each, last, count)]
        return min(before, key=lambda each: (-last_numbers[each], each not in self.open, each), default=None)

    def _precedes(self, variant: int, last: int, count: int) -> bool:
        return last == count - 1 or (last < count and variant not in self.unbegun)

    def unused(self) -> int:
        """Return the variant of a new call: a failed one without an open call, else the next."""
        return next((variant for variant in self.failed if variant not in self.open), self.next)


class TrackedCall:
    """One call of a client, from its POST to its end.

    variant: of the request; None until `place` or `join`, if it repeats a call that this process has not cached.
    is_repeat: it joins the task of an earlier call.
    """

    def __init__(self, group: _Group, count: int, clock: Callable[[], float]) -> None:
        self.variant: int | None = None
        self.is_repeat = False
        self._group, self._count, self._clock = group, count, clock
        self._skips = 0

    def join(self, variant: int) -> None:
        """Become a repeat of the call that has this variant."""
        self.enter(variant)
        self.is_repeat = True

    def place(self, existing: Sequence[int], lost: Sequence[int]) -> None:
        """Become a repeat of one of the calls before the memory of this process, a new call if there is none.

        Args:
            existing: variants that have a task, ascending.
            lost: those among them that no client got.
        """
        group = self._group
        if not group.is_known:
            group.is_known = True
            group.lost += [variant for variant in lost if variant not in group.open]
        free = [variant for variant in existing if variant not in group.open]
        if candidates := group.lost or free[-1:]:
            self.join(candidates[0])
        else:
            self.enter_new()

    def enter(self, variant: int) -> None:
        """Take a variant, and leave the one before."""
        if self.variant is not None:
            self._group.leave(self.variant, self._count)
        self.variant = variant
        self._group.enter(variant, self._count)

    def enter_new(self, fixed: int | None = None) -> None:
        """Become a new call. fixed: the only variant of the request."""
        variant = self._group.unused() if fixed is None else fixed
        if self._count:
            self._group.unbegun.add(variant)
        self.enter(variant)

    def skip(self) -> None:
        """Take a higher variant, since the task of this one exists."""
        self._skips += 1
        step = 1 << max(0, self._skips - PLAIN_STEPS)
        variant = max(self._group.next, (self.variant or 0) + step)
        self.enter(variant if variant <= MAX_VARIANT else 0)

    def suspect(self) -> None:
        """Note that the client may have left: until this call ends, the next equal call is its repeat."""
        if self.variant is not None and self.variant not in self._group.lost:
            self._group.lost.append(self.variant)

    def end(self, ending: Ending) -> None:
        """Remember how the call ended. Only the last open call of a variant decides whether it was lost."""
        group, variant, now = self._group, self.variant, self._clock()
        if variant is None:
            return
        is_last = group.leave(variant, self._count)
        if variant in group.lost:
            group.lost.remove(variant)
        if ending is Ending.DELIVERED:
            group.deliver(variant, self._count, now)
        elif ending is Ending.FAILED:
            group.failed[variant] = now
        elif is_last:
            group.lost.append(variant)


class ClientCalls:
    """Calls by client and request, for up to `MAX_GROUPS` pairs, least recently used first out.

    clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._groups: OrderedDict[tuple[str, str], _Group] = OrderedDict()
        self._refused: deque[tuple[str, float]] = deque(maxlen=MAX_REFUSALS)

    def begin(self, client: str, request_id: str, mark: Mark, fixed: int | None = None) -> TrackedCall:
        """Return the call for a POST; it is open until its `end`.

        Args:
            client: name of the client.
            request_id: fingerprint of the request as its first variant.
            mark: what its headers show.
            fixed: the only variant of the request, None if another call is another image.
        """
        is_marked, now = mark.marking is Marking.REPEAT, self._clock()
        group = self._group(client, request_id, is_known=not is_marked)
        call, variant = TrackedCall(group, mark.number, self._clock), group.to_repeat(mark.marking, now)
        if variant is None and is_marked and not self._was_refused(client, now):
            variant = group.assumed_lost(mark.number, now) if group.is_known else None
            if fixed is not None:
                variant = fixed
            elif variant is None and not group.is_known:
                return call
        if variant is not None:
            call.join(variant)
        else:
            call.enter_new(fixed)
        return call

    def refuse(self, client: str, mark: Mark) -> None:
        """Remember that a call was refused before its request was read: its repeat has no task to join."""
        now = self._clock()
        if mark.marking is not Marking.REPEAT or self._was_refused(client, now):
            self._refused.append((client, now + REFUSAL_S))

    def _was_refused(self, client: str, now: float) -> bool:
        """Return whether a refused call of the client may come again now, once for each."""
        while self._refused and self._refused[0][1] <= now:
            self._refused.popleft()
        match = next((refusal for refusal in self._refused if refusal[0] == client), None)
        if match is not None:
            self._refused.remove(match)
        return match is not None

    def _group(self, client: str, request_id: str, *, is_known: bool) -> _Group:
        """Return the group of equal calls. is_known: whether there are no earlier calls if the group is new."""
        key = (client, request_id)
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
            return group
        group = self._groups[key] = _Group(is_known=is_known)
        if len(self._groups) > MAX_GROUPS:
            idle = next((name for name, other in self._groups.items() if not other.open and other is not group), None)
            if idle is not None:
                del self._groups[idle]
        return group
