"""Owns how a provider's picture becomes checked bytes: its link is fetched with care, or its bytes are taken."""

from __future__ import annotations

import asyncio

import aiohttp
from yarl import URL

from imagegen import __version__
from imagegen.addresses import AddressRefused, check_host, refusal_in
from imagegen.errors import UpstreamError
from imagegen.images.sniff import NotAnImage, sniff
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import ImageBytes, ImageLink

MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_REDIRECTS = 3
TRIES = 3
BACKOFF_S = 0.25
MAX_DETAIL_CHARS = 300

_INLINE_BYTES = 256 * 1024
"""A larger picture is checked in a thread, so that the loop never stands for more than a millisecond."""

# Together's CDN answers 403 to a blank User-Agent; `identity` because pictures are compressed already.
_HEADERS = {
    "User-Agent": f"imagegen/{__version__}",
    "Accept": "image/png,image/jpeg,image/webp,*/*;q=0.1",
    "Accept-Encoding": "identity",
}
_REDIRECTS = {301, 302, 303, 307, 308}
# 404 too: a link may be handed out moments before its CDN knows the picture.
_PASSING = {404, 408, 425, 429}


class _LinkFailed(Exception):
    """One try of a link failed in a way that may pass."""


class ImageFetcher:
    """Brings one picture. A failing link is tried again, since that costs nothing and the picture is paid for.

    session: over a guarded_connector that allows `own_hosts`, with no cookies and no credentials of its own.
    own_hosts: `host` or `host:port` that may be fetched from though their addresses are not public.
    timeout_s: for one picture, all tries and redirects together.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        own_hosts: frozenset[str],
        timeout_s: float,
        max_bytes: int = MAX_IMAGE_BYTES,
    ) -> None:
        self._session = session
        self._own_hosts = own_hosts
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        stall_s = timeout_s / TRIES
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)

    async def fetch(self, image: ImageLink | ImageBytes) -> VerifiedImage:
        """The picture's checked bytes. Raises UpstreamError `upstream_bad_response`, which no repeat mends for free."""
        if isinstance(image, ImageLink):
            data = await self._download(image.url)
        else:
            data = image.data
            self._check_size(len(data))
        try:
            return sniff(data) if len(data) <= _INLINE_BYTES else await asyncio.to_thread(sniff, data)
        except NotAnImage as error:
            raise _bad(f"The upstream's picture can't be used: {error}") from error

    async def _download(self, link: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._try_often(_parsed(link))
        except TimeoutError as error:
            raise _bad(f"The picture could not be fetched within {self._timeout_s:g} s") from error

    async def _try_often(self, url: URL) -> bytes:
        for number in range(1, TRIES):
            try:
                return await self._follow(url)
            except _LinkFailed:
                await asyncio.sleep(BACKOFF_S * number)
        try:
            return await self._follow(url)
        except _LinkFailed as error:
            raise _bad(f"The picture's link failed {TRIES} times: {error}") from error

    async def _follow(self, url: URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise _bad(f"The picture's link redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: URL) -> bytes | URL:
        """The body, or where it is said to be."""
        self._check(url)
        host = url.raw_host
        try:
            async with self._session.get(
                url, headers=_HEADERS, allow_redirects=False, timeout=self._timeout
            ) as response:
                if response.status in _REDIRECTS:
                    return _parsed(response.headers.get("Location", ""), url)
                if response.status >= 500 or response.status in _PASSING:
                    raise _LinkFailed(f"{host} answered {response.status}")
                if response.status != 200:
                    raise _bad(f"The picture's link is dead: {host} answered {response.status}")
                return await self._read(response)
        except (aiohttp.ClientError, OSError) as error:
            if refused := refusal_in(error):
                raise _bad(f"The picture's link is refused: {refused}") from error
            raise _LinkFailed(f"{host}: {_reason(error)}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        self._check_size(response.content_length or 0)
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            self._check_size(len(data))
        return bytes(data)

    def _check(self, url: URL) -> None:
        if url.scheme not in ("http", "https") or not url.raw_host:
            raise _bad("The picture's link is not an http or https address")
        if url.raw_user is not None or url.raw_password is not None:
            raise _bad("The picture's link carries a user name")
        try:
            check_host(url.raw_host, url.port or 0, self._own_hosts)
        except AddressRefused as error:
            raise _bad(f"The picture's link is refused: {error}") from error

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise _bad(f"The upstream's picture is over {self._max_bytes} bytes")


def _parsed(link: str, base: URL | None = None) -> URL:
    """The link as it was written where that is possible: a signature covers each character of it."""
    as_written = link.isascii() and link.isprintable() and " " not in link
    try:
        url = URL(link, encoded=as_written)
        return url if base is None or not link else base.join(url)
    except ValueError as error:
        raise _bad("The picture's link is not a valid address") from error


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return "the answer broke off"


def _bad(detail: str) -> UpstreamError:
    shown = "".join(c if c.isprintable() else "?" for c in detail)
    return UpstreamError("upstream_bad_response", shown[:MAX_DETAIL_CHARS])
