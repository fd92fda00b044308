"""Choice of a channel and a key for each paid call: by priority, weight, limits, and the health of both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from loguru import logger

from imagegen.channels_file import Channel
from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.tasks.task import WaitReason
from imagegen.worker.answer_times import AnswerTimes
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.key_health import KEY_REFUSALS, LIMITED, NO_MODEL, PROBE_S, KeyHealth, Probes
from imagegen.worker.pacing import USELESS_TASKS, Pacing
from imagegen.worker.permits import ANY, Blocked, Choice, Permit, PermitLine


@dataclass(eq=False, slots=True)
class _RunningCall:
    """A running call. probes: troubles of the key that it probes."""

    lane: Lane
    key: KeyHealth
    probes: Probes


class Lane:
    """One channel at work. credit: for its turn among channels of one priority (smooth weighted round robin)."""

    def __init__(self, channel: Channel, routes: Sequence[Route], pacing: Pacing) -> None:
        self.channel = channel
        self.keys = {route: KeyHealth() for route in routes}
        self.pacing = pacing
        self.answers = AnswerTimes(channel.concurrency)
        self.in_flight = 0
        self.credit = 0

    def may_have(self, model: str, now: float, choice: Choice) -> bool:
        """Return whether the provider may have a model, by a key that this call has not tried yet."""
        return any(key.may_have(model, now) for _, key in self.usable(choice))

    def lacks(self, model: str, now: float, choice: Choice) -> bool:
        """Return whether the provider refused a model in the last minutes, whichever key of the call it was."""
        return all(key.lacks(model, now) for _, key in self.usable(choice))

    def record_refused_model(self, permit: Permit, now: float, *, of_channel: bool) -> None:
        """Record that the provider does not have a model. of_channel: no other key of the channel would have it."""
        for route, key in self.keys.items():
            if of_channel or route is permit.route:
                key.record_refused_model(permit.model, now)

    def usable(self, choice: Choice) -> Iterator[tuple[Route, KeyHealth]]:
        """Yield the keys that this call has not tried yet."""
        if self.channel.name not in choice.channels:
            tried = choice.keys
            yield from (each for each in self.keys.items() if tried.isdisjoint((each[0].account, each[0].place)))

    def fit(self, model: str, now: float, choice: Choice) -> list[tuple[Route, KeyHealth]]:
        """Return the keys for a call: those of the usable ones that may have the model, else all."""
        usable = list(self.usable(choice))
        return [entry for entry in usable if entry[1].may_have(model, now)] or usable

    def opens_at(self, model: str, now: float, choice: Choice, *, alone: bool) -> float:
        """Return when a call may begin: `now` or later; infinite while a running call decides that."""
        keys = [key.next_at(model, now, alone=alone) for _, key in self.fit(model, now, choice)]
        if not keys or self._is_full:
            return math.inf
        return max(min(keys), self.pacing.opens_at(model, now))

    def rests(self, model: str, now: float, choice: Choice) -> bool:
        """Return whether its breaker or all its keys take no calls, as opposed to a channel that is only full."""
        if self.pacing.rests_until(model, now) > now:
            return True
        return all(key.trouble(model) is not None for _, key in self.fit(model, now, choice))

    def is_out(self, model: str, now: float, choice: Choice) -> bool:
        """Return whether all its keys are refused, or tried by this call."""
        troubles = (key.trouble(model) for _, key in self.fit(model, now, choice))
        return all(trouble is not None and trouble.state == "out" for trouble in troubles)

    def pick(self, model: str, now: float, choice: Choice, *, alone: bool) -> Route:
        """Return the key for a call that may begin now: a key that is due for a probe, else the least busy one."""
        ready = [
            (key.trouble(model) is None, key.in_flight, key.used_at, number, route)
            for number, (route, key) in enumerate(self.fit(model, now, choice))
            if key.next_at(model, now, alone=alone) <= now
        ]
        return min(ready)[-1]

    def free(self, now: float) -> float:
        """Return how many calls its `concurrency` and `rate` allow now; infinite without limits."""
        concurrency = self.channel.concurrency
        left = math.inf if concurrency is None else max(concurrency - self.in_flight, 0)
        return min(left, self.pacing.pace_capacity(now))

    @property
    def _is_full(self) -> bool:
        return self.channel.concurrency is not None and self.in_flight >= self.channel.concurrency


class Router(PermitLine):
    """Permits of several channels or keys. clock: monotonic; wall: Unix time."""

    def __init__(
        self,
        routes: Routes,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        most_hung: float = math.inf,
    ) -> None:
        super().__init__(clock=clock, most_hung=most_hung)
        self.routes = routes
        self._wall = wall
        self.lanes: dict[str, Lane] = {}
        self._running: dict[Permit, _RunningCall] = {}
        for channel in routes.channels.all:
            keys = routes.of_channel(channel)
            pacing = Pacing(keys[0], rate_per_min=channel.rate_per_min, clock=clock, wall=wall)
            self.lanes[channel.name] = Lane(channel, keys, pacing)

    def opens_at(self, model: str, now: float, choice: Choice = ANY) -> float:
        return self._choose(model, now, choice)[0]

    def issue(self, model: str, now: float, choice: Choice = ANY) -> Permit:
        ready, alone = self._choose(model, now, choice)[1:]
        lane = _next_in_turn(ready)
        route = lane.pick(model, now, choice, alone=alone)
        key = lane.keys[route]
        lane.in_flight += 1
        permit = Permit(self, model, lane.pacing.enter(model, now), route, now)
        self._running[permit] = _RunningCall(lane, key, key.enter(model, now))
        lane.answers.begin(permit)
        return permit

    def leave(self, permit: Permit) -> None:
        call = self._running.pop(permit)
        call.lane.in_flight -= 1
        call.lane.answers.end(permit, self.clock())
        call.key.leave(call.probes)
        call.lane.pacing.leave(permit)

    def blocked(self, model: str, choice: Choice = ANY) -> Blocked | None:
        now = self.clock()
        opens_at = self.opens_at(model, now, choice)
        return None if opens_at <= now else self._blocked(model, opens_at, now, choice)

    def resting(self, model: str, choice: Choice = ANY) -> Blocked | None:
        now = self.clock()
        lanes = self._lanes(model, choice)
        if not lanes or not all(lane.rests(model, now, choice) for lane in lanes):
            return None
        opens_at = self.opens_at(model, now, choice)
        return None if opens_at <= now else self._blocked(model, opens_at, now, choice)

    def capacity(self, model: str) -> float:
        now = self.clock()
        lanes = self._lanes(model, ANY)
        if self._fail_at_once(lanes, model, now):
            return math.inf
        allowed = 0.0
        for _, group in groupby(lanes, key=lambda lane: lane.channel.priority):
            same = list(group)
            allowed += sum(min(self._healthy(lane, lanes, model, now), lane.free(now)) for lane in same)
            if not all(lane.rests(model, now, ANY) for lane in same):
                break  # as in `_choose`
        return allowed if allowed == math.inf else allowed - sum(waiter.model == model for waiter in self.waiters)

    def is_on_trial(self, model: str) -> bool:
        now = self.clock()
        lanes = self._lanes(model, ANY)
        if self._fail_at_once(lanes, model, now):
            return False
        return sum(self._healthy(lane, lanes, model, now) for lane in lanes) < math.inf

    def _fail_at_once(self, lanes: Sequence[Lane], model: str, now: float) -> bool:
        """Return whether tasks of a model fail at once, or probe."""
        return not lanes or all(lane.is_out(model, now, ANY) for lane in lanes)

    def _healthy(self, lane: Lane, lanes: Sequence[Lane], model: str, now: float) -> float:
        """Return how many calls the health of a channel allows now; infinite without trouble."""
        if any(key.trouble(model) is None for key in lane.keys.values()):
            return lane.pacing.capacity(model)
        alone = not any(key.trouble(model) is None for each in lanes for key in each.keys.values())
        due = sum(key.next_at(model, now, alone=alone) <= now for key in lane.keys.values())
        return min(due, lane.pacing.capacity(model))

    def upstream_capacity(self) -> float:
        return sum(lane.pacing.upstream_capacity() for lane in self.lanes.values()) - len(self.waiters)

    def opens_in_s(self, model: str) -> float:
        now = self.clock()
        return self.opens_at(model, now) - now

    def closed(self, model: str) -> Blocked:
        now = self.clock()
        return self._blocked(model, self.opens_at(model, now), now, ANY)

    def is_dead(self, model: str) -> bool:
        lanes = self._lanes(model, ANY)
        return bool(lanes) and all(lane.pacing.is_dead(model) for lane in lanes)

    def has_failed(self, task_id: str) -> bool:
        return any(lane.pacing.has_failed(task_id) for lane in self.lanes.values())

    def is_suspect(self, task_id: str) -> bool:
        return any(lane.pacing.is_suspect(task_id) for lane in self.lanes.values())

    def excuses(self, permit: Permit, error: UpstreamError) -> bool:
        return self._running[permit].lane.pacing.excuses(permit, error)

    def record_success(self, permit: Permit, limits: UpstreamLimits) -> None:
        call = self._running[permit]
        call.lane.answers.answered(permit, self.clock())
        call.key.accepted(permit.model, call.probes)
        self.limited_tasks.answered((permit.route.place, permit.model), permit.began_at)
        call.lane.pacing.record_success(permit, UpstreamLimits())
        call.key.record_made(permit.model, self.clock())
        if limits.remaining is not None and limits.remaining < 1 and limits.reset_s:
            call.key.pause(self.clock(), limits.reset_s, call.probes)

    def record_acceptance(self, permit: Permit) -> None:
        call = self._running[permit]
        call.lane.answers.answered(permit, self.clock())
        call.key.accepted(permit.model, call.probes)
        self.limited_tasks.answered((permit.route.place, permit.model), permit.began_at)

    def failed(self, permit: Permit, error: UpstreamError, *, unfinished: str | None) -> None:
        call, now = self._running[permit], self.clock()
        key, pacing = call.key, call.lane.pacing
        if not error.ambiguous:
            call.lane.answers.answered(permit, now)
        if error.code == LIMITED:
            pacing.reached(permit)
            place = (permit.route.place, permit.model)
            if unfinished and self.limited_tasks.limited(unfinished, place, now):
                return
            if key.limited(now, error, call.probes) and key.warns(now):
                logger.warning("The rate limit of {} is reached; other keys take its calls", permit.route.title)
        elif error.code in KEY_REFUSALS:
            pacing.reached(permit)
            key.refused(now, permit.model, error, call.probes)
        else:
            if error.status is not None:
                key.accepted(permit.model, call.probes)
            if error.code == NO_MODEL or error.of_channel:
                call.lane.record_refused_model(permit, now, of_channel=error.of_channel)
            if error.of_channel and key.warns(now):
                logger.warning(
                    "Channel {} answered a call with {}, as an address without this route does; check its base_url",
                    call.lane.channel.name,
                    error.status,
                )
            pacing.failed(permit, error, unfinished=unfinished)

    def finished(self, task_id: str) -> None:
        self.limited_tasks.finished(task_id)
        for lane in self.lanes.values():
            lane.pacing.finished(task_id)

    def images_wait(self, task_id: str, channel: str, model: str) -> None:
        if lane := self.lanes.get(channel):
            has_other = self.has_other(model, Choice(channels=frozenset({channel})))
            lane.pacing.images_wait(task_id, channel, model, most=USELESS_TASKS if has_other else None)

    def images_useless(self, task_id: str, channel: str, model: str) -> None:
        if lane := self.lanes.get(channel):
            lane.pacing.images_useless(task_id, channel, model)

    def doubts_images(self, channel: str, model: str) -> bool:
        lane = self.lanes.get(channel)
        return lane is not None and lane.pacing.doubts_images(channel, model)

    def image_saved(self, channel: str, model: str) -> None:
        if lane := self.lanes.get(channel):
            lane.pacing.image_saved(channel, model)

    def refusal(self, model: str, choice: Choice = ANY) -> UpstreamError | None:
        lanes = self._lanes(model, choice)
        if not lanes:
            return UpstreamError("model_not_available", f"no channel serves the model {model[:200]}")
        now = self.clock()
        if not all(lane.is_out(model, now, choice) for lane in lanes):
            return None
        if self.opens_at(model, now, choice) <= now:
            return None
        troubles = [key.trouble(model) for lane in lanes for _, key in lane.fit(model, now, choice)]
        return next((trouble.error for trouble in troubles if trouble is not None), None)

    def has_other(self, model: str, choice: Choice) -> bool:
        now = self.clock()
        lanes = self._with_model(model, choice)
        is_open = bool(lanes) and self.opens_at(model, now, choice) <= now
        return is_open or any(not lane.rests(model, now, choice) for lane in lanes)

    def recovers(self, model: str, choice: Choice) -> bool:
        now = self.clock()
        return not all(lane.is_out(model, now, choice) for lane in self._with_model(model, choice))

    def _lanes(self, model: str, choice: Choice) -> list[Lane]:
        """Return the channels for a call, those of the highest priority first.

        Channels that lack the model get calls only if all lack it: they may have it by now. Those that are silent get
        none while another one takes calls.
        """
        usable, now = self._usable(model, choice), self.clock()
        lanes = [lane for lane in usable if lane.may_have(model, now, choice)] or usable
        silent = [lane for lane in lanes if lane.answers.is_silent(model, now)] if len(lanes) > 1 else []
        others = [lane for lane in lanes if lane not in silent] if silent else lanes
        if others is lanes or all(lane.rests(model, now, choice) for lane in others):
            return lanes
        for lane in silent:
            if lane.answers.warns(now):
                text = "Channel {} answers no call for {}, for far longer than usual; other channels take its calls"
                logger.warning(text, lane.channel.name, model)
        return others

    def _with_model(self, model: str, choice: Choice) -> list[Lane]:
        """Return the channels for a call that have not refused the model in the last minutes."""
        now = self.clock()
        return [lane for lane in self._usable(model, choice) if not lane.lacks(model, now, choice)]

    def _usable(self, model: str, choice: Choice) -> list[Lane]:
        lanes = [self.lanes[channel.name] for channel in self.routes.channels.serving(model)]
        only = [lane for lane in lanes if lane.channel.name == choice.only]
        return [lane for lane in only or lanes if any(lane.usable(choice))]

    def _choose(self, model: str, now: float, choice: Choice) -> tuple[float, list[Lane], bool]:
        """Return when a call may begin, the channels that take it now, and whether no healthy key could take it.

        A channel of a lower priority takes calls only while all higher ones rest: a full channel keeps its calls.
        """
        lanes, earliest = self._lanes(model, choice), math.inf
        alone = not any(key.trouble(model) is None for lane in lanes for _, key in lane.fit(model, now, choice))
        for _, group in groupby(lanes, key=lambda lane: lane.channel.priority):
            same = list(group)
            times = [lane.opens_at(model, now, choice, alone=alone) for lane in same]
            earliest = min(earliest, *times)
            if ready := [lane for lane, at in zip(same, times, strict=True) if at <= now]:
                return now, ready, alone
            if not all(lane.rests(model, now, choice) for lane in same):
                break
        return earliest, [], alone

    def _blocked(self, model: str, opens_at: float, now: float, choice: Choice) -> Blocked:
        wait_s = PROBE_S if opens_at == math.inf else opens_at - now
        lanes = self._lanes(model, choice)
        dead = bool(lanes) and all(lane.pacing.rests_until(model, now) > now for lane in lanes)
        reason = WaitReason.UPSTREAM_OVERLOADED if dead else WaitReason.UPSTREAM_RATE_LIMITED
        return Blocked(reason, self._wall() + wait_s)


def _next_in_turn(lanes: Sequence[Lane]) -> Lane:
    """Return the channel with the next turn, by weight."""
    if len(lanes) == 1:
        return lanes[0]
    for lane in lanes:
        lane.credit += lane.channel.weight
    chosen = max(lanes, key=lambda lane: lane.credit)
    chosen.credit -= sum(lane.channel.weight for lane in lanes)
    return chosen
