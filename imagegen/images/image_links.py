"""Links to images: as they are written, where they really lead, and how long they live."""

from __future__ import annotations

import re
import socket
from datetime import datetime
from ipaddress import ip_address

from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver
from msgspec import Struct, field
from yarl import URL

from imagegen.ssrf import is_public

LINK_TTL_S = 600.0
"""How long a link lives that names no end: the shortest life that a vendor documents (BFL)."""

MAX_LINK_TTL_S = 7 * 86_400.0

_STAMPS = (("x-amz-date", "x-amz-expires"), ("x-goog-date", "x-goog-expires"), ("x-oss-date", "x-oss-expires"))
_UNIX_ENDS = ("expires", "exp", "expiry", "x-expires")
_DIGITS = re.compile(r"[0-9]{1,12}")
_UTC_TIME = re.compile(r"[0-9]{8}T[0-9]{6}Z|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


class Origin(Struct, frozen=True):
    """An upstream as the links in its answers see it.

    own_hosts: `host` or `host:port` that may be fetched from though their addresses are not public.
    base_url: its relative links, and those that name it otherwise, are resolved against it.
    resolver: finds the addresses of its names.
    """

    own_hosts: frozenset[str]
    base_url: URL | None
    resolver: AbstractResolver = field(default_factory=ThreadedResolver)

    def owns(self, url: URL) -> bool:
        """Return whether this is the address by which we reach it."""
        host, port = url.raw_host or "", url.port
        return not self.own_hosts.isdisjoint({host, f"{host}:{port}", f"[{host}]:{port}"})

    async def own_address(self, url: URL) -> URL | None:
        """Return where a link leads that names the upstream itself by another name or port; None if it names another.

        An upstream on a private network writes links by its own name (`http://localhost:8188/…`, its container's
        name or address). Their path is at the address by which we reach it; no other address is requested.
        """
        if self.base_url is None:
            return None
        here = await _addresses(self.base_url.host or "", self.resolver)
        if here and all(map(is_public, here)):
            return None
        host = (url.host or "").lower().rstrip(".")
        there = await _addresses(host, self.resolver)
        if not (_is_local_name(host) or any(map(_is_loopback, there)) or here & there):
            return None
        return self.base_url.origin().join(URL(url.raw_path_qs, encoded=True))


def parse_link(link: str, base: URL | None) -> URL:
    """Return the link as it was written if possible: a signature covers each character of it.

    A relative link is resolved against `base`. Raises ValueError.
    """
    as_written = link.isascii() and link.isprintable() and " " not in link
    url = URL(link, encoded=as_written)
    if url.port == 0:  # it raises ValueError itself for one above 65535
        raise ValueError("no port")
    return url if base is None or not link else base.join(url)


def expires_at(link: str, received_at: float) -> float:
    """Return the Unix time until which a link that came at `received_at` may live.

    The query of a signed link has it: `X-Amz-Date` and `X-Amz-Expires` (seconds; also Google's and Alibaba's names),
    `Expires` (Unix time: S3 version 2, CloudFront), `se` (Azure). Other links are taken to live LINK_TTL_S.
    """
    try:
        query = {name.lower(): value for name, value in URL(link).query.items()}
    except ValueError:
        return received_at + LINK_TTL_S
    end_at = _signed_expiry(query)
    if end_at is None or not received_at < end_at <= received_at + MAX_LINK_TTL_S:
        return received_at + LINK_TTL_S
    return end_at


def _signed_expiry(query: dict[str, str]) -> float | None:
    for date, life in _STAMPS:
        signed_at = _parse_timestamp(query.get(date, ""))
        if signed_at is not None and _DIGITS.fullmatch(query.get(life, "")):
            return signed_at + int(query[life])
    for name in _UNIX_ENDS:
        if _DIGITS.fullmatch(query.get(name, "")):
            return float(query[name])
    return _parse_timestamp(query.get("se", ""))


def _parse_timestamp(text: str) -> float | None:
    """Return the Unix time of a UTC time in ISO 8601, in its basic or its extended form.

    `strptime` would not do: it imports a module at its first call, which fails where file descriptors have run out.
    """
    if not _UTC_TIME.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _is_local_name(host: str) -> bool:
    """Return whether it is a name without a domain: this machine's, or one of a private network's own."""
    return bool(host) and "." not in host and ":" not in host and not host[0].isdigit()


def _is_loopback(address: str) -> bool:
    parsed_address = ip_address(address)
    inside = getattr(parsed_address, "ipv4_mapped", None) or parsed_address
    return bool(inside.is_loopback or inside.is_unspecified)


async def _addresses(host: str, resolver: AbstractResolver) -> frozenset[str]:
    try:
        return frozenset({str(ip_address(host.partition("%")[0]))})
    except ValueError:
        pass
    try:
        resolved = await resolver.resolve(host, 0, socket.AF_UNSPEC)
    except (OSError, UnicodeError):
        return frozenset()
    return frozenset(result["host"].partition("%")[0] for result in resolved)
