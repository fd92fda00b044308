"""Headers of every response: the id of its request, and the security headers."""

from __future__ import annotations

import random
import re

from aiohttp import hdrs, web
from multidict import CIMultiDict, istr

REQUEST_ID = web.RequestKey("request_id", str)
"""Read it by `request_id_of`, which works before the pipeline too."""

X_REQUEST_ID = istr("X-Request-Id")
_NOSNIFF = istr("X-Content-Type-Options")
_CSP = istr("Content-Security-Policy")
_REFERRER = istr("Referrer-Policy")

SECURITY_HEADERS = {
    _NOSNIFF: "nosniff",
    _CSP: "default-src 'none'; frame-ancestors 'none'",
    _REFERRER: "no-referrer",
    hdrs.CACHE_CONTROL: "no-store",
}
"""Defaults: a handler may set its own value."""

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


async def on_response_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Add the default headers to each response, event streams too."""
    apply_default_headers(response.headers, request_id_of(request))


def apply_default_headers(headers: CIMultiDict[str], request_id: str) -> None:
    """Add the headers of every response, and remove what names our software, which aiohttp has added."""
    headers[X_REQUEST_ID] = request_id
    headers.popall(hdrs.SERVER, None)
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)


def request_id_of(request: web.Request) -> str:
    """Return the client's own X-Request-Id if it is harmless, else a new one; it is the same for the whole request."""
    try:
        return request[REQUEST_ID]
    except KeyError:
        return assign_request_id(request)


def fresh_request_id() -> str:
    """Return an id for a request without one; it is no secret."""
    return f"{random.getrandbits(64):016x}"


def assign_request_id(request: web.Request) -> str:
    """Set the id of a request and return it."""
    client_id = request.headers.get(X_REQUEST_ID)
    request_id = client_id if client_id and _CLIENT_ID.fullmatch(client_id) else fresh_request_id()
    request[REQUEST_ID] = request_id
    return request_id


def quality_of(parameter: str) -> float:
    """Return the weight of a part of an Accept header by its parameter `q=0.5` in lower case; 1 for an empty one."""
    if not parameter:
        return 1.0
    name, _, value = parameter.partition("=")
    try:
        quality = float(value) if name.strip() == "q" else 0.0
    except ValueError:
        return 0.0
    return quality if 0.0 <= quality <= 1.0 else 0.0
