"""The client of a request, and the guard of all routes: who may call one.

That is decided before the rate limit of the route counts, and before its body is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler
from msgspec import Struct
from multidict import CIMultiDictProxy, istr

from imagegen.accounts.api_keys import ApiKey, secret_digest
from imagegen.accounts.key_store import KeyRing, KeyStore
from imagegen.errors import ExpectationFailed, QueueUnavailable, Unauthorized
from imagegen.ratelimit.limits import OWN_LIMITS, LimitedHandler, OwnLimits
from imagegen.tasks.clients import KEY_ID
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body_stream import AWAITS_CONTINUE
from imagegen.web.http.forwarded import TrustedHops, client_address
from imagegen.web.openapi.document import Operation

MAX_DROPPED_BYTES = 64 * 1024
"""The rest of a refused request's body up to this size is read and dropped; the connection of a larger one ends."""

X_API_KEY = istr("X-API-Key")

_RETRY_AFTER = "2"

_ADMIN_SCOPE = "(admin)"
"""No key has this name."""


class Client(Struct, frozen=True, gc=False):
    """Who sent a request.

    id: name by which limits, idempotency keys and repeated calls are kept: of its key, else its address.
    key: its API key, None without one. name: of the key, empty without one. scope: name of the key with all tasks that
    it sees; None if it sees the tasks that are shared. is_admin: it sees and may do everything.
    has_link: it has only a signed link of the request's path, which gives the tasks of this path.
    """

    id: str
    key: ApiKey | None = None
    name: str = ""
    scope: str | None = None
    is_admin: bool = False
    has_link: bool = False

    @classmethod
    def with_key(cls, key: ApiKey, *, owns_tasks: bool, has_link: bool = False) -> Self:
        """Return the client with a key. owns_tasks: whether it sees the tasks of its key alone."""
        return cls(KEY_ID + key.name, key, key.name, key.name if owns_tasks else None, has_link=has_link)

    @property
    def own_scope(self) -> str | None:
        """Scope of tasks that it alone sees; None without a key."""
        return _ADMIN_SCOPE if self.is_admin else self.name or None

    def may_see(self, scope: str | None) -> bool:
        """Return whether it may see the tasks of a scope."""
        if scope == self.scope or self.is_admin or self.has_link:
            return True
        return scope is not None and scope == self.name


CLIENT = web.RequestKey("client", Client)


class AccessRules(Struct, frozen=True):
    """Rules of the guard.

    Args:
        is_admin: returns whether a secret is the admin token.
        verify_link: returns whether a request for this path has a valid signature in its query.
        count_refusal: counts a refused request by its address; raises RateLimited over the limit.
        hops: see `forwarded.client_address`.
        own_tasks: each key sees its own tasks only.
        may_be_open: while there is no key, everybody may call all routes but those of the admin.
    """

    is_admin: Callable[[str], bool]
    verify_link: Callable[[web.Request, str], bool]
    count_refusal: Callable[[web.Request, str], None]
    hops: TrustedHops
    own_tasks: bool
    may_be_open: bool


class _UnauthorizedBody(Unauthorized):
    """The rest of the body is not read."""

    closes_connection = True


class Guard:
    """Authentication of requests by API key, admin token or signed link.

    Until the keys in Redis were read once, no client is admitted by its key: such a request gets a 503.
    """

    def __init__(self, ring: KeyRing, rules: AccessRules) -> None:
        self.ring = ring
        self._rules = rules
        self._store: KeyStore | None = None

    def use(self, store: KeyStore) -> None:
        """Keep the keys up to date by this store, which is not connected when the routes are made."""
        self._store = store

    def needs_keys(self) -> bool:
        """Return whether clients need a key, or may need one while the keys were never read."""
        return not (self.ring.is_loaded and not self.ring.has_keys and self._rules.may_be_open)

    def protect(self, operation: Operation, handlers: LimitedHandler) -> Handler:
        """Return a handler that only those run who may call its route, within the limits that they have."""
        if operation.needs == "none":
            return handlers.shared

        async def guarded(request: web.Request) -> web.StreamResponse:
            if hdrs.EXPECT in request.headers and CLIENT in request:  # an exception for each key that is not there
                has_own_limits = OWN_LIMITS in request
            else:
                if self._may_be_outdated:
                    await self._update(operation)
                has_own_limits = self.admit(request, operation)
            return await (handlers.own if has_own_limits else handlers.shared)(request)

        return guarded

    def expect(self, operation: Operation) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
        """Return the check of `Expect: 100-continue`; whoever reads the body answers it."""

        async def answer(request: web.Request) -> web.StreamResponse | None:
            if operation.needs != "none":
                if self._may_be_outdated:
                    await self._update(operation)
                self.admit(request, operation)
            if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
                raise ExpectationFailed
            request[AWAITS_CONTINUE] = request.version == HttpVersion11
            return None

        return answer

    @property
    def _may_be_outdated(self) -> bool:
        if self._store is None:
            return False
        notifier = self._store.notifier
        return not (notifier is not None and notifier.is_informed) and not self._store.is_current

    async def _update(self, operation: Operation) -> None:
        """Read the keys for a route that may need one."""
        if self._store is not None and operation.needs != "admin":
            await self._store.update()

    def admit(self, request: web.Request, operation: Operation) -> bool:
        """Set the client of a request by the keys in memory. Return whether its key has limits of its own.

        Raises Unauthorized, RateLimited, QueueUnavailable.
        """
        if operation.needs != "admin" and not self.needs_keys():
            return False
        address = client_address(request, self._rules.hops)
        try:
            request[CLIENT] = client = self._client(request, operation, address)
            if client.key is not None and (client.key.rate is not None or client.key.images_rate is not None):
                request[OWN_LIMITS] = OwnLimits(client.key.rate, client.key.images_rate)
                return True
        except Unauthorized as error:
            self._rules.count_refusal(request, address)
            if _has_long_rest(request):
                raise _UnauthorizedBody from error
            raise
        return False

    def require_admin(self, request: web.Request) -> None:
        """Raise Unauthorized or RateLimited unless a request has the admin token, for a route that needs no key now."""
        if not self._rules.is_admin(sent_secret(request.headers)):
            self._rules.count_refusal(request, client_address(request, self._rules.hops))
            raise Unauthorized

    def still_admits(self, request: web.Request) -> bool:
        """Return whether the key of a request that was admitted is still valid."""
        client = request.get(CLIENT)
        if client is None or client.key is None:
            return True
        return self.ring.find(secret_digest(sent_secret(request.headers))) is not None

    def _client(self, request: web.Request, operation: Operation, address: str) -> Client:
        """Return who sent a request. Raises Unauthorized, QueueUnavailable."""
        ring, rules, needs = self.ring, self._rules, operation.needs
        if secret := sent_secret(request.headers):
            if needs != "admin" and ring.is_loaded and (key := ring.find(secret_digest(secret))) is not None:
                has_link = needs == "link" and rules.verify_link(request, _path_of(request, operation))
                return Client.with_key(key, owns_tasks=rules.own_tasks, has_link=has_link)
            if rules.is_admin(secret):
                return Client(address, is_admin=True)
        if needs == "admin":
            raise Unauthorized
        if needs == "link" and rules.verify_link(request, _path_of(request, operation)):
            return Client(address, has_link=True)
        if not ring.is_loaded and (secret or not ring.fixed):
            raise QueueUnavailable(headers={hdrs.RETRY_AFTER: _RETRY_AFTER})
        raise Unauthorized


GUARD = web.AppKey("guard", Guard)


def sent_secret(headers: CIMultiDictProxy[str]) -> str:
    """Return the secret in the headers, empty without one. Raises Unauthorized if they hold different ones."""
    authorizations, keys = headers.getall(hdrs.AUTHORIZATION, ()), headers.getall(X_API_KEY, ())
    if len(authorizations) > 1 or len(keys) > 1:
        raise Unauthorized
    scheme, _, bearer = authorizations[0].partition(" ") if authorizations else ("", "", "")
    secret = bearer.strip() if scheme.lower() == "bearer" else ""
    own = keys[0].strip() if keys else ""
    if own and secret and own != secret:
        raise Unauthorized
    return secret or own


def still_admits(request: web.Request) -> bool:
    """Return whether the client of a request that lasts may still get answers."""
    guard = request.app.get(GUARD)
    return guard is None or guard.still_admits(request)


def _path_of(request: web.Request, operation: Operation) -> str:
    """Return the path as links have it: without the prefix of a proxy."""
    path, info = operation.path, request.match_info
    for parameter, name in (("{taskId}", "task_id"), ("{index}", "index")):
        if name in info:
            path = path.replace(parameter, info[name])
    return path


def _has_long_rest(request: web.Request) -> bool:
    if request.content.is_eof():
        return False
    return hdrs.EXPECT in request.headers or (request.content_length or MAX_DROPPED_BYTES + 1) > MAX_DROPPED_BYTES


def client_of(request: web.Request) -> Client:
    """Return the client; without a guard it has its address alone."""
    client = request.get(CLIENT)
    if client is None:
        client = Client(client_address(request, request.app[SERVICES].link_base.hops))
        request[CLIENT] = client
    return client
