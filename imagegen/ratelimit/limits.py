"""Owns rate limits: the one file that knows aiohttp-ratelimiter, and what a client is told about its budget.

The package's decorator and rule grammar are used as they are. Its window is replaced: the decorator asks `test()`, then
`hit()`, and drops what `hit()` says, so that requests at one moment are all admitted. Here `test()` is the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from aiohttplimiter import Limiter
from limits.aio.strategies import MovingWindowRateLimiter

from imagegen.errors import RateLimited, TaskNotFound
from imagegen.ratelimit.stores import LimitState, LocalRateLimitStore, Window


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may do in `window_s` seconds: requests, and generations among them; 0 sets no limit."""

    general: int
    generation: int
    window_s: float


class Admission(NamedTuple):
    """How many generations of a batch are paid for, and when more can be (0 where all are)."""

    admitted: int
    retry_after_s: int


class _Rule(NamedTuple):
    name: str
    limit: int
    window_s: float

    @property
    def policy(self) -> str:
        return f'"{self.name}";q={self.limit};w={math.ceil(self.window_s)}'

    def window(self, client: str) -> Window:
        return Window(f"{self.name}:{client}", self.limit, self.window_s)


@dataclass(frozen=True, slots=True)
class _LimitResult:
    """What one request was told: its rules and their standings."""

    rules: Sequence[_Rule]
    states: Sequence[LimitState]

    @property
    def retry_s(self) -> float:
        return max(standing.retry_s for standing in self.states)

    def after(self, earlier: _LimitResult | None) -> _LimitResult:
        """Both, where one request is asked for two budgets one after the other."""
        if earlier is None:
            return self
        return _LimitResult((*earlier.rules, *self.rules), (*earlier.states, *self.states))


_BUDGET = web.RequestKey("rate_budget", _LimitResult)
_current_request: ContextVar[web.Request] = ContextVar("rate_limited_request")


class RateLimits:
    """Wraps handlers so that a client's budget is asked first. Where a rule is off it costs nothing.

    identify: whose budget it is, say the name of the key, else the address.
    """

    def __init__(self, limits: Limits, port: LocalRateLimitStore, identify: Callable[[web.Request], str]) -> None:
        self._store = port
        self._identify = identify
        self._general = _rules("general", limits.general, limits.window_s)
        self._misses = _rules("misses", limits.general, limits.window_s)
        self._generation = _rules("generation", limits.generation, limits.window_s)

    def use(self, port: LocalRateLimitStore) -> None:
        """Counts there from now on, in Redis say, which is not connected when the routes are made."""
        self._store = port

    def install(self, app: web.Application) -> None:
        """Put the headers of the budget on every limited answer, event streams too."""
        if self._general or self._generation:
            app.on_response_prepare.append(_add_headers)

    def general(self, handler: Handler) -> Handler:
        """For every route of `/api` and `/v1` that counts."""
        return self._limited(handler, "general", self._general)

    def generation(self, handler: Handler) -> Handler:
        """For the POST of one generation: both rules in one step, and a refused request spends from neither."""
        return self._limited(handler, "generation", self._general + self._generation)

    def misses(self, handler: Handler, is_free: Callable[[web.Request], bool]) -> Handler:
        """For a route that counts only if it finds nothing, in this process alone: no miss costs a command for that.

        is_free: whether a request costs no Redis command, and is never refused beforehand.
        """
        if not self._general:
            return handler

        async def handle(request: web.Request) -> web.StreamResponse:
            if not is_free(request):
                self._check_misses(request)
            try:
                return await handler(request)
            except TaskNotFound:
                self._count_miss(request)
                raise

        return handle

    def _check_misses(self, request: web.Request) -> None:
        rules = self._misses
        standings = self._store.hit_sync([rule.window(self._identify(request)) for rule in rules], 0)
        if standings[0].remaining <= 0:
            request[_BUDGET] = _LimitResult(rules, [standings[0]._replace(retry_s=standings[0].reset_s)])
            _refuse(request, None)

    def _count_miss(self, request: web.Request) -> None:
        """Count a miss. A client whose limit is used up gets that answer and not the 404."""
        client = self._identify(request)
        self._store.hit_sync([rule.window(client) for rule in self._misses], 1)
        standings = self._store.hit_sync([rule.window(client) for rule in self._general], 1)
        request[_BUDGET] = budget = _LimitResult(self._general, standings)
        if budget.retry_s > 0:
            _refuse(request, None)

    async def admit(self, request: web.Request, wanted: int) -> Admission:
        """Pay for up to `wanted` generations of a batch (1 at least); those over the limit spend nothing."""
        if not self._generation:
            return Admission(wanted, 0)
        client, before, left = self._identify(request), request.get(_BUDGET), wanted
        while left > 0:
            budget = await self._hit_store(self._generation, client, left)
            request[_BUDGET] = budget.after(before)
            standing = budget.states[0]
            if standing.retry_s <= 0:
                break
            left = min(standing.remaining, left - 1)
        return Admission(left, 0 if left == wanted else _whole_seconds(request[_BUDGET].states[-1].reset_s))

    def _limited(self, handler: Handler, kind: str, rules: tuple[_Rule, ...]) -> Handler:
        if not rules:
            return handler
        limiter = Limiter(keyfunc=self._name_client, error_handler=_refuse)
        limiter.moving_window = _SingleStepStrategy(limiter.db, self._hit_store, rules)
        strictest = rules[-1]
        text = f"{strictest.limit} per {_whole_seconds(strictest.window_s)} second"
        limited: Handler = limiter.limit(text, path_id=kind)(handler)
        return limited

    def _name_client(self, request: web.Request) -> str:
        _current_request.set(request)
        return self._identify(request)

    async def _hit_store(self, rules: Sequence[_Rule], client: str, cost: int) -> _LimitResult:
        standings = await self._store.hit([rule.window(client) for rule in rules], cost)
        return _LimitResult(rules, [LimitState(*standing) for standing in standings])


RATE_LIMITS = web.AppKey("rates", RateLimits)


class _SingleStepStrategy(MovingWindowRateLimiter):
    """Decides in `test()` and leaves nothing for `hit()`."""

    def __init__(
        self, storage: Any, ask: Callable[[Sequence[_Rule], str, int], Awaitable[_LimitResult]], rules: Sequence[_Rule]
    ) -> None:
        super().__init__(storage)
        self._hit_store = ask
        self._rules = rules

    async def test(self, item: Any, *identifiers: str, cost: int = 1) -> bool:  # noqa: ARG002 - the item is of one rule
        client = identifiers[0].rpartition(":")[0]
        budget = await self._hit_store(self._rules, client, cost)
        _current_request.get()[_BUDGET] = budget
        return budget.retry_s <= 0

    async def hit(self, item: Any, *identifiers: str, cost: int = 1) -> bool:  # noqa: ARG002
        return True


def _rules(name: str, limit: int, window_s: float) -> tuple[_Rule, ...]:
    return (_Rule(name, limit, window_s),) if limit > 0 else ()


def _refuse(request: web.Request, _exceeded: object) -> NoReturn:
    raise RateLimited(headers={hdrs.RETRY_AFTER: str(_whole_seconds(request[_BUDGET].retry_s))})


def _whole_seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    budget = request.get(_BUDGET)
    if budget is None:
        return
    pairs = list(zip(budget.rules, budget.states, strict=True))
    headers = response.headers
    headers["RateLimit-Policy"] = ", ".join(rule.policy for rule, _ in pairs)
    headers["RateLimit"] = ", ".join(
        f'"{rule.name}";r={max(0, standing.remaining)};t={math.ceil(standing.reset_s)}' for rule, standing in pairs
    )
    rule, tightest = min(pairs, key=lambda pair: (-pair[1].retry_s, pair[1].remaining))
    headers["X-RateLimit-Limit"] = str(rule.limit)
    headers["X-RateLimit-Remaining"] = str(max(0, tightest.remaining))
    headers["X-RateLimit-Reset"] = str(math.ceil(tightest.reset_s))
