"""Bodies of responses: received within bounds, decompressed, and kept as far as they came where they break off."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import aiohttp
from aiohttp.client_proto import ResponseHandler

from imagegen.body_receiver import BodyReceiver, next_piece
from imagegen.byte_budget import ByteBudget
from imagegen.errors import UpstreamError
from imagegen.providers.large_body import LARGE_BYTES, MAX_VALUES, LargeBody, has_many_values, load_object
from imagegen.providers.streamed_answer import is_event_stream, read_answer

MAX_BODY_BYTES = 48 * 2**20
"""The images of one call fit as base64 (`MAX_INLINE_PIXELS`); larger bodies, also after decompression, are not read."""

_RESERVED_BYTES = 2**20
"""Of memory for the rest of a body of unknown length; more is reserved as it comes."""

_USUAL_BYTES = 8 * 2**20
"""A body of unknown length that is larger, compressed or not, grows on alone: several would fill the memory."""

_WAIT_FOR_MEMORY_S = 10.0
"""How long a large body stays unread while others fill the memory: its call is paid, so it is not left for long."""

_COMPRESSED_STEP_BYTES = 2**15
_PLAIN_STEP_BYTES = 2**19
_START_BYTES = 64
_JSON_STARTS = (b"{", b"[")
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15
_MAX_LAYERS = 2
_MAX_MEMBERS = 10_000
_UNREADABLE = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz"})
"""Content codings that no request here accepts."""

_bodies = ByteBudget()
_growing = ByteBudget(1)


class ResponseBody:
    """The body of one response. After a failed `read` it has what came until then, until `release`.

    Args:
        status, headers: of the response.
        content: the body, as it was sent: aiohttp must not decompress it.
        protocol: of the connection, if nothing is to be written to it any more: a large body is received past it.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        content: aiohttp.StreamReader,
        protocol: ResponseHandler | None = None,
    ) -> None:
        self._status = status
        self._headers = headers
        self._content = content
        self._protocol = protocol
        self._body: LargeBody | None = None
        self._missing = 0

    async def read(self) -> bytes | bytearray:
        """Return the whole body, decompressed, and an event stream as the JSON of its answer.

        Raises: UpstreamError if it is over a limit, or compressed in a way that was not requested; as the connection.
        """
        content, length = self._content, self._length()
        if length > MAX_BODY_BYTES:
            raise _too_large(self._status)
        if length and content.is_eof():
            body: bytes | bytearray = content.read_nowait()
        elif length > LARGE_BYTES:
            body = await self._receive(length)
        else:
            body = await self._receive_pieces()
        plain = body if _is_small_json(body) else await self._plain(body)
        if plain is not self._body:
            self.release()
        return plain

    async def whole_part(self) -> bytes | bytearray | None:
        """Return the bytes of a body that broke off if they are complete in content; None otherwise.

        Hosts declare wrong lengths and end connections too early, and an error's status is its meaning.
        """
        came = LargeBody() if self._body is None else self._body
        if self._missing:  # the error refers to the block, so that it can't be cut
            came = LargeBody(memoryview(came)[: len(came) - self._missing])
            self.release()
            await _reserve(came)
        body = await self._plain(came, is_cut=True)
        if not 200 <= self._status < 300:
            return body
        fields = load_object(body) if len(body) <= LARGE_BYTES else await asyncio.to_thread(load_object, body)
        return None if fields is None else body

    def release(self) -> None:
        """Free the memory of a body that is not needed."""
        if self._body is not None:
            _free(self._body)

    def _length(self) -> int:
        """Return the declared length; 0 without one."""
        return 0 if "Transfer-Encoding" in self._headers else int(self._headers.get("Content-Length", 0))

    async def _receive(self, length: int) -> LargeBody:
        """Receive a large body into one block: joining its pieces would take the memory twice."""
        await _bodies.take(length, _WAIT_FOR_MEMORY_S)
        body = self._body = LargeBody(length)
        body.budget, body.reserved_bytes, self._missing = _bodies, length, length
        if self._protocol is not None:
            receiver = BodyReceiver(self._protocol, self._content, length)
            try:
                await receiver.fill(memoryview(body))
            finally:
                self._missing = receiver.left
            return body
        while piece := await next_piece(self._content):
            at = length - self._missing
            body[at : at + len(piece)] = piece
            self._missing -= len(piece)
        return body

    async def _receive_pieces(self) -> bytes | bytearray:
        """Receive a small body, or one of unknown length."""
        body = self._body = LargeBody()
        while piece := await next_piece(self._content):
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise _too_large(self._status)
            await _reserve(body)
        return body if len(body) > LARGE_BYTES else bytes(body)

    async def _plain(self, body: bytes | bytearray, *, is_cut: bool = False) -> bytes | bytearray:
        """Return a body to parse. Raises as `read` does. An error with very many values is its status alone."""
        plain = await self._decoded(body, is_cut=is_cut)
        if len(plain) <= LARGE_BYTES or not has_many_values(plain):
            return plain
        if isinstance(plain, LargeBody):
            _free(plain)
        if not 200 <= self._status < 300:
            return b""
        detail = f"HTTP {self._status}, more than {MAX_VALUES} values"
        raise UpstreamError("upstream_bad_response", detail, status=self._status, lasting=True)

    async def _decoded(self, body: bytes | bytearray, *, is_cut: bool) -> bytes | bytearray:
        for _ in range(_MAX_LAYERS):
            if body[:1] in _JSON_STARTS or (form := self._compression(body)) is None:
                break
            with suppress(zlib.error):
                body = await _decompressed(self._status, body, form)
        if body[:1] in _JSON_STARTS or not body:
            return body
        if is_event_stream(body[:_START_BYTES]):
            answer = await asyncio.to_thread(read_answer, body)
            return await _counted(answer.body, body) if answer and (answer.is_whole or not is_cut) else body
        self._check_readable(body)
        return body

    def _compression(self, body: bytes | bytearray) -> int | None:
        """Return the form in which a body is compressed: by its content coding, as a transfer, or without a word."""
        if body[:2] == _GZIP_MAGIC:
            return _GZIP
        if self._encoding() == "deflate" and body:
            return _ZLIB if body[0] & 0xF == 8 else _RAW_DEFLATE
        return None

    def _check_readable(self, body: bytes | bytearray) -> None:
        """Raise UpstreamError for an answer that is paid for, but can't be read, however often it is requested."""
        coding = "zstd" if body[:4] == _ZSTD_MAGIC else self._encoding()
        if 200 <= self._status < 300 and coding in _UNREADABLE and load_object(body) is None:
            detail = f"HTTP {self._status}, compressed by {coding}, which the request does not accept"
            raise UpstreamError("upstream_bad_response", detail, status=self._status, lasting=True)

    def _encoding(self) -> str:
        return self._headers.get("Content-Encoding", "").rpartition(",")[2].strip().lower()


def _is_small_json(body: bytes | bytearray) -> bool:
    """Return whether a body is as it is to be parsed."""
    return body[:1] in _JSON_STARTS and len(body) <= LARGE_BYTES


async def _decompressed(status: int, body: bytes | bytearray, form: int) -> bytes | bytearray:
    """Return the body decompressed. Raises zlib.error, and UpstreamError if it is over the limit."""
    plain, pieces = LargeBody(), _pieces(body, form)
    plain.continues(body)
    with _released_after_failure(plain):
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            plain += piece
            if len(plain) > MAX_BODY_BYTES:
                raise _too_large(status)
            await _reserve(plain)
    return plain if len(plain) > LARGE_BYTES else bytes(plain)


def _pieces(body: bytes | bytearray, form: int) -> Iterator[bytes]:
    """Yield a compressed body, which may have several gzip members, without what follows it. Raises zlib.error."""
    decompressor, view, members = zlib.decompressobj(wbits=form), memoryview(body), 1
    for at in range(0, len(body), _COMPRESSED_STEP_BYTES):
        rest: bytes | memoryview = view[at : at + _COMPRESSED_STEP_BYTES]
        is_full = True
        while is_full:
            piece = decompressor.decompress(rest, _PLAIN_STEP_BYTES)
            rest, is_full = decompressor.unconsumed_tail, len(piece) == _PLAIN_STEP_BYTES
            yield piece
            if len(surplus := decompressor.unused_data) >= len(_GZIP_MAGIC):
                if not surplus.startswith(_GZIP_MAGIC) or members >= _MAX_MEMBERS:
                    return
                decompressor, rest, is_full = zlib.decompressobj(wbits=form), surplus, True
                members += 1


async def _counted(body: bytes, source: bytes | bytearray) -> bytes | bytearray:
    if len(body) <= LARGE_BYTES:
        return body
    counted = LargeBody(body)
    counted.continues(source)
    await _reserve(counted)
    return counted


async def _reserve(body: LargeBody) -> None:
    """Reserve memory for a large body as it grows."""
    if len(body) > max(LARGE_BYTES, body.reserved_bytes):
        if len(body) > _USUAL_BYTES:
            await body.take_turn(_growing, _WAIT_FOR_MEMORY_S)
        await body.reserve(_bodies, len(body) + _RESERVED_BYTES, _WAIT_FOR_MEMORY_S)


def _too_large(status: int) -> UpstreamError:
    detail = f"HTTP {status}, more than {MAX_BODY_BYTES >> 20} MiB"
    return UpstreamError("upstream_bad_response", detail, status=status, lasting=True)


@contextmanager
def _released_after_failure(body: LargeBody) -> Iterator[None]:
    """Free the memory of a body that could not be read."""
    try:
        yield
    except BaseException:
        _free(body)
        raise


def _free(body: LargeBody) -> None:
    with suppress(BufferError):  # it is still referred to
        body.clear()
    body.release()


async def read_body(
    status: int, headers: Mapping[str, str], content: aiohttp.StreamReader, ends_at: float | None
) -> bytes | bytearray:
    """Return the body of a response (see `ResponseBody`), also one that broke off and is complete in content.

    ends_at: time limit, by the clock of the event loop. Raises as `ResponseBody.read`; TimeoutError.
    """
    body, plain = ResponseBody(status, headers, content), None
    try:
        async with asyncio.timeout_at(ends_at):
            plain = await body.read()
    except (aiohttp.ClientError, OSError):
        if (plain := await body.whole_part()) is None:
            raise
    finally:
        if plain is None:
            body.release()
    return plain
