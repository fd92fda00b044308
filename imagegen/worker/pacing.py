"""Pacing of paid calls: evenly spaced, and only while the breakers of the upstream allow them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from loguru import logger

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.tasks.retry import is_server_error, was_never_sent
from imagegen.tasks.task import WaitReason
from imagegen.worker.call_routes import Route
from imagegen.worker.circuit_breaker import FAILING_TASKS, UNREACHED_CALLS, BreakerConfig, CircuitBreaker, FailingTasks
from imagegen.worker.permits import ANY, Blocked, Choice, Permit, PermitLine

_MANY_MODELS = 200


class Pacing(PermitLine):
    """One for each channel. rate_per_min: calls a minute, all models together; clock: monotonic; wall: Unix time.

    route: of all calls that it permits.
    """

    def __init__(
        self,
        route: Route,
        *,
        rate_per_min: float | None = None,
        tempo: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(clock=clock, on_release=on_release)
        self._route = route
        self._title = f" (channel {route.channel.name})" if route.title else ""
        self._interval_s = 60.0 / rate_per_min if rate_per_min else 0.0
        self._next_at = 0.0
        self._tempo = tempo or BreakerConfig()
        self._wall = wall
        self._upstream = CircuitBreaker(self._tempo)
        self._models: dict[str, CircuitBreaker] = {}
        self._streaks = FailingTasks()
        self._unreached = 0

    def blocked(self, model: str, _choice: Choice = ANY) -> Blocked | None:
        now = self.clock()
        resting = self._resting(model, now)
        if self._next_at > max(now, resting[0] if resting else 0.0):
            return self._blocked(WaitReason.UPSTREAM_RATE_LIMITED, self._next_at, now)
        return self._blocked(resting[1], resting[0], now) if resting else None

    def resting(self, model: str, _choice: Choice = ANY) -> Blocked | None:
        now = self.clock()
        if self.opens_at(model, now) <= now:
            return None
        resting = self._resting(model, now)
        if resting is None or resting[0] - now <= self._tempo.step_s:
            return None
        return self._blocked(resting[1], resting[0], now)

    def room(self, model: str) -> float:
        gate, now = self._models.get(model), self.clock()
        allowed = self._upstream.room(now) if gate is None else min(self._upstream.room(now), gate.room(now))
        return allowed if allowed == math.inf else allowed - sum(waiter.model == model for waiter in self.waiters)

    def room_of_upstream(self) -> float:
        return self._upstream.room(self.clock()) - len(self.waiters)

    def opens_in_s(self, model: str) -> float:
        now = self.clock()
        return max(gate.next_allowed_at(now) for gate in self._gates(model)) - now

    def closed(self, model: str) -> Blocked:
        now = self.clock()
        gate = max(self._gates(model), key=lambda gate: (gate.next_allowed_at(now), gate.room(now) < math.inf))
        return self._blocked(gate.reason, gate.next_allowed_at(now), now)

    def has_failed(self, task_id: str) -> bool:
        return self._streaks.has_failed(task_id)

    def is_suspect(self, task_id: str) -> bool:
        return self._streaks.is_suspect(task_id)

    def excuses(self, turn: Permit, error: UpstreamError) -> bool:
        gates = [gate for gate, _ in turn.places]
        if is_server_error(error):
            now = self.clock()
            return any(gate.excuses_answers(now) for gate in gates)
        return any(gate.is_tripped for gate in gates)

    def record_success(self, turn: Permit, limits: UpstreamLimits) -> None:
        now = self.clock()
        self._unreached = 0
        self._alive(turn, now)
        if limits.remaining is not None and limits.remaining < 1 and limits.reset_s:
            self._gate(turn.model).pause(now, limits.reset_s)

    def failed(self, turn: Permit, error: UpstreamError, *, unfinished: str | None) -> None:
        now, gate = self.clock(), self._gate(turn.model)
        if was_never_sent(error):
            self._unreached += 1
            if self._unreached >= UNREACHED_CALLS and self._upstream.trip(now) and self._upstream.warns(now):
                probe_s = self._tempo.probe_s
                logger.warning("The upstream can't be reached; it is asked every {:g} s{}", probe_s, self._title)
            return
        self._unreached = 0
        self._upstream.record_success(now, turn.places[0][1])
        if error.code == "upstream_rate_limited":
            pause_s = self._tempo.probe_s if error.retry_after_s is None else error.retry_after_s
            if gate.open_for(now, pause_s, WaitReason.UPSTREAM_RATE_LIMITED) and gate.warns(now):
                logger.warning("The upstream's rate limit is reached for {}", turn.model)
        elif error.status is not None and error.status < 500 and not error.retryable:
            self._alive(turn, now)
        elif error.retryable and unfinished:
            failing = self._streaks.failed(unfinished, turn.model)
            if failing >= FAILING_TASKS and gate.trip(now) and gate.warns(now):
                where, probe_s = self._title, self._tempo.probe_s
                logger.warning("The upstream is dead for {}; it is asked every {:g} s{}", turn.model, probe_s, where)

    def finished(self, task_id: str) -> None:
        self._streaks.finished((task_id,))

    def leave(self, turn: Permit) -> None:
        for gate, period in turn.places:
            gate.leave(period)

    def reached(self, turn: Permit) -> None:
        """Record a call that the upstream refused for a reason of its key."""
        self._unreached = 0
        self._upstream.record_success(self.clock(), turn.places[0][1])

    def rests_until(self, model: str, now: float) -> float:
        """Return when its breakers allow a call for this model, without regard to the rate."""
        gate = self._models.get(model)
        opens_at = self._upstream.next_allowed_at(now)
        return opens_at if gate is None else max(opens_at, gate.next_allowed_at(now))

    def longest_rest(self) -> tuple[float, WaitReason] | None:
        """Return until when a breaker allows no call, and why: of the upstream, else of a model. None without one."""
        now = self.clock()
        gates = [
            gate for gate in (self._upstream, *self._models.values()) if gate.is_open or gate.next_allowed_at(now) > now
        ]
        return max(((gate.next_allowed_at(now), gate.reason) for gate in gates), default=None)

    def _alive(self, turn: Permit, now: float) -> None:
        self._streaks.alive(turn.model)
        for gate, period in turn.places:
            if gate.record_success(now, period) and gate.warned:
                logger.info("The upstream takes calls again{}", self._title)

    def _gate(self, model: str) -> CircuitBreaker:
        """Return the breaker of a model. Clients may name any id, so idle breakers are dropped when there are many."""
        gate = self._models.get(model)
        if gate is None:
            if len(self._models) >= _MANY_MODELS:
                now = self.clock()
                self._models = {name: breaker for name, breaker in self._models.items() if not breaker.idle(now)}
            gate = self._models[model] = CircuitBreaker(self._tempo)
        return gate

    def _gates(self, model: str) -> tuple[CircuitBreaker, CircuitBreaker]:
        return self._upstream, self._models.get(model, self._upstream)

    def opens_at(self, model: str, now: float, _choice: Choice = ANY) -> float:
        return max(self._next_at, self.rests_until(model, now))

    def issue(self, model: str, now: float, _choice: Choice = ANY) -> Permit:
        return Permit(self, model, self.enter(model, now), self._route)

    def enter(self, model: str, now: float) -> tuple[tuple[CircuitBreaker, int], ...]:
        """Count a call that begins; return its places."""
        self._next_at = max(self._next_at, now) + self._interval_s
        upstream, gate = self._upstream, self._gate(model)
        return (upstream, upstream.enter(now)), (gate, gate.enter(now))

    def _resting(self, model: str, now: float) -> tuple[float, WaitReason] | None:
        """Return when the upstream allows a call and why not before, None if it does now."""
        opens_at, reason = max((gate.next_allowed_at(now), gate.reason) for gate in self._gates(model))
        return (opens_at, reason) if opens_at > now else None

    def _blocked(self, reason: WaitReason, at: float, now: float) -> Blocked:
        wait_s = self._tempo.probe_s if at == math.inf else at - now
        return Blocked(reason, self._wall() + wait_s)
