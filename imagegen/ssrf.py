"""SSRF guard: the service calls public addresses only, and the few hosts that are allowed by name."""

from __future__ import annotations

import asyncio
import re
import socket
import unicodedata
from collections.abc import Coroutine
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from aiohttp import ClientConnectorDNSError, ClientConnectorError, ClientRequest, ClientTimeout, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from imagegen.proxies import Proxies, ProxyConnector
from imagegen.resolver import Resolver

# https://www.iana.org/assignments/iana-ipv4-special-registry; `is_global` alone differs between Python versions.
_BLOCKED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
)

# https://www.iana.org/assignments/iana-ipv6-special-registry: all routed addresses are in 2000::/3, and in there
# 2001::/23 (Teredo, ORCHID, benchmarks) and 2002::/16 (6to4) lead elsewhere.
_ROUTED_V6 = IPv6Network("2000::/3")
_BLOCKED_V6 = tuple(IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))

ROUTE_CACHE_S = 2.0
"""How long a name is looked up that goes through a proxy."""

_NO_PROXIES = Proxies()
_MAX_HOST_CHARS = 253
_IDEOGRAPHIC_DOT = "\u3002"
_NAME = re.compile(r"(?:[\w-]{1,63}\.)*[\w-]{1,63}")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")


class AddressBlocked(OSError):
    """The host is, or resolves to, an address that is not public."""


def is_public(address: str | IPv4Address | IPv6Address) -> bool:
    """Return whether an address is of the public internet; text in any form that `ipaddress` takes.

    An IPv4 address mapped into IPv6 is judged by the inner one; NAT64, 6to4 and Teredo are always refused.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:
            return False
        if parsed.ipv4_mapped is None:
            return parsed in _ROUTED_V6 and parsed.is_global and not any(parsed in network for network in _BLOCKED_V6)
        parsed = parsed.ipv4_mapped
    return parsed.is_global and not any(parsed in network for network in _BLOCKED_V4)


@lru_cache(maxsize=256)
def check_host(host: str, port: int, allowed: frozenset[str] = frozenset()) -> None:
    """Raise AddressBlocked for a host that is refused without DNS: resolvers never see literal addresses.

    That is a literal address that is not public or not in its one usual spelling (`127.1`, `0x7f000001`, fullwidth
    digits, zone ids), `localhost`, and text that is no host name. `allowed` holds `host` or `host:port`.
    """
    if _is_allowed(host, port, allowed):
        return
    name = plain_host(host)
    last = name.rpartition(".")[2]
    if ":" in name or "%" in name or _NUMERIC_LABEL.fullmatch(last):
        if not is_public(name):
            raise AddressBlocked(f"{host!r} is not a public address")
    elif last == "localhost":
        raise AddressBlocked(f"{host!r} is this machine")
    elif len(name) > _MAX_HOST_CHARS or not _NAME.fullmatch(name):
        raise AddressBlocked("the link has no valid host name")


def blocked_cause(error: BaseException) -> AddressBlocked | None:
    """Return the refusal behind an error of a client over a guarded connector, None for other errors."""
    cause = error.os_error if isinstance(error, ClientConnectorError) else error
    return cause if isinstance(cause, AddressBlocked) else None


class PublicResolver(AbstractResolver):
    """Resolver that refuses a name with an address that is not public.

    The client connects to the returned addresses without a second lookup, so DNS rebinding gains nothing. `allowed`
    holds `host` or `host:port` that may be anywhere, and so may the hosts of the proxies.
    """

    def __init__(
        self,
        allowed: frozenset[str] = frozenset(),
        inner: AbstractResolver | None = None,
        proxies: frozenset[tuple[str, int]] = frozenset(),
    ) -> None:
        self._allowed = allowed
        self._inner = inner or Resolver()
        self._proxies = proxies

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if (host, port) in self._proxies:
            return await self._inner.resolve(host, port, family)
        check_host(host, port, self._allowed)
        try:
            resolved = await self._inner.resolve(host, port, family)
        except UnicodeError as error:
            raise AddressBlocked("the link has no valid host name") from error
        if not _is_allowed(host, port, self._allowed):
            for result in resolved:
                if not is_public(result["host"]):
                    raise AddressBlocked(f"{host!r} has an address that is not public")
        return resolved

    async def close(self) -> None:
        await self._inner.close()


class _GuardedConnector(ProxyConnector):
    """Connector that refuses addresses that are not public, also literal ones, by a ClientConnectorError.

    Through a proxy, which resolves names itself, a name is refused if it can be resolved here to an address that is
    not public; a name that only the proxy can resolve is left to the proxy's own rules.
    """

    def __init__(self, allowed: frozenset[str], proxies: Proxies, inner: AbstractResolver | None, limit: int) -> None:
        inner = inner or Resolver()
        resolver = PublicResolver(allowed, inner, proxies.hosts)
        super().__init__(proxies, resolver=resolver, use_dns_cache=False, limit=limit)
        self._judge = PublicResolver(allowed, inner)
        self._allowed = allowed

    def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout
    ) -> Coroutine[Any, Any, Connection]:
        if self.proxies:
            return self._connect_by_route(req, traces, timeout)
        try:
            check_host(req.url.raw_host or "", req.port or 0, self._allowed)
        except AddressBlocked as error:
            raise ClientConnectorDNSError(req.connection_key, error) from error
        return super().connect(req, traces, timeout)

    async def _connect_by_route(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        host, port = req.url.raw_host or "", req.port or 0
        try:
            check_host(host, port, self._allowed)
            await self._check_route(req, host, port)
        except AddressBlocked as error:
            raise ClientConnectorDNSError(req.connection_key, error) from error
        return await super().connect(req, traces, timeout)

    async def _check_route(self, req: ClientRequest, host: str, port: int) -> None:
        """Refuse a name that is not public though a proxy would resolve it, and a proxy that is called itself."""
        if self.proxies.of(req.url) is None:
            if (host, port) in self.proxies.hosts and not _is_allowed(host, port, self._allowed):
                raise AddressBlocked(f"{host!r} is a proxy")
            return
        try:
            async with asyncio.timeout(ROUTE_CACHE_S):
                await self._judge.resolve(host, port, socket.AF_UNSPEC)
        except AddressBlocked:
            raise
        except (OSError, TimeoutError):
            return


def guarded_connector(
    allowed: frozenset[str] = frozenset(),
    *,
    proxies: Proxies = _NO_PROXIES,
    inner: AbstractResolver | None = None,
    limit: int = 100,
) -> TCPConnector:
    """Return a connector to public addresses and the `allowed` hosts. inner: resolves names. limit: of open sockets."""
    return _GuardedConnector(allowed, proxies, inner, limit)


def _is_allowed(host: str, port: int, allowed: frozenset[str]) -> bool:
    if not allowed:
        return False
    name = host.lower().strip("[]")
    return not allowed.isdisjoint({name, f"[{name}]", f"{name}:{port}", f"[{name}]:{port}"})


def plain_host(host: str) -> str:
    """Return the host as a resolver reads it: compatible characters folded, one trailing dot removed."""
    folded = unicodedata.normalize("NFKC", host).replace(_IDEOGRAPHIC_DOT, ".").lower()
    return folded.removeprefix("[").removesuffix("]").removesuffix(".")
