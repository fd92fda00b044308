"""Owns one exchange with a provider: JSON out, a bounded answer in, and every loss as one `UpstreamError`.

The session is the app's. It needs `sent_trace()` among its trace configs (else no watcher hears `sent`), a
`DummyCookieJar` (the vendors' proxies set cookies), no `trust_env`, and a connector with a short `keepalive_timeout`
(15 s is fine): when an upstream closes an idle connection just as it is used again, the request counts as sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace

import aiohttp
import orjson
from yarl import URL

from imagegen import __version__
from imagegen.errors import UpstreamError
from imagegen.providers.protocol import CallWatcher, Reply
from imagegen.providers.wire import decipher, refusal

MAX_BODY_BYTES = 48 * 2**20
"""Four PNG pictures of 2048 x 2048 as base64 fit; what is over it, also after decompression, is not read."""

USER_AGENT = f"imagegen/{__version__}"

_CONNECT_S = 10.0
_LOOK_UP_S = 15.0
_CHUNK_BYTES = 2**16

_NEVER_SENT: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorDNSError, "its name was not found"),
    (aiohttp.ClientSSLError, "TLS failed"),
    (aiohttp.ServerFingerprintMismatch, "TLS failed"),
    (aiohttp.ConnectionTimeoutError, "no connection in time"),
    (aiohttp.ClientConnectorError, "no connection"),
    (aiohttp.InvalidURL, "its address is not usable"),
    (aiohttp.NonHttpUrlClientError, "its address is not usable"),
)


def sent_trace() -> aiohttp.TraceConfig:
    """The trace by which a call's watcher hears that its request is on the wire; give it to the session."""
    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(_tell_sent)
    return trace


async def _tell_sent(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _sent: aiohttp.TraceRequestChunkSentParams
) -> None:
    if isinstance(wire := context.trace_request_ctx, _Wire):
        wire.watcher.sent()


@dataclass(frozen=True, slots=True)
class _Wire:
    watcher: CallWatcher


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Upstream:
    """A provider's base URL, and what goes with each request to it and to no other host.

    timeout_s: over everything, from the wait for a connection to the last byte of the body.
    authorization: the header's value; secret: the part of it that no text may show.
    """

    session: aiohttp.ClientSession
    base: URL
    timeout_s: float
    authorization: str | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)

    @property
    def own_hosts(self) -> frozenset[str]:
        return frozenset({self.base.host_port_subcomponent or ""})

    async def generate(self, path: str, fields: Mapping[str, object], watcher: CallWatcher) -> Reply:
        """POSTs one paid call. Raises UpstreamError."""
        answer = await self._exchange("POST", path, self.timeout_s, orjson.dumps(fields), _Wire(watcher))
        return decipher(answer.status, answer.headers, answer.body, secret=self.secret, now_s=time.time())

    async def look_up(self, path: str) -> object:
        """GETs some JSON that costs nothing. Raises UpstreamError."""
        answer = await self._exchange("GET", path, min(_LOOK_UP_S, self.timeout_s))
        if 200 <= answer.status < 300:
            with suppress(orjson.JSONDecodeError):
                return orjson.loads(answer.body)
        raise refusal(answer.status, answer.headers, answer.body, secret=self.secret, now_s=time.time())

    async def _exchange(
        self, method: str, path: str, timeout_s: float, body: bytes | None = None, wire: _Wire | None = None
    ) -> _Answer:
        connect_s = min(_CONNECT_S, timeout_s / 2)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.request(
                    method,
                    _address(self.base, path),
                    data=body,
                    headers=self._headers(),
                    allow_redirects=False,
                    timeout=_limits(connect_s),
                    trace_request_ctx=wire,
                ) as response,
            ):
                return _Answer(response.status, response.headers, await _bounded(response))
        except (aiohttp.ClientError, OSError) as error:
            raise _loss(error, timeout_s) from error

    def _headers(self) -> dict[str, str]:
        """A blank User-Agent gets a 403 from the proxies before Together."""
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": USER_AGENT}
        return headers | ({"Authorization": self.authorization} if self.authorization else {})


@lru_cache(maxsize=64)
def _address(base: URL, path: str) -> URL:
    return URL(f"{base}/{path}")


@lru_cache(maxsize=8)
def _limits(connect_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    length = response.content_length or 0
    if 0 < length <= MAX_BODY_BYTES and "Content-Encoding" not in response.headers:
        return await response.read()
    if length <= MAX_BODY_BYTES:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
        else:
            return bytes(body)
    response.close()
    raise UpstreamError(
        "upstream_bad_response",
        f"HTTP {response.status}, more than {MAX_BODY_BYTES >> 20} MiB",
        status=response.status,
    )


def _loss(error: aiohttp.ClientError | OSError, timeout_s: float) -> UpstreamError:
    """What it means that no whole answer came. What can't have reached the upstream can't have been paid for."""
    for kind, reason in _NEVER_SENT:
        if isinstance(error, kind):
            return UpstreamError("upstream_error", f"The provider can't be reached: {reason}", retryable=True)
    if isinstance(error, aiohttp.ClientResponseError):
        return UpstreamError("upstream_bad_response", "The provider's answer is not HTTP")
    if isinstance(error, TimeoutError):
        detail = f"The provider did not answer within {timeout_s:g} s"
        return UpstreamError("upstream_timeout", detail, retryable=True, ambiguous=True)
    detail = "The connection to the provider was lost before its answer was complete"
    return UpstreamError("upstream_error", detail, retryable=True, ambiguous=True)
