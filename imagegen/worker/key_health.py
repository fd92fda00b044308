"""Health of one key among several: on trial, healthy, cooling after a rate limit, or out after a refusal. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass

from imagegen.backoff import doubled
from imagegen.errors import UpstreamError
from imagegen.tasks.retry import MAX_RETRY_AFTER_S
from imagegen.worker.circuit_breaker import WARN_AGAIN_S

TRIAL_S = 2.0
"""How long a key that was never accepted gets one call at once: refusals come within this time."""

PROBE_S = 5.0
"""Between the starts of two probes of a key that cools, and of a key that is out while no other is left."""

FIRST_PROBE_S = 0.5
"""Until the first probe of a key that cools while no other is left, after a rate limit without a time; each further
pause is twice as long, up to `PROBE_S`. The limit may be of one task alone."""

OUT_S, MAX_OUT_S = 300.0, 3600.0
"""Until the first probe of a key that is out while others work, and the longest time between two of them."""

REFUSED_MODELS = 2
"""Models with such a refusal as a 403, and no answered call between, after which the key itself is refused, not its use
of one model. A 401 is about the key at once. A refusal with words about a model or a prompt never is."""

NO_MODEL_S = 180.0
"""How long a key with which a model was not available gets no call for it while another one may have it.

A key that made an image of the model within this time has it: the refusal is about one request, such as an edit.
"""

REFUSED_TASKS = 2
"""Tasks of a model with such a refusal without a reason, and no answered call of the model between, after which the key
gets no call for the model: one of them may be about its prompt."""

MAX_MODELS = 200
LIMITED = "upstream_rate_limited"
NO_MODEL = "model_not_available"
KEY_REFUSALS = ("upstream_auth", "upstream_billing")

_UNAUTHORIZED = 401


@dataclass(eq=False, slots=True)
class Trouble:
    """Trouble that keeps calls from a key. Times are of one monotonic clock.

    state: `cooling` or `out`. error: the refusal. failures: refused probes. began_at: of the last probe.
    until: of the next probe; alone_until: of the next probe if no other key takes the call.
    """

    state: str
    error: UpstreamError
    began_at: float
    until: float
    alone_until: float
    probing: bool = False
    failures: int = 0

    def next_at(self, *, alone: bool) -> float:
        """Return when the next probe may begin; infinite while one runs.

        A refusal without a reason may be of the prompts, so it keeps no call from the last key.
        """
        if alone and self.error.unexplained:
            return self.began_at
        if self.probing:
            return math.inf
        return min(self.until, self.alone_until) if alone else self.until


Probes = tuple[Trouble, ...]
"""Troubles that a call probes; empty for a call that began before them."""


class KeyHealth:
    """When calls with a key may begin, and what their ends change. used_at: start of the last call, monotonic."""

    def __init__(self) -> None:
        self.used_at = -math.inf
        self.in_flight = 0
        self._accepted = False
        self._tried_at: float | None = None
        self._trouble: Trouble | None = None
        self._models: dict[str, Trouble] = {}
        self._forbidden = 0
        self._refusals: dict[str, int] = {}
        self._warned_at = -math.inf
        self._lacked_until: dict[str, float] = {}
        self._made_until: dict[str, float] = {}

    def record_made(self, model: str, now: float) -> None:
        """Record that the provider made an image of a model."""
        _put(self._made_until, model, now + NO_MODEL_S)

    def may_have(self, model: str, now: float) -> bool:
        """Return whether the provider made an image of a model in the last minutes, or did not refuse it."""
        return self._made_until.get(model, now) > now or not self.lacks(model, now)

    def record_refused_model(self, model: str, now: float) -> None:
        """Record that the provider does not have a model."""
        _put(self._lacked_until, model, now + NO_MODEL_S)

    def lacks(self, model: str, now: float) -> bool:
        """Return whether the provider refused a model in the last minutes, since it does not have it."""
        return self._lacked_until.get(model, now) > now

    def trouble(self, model: str | None = None) -> Trouble | None:
        """Return what keeps calls for a model, or for any if None, from this key."""
        if self._trouble or not self._models:
            return self._trouble
        return self._models.get(model) if model is not None else next(iter(self._models.values()))

    def next_at(self, model: str, now: float, *, alone: bool) -> float:
        """Return when a call may begin: `now` or later; infinite while a running call decides that.

        alone: whether no healthy key could take the call.
        """
        if (trouble := self.trouble(model)) is not None:
            return max(now, trouble.next_at(alone=alone))
        if self._accepted or not self.in_flight or self._tried_at is None:
            return now
        return max(now, self._tried_at + TRIAL_S)

    def enter(self, model: str, now: float) -> Probes:
        """Count a call that begins; return what it probes."""
        self.used_at = now
        self.in_flight += 1
        if self._tried_at is None:
            self._tried_at = now
        trouble = self.trouble(model)
        if trouble is None:
            return ()
        trouble.probing, trouble.began_at = True, now
        trouble.until = trouble.alone_until = max(trouble.until, now + PROBE_S)
        return (trouble,)

    def leave(self, probes: Probes) -> None:
        """Count a call that has ended."""
        self.in_flight -= 1
        for trouble in probes:
            trouble.probing = False

    def warns(self, now: float) -> bool:
        """Return whether to log a warning: a rate limit that comes and goes is logged once in a while."""
        if now - self._warned_at < WARN_AGAIN_S:
            return False
        self._warned_at = now
        return True

    def accepted(self, model: str, probes: Probes) -> None:
        """Record a call that was not refused for its key."""
        self._accepted, self._forbidden = True, 0
        self._refusals.pop(model, None)
        for trouble in probes:
            if self._trouble is trouble:
                self._trouble = None
            elif self._models.get(model) is trouble:
                del self._models[model]

    def limited(self, now: float, error: UpstreamError, probes: Probes) -> bool:
        """Record a rate limit. Return whether this is new."""
        wait_s = PROBE_S if error.retry_after_s is None else min(error.retry_after_s, MAX_RETRY_AFTER_S)
        trouble = self._trouble
        if trouble is not None and trouble not in probes:  # this call began before the trouble
            if trouble.state == "cooling":
                trouble.until = max(trouble.until, now + wait_s)
                if error.retry_after_s is not None:
                    trouble.alone_until = max(trouble.alone_until, now + wait_s)
            return False
        failures = trouble.failures + 1 if trouble is not None and trouble.state == "cooling" else 0
        until = max(now + wait_s, (trouble.began_at if trouble else now) + PROBE_S)
        alone_until = until if trouble else now + wait_s
        if error.retry_after_s is None:
            alone_until = now + doubled(FIRST_PROBE_S, failures, PROBE_S)
        self._trouble = Trouble("cooling", error, now, until, alone_until, failures=failures)
        return trouble is None

    def pause(self, now: float, for_s: float, probes: Probes) -> None:
        """Let the key rest as the headers of an answered call require."""
        if self._trouble is None or self._trouble in probes:
            until = now + min(for_s, MAX_RETRY_AFTER_S)
            error = UpstreamError(LIMITED, "the provider's window is used up", retryable=True)
            self._trouble = Trouble("cooling", error, now, until, until)

    def refused(self, now: float, model: str, error: UpstreamError, probes: Probes) -> None:
        """Record a refusal of the key or of its account."""
        current = self.trouble(model)
        if current is not None and current.state == "out" and current not in probes:
            return  # this call began before the key was out
        if current is None and self._may_be_of_prompt(model, error):
            return
        failures = current.failures + 1 if current is not None and current.state == "out" else 0
        trouble = Trouble(
            "out", error, now, now + doubled(OUT_S, failures, MAX_OUT_S), now + PROBE_S, failures=failures
        )
        if error.of_model or (error.status != _UNAUTHORIZED and error.code == "upstream_auth"):
            self._forbidden += not error.of_model and model not in self._models
            if self._forbidden < REFUSED_MODELS and self._trouble is None:
                if len(self._models) >= MAX_MODELS:
                    self._models.clear()
                self._models[model] = trouble
                return
        self._models.clear()
        self._trouble = trouble

    def _may_be_of_prompt(self, model: str, error: UpstreamError) -> bool:
        """Count a refusal without a reason; return whether it may be about one prompt, so that the key goes on."""
        if not error.unexplained:
            return False
        if len(self._refusals) >= MAX_MODELS:
            self._refusals.clear()
        self._refusals[model] = self._refusals.get(model, 0) + 1
        return self._refusals[model] < REFUSED_TASKS


def _put(times: dict[str, float], model: str, until: float) -> None:
    if len(times) >= MAX_MODELS:
        times.clear()
    times[model] = until
