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

MAX_UNSAVED = 32
"""Tasks of a model that wait for paid images, after which only probes are paid until one of its images is saved."""

USELESS_TASKS = 5
"""Tasks of a model in a row that were paid and can't be given an image, after which only probes are paid until one of
its images is saved; also those that wait for theirs where another channel takes the calls."""

DOUBTED_TASKS = 2
"""Such tasks after which an image that can't be used is blamed on the channel, and not on its task."""

_MOST_USELESS = 200


class Pacing(PermitLine):
    """Pacing of one channel. rate_per_min: calls a minute, all models together; clock: monotonic; wall: Unix time.

    route: of all calls that it permits.
    """

    def __init__(
        self,
        route: Route,
        *,
        rate_per_min: float | None = None,
        breaker_config: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        most_hung: float = math.inf,
    ) -> None:
        super().__init__(clock=clock, most_hung=most_hung)
        self._route = route
        self._title = f" (channel {route.channel.name})" if route.title else ""
        self._interval_s = 60.0 / rate_per_min if rate_per_min else 0.0
        self._next_at = 0.0
        self._breaker_config = breaker_config or BreakerConfig()
        self._wall = wall
        self._upstream = CircuitBreaker(self._breaker_config)
        self._models: dict[str, CircuitBreaker] = {}
        self._failing_tasks, self._unsaved_tasks = FailingTasks(), FailingTasks()
        self._useless_tasks = FailingTasks(_MOST_USELESS)
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
        if resting is None or resting[0] - now <= self._breaker_config.step_s:
            return None
        return self._blocked(resting[1], resting[0], now)

    def capacity(self, model: str) -> float:
        breaker, now = self._models.get(model), self.clock()
        allowed = self._upstream.capacity(now)
        if breaker is not None:
            allowed = min(allowed, breaker.capacity(now))
        return allowed if allowed == math.inf else allowed - sum(waiter.model == model for waiter in self.waiters)

    def pace_capacity(self, now: float) -> float:
        """Return how many calls the rate allows now; infinite without one."""
        return math.inf if not self._interval_s else float(self._next_at <= now)

    def upstream_capacity(self) -> float:
        return self._upstream.capacity(self.clock()) - len(self.waiters)

    def opens_in_s(self, model: str) -> float:
        now = self.clock()
        return max(breaker.next_allowed_at(now) for breaker in self._breakers(model)) - now

    def closed(self, model: str) -> Blocked:
        now = self.clock()
        breaker = max(
            self._breakers(model), key=lambda breaker: (breaker.next_allowed_at(now), breaker.capacity(now) < math.inf)
        )
        return self._blocked(breaker.reason, breaker.next_allowed_at(now), now)

    def is_dead(self, model: str) -> bool:
        now = self.clock()
        return any(breaker.is_dead(now) for breaker in self._breakers(model))

    def has_failed(self, task_id: str) -> bool:
        return self._failing_tasks.has_failed(task_id)

    def is_suspect(self, task_id: str) -> bool:
        return self._failing_tasks.is_suspect(task_id)

    def excuses(self, permit: Permit, error: UpstreamError) -> bool:
        breakers = [breaker for breaker, _ in permit.places]
        if is_server_error(error):
            now = self.clock()
            return any(breaker.excuses_answers(now) for breaker in breakers)
        return any(breaker.is_tripped for breaker in breakers)

    def record_success(self, permit: Permit, limits: UpstreamLimits) -> None:
        now = self.clock()
        self._unreached = 0
        self._alive(permit, now)
        self.limited_tasks.answered((permit.route.place, permit.model), permit.began_at)
        if limits.remaining is not None and limits.remaining < 1 and limits.reset_s:
            self._breaker(permit.model).pause(now, limits.reset_s)

    def record_acceptance(self, permit: Permit) -> None:
        now = self.clock()
        self.limited_tasks.answered((permit.route.place, permit.model), permit.began_at)
        for breaker, period in permit.places:
            if not breaker.is_tripped:  # the jobs of a dead upstream may be accepted, and fail
                self._close(breaker, period, now)

    def failed(self, permit: Permit, error: UpstreamError, *, unfinished: str | None) -> None:
        now, breaker = self.clock(), self._breaker(permit.model)
        if was_never_sent(error):
            self._unreached += 1
            if self._unreached >= UNREACHED_CALLS and self._upstream.trip(now) and self._upstream.warns(now):
                cause = error.detail.rpartition(": ")[2] if error.status is None else f"HTTP {error.status}"
                probe_s = self._breaker_config.probe_s
                text = "The upstream can't be reached ({}); it is probed every {:g} s{}"
                logger.warning(text, cause, probe_s, self._title)
            return
        self._unreached = 0
        self._upstream.record_success(now, permit.places[0][1])
        if error.code == "upstream_rate_limited":
            place = (permit.route.place, permit.model)
            if unfinished and self.limited_tasks.limited(unfinished, place, now):
                return
            if breaker.limit(now, error.retry_after_s) and breaker.warns(now):
                logger.warning("The upstream's rate limit is reached for {}", permit.model)
        elif error.status is not None and error.status < 500 and not error.retryable:
            self._alive(permit, now)
        elif error.retryable and unfinished:
            failing = self._failing_tasks.failed(unfinished, permit.model)
            if failing >= FAILING_TASKS and breaker.trip(now) and breaker.warns(now):
                where, probe_s = self._title, self._breaker_config.probe_s
                logger.warning("The upstream is dead for {}; it is probed every {:g} s{}", permit.model, probe_s, where)

    def finished(self, task_id: str) -> None:
        self.limited_tasks.finished(task_id)
        self._failing_tasks.finished(task_id)
        self._unsaved_tasks.finished(task_id)

    def images_wait(self, task_id: str, _channel: str, model: str, *, most: int | None = None) -> None:
        now, breaker = self.clock(), self._breaker(model)
        waiting = self._unsaved_tasks.failed(task_id, model)
        if waiting >= (most or MAX_UNSAVED) and breaker.hold(now, self._breaker_config.probe_s) and breaker.warns(now):
            where, first_s, most_s = self._title, self._breaker_config.probe_s, self._breaker_config.longest_held_s
            text = "No image of {} can be fetched, and {} paid tasks wait for theirs; a call in {:g} s probes it, "
            text += "later ones in up to {:g} s{}"
            logger.warning(text, model, waiting, first_s, most_s, where)

    def images_useless(self, task_id: str, _channel: str, model: str) -> None:
        now, breaker, config = self.clock(), self._breaker(model), self._breaker_config
        useless = self._useless_tasks.failed(task_id, model)
        if useless >= USELESS_TASKS and breaker.hold(now, config.first_probe_s) and breaker.warns(now):
            text = "No image of {} can be used, of {} paid tasks in a row; a call in {:g} s probes it, later ones in "
            text += "up to {:g} s{}"
            logger.warning(text, model, useless, config.first_probe_s, config.longest_held_s, self._title)

    def image_saved(self, _channel: str, model: str) -> None:
        self._unsaved_tasks.alive(model)
        self._useless_tasks.alive(model)
        if (breaker := self._models.get(model)) is not None and breaker.release(self.clock()):
            logger.info("Images of {} come again{}", model, self._title)

    def doubts_images(self, _channel: str, model: str) -> bool:
        return self._useless_tasks.count(model) >= DOUBTED_TASKS

    def leave(self, permit: Permit) -> None:
        for breaker, period in permit.places:
            breaker.leave(period)

    def reached(self, permit: Permit) -> None:
        """Record a call that the upstream refused for a reason of its key."""
        self._unreached = 0
        self._upstream.record_success(self.clock(), permit.places[0][1])

    def rests_until(self, model: str, now: float) -> float:
        """Return when its breakers allow a call for this model, without regard to the rate."""
        breaker = self._models.get(model)
        opens_at = self._upstream.next_allowed_at(now)
        return opens_at if breaker is None else max(opens_at, breaker.next_allowed_at(now))

    def longest_rest(self) -> tuple[float, WaitReason] | None:
        """Return until when a breaker allows no call, and why: of the upstream, else of a model. None without one."""
        now = self.clock()
        breakers = [
            breaker
            for breaker in (self._upstream, *self._models.values())
            if breaker.is_open or breaker.next_allowed_at(now) > now
        ]
        return max(((breaker.next_allowed_at(now), breaker.reason) for breaker in breakers), default=None)

    def _alive(self, permit: Permit, now: float) -> None:
        self._failing_tasks.alive(permit.model)
        for breaker, period in permit.places:
            self._close(breaker, period, now)

    def _close(self, breaker: CircuitBreaker, period: int, now: float) -> None:
        if breaker.record_success(now, period) and breaker.warned:
            logger.info("The upstream takes calls again{}", self._title)

    def _breaker(self, model: str) -> CircuitBreaker:
        """Return the breaker of a model. Clients may name any id, so idle breakers are dropped when there are many."""
        breaker = self._models.get(model)
        if breaker is None:
            if len(self._models) >= _MANY_MODELS:
                now = self.clock()
                self._models = {name: breaker for name, breaker in self._models.items() if not breaker.idle(now)}
            breaker = self._models[model] = CircuitBreaker(self._breaker_config)
        return breaker

    def _breakers(self, model: str) -> tuple[CircuitBreaker, CircuitBreaker]:
        return self._upstream, self._models.get(model, self._upstream)

    def opens_at(self, model: str, now: float, _choice: Choice = ANY) -> float:
        return max(self._next_at, self.rests_until(model, now))

    def issue(self, model: str, now: float, _choice: Choice = ANY) -> Permit:
        return Permit(self, model, self.enter(model, now), self._route, now)

    def enter(self, model: str, now: float) -> tuple[tuple[CircuitBreaker, int], ...]:
        """Count a call that begins; return its places."""
        self._next_at = max(self._next_at, now) + self._interval_s
        upstream, breaker = self._upstream, self._breaker(model)
        return (upstream, upstream.enter(now)), (breaker, breaker.enter(now))

    def _resting(self, model: str, now: float) -> tuple[float, WaitReason] | None:
        """Return when the upstream allows a call and why not before, None if it does now."""
        opens_at, reason = max((breaker.next_allowed_at(now), breaker.reason) for breaker in self._breakers(model))
        return (opens_at, reason) if opens_at > now else None

    def _blocked(self, reason: WaitReason, at: float, now: float) -> Blocked:
        wait_s = self._breaker_config.probe_s if at == math.inf else at - now
        return Blocked(reason, self._wall() + wait_s)
