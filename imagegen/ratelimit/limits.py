"""Rate limits of handlers by aiohttp-ratelimiter, and the headers that show them to clients.

The package's decorator and rule grammar are used unchanged. Its window is replaced: the decorator calls `test()`, then
`hit()`, and ignores the result of `hit()`, so that it admits all simultaneous requests. Here `test()` is the whole
step.
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
    """Limits of a client in `window_s` seconds: requests, and generations among them; 0 sets no limit."""

    general: int
    generation: int
    window_s: float


class Admission(NamedTuple):
    """Number of generations of a batch that are admitted, and seconds until more can be (0 if all are)."""

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
    """Rules of one request and their states after it."""

    rules: Sequence[_Rule]
    states: Sequence[LimitState]

    @property
    def retry_s(self) -> float:
        return max(state.retry_s for state in self.states)

    def after(self, earlier: _LimitResult | None) -> _LimitResult:
        """Return both results, if one request counts against two rules one after the other."""
        if earlier is None:
            return self
        return _LimitResult((*earlier.rules, *self.rules), (*earlier.states, *self.states))


_BUDGET = web.RequestKey("rate_budget", _LimitResult)
_current_request: ContextVar[web.Request] = ContextVar("rate_limited_request")


class RateLimits:
    """Wrapper of handlers that checks a client's limits first. A rule that is off costs nothing.

    identify: returns the client, by its key or its address.
    """

    def __init__(self, limits: Limits, port: LocalRateLimitStore, identify: Callable[[web.Request], str]) -> None:
        self._store = port
        self._identify = identify
        self._general = _rules("general", limits.general, limits.window_s)
        self._misses = _rules("misses", limits.general, limits.window_s)
        self._generation = _rules("generation", limits.generation, limits.window_s)

    def use(self, port: LocalRateLimitStore) -> None:
        """Count in another store from now on, such as Redis, which is not connected when the routes are made."""
        self._store = port

    def install(self, app: web.Application) -> None:
        """Put the headers of the budget on every limited answer, event streams too."""
        if self._general or self._generation:
            app.on_response_prepare.append(_add_headers)

    def general(self, handler: Handler) -> Handler:
        """Wrap a handler that counts against the general limit."""
        return self._limited(handler, "general", self._general)

    def generation(self, handler: Handler) -> Handler:
        """Wrap the POST of one generation: both rules are one step, and a refused request spends from neither."""
        return self._limited(handler, "generation", self._general + self._generation)

    def misses(self, handler: Handler, is_free: Callable[[web.Request], bool]) -> Handler:
        """Wrap a handler that counts only if it finds nothing. Misses are counted here, without Redis commands.

        is_free: whether a request finds its task without a Redis command, and is never refused beforehand.
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
        states = self._store.hit_sync([rule.window(self._identify(request)) for rule in rules], 0)
        if states[0].remaining <= 0:
            request[_BUDGET] = _LimitResult(rules, [states[0]._replace(retry_s=states[0].reset_s)])
            _refuse(request, None)

    def _count_miss(self, request: web.Request) -> None:
        """Count a miss. A client over its limit gets a 429 instead of the 404."""
        client = self._identify(request)
        self._store.hit_sync([rule.window(client) for rule in self._misses], 1)
        states = self._store.hit_sync([rule.window(client) for rule in self._general], 1)
        request[_BUDGET] = budget = _LimitResult(self._general, states)
        if budget.retry_s > 0:
            _refuse(request, None)

    async def admit(self, request: web.Request, wanted: int) -> Admission:
        """Pay for up to `wanted` generations of a batch (1 at least); those over the limit spend nothing."""
        if not self._generation:
            return Admission(wanted, 0)
        client, before, admitted = self._identify(request), request.get(_BUDGET), wanted
        while admitted > 0:
            budget = await self._hit_store(self._generation, client, admitted)
            request[_BUDGET] = budget.after(before)
            state = budget.states[0]
            if state.retry_s <= 0:
                break
            admitted = min(state.remaining, admitted - 1)
        return Admission(admitted, 0 if admitted == wanted else _whole_seconds(request[_BUDGET].states[-1].reset_s))

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
        states = await self._store.hit([rule.window(client) for rule in rules], cost)
        return _LimitResult(rules, states)


RATE_LIMITS = web.AppKey("rates", RateLimits)


class _SingleStepStrategy(MovingWindowRateLimiter):
    """Strategy that counts in `test()`; `hit()` does nothing."""

    def __init__(
        self,
        storage: Any,
        hit_store: Callable[[Sequence[_Rule], str, int], Awaitable[_LimitResult]],
        rules: Sequence[_Rule],
    ) -> None:
        super().__init__(storage)
        self._hit_store = hit_store
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
        f'"{rule.name}";r={max(0, state.remaining)};t={math.ceil(state.reset_s)}' for rule, state in pairs
    )
    rule, tightest = min(pairs, key=lambda pair: (-pair[1].retry_s, pair[1].remaining))
    headers["X-RateLimit-Limit"] = str(rule.limit)
    headers["X-RateLimit-Remaining"] = str(max(0, tightest.remaining))
    headers["X-RateLimit-Reset"] = str(math.ceil(tightest.reset_s))
