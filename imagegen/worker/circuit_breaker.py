"""Circuit breaker of an upstream: when calls stop, when one probes, how they come back. No I/O."""

from __future__ import annotations

import math

from msgspec import Struct

from imagegen.backoff import Backoff
from imagegen.tasks.task import WaitReason

FAILING_TASKS = 5
"""Unfinished tasks with a failed call in a row that trip the breaker."""

UNREACHED_CALLS = 2
"""Calls in a row that never reached the upstream and trip the breaker."""

DEAD_AFTER_S = 2.0
"""How long an upstream is taken for dead until others get its tasks: a few faulty ones look so for a moment."""

WARN_AGAIN_S = 60.0
"""Between two warnings of one breaker."""

_FULL_STEPS = 10


class BreakerConfig(Struct, frozen=True):
    """Seconds. probe_s: between the starts of two probes. first_probe_s: until the first probe of a dead upstream, or
    after a rate limit without a time; each further pause is twice as long, up to probe_s. It is short because a few
    faulty tasks look like a dead upstream, or a limit of all.
    longest_s: the longest pause that is believed. step_s: after trouble the calls at once double each time this passed.
    excused_s: how long an upstream that answers every call with a server error is taken for dead. After that each
    such answer counts as an attempt of its task, because a few tasks that always fail look the same.
    longest_held_s: between two probes while the breaker is held: each pays for an image that can't be fetched, or used.
    The pauses double, from probe_s for images that are waited for: such tasks notice without a call that they can be
    fetched again.
    """

    first_probe_s: float = 0.5
    probe_s: float = 5.0
    longest_s: float = 120.0
    step_s: float = 1.0
    excused_s: float = 60.0
    longest_held_s: float = 300.0


class CircuitBreaker:
    """Circuit breaker with slow start: after trouble no call until a time, then one probe, then 2, 4, 8 at once.

    Times are of one monotonic clock. A period begins with each trouble; calls of an earlier one do not count in it.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._until = 0.0
        self._ramp_from: float | None = None
        self._period = 0
        self._running = 0
        self._out = 0
        self._pauses = Backoff(config.probe_s, config.probe_s)
        self._held_pauses = Backoff(config.probe_s, config.longest_held_s)
        self._held_until = -math.inf
        self.is_open = False
        self.is_tripped = self.is_held = self._is_only_held = False
        self._dead_since = 0.0
        self.reason = WaitReason.UPSTREAM_RATE_LIMITED
        self.warned_at = -math.inf
        self.warned = False

    def warns(self, now: float) -> bool:
        """Return whether to log a warning: trouble that comes and goes is logged once in a while."""
        self.warned = now - self.warned_at >= WARN_AGAIN_S
        if self.warned:
            self.warned_at = now
        return self.warned

    def next_allowed_at(self, now: float) -> float:
        """Return when the next call may be made: `now` or later; infinite while a probe runs that decides it."""
        if now < self._until:
            return self._until
        if self._ramp_from is None and not self.is_open:
            return now
        if self._running < self._allowed_concurrency(now):
            return now
        if self.is_open or self._ramp_from is None:
            return math.inf
        step_s = self._config.step_s
        return self._ramp_from + (math.floor((now - self._ramp_from) / step_s) + 1) * step_s

    def _allowed_concurrency(self, now: float) -> float:
        """Return how many calls of this period may run at once."""
        if self.is_open:
            return 1
        steps = _FULL_STEPS if self._ramp_from is None else int((now - self._ramp_from) / self._config.step_s)
        return math.inf if steps >= _FULL_STEPS else 2**steps

    def capacity(self, now: float) -> float:
        """Return how many calls may begin now; infinite if the upstream is not in trouble."""
        if now < self._until:
            return 0
        if self._ramp_from is None and not self.is_open:
            return math.inf
        return max(self._allowed_concurrency(now) - self._running, 0)

    def enter(self, now: float) -> int:
        """Count a call that begins; return its period."""
        if self.is_open:
            self._until = now + self._pauses.next_s()
            if self.is_held:
                self._until = self._held_until = now + self._held_pauses.next_s()
        self._running += 1
        self._out += 1
        return self._period

    def leave(self, period: int) -> None:
        """Count a call that has ended."""
        self._out -= 1
        if period == self._period:
            self._running -= 1

    def open_for(self, now: float, for_s: float, reason: WaitReason) -> bool:
        """Allow no call for `for_s` seconds, then one probe at a time until a response. Return whether this is new."""
        new = not self.is_open
        if new:
            self.is_open = True
            self._begin_period()
        self.reason, self._is_only_held = reason, False
        self._until = max(self._until, now + min(for_s, self._config.longest_s))
        return new

    def limit(self, now: float, for_s: float | None) -> bool:
        """Allow no call for `for_s` seconds, as the upstream requested with a rate limit. Return whether this is new.

        None: it requested no time. The first probe is soon then, since the limit may be of one task alone.
        """
        if for_s is not None:
            return self.open_for(now, for_s, WaitReason.UPSTREAM_RATE_LIMITED)
        if self.is_open:
            return self.open_for(now, 0.0, WaitReason.UPSTREAM_RATE_LIMITED)
        self._pauses = Backoff(self._config.first_probe_s, self._config.probe_s)
        return self.open_for(now, self._pauses.next_s(), WaitReason.UPSTREAM_RATE_LIMITED)

    def trip(self, now: float) -> bool:
        """Take the upstream for dead until it responds. Return whether this is new."""
        new = not self.is_tripped
        if new:
            self.is_tripped = True
            self._dead_since = now
            self._pauses = Backoff(self._config.first_probe_s, self._config.probe_s)
            self.open_for(now, self._pauses.next_s(), WaitReason.UPSTREAM_OVERLOADED)
        return new

    def hold(self, now: float, first_s: float) -> bool:
        """Stay open until `release`, whatever the probes return; they become rare. Return whether this is new.

        first_s: seconds until the first probe.
        """
        new = not self.is_held
        if new:
            self.is_held = True
            self._held_pauses = Backoff(first_s, self._config.longest_held_s)
            self._is_only_held = self.open_for(now, self._held_pauses.next_s(), WaitReason.UPSTREAM_OVERLOADED)
        return new

    def release(self, now: float) -> bool:
        """Close it, unless it is open for another reason too. Return whether it was held.

        Then the next successful probe, which is soon, closes it.
        """
        was_held, self.is_held = self.is_held, False
        if was_held and self._is_only_held:
            self._close(now)
        elif was_held and self._until == self._held_until:
            self._until = min(self._until, now + self._config.probe_s)
        return was_held

    def is_dead(self, now: float) -> bool:
        """Return whether the upstream has been taken for dead for a while."""
        return self.is_tripped and now - self._dead_since >= DEAD_AFTER_S

    def excuses_answers(self, now: float) -> bool:
        """Return whether a server error that is answered now is blamed on the upstream and not on its task."""
        return self.is_tripped and now - self._dead_since < self._config.excused_s

    def pause(self, now: float, for_s: float) -> None:
        """Stop calls for `for_s` seconds, as the upstream requested; after that they come back slowly."""
        self._until, self._is_only_held = max(self._until, now + min(for_s, self._config.longest_s)), False
        if not self.is_open:
            self._begin_period()
            self._ramp_from = self._until
            self.reason = WaitReason.UPSTREAM_RATE_LIMITED

    def record_success(self, now: float, period: int) -> bool:
        """Close the breaker after a response that is not from before a rate limit. Return whether it was open."""
        if not self.is_open or self.is_held or not (self.is_tripped or period == self._period):
            return False
        self._close(now)
        return True

    def idle(self, now: float) -> bool:
        """Return whether it is in the state of a new breaker."""
        return not self._out and not self.is_open and now >= self._until and self._allowed_concurrency(now) == math.inf

    def _close(self, now: float) -> None:
        self.is_open = self.is_tripped = self._is_only_held = False
        self._pauses = Backoff(self._config.probe_s, self._config.probe_s)
        self._until = now
        self._ramp_from = now - self._config.step_s

    def _begin_period(self) -> None:
        self._period += 1
        self._running = 0


MAX_FAILING_TASKS = 10_000
"""A task that is cancelled, or taken over, while it waits for a retry is not reported as finished."""


class FailingTasks:
    """Unfinished tasks with a failed last call since their model last answered, and tasks under suspicion.

    A task that failed before its model answered others is suspect: others succeed, so its failures are its own.
    They prove nothing against the upstream, and count as its attempts even while the upstream is taken for dead.

    most: tasks of either kind; the oldest are forgotten.
    """

    def __init__(self, most: int = MAX_FAILING_TASKS) -> None:
        self._most = most
        self._model_of: dict[str, str] = {}
        self._suspects: dict[str, None] = {}

    def failed(self, task_id: str, model: str) -> int:
        """Record a failed call of a task that goes on; return how many such tasks count against this model."""
        if task_id in self._suspects:
            return 0
        self._model_of[task_id] = model
        if len(self._model_of) > self._most:
            del self._model_of[next(iter(self._model_of))]
        return self.count(model)

    def count(self, model: str) -> int:
        """Return how many tasks count against a model."""
        return sum(failing == model for failing in self._model_of.values())

    def alive(self, model: str) -> None:
        if self._model_of:
            failing = [task_id for task_id, failing in self._model_of.items() if failing == model]
            for task_id in failing:
                del self._model_of[task_id]
                self._suspects[task_id] = None
            while len(self._suspects) > self._most:
                del self._suspects[next(iter(self._suspects))]

    def has_failed(self, task_id: str) -> bool:
        """Return whether a call for this unfinished task failed here."""
        return task_id in self._model_of or task_id in self._suspects

    def is_suspect(self, task_id: str) -> bool:
        return task_id in self._suspects

    def finished(self, task_id: str) -> None:
        """Forget a task that ended: it may have been at fault itself."""
        self._model_of.pop(task_id, None)
        self._suspects.pop(task_id, None)
