"""Address of a client behind proxies, and the base of absolute links as the client sees this service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from aiohttp import hdrs, web

TrustedHops = int | Literal["auto"]
"""Number of trusted proxies in front of the service (`TRUSTED_PROXY_HOPS`); 0 trusts no forwarding header."""

UNKNOWN = "unknown"
"""The client of a connection without an address, such as a unix socket."""

_X_FORWARDED_FOR = "X-Forwarded-For"
_X_FORWARDED_PREFIX = "X-Forwarded-Prefix"
_X_FORWARDED_HOST = "X-Forwarded-Host"
_FORWARDING = (_X_FORWARDED_FOR, _X_FORWARDED_HOST, "X-Forwarded-Proto")
_MAX_CHAIN = 32

# https://www.cloudflare.com/ips/
_CLOUDFLARE = (
    "173.245.48.0/20 103.21.244.0/22 103.22.200.0/22 103.31.4.0/22 141.101.64.0/18 108.162.192.0/18 190.93.240.0/20 "
    "188.114.96.0/20 197.234.240.0/22 198.41.128.0/17 162.158.0.0/15 104.16.0.0/13 104.24.0.0/14 172.64.0.0/13 "
    "131.0.72.0/22 2400:cb00::/32 2606:4700::/32 2803:f800::/32 2405:b500::/32 2405:8100::/32 2a06:98c0::/29 "
    "2c0f:f248::/32"
)
_INSIDE = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 127.0.0.0/8 169.254.0.0/16 100.64.0.0/10 ::1/128 fc00::/7 fe80::/10"
_INSIDE_NETWORKS, _CLOUDFLARE_NETWORKS = (tuple(map(ip_network, text.split())) for text in (_INSIDE, _CLOUDFLARE))

_HOST = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_PREFIX = re.compile(r"(?:/(?!\.+(?:/|$))[A-Za-z0-9._~-]{1,100}){1,8}")
_V4_WITH_PORT = re.compile(r"([0-9.]+):[0-9]{1,5}")
_V6_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")


def client_address(request: web.Request, hops: TrustedHops) -> str:
    """Return the address that limits are kept by: an IPv4 address, an IPv6 /64, or `unknown`.

    With N hops it is the N-th entry of X-Forwarded-For from the right, which the outermost of our proxies wrote. With
    `auto` it is the first from the right, the peer included, that is neither private nor loopback; if that is one of
    Cloudflare's, it is the one before, which Cloudflare wrote. A second one of Cloudflare's is a client, who may have
    sent the rest.
    Where the header is not as it should be the nearest good hop counts: stricter, never looser.
    """
    peer = request.remote or ""
    if hops == 0 or _X_FORWARDED_FOR not in request.headers:
        return client_key(peer)
    if hops == "auto":
        return _first_untrusted(peer, request)
    return _nth_from_right(peer, request, hops)


def base_url(request: web.Request, public_url: str | None, hops: TrustedHops) -> str:
    """Return the base of absolute links, with no slash at the end; no byte of a bad header gets into it."""
    if public_url:
        return public_url.rstrip("/")
    scheme, host = request.scheme, request.headers.get(hdrs.HOST, "")
    if hops and _trusts_peer(request, hops):
        forwarded_scheme = _forwarded(request, "X-Forwarded-Proto", hops).lower()
        scheme = forwarded_scheme if forwarded_scheme in {"http", "https"} else scheme
        host = forwarded_host(request, hops) or host
    return f"{scheme}://{host if valid_host(host) else _own_address(request)}{path_prefix(request, None, hops)}"


class LinkBase(NamedTuple):
    """Base of this service's links for the client of a request. hops: see `client_address`."""

    public_url: str | None
    hops: TrustedHops

    def url(self, request: web.Request) -> str:
        """Return the base of absolute links, see `base_url`."""
        return base_url(request, self.public_url, self.hops)

    def path(self, request: web.Request, path: str) -> str:
        """Return the link to one of our paths without scheme and host (for `Location`)."""
        return path_prefix(request, self.public_url, self.hops) + path


def forwarded_host(request: web.Request, hops: TrustedHops) -> str:
    """Return the host that a trusted proxy was called by; empty if it does not name one."""
    if not hops or _X_FORWARDED_HOST not in request.headers or not _trusts_peer(request, hops):
        return ""
    host = _forwarded(request, _X_FORWARDED_HOST, hops)
    return host if valid_host(host) else ""


def is_forwarded(request: web.Request, hops: TrustedHops) -> bool:
    """Return whether a trusted proxy sent the request."""
    return bool(hops) and any(name in request.headers for name in _FORWARDING) and _trusts_peer(request, hops)


def bases(request: web.Request, base: str) -> tuple[str, ...]:
    """Return the bases by which clients may reach this service: of links, and of every header that names a host."""
    hosts = [request.headers.get(hdrs.HOST, ""), *request.headers.getall(_X_FORWARDED_HOST, ())[:2]]
    return (base, *(f"{request.scheme}://{host}" for host in hosts if valid_host(host)))


def path_prefix(request: web.Request, public_url: str | None, hops: TrustedHops) -> str:
    """Return the path prefix that clients see: that of PUBLIC_URL, else what a trusted proxy names."""
    if public_url:
        return public_prefix(public_url)
    if not hops or _X_FORWARDED_PREFIX not in request.headers or not _trusts_peer(request, hops):
        return ""
    prefix = _forwarded(request, _X_FORWARDED_PREFIX, hops).rstrip("/")
    return prefix if _PREFIX.fullmatch(prefix) else ""


@lru_cache(maxsize=16)
def public_prefix(public_url: str | None) -> str:
    """Return the path of PUBLIC_URL, with no slash at the end."""
    return urlsplit(public_url or "").path.rstrip("/")


@lru_cache(maxsize=256)
def valid_host(host: str) -> bool:
    """Return whether it is a host name or address with an optional port, and nothing else."""
    if not _HOST.fullmatch(host):
        return False
    port = host.rpartition(":")[2] if not host.endswith("]") and ":" in host else ""
    return not port or int(port) <= 65535


def _first_untrusted(peer: str, request: web.Request) -> str:
    address, entries = _parse(peer), _from_the_right(request)
    while address is not None and _is_inside(address):
        address = _parse(next(entries, ""))
    if address is not None and _is_cloudflare(address):
        address = _parse(next(entries, ""))
    if address is None or _is_inside(address):
        return client_key(peer)
    return _network_of(address)


def _nth_from_right(peer: str, request: web.Request, hops: int) -> str:
    good = peer
    for count, entry in enumerate(_from_the_right(request), start=1):
        if _parse(entry) is None:
            return client_key(good)
        good = entry
        if count == hops:
            return client_key(good)
    return client_key(peer)


def _from_the_right(request: web.Request) -> Iterator[str]:
    entries = ",".join(request.headers.getall(_X_FORWARDED_FOR, ())).split(",")
    return (entry.strip() for entry in entries[: -_MAX_CHAIN - 1 : -1])


@lru_cache(maxsize=4096)
def client_key(text: str) -> str:
    address = _parse(text)
    return UNKNOWN if address is None else _network_of(address)


def _network_of(address: IPv4Address | IPv6Address) -> str:
    """Return the network of one customer: an IPv4 address or an IPv6 /64."""
    if isinstance(address, IPv4Address):
        return str(address)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"


@lru_cache(maxsize=4096)
def _parse(text: str) -> IPv4Address | IPv6Address | None:
    with_port = _V4_WITH_PORT.fullmatch(text) or _V6_WITH_PORT.fullmatch(text)
    try:
        address = ip_address(with_port[1] if with_port else text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


@lru_cache(maxsize=4096)
def _is_inside(address: IPv4Address | IPv6Address) -> bool:
    return any(address in network for network in _INSIDE_NETWORKS)


@lru_cache(maxsize=4096)
def _is_cloudflare(address: IPv4Address | IPv6Address) -> bool:
    return any(address in network for network in _CLOUDFLARE_NETWORKS)


def _trusts_peer(request: web.Request, hops: TrustedHops) -> bool:
    if hops != "auto":
        return hops >= 1
    peer = _parse(request.remote or "")
    return peer is None or _is_inside(peer) or _is_cloudflare(peer)


def _forwarded(request: web.Request, name: str, hops: TrustedHops) -> str:
    """Return the value that our outermost proxy wrote; proxies of another make than ours may send just one."""
    values = [value.strip() for value in ",".join(request.headers.getall(name, ())).split(",")]
    return values[0] if hops == "auto" else values[-min(hops, len(values))]


def _own_address(request: web.Request) -> str:
    own = request.transport.get_extra_info("sockname") if request.transport else None
    if not isinstance(own, tuple):
        return "localhost"
    return f"[{own[0]}]:{own[1]}" if ":" in own[0] else f"{own[0]}:{own[1]}"
