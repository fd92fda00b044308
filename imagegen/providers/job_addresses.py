"""Addresses of provider jobs that came from an upstream: which of them may be requested with its key. No I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from yarl import URL

MAX_ADDRESS_CHARS = 2_000


def same_host(base: URL, address: str) -> URL | None:
    """Return an address of an upstream, relative or absolute, if it leads to the base's host; else None."""
    url = _resolved(base, address)
    if url is None or url.host != base.host:
        return None
    if url.scheme == base.scheme and url.port == base.port:
        return url
    is_default = url.is_default_port() and base.is_default_port()
    if is_default and {url.scheme, base.scheme} == {"http", "https"}:
        return url.with_scheme("https")
    return None


def in_domains(base: URL, address: str, domains: Iterable[str]) -> URL | None:
    """Return an address of an upstream if the provider's key may go there; else None.

    domains: registered names of the provider; each includes its subdomains. They need `https` and its usual port.
    The base's own host is always allowed. A base on loopback, which is an emulator, has no other host.
    """
    if own := same_host(base, address):
        return own
    url = _resolved(base, address)
    if url is None or url.host is None or _is_loopback(base):
        return None
    host = url.host.lower()
    is_known = any(host == domain or host.endswith(f".{domain}") for domain in domains)
    return url if is_known and url.scheme == "https" and url.is_default_port() else None


def _resolved(base: URL, address: str) -> URL | None:
    """Return the whole address, None if it is unusable or has a user."""
    if not address or len(address) > MAX_ADDRESS_CHARS or not address.isprintable():
        return None
    try:
        url = URL(f"{base}/").join(URL(address)).with_fragment(None)
        usable = url.user is None and url.host is not None and url.port is not None
    except ValueError:
        return None
    return url if usable else None


def _is_loopback(url: URL) -> bool:
    host = url.host or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
