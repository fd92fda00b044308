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
from functools import partial
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


class OwnLimits(NamedTuple):
    """Limits a minute that one client has in place of the others'; None: the others' count."""

    general: int | None
    generation: int | None


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


MINUTE_S = 60.0

_UNUSED_RULE = "1 per 1 second"
"""The package requires one; the strategy takes its rules from the request's client."""

_BUDGET = web.RequestKey("rate_budget", _LimitResult)
_current_request: ContextVar[web.Request] = ContextVar("rate_limited_request")


class RateLimits:
    """Wrapper of handlers that checks a client's limits first. A rule that is off costs nothing.

    identify: returns the client, by its key or its address. own_limits: returns those that it has in place of the
    others'; None if no client has any.
    """

    def __init__(
        self,
        limits: Limits,
        port: LocalRateLimitStore,
        identify: Callable[[web.Request], str],
        own_limits: Callable[[web.Request], OwnLimits | None] | None = None,
    ) -> None:
        self._store = port
        self._identify = identify
        self._own_limits = own_limits
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
        return self._limited(handler, "general")

    def generation(self, handler: Handler) -> Handler:
        """Wrap the POST of one generation: both rules are one step, and a refused request spends from neither."""
        return self._limited(handler, "generation")

    def misses(self, handler: Handler, is_free: Callable[[web.Request], bool]) -> Handler:
        """Wrap a handler that counts only if it finds nothing. Misses are counted here, without Redis commands.

        is_free: whether a request finds its task without a Redis command, and is never refused beforehand.
        """
        if not self._general and self._own_limits is None:
            return handler

        async def handle(request: web.Request) -> web.StreamResponse:
            if not self._rules_of(request, "misses"):
                return await handler(request)
            if not is_free(request):
                self._check_misses(request)
            try:
                return await handler(request)
            except TaskNotFound:
                self._count_miss(request)
                raise

        return handle

    def _check_misses(self, request: web.Request) -> None:
        rules = self._rules_of(request, "misses")
        states = self._store.hit_sync([rule.window(self._identify(request)) for rule in rules], 0)
        if states[0].remaining <= 0:
            request[_BUDGET] = _LimitResult(rules, [states[0]._replace(retry_s=states[0].reset_s)])
            _refuse(request, None)

    def _count_miss(self, request: web.Request) -> None:
        """Count a miss. A client over its limit gets a 429 instead of the 404."""
        client, general = self._identify(request), self._rules_of(request, "general")
        self._store.hit_sync([rule.window(client) for rule in self._rules_of(request, "misses")], 1)
        self._count_here(request, client, general)

    def count_unauthorized(self, request: web.Request, address: str) -> None:
        """Count a request without a valid key, by its address. One over the limit gets a 429 instead of the 401."""
        if self._general:
            self._count_here(request, address, self._general)

    def _count_here(self, request: web.Request, client: str, rules: Sequence[_Rule]) -> None:
        """Count without a Redis command. Raises RateLimited."""
        states = self._store.hit_sync([rule.window(client) for rule in rules], 1)
        request[_BUDGET] = budget = _LimitResult(rules, states)
        if budget.retry_s > 0:
            _refuse(request, None)

    async def admit(self, request: web.Request, wanted: int) -> Admission:
        """Pay for up to `wanted` generations of a batch (1 at least); those over the limit spend nothing."""
        rules = self._rules_of(request, "entries")
        if not rules:
            return Admission(wanted, 0)
        client, before, admitted = self._identify(request), request.get(_BUDGET), wanted
        while admitted > 0:
            budget = await self._hit_store(rules, client, admitted)
            request[_BUDGET] = budget.after(before)
            state = budget.states[0]
            if state.retry_s <= 0:
                break
            admitted = min(state.remaining, admitted - 1)
        return Admission(admitted, 0 if admitted == wanted else _whole_seconds(request[_BUDGET].states[-1].reset_s))

    def _limited(self, handler: Handler, kind: str) -> Handler:
        rules = self._default_rules(kind)
        if not rules and self._own_limits is None:
            return handler
        limiter = Limiter(keyfunc=self._name_client, error_handler=_refuse)
        limiter.moving_window = _SingleStepStrategy(limiter.db, self._hit_store, partial(self._rules_of, kind=kind))
        limited: Handler = limiter.limit(_UNUSED_RULE, path_id=kind)(handler)
        if rules:
            return limited

        async def handle(request: web.Request) -> web.StreamResponse:
            """Limit only clients with limits of their own; no hook adds the headers."""
            if not self._rules_of(request, kind):
                return await handler(request)
            response = await limited(request)
            if not response.prepared:
                await _add_headers(request, response)
            return response

        return handle

    def _default_rules(self, kind: str) -> tuple[_Rule, ...]:
        match kind:
            case "general":
                return self._general
            case "misses":
                return self._misses
            case "entries":
                return self._generation
            case _:
                return self._general + self._generation

    def _rules_of(self, request: web.Request, kind: str) -> tuple[_Rule, ...]:
        """Return the rules for a client: its own ones in place of those with the same name."""
        rules = self._default_rules(kind)
        own = self._own_limits(request) if self._own_limits is not None else None
        if own is None:
            return rules
        limits = {"general": own.general, "misses": own.general, "generation": own.generation}
        names = {"generation": ("general", "generation"), "entries": ("generation",)}.get(kind, (kind,))
        by_name = {rule.name: rule for rule in rules}
        by_name |= {name: _Rule(name, limit, MINUTE_S) for name in names if (limit := limits[name]) is not None}
        return tuple(by_name[name] for name in names if name in by_name)

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
        rules_of: Callable[[web.Request], Sequence[_Rule]],
    ) -> None:
        super().__init__(storage)
        self._hit_store = hit_store
        self._rules_of = rules_of

    async def test(self, item: Any, *identifiers: str, cost: int = 1) -> bool:  # noqa: ARG002 - the item is no rule of ours
        client, request = identifiers[0].rpartition(":")[0], _current_request.get()
        budget = await self._hit_store(self._rules_of(request), client, cost)
        request[_BUDGET] = budget
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
