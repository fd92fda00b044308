"""Rules for requests of web pages: CORS, refusal of cross-site requests, and of foreign names on loopback.

A browser sends `Origin` or `Sec-Fetch-Site` with each request that a page of another site could misuse; programs send
neither, and are not checked. https://fetch.spec.whatwg.org/, https://www.w3.org/TR/fetch-metadata/
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from loguru import logger
from multidict import istr
from yarl import URL

from imagegen.errors import BadRequest, CrossSiteRefused, ForeignHost
from imagegen.web.http.forwarded import TrustedHops, forwarded_host, is_forwarded, valid_host
from imagegen.web.http.responses import refuse_route, route_of

SEC_FETCH_SITE = istr("Sec-Fetch-Site")

ADMIN_ROUTES = web.AppKey("admin_routes", set[web.AbstractRoute])
"""Routes for the operator alone: no page of another origin may read them."""

PREFLIGHT_MAX_AGE_S = 86_400

_SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_TRUSTED_SITES = frozenset({"same-origin", "none"})
"""The page is ours, by the browser; or no page but the user or a privileged extension sent the request."""

_METHODS = "GET, HEAD, POST, DELETE"
_REQUEST_HEADERS = (
    "Authorization, X-API-Key, Content-Type, Idempotency-Key, Last-Event-ID, Prefer, Cache-Control, If-None-Match, "
    "If-Match, Range, If-Range, Accept, Accept-Language, User-Agent, X-Request-Id, MCP-Protocol-Version, Mcp-Method, "
    "Mcp-Name, Mcp-Session-Id, OpenAI-Organization, OpenAI-Project, "
    "x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, x-stainless-helper-method, "
    "x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-poll-helper, "
    "x-stainless-read-timeout, x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, "
    "x-stainless-timeout"
)
_EXPOSED_HEADERS = (
    "Location, X-Cache, ETag, Retry-After, RateLimit, RateLimit-Policy, X-RateLimit-Limit, X-RateLimit-Remaining, "
    "X-RateLimit-Reset, X-Request-Id, Preference-Applied, Content-Range, Accept-Ranges, Content-Disposition, "
    "WWW-Authenticate, x-should-retry"
)
_PREFLIGHT_HEADERS: dict[str, str] = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
    hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_MAX_AGE_S),
    hdrs.VARY: "Access-Control-Request-Method, Access-Control-Request-Headers",
}
_PRIVATE_NETWORK = "Access-Control-{}-Private-Network"

_WITHOUT_CORS = web.RequestKey("without_cors", bool)
_DEFAULT_PORT = re.compile(r":(?:80|443)$")
_LOCAL_NAME = re.compile(r"[a-z_][a-z0-9_-]*|[a-z0-9_.-]+\.(?:localhost|internal)")
"""Names that public DNS never has, so that no other site can point them here.

Without a dot: https://www.icann.org/en/announcements/details/new-gtld-dotless-domain-names-prohibited-30-8-2013-en.
Below `localhost`: RFC 6761. Below `internal`, as `host.docker.internal`: reserved by ICANN on 2024-07-29.
"""


@dataclass(slots=True)
class CrossOriginPolicy:
    """Rules of one service.

    allowed: the exact origins of CORS_ORIGINS. public_url, hops: see `forwarded.base_url`.
    loopback_only: the service listens on loopback alone, so that every other name in `Host` was made to lead here.
    """

    allowed: frozenset[str] = frozenset()
    public_url: str | None = None
    hops: TrustedHops = 0
    loopback_only: bool = False
    _has_warned: bool = field(default=False, init=False)

    @property
    def is_known_host(self) -> Callable[[str], bool]:
        """Return the quick check of a Host header; `check_host` decides about a host that fails it."""
        return is_local_host if self.loopback_only else valid_host

    def check_host(self, request: web.Request, host: str) -> None:
        """Raise BadRequest for a malformed Host; ForeignHost for a foreign one on loopback, unless a proxy sent it."""
        if not valid_host(host):
            raise BadRequest
        if not self.loopback_only or is_local_host(host) or self._is_public_host(host):
            return
        if is_forwarded(request, self.hops):
            return
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Refused a request for the host {}, since HOST is loopback. Behind a proxy set PUBLIC_URL to the "
                "address that clients use, or TRUSTED_PROXY_HOPS=1 if the proxy sends X-Forwarded-For",
                host,
            )
        raise ForeignHost

    def check_site(self, request: web.Request) -> None:
        """Raise CrossSiteRefused for a request of another site's page that changes something."""
        if request.method in _SAFE_METHODS:
            return
        site, origin = request.headers.get(SEC_FETCH_SITE), request.headers.get(hdrs.ORIGIN)
        if origin in self.allowed or site in _TRUSTED_SITES:
            return
        if site == "cross-site" or (origin is not None and not self._is_own(request, origin)):
            raise CrossSiteRefused

    async def preflight(self, request: web.Request, app: web.Application, path: str) -> web.Response | None:
        """Return the response to a preflight by a page of an allowed origin; None for any other request.

        path: the raw path that is routed.
        """
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or not wanted or request.headers.get(hdrs.ORIGIN) not in self.allowed:
            return None
        url = URL.build(path=path, encoded=True)
        match = await app.router.resolve(request.clone(method=wanted, rel_url=url))
        if match.route in app.get(ADMIN_ROUTES, ()):
            request[_WITHOUT_CORS] = True
            return None
        headers = dict(_PREFLIGHT_HEADERS)
        if request.headers.get(_PRIVATE_NETWORK.format("Request")) == "true":
            headers[_PRIVATE_NETWORK.format("Allow")] = "true"
        refuse_route(request, app)
        return web.Response(status=204, headers=headers)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let an allowed origin read the response; installed only where origins are allowed."""
        headers = response.headers
        vary = headers.get(hdrs.VARY)
        headers[hdrs.VARY] = f"{vary}, Origin" if vary else "Origin"
        if route_of(request) not in request.app.get(ADMIN_ROUTES, ()) and not request.get(_WITHOUT_CORS):
            origin = request.headers.get(hdrs.ORIGIN)
            if origin in self.allowed:
                headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
                headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS

    def _is_own(self, request: web.Request, origin: str) -> bool:
        """Return whether an origin is ours: by PUBLIC_URL, else by host and port, since a proxy may have ended TLS."""
        scheme, _, host = origin.lower().partition("://")
        if scheme not in ("http", "https") or not host:
            return False
        if self.public_url and origin.lower() == _origin_of(self.public_url):
            return True
        hosts = (request.headers.get(hdrs.HOST, ""), forwarded_host(request, self.hops))
        return host in {_DEFAULT_PORT.sub("", name.lower()) for name in hosts if name}

    def _is_public_host(self, host: str) -> bool:
        return self.public_url is not None and _name_of(host) == urlsplit(self.public_url).hostname


@lru_cache(maxsize=256)
def is_local_host(host: str) -> bool:
    """Return whether a Host header names this machine in a way that no other site's DNS can."""
    if not valid_host(host):
        return False
    name = _name_of(host)
    if _LOCAL_NAME.fullmatch(name):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _name_of(host: str) -> str:
    """Return the name or address of a valid Host header, without port, brackets and a dot at the end."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


@lru_cache(maxsize=16)
def _origin_of(url: str) -> str:
    parts = urlsplit(url.lower())
    default = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}"
