"""Sending of an opened image to a client: from its file where the platform can, with a bound on bytes in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from io import FileIO
from typing import BinaryIO, cast

from aiohttp import web
from loguru import logger

from imagegen.errors import StoreUnavailable
from imagegen.images.store import PIECE_BYTES, OpenedImage
from imagegen.web.shortcuts import QuickResponse

STALL_S = 60.0
"""A client that takes not even one piece in this time is cut off."""

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""Bytes of images in memory that clients have not taken yet, of all clients together."""


class ImageSender:
    """Sends images. Over `max_waiting_bytes`, the clients that have waited longest are cut off.

    stall_s: how long a client may take for a piece of PIECE_BYTES.
    """

    def __init__(self, *, stall_s: float = STALL_S, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._stall_s = stall_s
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: dict[asyncio.Transport, int] = {}
        self._waiting_bytes = 0

    async def send(
        self, request: web.Request, opened: OpenedImage, part: range, status: int, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """Answer with the bytes `part` of an image, and close it.

        headers: with the Content-Type, and no framing.
        """
        transport = request.transport
        if transport is None:
            opened.close()
            raise ConnectionResetError
        try:
            if opened.data is not None:
                body = opened.data if len(part) == len(opened.data) else opened.data[part.start : part.stop]
                return await self._send_whole(request, transport, QuickResponse(body, status, headers))
            response = web.StreamResponse(status=status, headers=headers)
            response.content_length = len(part)
            await response.prepare(request)
            await self._send_pieces(response, transport, opened, part)
            return response
        finally:
            opened.close()

    async def _send_whole(
        self, request: web.Request, transport: asyncio.Transport, response: QuickResponse
    ) -> web.StreamResponse:
        body = response.body
        with self._counted(transport, len(body) if isinstance(body, bytes) else 0):
            try:
                async with asyncio.timeout(self._stall_s):
                    await response.prepare(request)
                    await response.write_eof()
                    await _flush(request, transport)
            except TimeoutError:
                _cut(transport)
        return response

    async def _send_pieces(
        self, response: web.StreamResponse, transport: asyncio.Transport, opened: OpenedImage, part: range
    ) -> None:
        offset = part.start
        try:
            if opened.file is not None:
                offset = await self._send_file(transport, opened.file, part)
            if offset < part.stop:
                await self._write_pieces(response, transport, opened, range(offset, part.stop))
        except TimeoutError:
            _cut(transport)
        except (OSError, StoreUnavailable) as error:
            if not isinstance(error, ConnectionError):
                logger.warning("An image could not be read to its end: {}", error.__cause__ or error)
            transport.abort()

    async def _send_file(self, transport: asyncio.Transport, file: FileIO, part: range) -> int:
        """Send from the file by the system's own call; return the offset that it came to."""
        loop = asyncio.get_running_loop()
        for offset in range(part.start, part.stop, PIECE_BYTES):
            length = min(PIECE_BYTES, part.stop - offset)
            try:
                async with asyncio.timeout(self._stall_s):
                    sent = await loop.sendfile(transport, cast(BinaryIO, file), offset, length, fallback=False)
            except (NotImplementedError, RuntimeError) as error:
                if transport.is_closing():
                    raise ConnectionResetError from error
                return offset
            if sent < length:
                raise OSError("an image file ended early")
        return part.stop

    async def _write_pieces(
        self, response: web.StreamResponse, transport: asyncio.Transport, opened: OpenedImage, part: range
    ) -> None:
        sent = 0
        with self._counted(transport, PIECE_BYTES):
            async with aclosing(opened.read(part.start, len(part))) as pieces:
                async for piece in _small(pieces):
                    async with asyncio.timeout(self._stall_s):
                        await response.write(piece)
                    sent += len(piece)
        if sent < len(part):
            raise OSError("an image ended early")

    @contextmanager
    def _counted(self, transport: asyncio.Transport, size_bytes: int) -> Iterator[None]:
        self._waiting[transport] = size_bytes
        self._waiting_bytes += size_bytes
        while self._waiting_bytes > self._max_waiting_bytes and len(self._waiting) > 1:
            longest = next(iter(self._waiting))
            self._waiting_bytes -= self._waiting.pop(longest)
            _cut(longest)
        try:
            yield
        finally:
            self._waiting_bytes -= self._waiting.pop(transport, 0)


async def _small(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the same bytes in pieces of at most PIECE_BYTES."""
    async for piece in pieces:
        for offset in range(0, len(piece), PIECE_BYTES):
            yield piece[offset : offset + PIECE_BYTES]


async def _flush(request: web.Request, transport: asyncio.Transport) -> None:
    """Wait until the system has taken all that was written."""
    if not transport.get_write_buffer_size():
        return
    transport.set_write_buffer_limits(high=0)
    try:
        await request.writer.drain()
    finally:
        transport.set_write_buffer_limits()


def _cut(transport: asyncio.Transport) -> None:
    logger.debug("A client stopped reading an image: connection closed")
    transport.abort()
