"""Times to the answers of one channel's calls, and whether it is silent: calls wait far longer than usual. No I/O."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from imagegen.worker.circuit_breaker import WARN_AGAIN_S
from imagegen.worker.permits import Permit

SILENT_CALLS = 3
"""Calls for a model without an answer for far longer than usual, after which other channels take its calls."""

SILENT_FACTOR, MIN_SILENT_S = 4.0, 5.0
"""Times the longest usual answer that is far longer, and seconds at least."""

LOST_FOR_S = 60.0
"""How long a call that ended without an answer counts as one that still waits for it."""

_KEPT = 0.9
"""Part of the longest time that is left after each answer, so that it follows a channel that becomes faster."""

_MAX_MODELS = 200


class _Usual(Struct):
    """Answers for a model. Seconds, and times of one monotonic clock. lost_at: ends of calls that got none since."""

    longest_s: float
    answered_at: float
    lost_at: deque[float]


class AnswerTimes:
    """Answer times of one channel: to a reply, a refusal, or the acceptance of a job.

    concurrency: of the channel, None without a limit: fewer calls than SILENT_CALLS may be all that it takes.
    """

    def __init__(self, concurrency: int | None) -> None:
        self._silent_calls = min(SILENT_CALLS, concurrency or SILENT_CALLS)
        self._waiting: dict[Permit, None] = {}
        self._usual: dict[str, _Usual] = {}
        self._warned_at = -WARN_AGAIN_S

    def begin(self, permit: Permit) -> None:
        """Record a call that begins."""
        self._waiting[permit] = None

    def answered(self, permit: Permit, now: float) -> None:
        """Record an answer of any kind to a call."""
        if self._waiting.pop(permit, permit) is permit:
            return
        usual = self._usual.get(permit.model)
        if usual is None:
            if len(self._usual) >= _MAX_MODELS:
                self._usual.clear()
            usual = self._usual[permit.model] = _Usual(0.0, now, deque(maxlen=SILENT_CALLS))
        usual.longest_s = max(now - permit.began_at, usual.longest_s * _KEPT)
        usual.answered_at = now
        usual.lost_at.clear()

    def end(self, permit: Permit, now: float) -> None:
        """Record the end of a call, which may have got no answer."""
        if self._waiting.pop(permit, permit) is not permit and (usual := self._usual.get(permit.model)):
            usual.lost_at.append(now)

    def is_silent(self, model: str, now: float) -> bool:
        """Return whether some calls for a model got no answer for far longer than usual, and no other one did."""
        usual = self._usual.get(model)
        if usual is None:
            return False
        longest_s = max(usual.longest_s * SILENT_FACTOR, MIN_SILENT_S)
        if now - usual.answered_at <= longest_s:
            return False
        lost = sum(at > now - LOST_FOR_S for at in usual.lost_at)
        late = sum(permit.model == model and now - permit.began_at > longest_s for permit in self._waiting)
        return lost + late >= self._silent_calls

    def silent_model(self, now: float) -> str | None:
        """Return a model for which the channel is silent, None without one."""
        return next((model for model in self._usual if self.is_silent(model, now)), None)

    def warns(self, now: float) -> bool:
        """Return whether to log a warning, which comes once in a while."""
        warns = now - self._warned_at >= WARN_AGAIN_S
        if warns:
            self._warned_at = now
        return warns
