"""Download and check of the images that a provider gives: as links, as bytes, or as base64 in its answer."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import pybase64
from yarl import URL

from imagegen import __version__
from imagegen.errors import DownloadFailed, ImageRejected, forget_frames
from imagegen.formats import certificate_fault, plain_base64, printable
from imagegen.images.image_links import Origin, parse_link
from imagegen.images.link_client import LinkBody, LinkClient, LinkResponse
from imagegen.images.sniff import QUICK_STEPS, NotAnImage, TooManySteps, sniff
from imagegen.images.spool import SMALL_BYTES, ImageSink, Spool
from imagegen.images.store import PIECE_BYTES, VerifiedImage, file_threads, in_check_thread
from imagegen.ssrf import blocked_cause, check_host
from imagegen.tasks.image import GivenImage, ImageBase64, ImageLink
from imagegen.timer_line import TimeLimit, TimerLine

MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_REDIRECTS = 3
MAX_TRIES = 3
BACKOFF_S = 0.25
MAX_DETAIL_CHARS = 300
NEW_LINK_S = 60.0
"""A link may be handed out moments before its host has the image; a 404 of an older one is final."""

SETTLING_S = 10.0
"""A refusal, a page or a damaged image may pass within this time: buckets answer 403 to what they do not have yet,
hosts answer with a page until the image is made, and caches pass on what they have so far."""

_FLUSH_BYTES = 2_500_000
"""Bytes of a large image that are passed to a thread at once: fewer would cost more in switches than in work."""

_FULL_BUFFERS = 4
"""Images that are received at once with buffers of _FLUSH_BYTES; those of further ones are smaller, since slow hosts
may keep dozens of them waiting."""

_FLUSH_COMPRESSED_BYTES = 64 * 1024
"""Of a compressed image, which may become a thousand times as large."""

_DECODED_CHARS = 256 * 1024

# Together's CDN answers 403 to a blank User-Agent; `identity` because images are compressed already.
_HEADERS = {
    "User-Agent": f"imagegen/{__version__}",
    "Accept": "image/png,image/jpeg,image/webp,*/*;q=0.1",
    "Accept-Encoding": "identity",
}
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT = {408, 425, 429}
_BODY_STATUSES = {200, 203, 206}
"""The check of an image decides whether a part is the whole. A body of another 2xx may be an image too."""

_WITHOUT_BODY = {204, 205}

_GRACE_S = {202: NEW_LINK_S, 404: NEW_LINK_S, 410: 0.0}
_GZIP_MAGIC = b"\x1f\x8b"
_ZLIB_MAGIC = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_ZLIB_OR_GZIP = 47

Decompress = Callable[[Iterable[bytes | memoryview]], Iterator[bytes]]
"""Yields the plain bytes of the next compressed ones. Raises NotAnImage."""


class ImageFetcher:
    """Fetcher that downloads or decodes one image into the spool. A failing link is tried again: the image is paid for.

    session: over a guarded_connector that allows the origin's own hosts, with no cookies and no credentials.
    timeout_s: for the tries of one `fetch` together. subject: begins the texts about an image that can't be used.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        spool: Spool,
        origin: Origin,
        *,
        timeout_s: float,
        max_bytes: int = MAX_IMAGE_BYTES,
        subject: str = "The upstream's image",
    ) -> None:
        self._spool = spool
        self._origin = origin
        self._timeout_s = timeout_s
        self._time_limits = TimerLine(timeout_s)
        self._max_bytes = max_bytes
        self._subject = subject
        self._client = LinkClient(session, _HEADERS, timeout_s / MAX_TRIES)
        self._receiving = 0

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        """Return the checked image; pass it to `Spool.discard` after use. age_s: seconds since its link came.

        Raises:
            ImageRejected: it can't be used.
            DownloadFailed: its link may work later.
            StoreUnavailable: neither disk nor memory can hold it now.
        """
        try:
            if isinstance(image, ImageLink):
                return await self._download(image.url, age_s)
            if isinstance(image, ImageBase64):
                return await self._decode(image.text)
            self._check_size(len(image.data))
            if len(image.data) <= SMALL_BYTES:
                return await _checked(image.data)
            return await self._write_decoded(self._spool.sink(must_hold=True), [image.data])
        except NotAnImage as error:
            detail = printable(f"{self._subject} can't be used: {error}", MAX_DETAIL_CHARS)
            renewable = isinstance(image, ImageLink) and _may_pass(error)
            if renewable and age_s < SETTLING_S:
                raise DownloadFailed(detail) from error
            raise ImageRejected(detail, lasting=error.lasting, renewable=renewable) from error

    def resolve(self, link: ImageLink) -> ImageLink:
        """Return the link as an absolute one. Raises ImageRejected."""
        if link.url.startswith(("http://", "https://")):
            return link
        url = _absolute(link.url, self._origin.base_url)
        self._check_form(url)
        return ImageLink(str(url))

    async def _download(self, link: str, age_s: float) -> VerifiedImage:
        try:
            with TimeLimit(self._time_limits):
                return await self._download_with_retries(_absolute(link, self._origin.base_url), age_s)
        except TimeoutError as error:
            raise DownloadFailed(f"the image could not be fetched within {self._timeout_s:g} s") from error

    async def _download_with_retries(self, url: URL, age_s: float) -> VerifiedImage:
        for number in range(1, MAX_TRIES):
            try:
                return await self._follow(url, age_s)
            except DownloadFailed as error:
                if error.retry_after_s is not None and error.retry_after_s > BACKOFF_S * number:
                    raise
                forget_frames(error)
            except NotAnImage as error:
                if not _may_pass(error):
                    raise
                forget_frames(error)
            await asyncio.sleep(BACKOFF_S * number)
        return await self._follow(url, age_s)

    async def _follow(self, url: URL, age_s: float) -> VerifiedImage:
        from_upstream = True
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(url, age_s, from_upstream=from_upstream)
            if isinstance(answer, VerifiedImage):
                return answer
            url, from_upstream = answer, self._origin.owns(url)
        raise _rejected(f"The image's link redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: URL, age_s: float, *, from_upstream: bool) -> VerifiedImage | URL:
        """Return the image, or where it redirects to. from_upstream: whether the upstream itself gave this address."""
        self._check_form(url)
        try:
            check_host(url.raw_host or "", url.port or 0, self._origin.own_hosts)
            return await self._request(url, age_s)
        except (aiohttp.ClientError, OSError) as error:
            refused, own = blocked_cause(error), None
            unknown_name = isinstance(error, aiohttp.ClientConnectorDNSError)
            if from_upstream and (refused or unknown_name):
                own = await self._origin.own_address(url)
            if own is None or own == url:
                if refused:
                    raise _rejected(f"The image's link is refused: {refused}") from error
                raise DownloadFailed(f"{url.raw_host}: {_reason(error)}") from error
        return await self._get(own, age_s, from_upstream=False)

    async def _request(self, url: URL, age_s: float) -> VerifiedImage | URL:
        async def read(response: LinkResponse) -> VerifiedImage | URL:
            status, host = response.status, url.raw_host
            if 200 <= status < 300 and status not in _WITHOUT_BODY:
                try:
                    return await self._read(response)
                except NotAnImage:
                    if status in _BODY_STATUSES:
                        raise
            if status in _REDIRECTS and (location := response.headers.get("Location", "").strip()):
                return _absolute(location, url)
            if status >= 500 or status in _TRANSIENT or age_s < _GRACE_S.get(status, SETTLING_S):
                requested_s = _seconds(response.headers.get("Retry-After", ""))
                raise DownloadFailed(f"{host} answered {status}", retry_after_s=requested_s)
            raise _rejected(f"The image's link is dead: {host} answered {status}", renewable=True)

        return await self._client.get(url, read)

    async def _read(self, response: LinkResponse) -> VerifiedImage:
        """Return the image of a response, also if only the end of the response is missing."""
        body, encoding = LinkBody(response), response.headers.get("Content-Encoding", "")
        self._check_size(body.length or 0)
        try:
            if body.length is None:
                return await self._read_pieces(body, encoding)
            if body.length > SMALL_BYTES:
                self._receiving += 1
                try:
                    return await self._receive(body, body.length, encoding)
                finally:
                    self._receiving -= 1
            return await self._check_small(await body.rest(), encoding)
        except NotAnImage as error:
            if (ended := body.take_error()) is None:
                raise
            try:
                raise ended from error
            finally:
                del ended  # it refers to this frame

    def _check_small(self, data: bytes, encoding: str) -> Coroutine[Any, Any, VerifiedImage]:
        plain = _plain_of(data[:2], encoding, self._check_size)
        return _checked(data) if plain is None else self._write_decoded(self._spool.sink(), plain([data]))

    async def _read_pieces(self, body: LinkBody, encoding: str) -> VerifiedImage:
        """Read a body of unknown length."""
        pieces: list[bytes] = []
        pending = total = 0
        plain, flush_bytes = None, _FLUSH_BYTES
        sink = self._spool.sink()
        try:
            while piece := await body.next_piece():
                if not total and (plain := _plain_of(piece[:2], encoding, self._check_size)):
                    flush_bytes = _FLUSH_COMPRESSED_BYTES
                pieces.append(piece)
                pending += len(piece)
                total += len(piece)
                self._check_size(total)
                if pending >= flush_bytes:
                    await self._spool.fill(sink, sink.write, plain(pieces) if plain else pieces)
                    pieces, pending = [], 0
            if plain is None and total <= SMALL_BYTES:
                return await _checked(b"".join(pieces))
            return await self._spool.fill(sink, sink.finish, plain(pieces) if plain else pieces)
        finally:
            if not sink.closed:
                file_threads.put(sink.discard)

    async def _receive(self, body: LinkBody, length: int, encoding: str) -> VerifiedImage:
        """Read a large body of declared length."""
        most_bytes = _FLUSH_BYTES * _FULL_BUFFERS // max(self._receiving, _FULL_BUFFERS)
        buffer = memoryview(bytearray(min(length, most_bytes)))
        sink = self._spool.sink()
        try:
            piece = await body.fill(buffer)
            plain = _plain_of(bytes(piece[:2]), encoding, self._check_size)
            while plain or not body.is_received:
                if plain is None:
                    await self._spool.fill(sink, sink.write, [piece])
                else:
                    for at in range(0, len(piece), _FLUSH_COMPRESSED_BYTES):
                        await self._spool.fill(sink, sink.write, plain([piece[at : at + _FLUSH_COMPRESSED_BYTES]]))
                    if body.is_received:
                        return await self._spool.fill(sink, sink.finish)
                piece = await body.fill(buffer)
            return await self._spool.fill(sink, sink.finish, [piece])
        finally:
            if not sink.closed:
                file_threads.put(sink.discard)

    async def _decode(self, text: memoryview) -> VerifiedImage:
        try:
            return await self._decode_plain(text)
        except NotAnImage:
            plain = await in_check_thread(_plain_base64, text)
            if plain == text:
                raise
        return await self._decode_plain(memoryview(plain))

    async def _decode_plain(self, text: memoryview) -> VerifiedImage:
        self._check_size(len(text) // 4 * 3)
        if len(text) <= SMALL_BYTES:
            return await _checked(b"".join(_decoded(text)))
        return await self._write_decoded(self._spool.sink(must_hold=True), _decoded(text))

    async def _write_decoded(self, sink: ImageSink, pieces: Iterator[bytes] | list[bytes]) -> VerifiedImage:
        try:
            return await self._spool.fill(sink, sink.finish, pieces)
        finally:
            if not sink.closed:
                file_threads.put(sink.discard)

    def _check_form(self, url: URL) -> None:
        if url.scheme not in ("http", "https") or not url.raw_host:
            raise _rejected("The image's link is not an http or https address")
        if url.raw_user is not None or url.raw_password is not None:
            raise _rejected("The image's link carries a user name")

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise _rejected(f"{self._subject} is over {self._max_bytes} bytes")


async def _checked(data: bytes) -> VerifiedImage:
    """Check a small image: at once, but in a thread if it has very many parts. Raises NotAnImage."""
    try:
        return sniff(data, QUICK_STEPS)
    except TooManySteps:
        return await in_check_thread(sniff, data)


def _may_pass(error: NotAnImage) -> bool:
    """Return whether the same link may return an image some seconds later."""
    return not error.lasting or error.is_text


def _plain_of(start: bytes, encoding: str, check_size: Callable[[int], None]) -> Decompress | None:
    """Return what decompresses a body that starts so, None for a plain one.

    Its first bytes decide: a host may name no `Content-Encoding`, or one before a plain image. check_size: is passed
    the bytes so far, and raises what ends the decompression.
    """
    is_deflate = encoding.strip().lower() == "deflate" and start in _ZLIB_MAGIC
    if start != _GZIP_MAGIC and not is_deflate:
        return None
    decompressor, total = zlib.decompressobj(wbits=_ZLIB_OR_GZIP), 0

    def decompress(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        nonlocal total
        for compressed in pieces:
            rest, is_full = compressed, True
            while is_full:
                try:
                    plain = decompressor.decompress(rest, PIECE_BYTES)
                except zlib.error as error:
                    raise NotAnImage("its compression is broken") from error
                rest, is_full = decompressor.unconsumed_tail, len(plain) == PIECE_BYTES
                total += len(plain)
                check_size(total)
                yield plain

    return decompress


def _plain_base64(text: memoryview) -> bytes:
    """Return base64 in any common form, or with the escapes of a JSON text, as plain base64."""
    plain = bytes(text)
    if b"\\" in plain:
        with suppress(ValueError):
            plain = str(json.loads(b'"%b"' % plain)).encode()
    return plain_base64(plain)


def _decoded(text: memoryview) -> Iterator[bytes]:
    """Yield the bytes of a base64 text in pieces; its padding may be missing. Raises NotAnImage."""
    whole = len(text) // 4 * 4
    try:
        for at in range(0, whole, _DECODED_CHARS):
            yield pybase64.b64decode(text[at : min(at + _DECODED_CHARS, whole)], validate=True)
        if rest := bytes(text[whole:]):
            yield pybase64.b64decode(rest + b"=" * (4 - len(rest)), validate=True)
    except ValueError as error:
        raise NotAnImage("it is not valid base64") from error


def _absolute(link: str, base: URL | None) -> URL:
    try:
        return parse_link(link, base)
    except ValueError as error:
        raise _rejected("The image's link is not a valid address") from error


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if fault := certificate_fault(error):
        return f"its TLS certificate is refused ({fault})"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return "the answer broke off"


def _rejected(detail: str, *, renewable: bool = False) -> ImageRejected:
    return ImageRejected(printable(detail, MAX_DETAIL_CHARS), lasting=True, renewable=renewable)
