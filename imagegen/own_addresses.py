"""Addresses of this service itself, which no webhook may call: it could start paid calls without end."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from imagegen.ssrf import AddressBlocked, plain_host

_WEB_PORTS = frozenset({80, 443})


class OwnAddresses:
    """Addresses at which this service can be reached, as far as it can find out.

    Args:
        listening: address and port of each listening socket.
        public_url: PUBLIC_URL.
    """

    def __init__(self, listening: Collection[tuple[str, int]] = (), public_url: str | None = None) -> None:
        self._listening = [(ip_address(address.partition("%")[0]), port) for address, port in listening]
        self._ports = frozenset(port for _, port in listening)
        self._public_urls = (public_url,) if public_url else ()

    def check(self, host: str, port: int, urls: Collection[str] = ()) -> None:
        """Refuse a host that is this service, as far as that is possible without DNS.

        Args:
            host: as a URL has it.
            port: of the URL.
            urls: other bases by which clients reach this service now.

        Raises:
            AddressBlocked: it is.
        """
        name = plain_host(host)
        for url in (*self._public_urls, *urls):
            with suppress(ValueError):
                parts = urlsplit(url)
                own_port = parts.port or (443 if parts.scheme == "https" else 80)
                ports = self._ports | (_WEB_PORTS if own_port in _WEB_PORTS else {own_port})
                if parts.hostname and plain_host(parts.hostname) == name and port in ports:
                    raise AddressBlocked(f"{host!r} is this service")
        if name.rpartition(".")[2] == "localhost":
            addresses = ["127.0.0.1", "::1"]
        else:
            addresses = [literal] if (literal := _literal(name)) else []
        for address in addresses:
            self.check_address(address, port)

    def check_address(self, address: str, port: int) -> None:
        """Refuse an address that one of our sockets listens on.

        Raises:
            AddressBlocked: one does.
        """
        if port not in self._ports:
            return
        try:
            called = _unmapped(ip_address(address.partition("%")[0]))
        except ValueError:
            return
        for listening, own_port in self._listening:
            if own_port == port and (_same(listening, called) or (listening.is_unspecified and _is_local(called))):
                raise AddressBlocked(f"{address!r} is this service")


class ForeignResolver(AbstractResolver):
    """Resolver that refuses a name with an address of this service itself."""

    def __init__(self, own: OwnAddresses, inner: AbstractResolver) -> None:
        self._own = own
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._inner.resolve(host, port, family)
        for result in results:
            self._own.check_address(result["host"], port)
        return results

    async def close(self) -> None:
        """Do nothing: the inner resolver belongs to its maker."""


def _literal(name: str) -> str | None:
    """Return the address that a host is, in any spelling that a resolver takes (`127.1`, `0x7f000001`)."""
    with suppress(ValueError):
        return str(ip_address(name.partition("%")[0]))
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(name))
    return None


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    return getattr(address, "ipv4_mapped", None) or address


def _same(listening: IPv4Address | IPv6Address, called: IPv4Address | IPv6Address) -> bool:
    """Return whether a call reaches a socket; one of the unspecified address reaches loopback."""
    return called == _unmapped(listening) or (called.is_unspecified and listening.is_loopback)


def _is_local(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is one of this machine's: a socket can be bound to it."""
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno == errno.EACCES
    return True
