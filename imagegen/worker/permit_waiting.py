"""Wait of an attempt for the moment at which its next paid call may be made."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.task import WaitReason
from imagegen.worker.permits import ANY, Choice, Permit, PermitLine
from imagegen.worker.saving import DeadlinePassed, ImageSaver

STORE_CHECK_S = 1.0
"""How often a claim that waits for the store looks whether the instance stops."""

HUNG_CHECK_S = 5.0
"""How often a claim that waits for others to repeat their hung calls looks whether its time is over."""


class Stopping(Exception):
    """The instance stops, or claiming is paused, so no further call is made."""


class UpstreamResting(Exception):
    """The upstream takes no calls now; `error` is what a call would have met."""

    def __init__(self, error: UpstreamError) -> None:
        super().__init__(error)
        self.error = error


def _keep(_claim: Claim) -> bool:
    return False


class PermitWaiting(Struct, eq=False):
    """Wait for a writable store and for a permit to call. ends_at: returns the task's deadline.

    begun: whether the attempt is written and counted. A claim that is not begun waits as pending; a begun attempt
    ends when the circuit breaker is open. give: gives a claim to an instance that can run it; False if there is none.
    """

    claims: WorkerQueue
    claim: Claim
    permits: PermitLine
    image_saver: ImageSaver
    ends_at: Callable[[], float]
    clock: Callable[[], float]
    begun: bool = False
    give: Callable[[Claim], bool] = _keep

    async def permit(self, model: str, choice: Choice = ANY) -> Permit:
        """Return the permit for the next call. Raises DeadlinePassed, Stopping, UpstreamResting.

        Stopping is raised too if claiming is paused and the attempt is not begun, or if the claim was given away.
        Raises UpstreamError if no channel can take the call before an operator acts.
        """
        if not self.claim.occupies_slot:
            await self.claims.come_back(self.claim)
        self._check_time()
        if self.image_saver.writable and (permit := self.permits.try_acquire(model, choice)):
            return self._unless_paused(permit)
        while True:
            await self._wait_for_store(self.give)
            if refusal := self.permits.refusal(model, choice):
                raise refusal
            wait_s = self._wait_s(model, choice)
            if choice.only:  # other channels may take the calls of others meanwhile
                self.claims.go_away(self.claim)
            if permit := await self.permits.acquire(model, wait_s, choice):
                await self._in_slot(permit)
                if self.image_saver.writable:
                    return self._unless_paused(permit)
                permit.close()

    async def _in_slot(self, permit: Permit) -> None:
        """Wait for a slot for the call of a permit, if its claim has left its own. Raises as `permit`."""
        if self.claim.occupies_slot:
            return
        try:
            await self.claims.come_back(self.claim)
            self._check_time()
        except BaseException:
            permit.close()
            raise

    def _unless_paused(self, permit: Permit) -> Permit:
        if self.claims.is_paused and not self.begun:
            permit.close()
            raise Stopping
        return permit

    async def store_writable(self) -> None:
        """Wait until images can be saved. Raises DeadlinePassed, Stopping."""
        await self._wait_for_store(_keep)

    async def _wait_for_store(self, give: Callable[[Claim], bool]) -> None:
        """Wait until images can be saved, or a claim that is not begun is given away. Raises DeadlinePassed, Stopping.

        give: see the class; Stopping is raised once the claim is given.
        """
        waited = False
        while not self.image_saver.writable:
            self._check_time()
            if waited and not (self.begun or self.claims.is_paused) and give(self.claim):
                raise Stopping
            if not waited:
                report = self.claims.stall if self.begun else self.claims.mark_waiting
                report(self.claim, WaitReason.STORE_UNAVAILABLE, self.clock() + STORE_CHECK_S)
            waited = True
            await self.image_saver.wait_writable(min(STORE_CHECK_S, self.ends_at() - self.clock()))
        if waited and self.begun:
            self.claims.stall(self.claim, None, None)

    def _wait_s(self, model: str, choice: Choice) -> float:
        """Return the seconds to wait before the next check."""
        self._check_time()
        if self.permits.is_full_of_hung(choice):
            wait_s = min(HUNG_CHECK_S, self.ends_at() - self.clock())
            if not self.begun:
                self.claims.mark_waiting(self.claim, WaitReason.RETRYING, self.clock() + wait_s)
            return wait_s
        blocked = self.permits.blocked(model, choice)
        if blocked is None:
            return 0.0
        if not self.begun:
            self.claims.mark_waiting(self.claim, *blocked)
        elif rest := self.permits.resting(model, choice):
            raise UpstreamResting(resting_error(rest.reason, rest.retry_at - self.clock()))
        return min(blocked.retry_at, self.ends_at()) - self.clock()

    def _check_time(self) -> None:
        if self.clock() >= self.ends_at():
            raise DeadlinePassed
        if self.permits.is_quiet:
            raise Stopping


def resting_error(reason: WaitReason, for_s: float) -> UpstreamError:
    """Return what a call would have met."""
    return UpstreamError(str(reason), "the upstream takes no calls now", retryable=True, retry_after_s=for_s)
