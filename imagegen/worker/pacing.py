"""Pacing of paid calls: evenly spaced, and only while the breakers of the upstream allow them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from loguru import logger

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.tasks.retry import is_server_error, was_never_sent
from imagegen.tasks.task import WaitReason
from imagegen.worker.circuit_breaker import FAILING_TASKS, UNREACHED_CALLS, BreakerConfig, CircuitBreaker, FailingTasks

_MANY_MODELS = 200


class Blocked(NamedTuple):
    """Why no call may be made now, and the Unix time at which one may be, at the earliest."""

    reason: WaitReason
    retry_at: float


@dataclass(eq=False, slots=True)
class Permit:
    """The right to make one call, until it is closed."""

    pacing: Pacing
    model: str
    places: tuple[tuple[CircuitBreaker, int], ...]
    closed: bool = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.pacing.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(eq=False, slots=True)
class _Waiter:
    model: str
    until: float
    turn: asyncio.Future[Permit | None]


class Pacing:
    """One for each provider. rate_per_min: calls a minute, all models together; clock: monotonic; wall: Unix time.

    on_release: called when a call has ended, so that more calls may be possible.
    """

    def __init__(
        self,
        *,
        rate_per_min: float | None = None,
        tempo: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        self._interval_s = 60.0 / rate_per_min if rate_per_min else 0.0
        self._next_at = 0.0
        self._tempo = tempo or BreakerConfig()
        self._clock = clock
        self._wall = wall
        self._upstream = CircuitBreaker(self._tempo)
        self._models: dict[str, CircuitBreaker] = {}
        self._streaks = FailingTasks()
        self._unreached = 0
        self._waiters: list[_Waiter] = []
        self._timer: asyncio.TimerHandle | None = None
        self.is_quiet = False
        self._on_release = on_release

    def try_acquire(self, model: str) -> Permit | None:
        """Return the permit for one call if it may be made now."""
        self._dispatch()
        now = self._clock()
        return self._issue(model, now) if self._opens_at(model, now) <= now else None

    async def acquire(self, model: str, at_most_s: float) -> Permit | None:
        """Wait for a permit, first come first served. Return None when the time is over or after `quiet`."""
        if turn := self.try_acquire(model):
            return turn
        if self.is_quiet:
            return None
        waiter = _Waiter(model, self._clock() + at_most_s, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            self._dispatch()
            return await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled() and (turn := waiter.turn.result()):
                turn.close()
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def quiet(self) -> None:
        """Release all waiters without a permit."""
        self.is_quiet = True
        for waiter in self._waiters:
            if not waiter.turn.done():
                waiter.turn.set_result(None)
        self._waiters.clear()

    def blocked(self, model: str) -> Blocked | None:
        """Return why a call for this model can't be made now, None if it can."""
        now = self._clock()
        resting = self._resting(model, now)
        if self._next_at > max(now, resting[0] if resting else 0.0):
            return self._blocked(WaitReason.UPSTREAM_RATE_LIMITED, self._next_at, now)
        return self._blocked(resting[1], resting[0], now) if resting else None

    def resting(self, model: str) -> Blocked | None:
        """Return the same, None unless the upstream is the reason for more than a moment."""
        now = self._clock()
        if self._opens_at(model, now) <= now:
            return None
        resting = self._resting(model, now)
        if resting is None or resting[0] - now <= self._tempo.step_s:
            return None
        return self._blocked(resting[1], resting[0], now)

    def room(self, model: str) -> float:
        """Return how many calls for this model its breakers allow now; infinite if it is not in trouble."""
        gate, now = self._models.get(model), self._clock()
        room = self._upstream.room(now) if gate is None else min(self._upstream.room(now), gate.room(now))
        return room if room == math.inf else room - sum(waiter.model == model for waiter in self._waiters)

    def room_of_upstream(self) -> float:
        """Return the same for all models together."""
        return self._upstream.room(self._clock()) - len(self._waiters)

    def opens_in_s(self, model: str) -> float:
        """Return the seconds until a call for this model may begin; infinite while a running call decides that."""
        now = self._clock()
        return max(gate.next_allowed_at(now) for gate in self._gates(model)) - now

    def closed(self, model: str) -> Blocked:
        """Return why all but a few calls for this model have to wait, and when the next may begin."""
        now = self._clock()
        gate = max(self._gates(model), key=lambda gate: (gate.next_allowed_at(now), gate.room(now) < math.inf))
        return self._blocked(gate.reason, gate.next_allowed_at(now), now)

    def has_failed(self, task_id: str) -> bool:
        """Return whether a call for this unfinished task failed here."""
        return self._streaks.has_failed(task_id)

    def is_suspect(self, task_id: str) -> bool:
        """Return whether this task failed while its model worked for others, so that its failures are its own."""
        return self._streaks.is_suspect(task_id)

    def excuses(self, turn: Permit, error: UpstreamError) -> bool:
        """Return whether this failure is blamed on an upstream that was found dead, so that it is no attempt."""
        gates = [gate for gate, _ in turn.places]
        if is_server_error(error):
            now = self._clock()
            return any(gate.excuses_answers(now) for gate in gates)
        return any(gate.is_tripped for gate in gates)

    def record_success(self, turn: Permit, limits: UpstreamLimits) -> None:
        """Record a call that was answered."""
        now = self._clock()
        self._unreached = 0
        self._alive(turn, now)
        if limits.remaining is not None and limits.remaining < 1 and limits.reset_s:
            self._gate(turn.model).pause(now, limits.reset_s)

    def failed(self, turn: Permit, error: UpstreamError, *, unfinished: str | None) -> None:
        """Record a failed call; `unfinished` is the id of its task if that goes on."""
        now, gate = self._clock(), self._gate(turn.model)
        if was_never_sent(error):
            self._unreached += 1
            if self._unreached >= UNREACHED_CALLS and self._upstream.trip(now) and self._upstream.warns(now):
                logger.warning("The upstream can't be reached; it is asked every {:g} s", self._tempo.probe_s)
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
                logger.warning("The upstream is dead for {}; it is asked every {:g} s", turn.model, self._tempo.probe_s)

    def finished(self, task_id: str) -> None:
        """Forget a task that ended."""
        self._streaks.finished((task_id,))

    def release(self, turn: Permit) -> None:
        """End the call of a permit and give its place to waiters."""
        for gate, period in turn.places:
            gate.leave(period)
        self._dispatch()
        self._on_release()

    def _alive(self, turn: Permit, now: float) -> None:
        self._streaks.alive(turn.model)
        for gate, period in turn.places:
            if gate.record_success(now, period) and gate.warned:
                logger.info("The upstream takes calls again")

    def _gate(self, model: str) -> CircuitBreaker:
        """Return the breaker of a model. Clients may name any id, so idle breakers are dropped when there are many."""
        gate = self._models.get(model)
        if gate is None:
            if len(self._models) >= _MANY_MODELS:
                now = self._clock()
                self._models = {name: known for name, known in self._models.items() if not known.idle(now)}
            gate = self._models[model] = CircuitBreaker(self._tempo)
        return gate

    def _gates(self, model: str) -> tuple[CircuitBreaker, CircuitBreaker]:
        return self._upstream, self._models.get(model, self._upstream)

    def _opens_at(self, model: str, now: float) -> float:
        opens_at, gate = self._upstream.next_allowed_at(now), self._models.get(model)
        return max(self._next_at, opens_at, gate.next_allowed_at(now) if gate else now)

    def _issue(self, model: str, now: float) -> Permit:
        self._next_at = max(self._next_at, now) + self._interval_s
        upstream, gate = self._upstream, self._gate(model)
        return Permit(self, model, ((upstream, upstream.enter(now)), (gate, gate.enter(now))))

    def _resting(self, model: str, now: float) -> tuple[float, WaitReason] | None:
        """Return when the upstream allows a call and why not before, None if it does now."""
        opens_at, reason = max((gate.next_allowed_at(now), gate.reason) for gate in self._gates(model))
        return (opens_at, reason) if opens_at > now else None

    def _blocked(self, reason: WaitReason, at: float, now: float) -> Blocked:
        wait_s = self._tempo.probe_s if at == math.inf else at - now
        return Blocked(reason, self._wall() + wait_s)

    def _dispatch(self) -> None:
        """Give permits to waiters in order, and run again when the next may be given."""
        if not self._waiters:
            return
        now, wake_at = self._clock(), math.inf
        for waiter in tuple(self._waiters):
            opens_at = self._opens_at(waiter.model, now)
            if waiter.turn.done():
                self._waiters.remove(waiter)
            elif min(opens_at, waiter.until) <= now:
                self._waiters.remove(waiter)
                waiter.turn.set_result(self._issue(waiter.model, now) if opens_at <= now else None)
            else:
                wake_at = min(wake_at, opens_at, waiter.until)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wake_at < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(wake_at - now, 0.0), self._dispatch)
