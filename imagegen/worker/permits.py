"""Permits to make paid calls, and the line of attempts that wait for one."""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.tasks.task import WaitReason
from imagegen.worker.call_routes import Route
from imagegen.worker.circuit_breaker import CircuitBreaker
from imagegen.worker.limited_tasks import LimitedTasks


class Blocked(NamedTuple):
    """Reason why no call may be made now, and the Unix time at which one may be, at the earliest."""

    reason: WaitReason
    retry_at: float


class Choice(Struct, frozen=True):
    """Channels and keys that a call may use. only: name of the only channel, empty for all.

    channels, keys: names of channels, and accounts of keys or their places in a channel, that this call has tried
    already. refused: those of the keys that were refused, so that it must not wait for them. repeats_hung: whether it
    repeats a call that got no answer in time.
    """

    only: str = ""
    channels: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    repeats_hung: bool = False


ANY = Choice()


class Permit(Struct, eq=False):
    """The right to make one call by a route, until it is closed.

    places: in circuit breakers, with their periods. began_at: monotonic. repeats_hung: as in `Choice`, until it is
    accepted as a job.
    """

    line: PermitLine
    model: str
    places: tuple[tuple[CircuitBreaker, int], ...]
    route: Route
    began_at: float
    closed: bool = False
    repeats_hung: bool = False

    def accepted(self) -> None:
        """Record that its call was accepted as a job, if it has not ended."""
        if not self.closed:
            self.line.record_acceptance(self)
            self.line.hangs_no_more(self)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.line.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(eq=False, slots=True)
class Waiter:
    """An attempt that waits for a permit. until: monotonic time."""

    model: str
    choice: Choice
    until: float
    permit: asyncio.Future[Permit | None]


class PermitLine(ABC):
    """Attempts that wait for permits, first come first served; subclasses decide when one may be given.

    clock: monotonic. limited_tasks: tasks that met a rate limit. on_release: called when a call has ended, so that more
    calls may be possible. most_hung: calls at once that repeat one without an answer in time: they may hang again, and
    would hold all slots.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most_hung: float = math.inf) -> None:
        self.clock = clock
        self._most_hung = most_hung
        self._hung = 0
        self.limited_tasks = LimitedTasks()
        self.waiters: list[Waiter] = []
        self._timer: asyncio.TimerHandle | None = None
        self.is_quiet = False
        self.on_release: Callable[[], None] = lambda: None

    @abstractmethod
    def opens_at(self, model: str, now: float, choice: Choice = ANY) -> float:
        """Return when a call may begin: `now` or later; infinite while a running call decides that."""

    @abstractmethod
    def issue(self, model: str, now: float, choice: Choice = ANY) -> Permit:
        """Return the permit for a call that may begin now."""

    @abstractmethod
    def leave(self, permit: Permit) -> None:
        """Record that the call of a permit has ended."""

    @abstractmethod
    def blocked(self, model: str, choice: Choice = ANY) -> Blocked | None:
        """Return why a call for this model can't be made now, None if it can."""

    @abstractmethod
    def resting(self, model: str, choice: Choice = ANY) -> Blocked | None:
        """Return the same, None unless the upstream is the reason for more than a moment."""

    @abstractmethod
    def capacity(self, model: str) -> float:
        """Return how many calls for this model may begin now; infinite if it is not in trouble, nor limited."""

    def is_on_trial(self, model: str) -> bool:
        """Return whether a model is in trouble, so that the next calls probe whether it has passed."""
        return self.capacity(model) < math.inf

    @abstractmethod
    def upstream_capacity(self) -> float:
        """Return the same for all models together."""

    @abstractmethod
    def opens_in_s(self, model: str) -> float:
        """Return the seconds until a call for this model may begin; infinite while a running call decides that."""

    @abstractmethod
    def closed(self, model: str) -> Blocked:
        """Return why all but a few calls for this model have to wait, and when the next may begin."""

    @abstractmethod
    def is_dead(self, model: str) -> bool:
        """Return whether calls for this model have got no answers for a while."""

    @abstractmethod
    def has_failed(self, task_id: str) -> bool:
        """Return whether a call for this unfinished task failed here."""

    @abstractmethod
    def is_suspect(self, task_id: str) -> bool:
        """Return whether this task failed while its model worked for others, so that its failures are its own."""

    @abstractmethod
    def excuses(self, permit: Permit, error: UpstreamError) -> bool:
        """Return whether this failure is blamed on an upstream that was found dead, so that it is no attempt."""

    @abstractmethod
    def record_success(self, permit: Permit, limits: UpstreamLimits) -> None:
        """Record a call that was answered."""

    @abstractmethod
    def record_acceptance(self, permit: Permit) -> None:
        """Record a call that was accepted as a job: no rate limit keeps calls away, whatever becomes of the job."""

    @abstractmethod
    def failed(self, permit: Permit, error: UpstreamError, *, unfinished: str | None) -> None:
        """Record a failed call; `unfinished` is the id of its task if that goes on."""

    @abstractmethod
    def finished(self, task_id: str) -> None:
        """Forget a task that ended."""

    @abstractmethod
    def images_wait(self, task_id: str, channel: str, model: str) -> None:
        """Record an unfinished task that was paid a while ago, with images that can't be fetched yet."""

    @abstractmethod
    def images_useless(self, task_id: str, channel: str, model: str) -> None:
        """Record a task that was paid, and got no image that can be used by a response."""

    @abstractmethod
    def doubts_images(self, channel: str, model: str) -> bool:
        """Return whether several tasks in a row were paid there and got no image that can be used."""

    @abstractmethod
    def image_saved(self, channel: str, model: str) -> None:
        """Record an image of a call that was saved."""

    def refusal(self, _model: str, _choice: Choice = ANY) -> UpstreamError | None:
        """Return why no call for this model can be made before an operator acts; None if one may be."""
        return None

    def has_other(self, _model: str, _choice: Choice) -> bool:
        """Return whether another channel or key takes this call now."""
        return False

    def recovers(self, _model: str, _choice: Choice) -> bool:
        """Return whether this call, refused for its key now, becomes possible without an operator."""
        return False

    def try_acquire(self, model: str, choice: Choice = ANY) -> Permit | None:
        """Return the permit for one call if it may be made now."""
        self.dispatch()
        now = self.clock()
        is_open = not self.is_full_of_hung(choice) and self.opens_at(model, now, choice) <= now
        return self._issue(model, now, choice) if is_open else None

    def is_full_of_hung(self, choice: Choice) -> bool:
        """Return whether a call waits for others that repeat a hung one as it does."""
        return choice.repeats_hung and self._hung >= self._most_hung

    def hangs_no_more(self, permit: Permit) -> None:
        """Count a permit no more as one that repeats a hung call."""
        if permit.repeats_hung:
            permit.repeats_hung = False
            self._hung -= 1

    def _issue(self, model: str, now: float, choice: Choice) -> Permit:
        permit = self.issue(model, now, choice)
        permit.repeats_hung = choice.repeats_hung
        self._hung += choice.repeats_hung
        return permit

    async def acquire(self, model: str, at_most_s: float, choice: Choice = ANY) -> Permit | None:
        """Wait for a permit, first come first served. Return None when the time is over or after `quiet`."""
        if permit := self.try_acquire(model, choice):
            return permit
        if self.is_quiet:
            return None
        waiter = Waiter(model, choice, self.clock() + at_most_s, asyncio.get_running_loop().create_future())
        self.waiters.append(waiter)
        try:
            self.dispatch()
            return await waiter.permit
        except asyncio.CancelledError:
            if not waiter.permit.cancelled() and (permit := waiter.permit.result()):
                permit.close()
            raise
        finally:
            if waiter in self.waiters:
                self.waiters.remove(waiter)

    def quiet(self) -> None:
        """Release all waiters without a permit."""
        self.is_quiet = True
        for waiter in self.waiters:
            if not waiter.permit.done():
                waiter.permit.set_result(None)
        self.waiters.clear()

    def release(self, permit: Permit) -> None:
        """End the call of a permit and give its place to waiters."""
        self.leave(permit)
        self.hangs_no_more(permit)
        self.dispatch()
        self.on_release()

    def dispatch(self) -> None:
        """Give permits to waiters in order, and run again when the next may be given."""
        if not self.waiters:
            return
        now, wake_at = self.clock(), math.inf
        for waiter in tuple(self.waiters):
            is_full = self.is_full_of_hung(waiter.choice)
            opens_at = math.inf if is_full else self.opens_at(waiter.model, now, waiter.choice)
            if waiter.permit.done():
                self.waiters.remove(waiter)
            elif min(opens_at, waiter.until) <= now:
                self.waiters.remove(waiter)
                waiter.permit.set_result(self._issue(waiter.model, now, waiter.choice) if opens_at <= now else None)
            else:
                wake_at = min(wake_at, opens_at, waiter.until)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wake_at < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(wake_at - now, 0.0), self.dispatch)
