"""Rate limits of handlers by aiohttp-ratelimiter, and the headers that show them to clients.

The package's decorator and rule grammar are used unchanged. Its window is replaced: the decorator calls `test()`, then
`hit()`, and ignores the result of `hit()`, so that it admits all simultaneous requests. Here `test()` is the whole
step.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from ipaddress import IPv6Network
from typing import Any, NamedTuple, NoReturn

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from aiohttplimiter import Limiter
from limits.aio.strategies import MovingWindowRateLimiter
from msgspec import Struct

from imagegen.errors import RateLimited, TaskNotFound
from imagegen.ratelimit.stores import LimitState, LocalRateLimitStore, Window


class Limits(Struct, frozen=True):
    """Limits of a client in `window_s` seconds: requests, generations among them, and units; 0 sets no limit.

    units: of 512 x 512 pixels, see `GenerationRequest.units`. units_per_generation: those of a client with a separate
    limit of generations; 0: the same as for all others.
    """

    general: int
    generation: int
    window_s: float
    units: int = 0
    units_per_generation: int = 0


class OwnLimits(NamedTuple):
    """Limits a minute that one client has in place of the others'; None: the others' count."""

    general: int | None
    generation: int | None


OWN_LIMITS = web.RequestKey("own_limits", OwnLimits)
"""Of a request by a client that has some."""


class Admission(NamedTuple):
    """Number of generations of a batch that are admitted, and seconds until more can be (0 if all are)."""

    admitted: int
    retry_after_s: int


class Allowance(NamedTuple):
    """Allowance for a generation at this moment.

    calls: further generations in the window, None without a limit. retry_after_s: seconds until the next one, 0 if now.
    """

    calls: int | None
    retry_after_s: int


class _Rule(NamedTuple):
    name: str
    limit: int
    window_s: float

    @property
    def policy(self) -> str:
        return f'"{self.name}";q={self.limit};w={math.ceil(self.window_s)}'


_Rules = tuple[_Rule, ...]
_Budget = dict[_Rule, LimitState]
"""State after a request of each rule that it counted against; that of the strictest of the client's networks."""

MINUTE_S = 60.0

_UNUSED_RULE = "1 per 1 second"
"""The package requires one; the strategy takes its rules from the request's client."""

_BUDGET = web.RequestKey[_Budget]("rate_budget")
_current_request: ContextVar[web.Request] = ContextVar("rate_limited_request")

_WIDER_NETWORKS = ((56, 2), (48, 4))
"""Prefix lengths of IPv6 networks around a /64 that one customer may have, and how many times its limit each has."""


@lru_cache(maxsize=4096)
def networks(client: str) -> tuple[tuple[str, int], ...]:
    """Return a client, and the wider networks of an IPv6 client; each with the factor of its limit."""
    try:
        network = IPv6Network(client)
    except ValueError:
        return ((client, 1),)
    wider = ((network.supernet(new_prefix=length), factor) for length, factor in _WIDER_NETWORKS)
    return ((client, 1), *((str(net), factor) for net, factor in wider))


@lru_cache(maxsize=4096)
def _windows(rules: _Rules, client: str) -> tuple[Window, ...]:
    """Return the windows of all networks of a client, all of which a hit spends from; those of a rule in a row."""
    return tuple(
        Window(f"{rule.name}:{network}", rule.limit * factor, rule.window_s)
        for rule in rules
        for network, factor in networks(client)
    )


class LimitedHandler(NamedTuple):
    """Handler of a route for all clients, and the one for requests with `OWN_LIMITS`, if others have none."""

    shared: Handler
    own: Handler


class RateLimits:
    """Wrapper of handlers that checks a client's limits first. A rule that is off costs nothing.

    identify: returns the client, by its key or its address.
    limits_units: whether there is a limit of units for all clients.
    """

    def __init__(self, limits: Limits, store: LocalRateLimitStore, identify: Callable[[web.Request], str]) -> None:
        self._store = store
        self._identify = identify
        self._general = _rules("general", limits.general, limits.window_s)
        self._misses = _rules("misses", limits.general, limits.window_s)
        self._generation = _rules("generation", limits.generation, limits.window_s)
        self._units = _rules("units", limits.units, limits.window_s)
        self._units_per_generation = limits.units_per_generation
        self._limits = {kind: self._decorator(kind) for kind in ("general", "generation")}
        self.limits_units = bool(self._units)

    def use(self, store: LocalRateLimitStore) -> None:
        """Count in another store from now on, such as Redis, which is not connected when the routes are made."""
        self._store = store

    def install(self, app: web.Application) -> None:
        """Put the headers of the budget on every limited answer, event streams too."""
        if self._general or self._generation or self._units:
            app.on_response_prepare.append(_add_headers)

    def general(self, handler: Handler) -> LimitedHandler:
        """Wrap a handler that counts against the general limit."""
        return self._limited(handler, "general")

    def generation(self, handler: Handler) -> LimitedHandler:
        """Wrap the POST of one generation: both rules are one step, and a refused request spends from neither."""
        return self._limited(handler, "generation")

    def misses(self, handler: Handler, is_free: Callable[[web.Request], bool]) -> LimitedHandler:
        """Wrap a handler that counts only if it finds nothing. Misses are counted here, without Redis commands.

        is_free: whether a request finds its task without a Redis command, and is never refused beforehand.
        """

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

        return LimitedHandler(handle if self._general else handler, handle)

    def _check_misses(self, request: web.Request) -> None:
        rules = self._rules_of(request, "misses")
        states = self._hit_here(rules, self._identify(request), 0)
        if states[0].remaining <= 0:
            _add_states(request, rules, [states[0]._replace(retry_s=states[0].reset_s)])
            _refuse(request, None)

    def _count_miss(self, request: web.Request) -> None:
        """Count a miss. A client over its limit gets a 429 instead of the 404."""
        client, general = self._identify(request), self._rules_of(request, "general")
        self._hit_here(self._rules_of(request, "misses"), client, 1)
        self._count_here(request, client, general)

    def count_unauthorized(self, request: web.Request, address: str) -> None:
        """Count a request without a valid key, by its address. One over the limit gets a 429 instead of the 401."""
        if self._general:
            self._count_here(request, address, self._general)

    def _count_here(self, request: web.Request, client: str, rules: _Rules) -> None:
        """Count without a Redis command. Raises RateLimited."""
        states = self._hit_here(rules, client, 1)
        _add_states(request, rules, states)
        if any(state.retry_s > 0 for state in states):
            _refuse(request, None)

    async def admit(self, request: web.Request, wanted: int) -> Admission:
        """Pay for up to `wanted` generations of a batch (1 at least); those over the limit spend nothing."""
        rules = self._rules_of(request, "entries")
        if not rules:
            return Admission(wanted, 0)
        client, admitted = self._identify(request), wanted
        while True:
            (state,) = await self._hit(request, rules, client, admitted)
            if state.retry_s <= 0:
                break
            admitted = max(min(state.remaining, admitted - 1), 0)
            if not admitted:
                break
        return Admission(admitted, 0 if admitted == wanted else _whole_seconds(state.reset_s))

    async def peek(self, request: web.Request, units: int) -> Allowance:
        """Return what the limits would admit now of a generation with these units. Nothing is counted."""
        calls, retry_s = [], 0.0
        for kind, cost in (("generation", 1), ("units", units)):
            rules = self._rules_of(request, kind)
            if not rules:
                continue
            windows = _windows(rules, self._identify(request))
            for rule, state in zip(rules, _by_rule(rules, await self._store.hit(windows, 0)), strict=True):
                if kind == "generation":
                    calls.append(max(state.remaining, 0))
                if state.remaining < min(cost, rule.limit):
                    retry_s = max(retry_s, state.reset_s)
        return Allowance(min(calls, default=None), _whole_seconds(retry_s) if retry_s else 0)

    async def spend_call(self, request: web.Request, kind: str) -> None:
        """Count a request of a route of many calls as one of `general` or `generation`. Raises RateLimited."""
        rules = self._rules_of(request, kind)
        if not rules:
            return
        states = await self._hit(request, rules, self._identify(request), 1)
        if (retry_s := max(state.retry_s for state in states)) > 0:
            raise _refusal(request, retry_s)

    async def spend_units(self, request: web.Request, units: int) -> None:
        """Spend the units of one generation; of one over the whole limit, the whole limit. Raises RateLimited."""
        rules = self._rules_of(request, "units")
        if not rules:
            return
        (state,) = await self._hit(request, rules, self._identify(request), min(units, rules[0].limit))
        if state.retry_s > 0:
            raise _refusal(request, state.retry_s)

    def _limited(self, handler: Handler, kind: str) -> LimitedHandler:
        limited = self._limits[kind](handler)
        if self._default_rules(kind):
            return LimitedHandler(limited, limited)

        async def handle(request: web.Request) -> web.StreamResponse:
            """Limit a client with its own limits; no hook adds the headers."""
            if not self._rules_of(request, kind):
                return await handler(request)
            response = await limited(request)
            if not response.prepared:
                await _add_headers(request, response)
            return response

        return LimitedHandler(handler, handle)

    def _decorator(self, kind: str) -> Callable[[Handler], Handler]:
        """Return the decorator that counts the requests of all handlers of a kind."""
        limiter = Limiter(keyfunc=self._name_client, error_handler=_refuse)
        limiter.moving_window = _SingleStepStrategy(limiter.db, self._hit, partial(self._rules_of, kind=kind))
        decorate: Callable[[Handler], Handler] = limiter.limit(_UNUSED_RULE, path_id=kind)
        return decorate

    def _default_rules(self, kind: str) -> tuple[_Rule, ...]:
        match kind:
            case "general":
                return self._general
            case "misses":
                return self._misses
            case "entries":
                return self._generation
            case "units":
                return self._units
            case _:
                return self._general + self._generation

    def _rules_of(self, request: web.Request, kind: str) -> tuple[_Rule, ...]:
        """Return the rules for a client: its own ones in place of those with the same name."""
        rules = self._default_rules(kind)
        own = request.get(OWN_LIMITS)
        if own is None:
            return rules
        limits = {"general": own.general, "misses": own.general, "generation": own.generation}
        if own.generation is not None and self._units_per_generation:
            limits["units"] = own.generation * self._units_per_generation
        names = {"generation": ("general", "generation"), "entries": ("generation",)}.get(kind, (kind,))
        by_name = {rule.name: rule for rule in rules}
        by_name |= {name: _Rule(name, limit, MINUTE_S) for name in names if (limit := limits.get(name)) is not None}
        return tuple(by_name[name] for name in names if name in by_name)

    def _name_client(self, request: web.Request) -> str:
        _current_request.set(request)
        return self._identify(request)

    async def _hit(self, request: web.Request, rules: _Rules, client: str, cost: int) -> Sequence[LimitState]:
        """Spend from all windows of the rules, or from none. Return the state of each rule, which `_BUDGET` has too."""
        states = _by_rule(rules, await self._store.hit(_windows(rules, client), cost))
        _add_states(request, rules, states)
        return states

    def _hit_here(self, rules: _Rules, client: str, cost: int) -> Sequence[LimitState]:
        """Spend in this process alone; a cost of 0 only looks. Return the state of each rule."""
        return _by_rule(rules, self._store.hit_sync(_windows(rules, client), cost))


RATE_LIMITS = web.AppKey("rates", RateLimits)


class _SingleStepStrategy(MovingWindowRateLimiter):
    """Strategy that counts in `test()`; `hit()` does nothing."""

    def __init__(
        self,
        storage: Any,
        hit: Callable[[web.Request, _Rules, str, int], Awaitable[Sequence[LimitState]]],
        rules_of: Callable[[web.Request], _Rules],
    ) -> None:
        super().__init__(storage)
        self._hit = hit
        self._rules_of = rules_of

    async def test(self, item: Any, *identifiers: str, cost: int = 1) -> bool:  # noqa: ARG002 - the item is no rule of ours
        client, request = identifiers[0].rpartition(":")[0], _current_request.get()
        states = await self._hit(request, self._rules_of(request), client, cost)
        return all(state.retry_s <= 0 for state in states)

    async def hit(self, item: Any, *identifiers: str, cost: int = 1) -> bool:  # noqa: ARG002
        return True


def _rules(name: str, limit: int, window_s: float) -> tuple[_Rule, ...]:
    return (_Rule(name, limit, window_s),) if limit > 0 else ()


def _by_rule(rules: _Rules, states: Sequence[LimitState]) -> Sequence[LimitState]:
    """Return the strictest state of each rule. states: of the windows of all rules, of as many networks each."""
    if len(states) == len(rules):
        return states
    count = len(states) // len(rules)
    parts = (states[start : start + count] for start in range(0, len(states), count))
    return [max(part, key=lambda state: (state.retry_s, -state.remaining)) for part in parts]


def _add_states(request: web.Request, rules: _Rules, states: Sequence[LimitState]) -> None:
    budget = request.get(_BUDGET)
    if budget is None:
        request[_BUDGET] = budget = {}
    for rule, state in zip(rules, states):  # noqa: B905 - of the same length, and `strict` takes time
        budget[rule] = state


def _refuse(request: web.Request, _exceeded: object) -> NoReturn:
    raise _refusal(request, max(state.retry_s for state in request[_BUDGET].values()))


def _refusal(request: web.Request, retry_s: float) -> RateLimited:
    """Return the error with all headers of the budget: where all limits are a key's own, no hook adds them."""
    headers = {hdrs.RETRY_AFTER: str(_whole_seconds(retry_s))}
    return RateLimited(headers=headers | _headers(request[_BUDGET]))


def _whole_seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    budget = request.get(_BUDGET)
    if budget:
        response.headers.update(_headers(budget))


def _headers(budget: _Budget) -> dict[str, str]:
    rule, tightest = min(budget.items(), key=_scarcity)
    return {
        "RateLimit-Policy": ", ".join(rule.policy for rule in budget),
        "RateLimit": ", ".join(
            f'"{rule.name}";r={max(0, state.remaining)};t={math.ceil(state.reset_s)}' for rule, state in budget.items()
        ),
        "X-RateLimit-Limit": str(rule.limit),
        "X-RateLimit-Remaining": str(max(0, tightest.remaining)),
        "X-RateLimit-Reset": str(math.ceil(tightest.reset_s)),
    }


def _scarcity(pair: tuple[_Rule, LimitState]) -> tuple[float, bool, int]:
    """Return what sorts the rule that a client meets first to the front; units are no requests and come last."""
    rule, state = pair
    return -state.retry_s, rule.name == "units", state.remaining
