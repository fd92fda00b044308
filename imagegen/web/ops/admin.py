"""Authentication of the admin routes by the admin token, for callers of every address."""

from __future__ import annotations

import hashlib
import hmac
from functools import wraps

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from imagegen.errors import Unauthorized


class AdminAuth:
    """The admin token, kept as its hash; every comparison takes the same time."""

    __slots__ = ("_hash",)

    def __init__(self, token: str) -> None:
        self._hash = _sha256(token)

    def admits(self, token: str) -> bool:
        return hmac.compare_digest(_sha256(token), self._hash)


ADMIN = web.AppKey("admin", AdminAuth)


def require_admin(request: web.Request) -> None:
    """Raises Unauthorized without the token in `Authorization: Bearer`; an application without a token has no admin."""
    rule = request.app.get(ADMIN)
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if rule is None or scheme.lower() != "bearer" or not rule.admits(token.strip()):
        raise Unauthorized(headers={hdrs.WWW_AUTHENTICATE: "Bearer"})


def admin_only(handler: Handler) -> Handler:
    """Return the handler behind the gate."""

    @wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        require_admin(request)
        return await handler(request)

    return guarded


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
