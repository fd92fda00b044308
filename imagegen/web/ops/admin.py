"""Authentication of the admin routes (docs/api.md, `ADMIN_TOKEN`)."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from functools import wraps
from ipaddress import IPv6Address, ip_address

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from imagegen.errors import Forbidden, Unauthorized

_FORWARDING = frozenset({"forwarded", "via"})
_FORWARDING_PREFIX = "x-forwarded-"


@dataclass(frozen=True, slots=True)
class AdminAuth:
    """Rule of admin access.

    token: the operator's, None if it is not set; on_render: behind Render's proxies, where a peer or a missing header
    proves nothing.
    """

    token: str | None = field(repr=False)
    on_render: bool


ADMIN = web.AppKey("admin", AdminAuth)

NO_TOKEN = AdminAuth(None, on_render=False)
"""Default of an application without its own."""


def require_admin(request: web.Request) -> None:
    """Accept a request with the token, or, if no token is set, a direct one from this machine.

    Raises Unauthorized or Forbidden.
    """
    rule = request.app.get(ADMIN, NO_TOKEN)
    if rule.token:
        if not _has_token(rule.token, request):
            raise Unauthorized(headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
    elif rule.on_render or not _is_local(request):
        raise Forbidden


def admin_only(handler: Handler) -> Handler:
    """Return the handler behind the gate."""

    @wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        require_admin(request)
        return await handler(request)

    return guarded


def _has_token(token: str, request: web.Request) -> bool:
    """Compare each header in constant time."""
    scheme, _, token_sent = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    same = hmac.compare_digest(token_sent.strip().encode(errors="surrogateescape"), token.encode())
    return same and scheme.lower() == "bearer"


def _is_local(request: web.Request) -> bool:
    hosts = request.headers.getall(hdrs.HOST, ())
    return (
        _is_loopback(request.remote or "")
        and len(hosts) == 1
        and _is_loopback_name(hosts[0])
        and not any(_forwards(name.lower()) for name in request.headers)
    )


def _forwards(name: str) -> bool:
    return name in _FORWARDING or name.startswith(_FORWARDING_PREFIX)


def _is_loopback_name(host: str) -> bool:
    """Return the Host too, since a page from afar may have its own name point here."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".") == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return (mapped or parsed).is_loopback
