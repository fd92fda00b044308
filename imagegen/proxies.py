"""HTTP proxies of outgoing calls: which one a URL goes through, and connectors that go through it."""

from __future__ import annotations

import ipaddress
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientRequest, ClientTimeout, TCPConnector, encode_basic_auth, hdrs
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

from imagegen.formats import parse_digits


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies by scheme of the URL that is called.

    Args:
        http, https: addresses of proxies, `http://user:password@host:port`; None for a direct call.
        exceptions: hosts that are called directly: `host`, `.domain`, `host:port`, a network as `10.0.0.0/8`, or `*`.
    """

    http: str | None = field(default=None, repr=False)
    https: str | None = field(default=None, repr=False)
    exceptions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.http or self.https)

    def of(self, url: URL) -> URL | None:
        """Return the proxy for a URL, None to call it directly. This machine is always called directly."""
        proxy = self.https if url.scheme == "https" else self.http
        host = (url.raw_host or "").lower().rstrip(".")
        if not proxy or _is_loopback(host) or any(_matches(exception, host, url.port) for exception in self.exceptions):
            return None
        return URL(proxy)

    @property
    def hosts(self) -> frozenset[tuple[str, int]]:
        """Host and port of each proxy."""
        urls = [URL(proxy) for proxy in (self.http, self.https) if proxy]
        return frozenset((url.raw_host or "", url.port or 0) for url in urls)

    @property
    def masked(self) -> str:
        """The proxies for the log, without their credentials."""
        masked_proxies = dict.fromkeys(_masked(proxy) for proxy in (self.https, self.http) if proxy)
        exceptions = f" (not for {', '.join(self.exceptions)})" if self.exceptions else ""
        return " and ".join(masked_proxies) + exceptions


def route(request: ClientRequest, proxies: Proxies) -> None:
    """Have a request go through its proxy, if it has one; the proxy's login goes to the proxy alone."""
    proxy = proxies.of(request.url)
    if proxy is None:
        return
    headers = {}
    if proxy.user is not None:
        login = encode_basic_auth(proxy.user, proxy.password or "", "utf-8")
        if request.is_ssl():
            headers[hdrs.PROXY_AUTHORIZATION] = login
        else:
            request.headers[hdrs.PROXY_AUTHORIZATION] = login
    request.update_proxy(proxy.with_user(None), None, headers)


class ProxyConnector(TCPConnector):
    """A connector that takes each request's proxy from the settings."""

    def __init__(self, proxies: Proxies, **options: Any) -> None:
        super().__init__(**options)
        self.proxies = proxies

    def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout
    ) -> Coroutine[Any, Any, Connection]:
        if self.proxies:
            route(req, self.proxies)
        return super().connect(req, traces, timeout)


def _masked(proxy: str) -> str:
    url = URL(proxy)
    host = url.host_subcomponent or ""
    return f"{url.scheme}://{'***@' if url.raw_user else ''}{host}:{url.port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _matches(exception: str, host: str, port: int | None) -> bool:
    """Return whether an entry of NO_PROXY names a host; a domain names its subdomains too, as for curl."""
    if exception == "*":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception.strip("[]"), strict=False)
    name, colon, own_port = exception.rpartition(":")
    if colon and (number := parse_digits(own_port)) is not None and (":" not in name or name.endswith("]")):
        if port != number:
            return False
        exception = name
    domain = exception.strip("[]").removeprefix("*").lstrip(".").rstrip(".")
    return bool(domain) and (host == domain or host.endswith("." + domain))
