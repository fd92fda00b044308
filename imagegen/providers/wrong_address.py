"""Addresses of providers with `http` for a port with TLS alone, the other way round, and of servers without HTTP.

Such a server has read no request, so nothing was paid; most of them only hang up, as a server that dies in a call does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.port_protocols import answers_with_tls, first_bytes
from imagegen.providers.job_polling import REDIRECTS

PROBE_S = 3.0

_PAGE_BYTES = 2_000
_STATUS_BYTES = 12
_TLS_PORT = re.compile(
    rb"plain HTTP request was sent to HTTPS port|sent an HTTP request to an HTTPS server"
    rb"|plain HTTP to an SSL-enabled server|host and port requires TLS",
    re.IGNORECASE,
)
"""Of nginx and the load balancers of Cloudflare and AWS; of servers in Go; of Apache; of Tomcat."""

_TO_TLS = re.compile(rb"\r\nlocation:[ \t]*https:", re.IGNORECASE)


_NO_HTTP = re.compile(rb"SSH-|220[ -]|-ERR |\x00\x00[\x00-\xff]\x04\x00\x00\x00\x00\x00")
"""First bytes of servers for SSH, for mail or files, of Redis, and of those with HTTP/2 alone."""


class WrongAddress(UpstreamError):
    """A call that can't have been read at the provider's address. fault: of the address, for the client."""

    def __init__(self, fault: str, upstream_detail: str) -> None:
        detail = f"The provider can't be reached: its address {fault}; the operator of this service must act"
        super().__init__("upstream_error", detail, upstream_detail=upstream_detail, of_channel=True)


def wrong_scheme(address: URL) -> WrongAddress:
    """Return the error of an address with `http` where `https` is needed, or the other way round."""
    given, needed, what = "http", "https", "TLS alone"
    if address.scheme == "https":
        given, needed, what = "https", "http", "HTTP without TLS"
    detail = f"{_place(address)} answers with {what}; write {needed} in place of {given} in {address.origin()}"
    return WrongAddress(f"has {given} in place of {needed}", detail)


def scheme_refused(address: URL, status: int, headers: Mapping[str, str], body: bytes | bytearray) -> bool:
    """Return whether a response says that an address with `http` needs `https`."""
    if address.scheme != "http":
        return False
    if status in REDIRECTS:
        return _leads_to_tls(address, headers.get("Location", ""))
    return 400 <= status < 500 and _TLS_PORT.search(body[:_PAGE_BYTES]) is not None


async def probed_address(address: URL) -> WrongAddress | None:
    """Return why no request can be read at an address; None if it can, or if that is not certain.

    It costs nothing, and takes a few seconds at most.
    """
    host, port = address.raw_host or "", address.port or 0
    try:
        async with asyncio.timeout(PROBE_S):
            answer = await first_bytes(host, port, _request(address), _is_enough)
            if address.scheme == "https" and _is_http(answer):
                return wrong_scheme(address)
            if _NO_HTTP.match(answer):
                return WrongAddress("is not of an HTTP server", f"{_place(address)} does not answer with HTTP")
            is_tls = address.scheme == "http" and not _is_http(answer) and await answers_with_tls(host, port)
            return wrong_scheme(address) if is_tls else None
    except (OSError, TimeoutError, ValueError):
        return None


def _place(address: URL) -> str:
    return f"{address.host}:{address.port}"


def _request(address: URL) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {address.host_port_subcomponent}\r\nConnection: close\r\n\r\n".encode()


def _is_enough(answer: bytes) -> bool:
    """Return whether the bytes that have come show what a port speaks; the reason of a refusal is in its body."""
    if not answer.startswith(b"HTTP/"):
        return len(answer) >= len(b"HTTP/")
    return b"\r\n\r\n" in answer and (b" 400" not in answer[:_STATUS_BYTES] or _TLS_PORT.search(answer) is not None)


def _is_http(answer: bytes) -> bool:
    """Return whether bytes are a response to HTTP without TLS other than that TLS is needed."""
    return answer.startswith(b"HTTP/") and not _TLS_PORT.search(answer) and not _TO_TLS.search(answer)


def _leads_to_tls(address: URL, location: str) -> bool:
    try:
        target = URL(location)
    except ValueError:
        return False
    return target.scheme == "https" and target.host == address.host
