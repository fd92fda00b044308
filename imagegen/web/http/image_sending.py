"""Sending of an opened image to a client: from memory or its file, past the transport's buffer where the platform can.

What is left in transports' buffers is bounded in `unread`; the store's cache bounds large images in memory.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager
from io import FileIO

from aiohttp import HttpVersion11, web
from loguru import logger

from imagegen.errors import StoreUnavailable
from imagegen.images.store import PIECE_BYTES, OpenedImage
from imagegen.turn_queue import TurnQueue
from imagegen.web.http.disconnect import begin_sending, on_disconnect
from imagegen.web.http.responses import FastJsonResponse
from imagegen.web.http.transfer import FileTransfer, MemoryTransfer, Transfer, TransferUnsupported
from imagegen.web.http.unread import STALL_S

MIN_TRANSFERS, DESCRIPTORS_PER_TRANSFER = 32, 8
"""Minimum of files sent at once; otherwise an eighth of the descriptors, since each file takes two."""


class ImageSender:
    """Sender of images to clients. Over a limit, the client that has waited longest is cut off.

    Args:
        stall_s: how long a client may take nothing that is sent past its transport's buffer.
        max_transfers: files that are sent at once; None: by the limit of descriptors.

    Attributes:
        turns: in which images are encoded into JSON.
    """

    def __init__(self, *, stall_s: float = STALL_S, max_transfers: int | None = None) -> None:
        self.turns = TurnQueue()
        self._stall_s = stall_s
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        by_limit = MIN_TRANSFERS if descriptors < 0 else max(MIN_TRANSFERS, descriptors // DESCRIPTORS_PER_TRANSFER)
        self._transfers = _Limit(max_transfers or by_limit)

    async def send(
        self, request: web.Request, opened: OpenedImage, part: range, status: int, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """Answer with the bytes `part` of an image, and close it.

        headers: with the Content-Type, and no framing.
        """
        begin_sending(request)
        if opened.data is not None and request.keep_alive and request.version == HttpVersion11:
            if len(part) == opened.size_bytes:
                whole = _ImageResponse(opened, opened.data, status, headers, self)
                if len(part) > PIECE_BYTES:
                    await whole.prepare(request)  # sends it: only a running handler is notified of a disconnect
                return whole
            if len(part) <= PIECE_BYTES:
                return _ImageResponse(opened, bytes(opened.data[part.start : part.stop]), status, headers, self)
        try:
            response = web.StreamResponse(status=status, headers=headers)
            response.content_length = len(part)
            await response.prepare(request)
            await self._send_body(request, response, opened, part)
            return response
        finally:
            opened.close()

    def holding_file(self, transport: asyncio.Transport) -> AbstractContextManager[None]:
        """Count a file that is open for a client; over the limit, the client that has one for longest is cut off."""
        return self._transfers.counted(transport)

    async def send_from_memory(self, request: web.BaseRequest, head: bytes, body: bytes | memoryview) -> None:
        """Send the head of a response and its body; cut off a client that stops reading."""
        if (transport := request.transport) is None:
            return
        if transport.get_write_buffer_size():
            await request.writer.drain()
        transfer = MemoryTransfer(transport, head, body)
        try:
            if transfer.start():
                return
            if len(body) > PIECE_BYTES:
                await self._finish(request, transport, transfer)
            else:  # a copy of the rest costs less than a descriptor
                await self._write_rest(request, transport, transfer)
        except TransferUnsupported:
            await self._write_rest(request, transport, transfer)
        except TimeoutError:
            _cut(transport)
        except OSError:
            transport.abort()
        finally:
            transfer.release()

    async def _write_rest(
        self, request: web.BaseRequest, transport: asyncio.Transport, transfer: MemoryTransfer
    ) -> None:
        for piece in transfer.rest():  # `writelines` does not pause it in some 3.12 and 3.13: CVE-2024-12254
            transport.write(piece)
        await request.writer.drain()

    async def _send_body(
        self, request: web.Request, response: web.StreamResponse, opened: OpenedImage, part: range
    ) -> None:
        if opened.data is not None:
            body = memoryview(opened.data)[part.start : part.stop]
            await self.send_from_memory(request, b"", body)
            return
        if (transport := request.transport) is None:
            return
        try:
            if opened.file is not None and not opened.is_slow:
                part = await self._send_file(request, transport, opened.file, part)
            if part:
                await self._write_pieces(request, response, opened, part)
        except TimeoutError:
            _cut(transport)
        except (OSError, StoreUnavailable) as error:
            if not isinstance(error, ConnectionError):
                logger.warning("An image could not be read to its end: {}", error.__cause__ or error)
            transport.abort()

    async def _send_file(self, request: web.Request, transport: asyncio.Transport, file: FileIO, part: range) -> range:
        """Send from the file by the system's own call; return the part for which that is not possible."""
        await request.writer.drain()
        transfer = FileTransfer(transport, file, part)
        try:
            if not transfer.start():
                await self._finish(request, transport, transfer)
        except TransferUnsupported:
            pass
        return range(transfer.offset, part.stop)

    async def _finish(self, request: web.BaseRequest, transport: asyncio.Transport, transfer: Transfer) -> None:
        if isinstance(request, web.Request):
            on_disconnect(request, transfer.abort)
        with self._transfers.counted(transport):
            await transfer.run(self._stall_s)

    async def _write_pieces(
        self, request: web.Request, response: web.StreamResponse, opened: OpenedImage, part: range
    ) -> None:
        sent = 0
        async with aclosing(opened.read(part.start, len(part))) as pieces:
            async for piece in _small(pieces):
                await response.write(piece)
                await request.writer.drain()
                sent += len(piece)
        if sent < len(part):
            raise OSError("an image ended early")


class _ImageResponse(FastJsonResponse):
    """Response with an image that is in memory; the image is closed after it was sent."""

    def __init__(
        self,
        opened: OpenedImage,
        body: bytes | memoryview,
        status: int,
        headers: Mapping[str, str],
        sender: ImageSender,
    ) -> None:
        super().__init__(body, status, headers)
        self._opened = opened
        self._sender = sender

    async def send(self, request: web.BaseRequest, head: bytes, body: bytes | memoryview) -> None:
        try:
            await self._sender.send_from_memory(request, head, body)
        finally:
            self.body = None
            self._opened.close()


class _Limit:
    """Number of connections that hold a file, below a maximum: above it, the one that holds for longest is cut off."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._held: dict[asyncio.Transport, None] = {}

    @contextmanager
    def counted(self, transport: asyncio.Transport) -> Iterator[None]:
        self._held[transport] = None
        while len(self._held) > max(self._maximum, 1):
            longest = next(iter(self._held))
            del self._held[longest]
            _cut(longest)
        try:
            yield
        finally:
            self._held.pop(transport, None)


async def _small(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the same bytes in pieces of at most PIECE_BYTES."""
    async for piece in pieces:
        for offset in range(0, len(piece), PIECE_BYTES):
            yield piece[offset : offset + PIECE_BYTES]


def _cut(transport: asyncio.Transport) -> None:
    logger.debug("A client stopped reading an image: connection closed")
    transport.abort()
