"""JSON with images in it as base64, which are read and encoded piece by piece while it is sent.

A large image and a client that stops reading cost little memory, and no step of it blocks the event loop.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Self

import pybase64
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from loguru import logger

from imagegen.errors import StoreUnavailable
from imagegen.images.store import ImageStore
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import TurnQueue
from imagegen.web.http.image_sending import ImageSender

IN_MEMORY_BYTES = 16 * 1024
"""A smaller image is encoded at once."""


STEP_BYTES = 144 * 1024
"""Read and encoded at once; a multiple of three, so that the texts of all steps are one text."""

STEP_COST = 4
"""Of a turn's cost: to read, encode and send a step takes up to 0.4 ms, and a client with large buffers takes the
texts of 2 MB without a wait."""

SENT_BYTES = 64 * 1024
"""Sent at once: for more, aiohttp would wait for a client without a limit of time."""


class ImageText(str):
    """Placeholder of the base64 of an image in a JSON value: a random text."""

    __slots__ = ("image", "task_id")

    task_id: str
    image: StoredImage

    @classmethod
    def of(cls, task_id: str, image: StoredImage) -> Self:
        """Return the placeholder of an image of a task."""
        text = cls(secrets.token_hex(16))
        text.task_id, text.image = task_id, image
        return text

    @property
    def length(self) -> int:
        """Return the characters of the base64."""
        return -(-self.image.size_bytes // 3) * 4


Part = bytes | ImageText


async def image_text(store: ImageStore, task_id: str, image: StoredImage) -> str:
    """Return the base64 of an image, or its placeholder. Raises StoreUnavailable if it can't be opened."""
    opened = await store.open(task_id, image)
    if opened is None:
        raise StoreUnavailable
    with closing(opened):
        if image.size_bytes > IN_MEMORY_BYTES:
            return ImageText.of(task_id, image)
        return pybase64.b64encode(await opened.read_all()).decode()


def parts_of(encoded: bytes, value: object) -> list[Part]:
    """Return encoded JSON in parts, the images of the value apart."""
    texts = {text.encode(): text for text in _image_texts(value)}
    if not texts:
        return [encoded]
    return [texts.get(part, part) for part in re.split(b"(%s)" % b"|".join(texts), encoded)]


def _image_texts(value: object) -> Iterator[ImageText]:
    if isinstance(value, ImageText):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _image_texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _image_texts(child)


async def pieces_of(parts: Sequence[Part], store: ImageStore, turns: TurnQueue) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of parts in small pieces. Raises StoreUnavailable, OSError if an image can't be read any more.

    turns: of all such responses, so that many at once do not delay other clients.
    """
    for part in parts:
        if not isinstance(part, ImageText):
            yield part
            continue
        opened = await store.open(part.task_id, part.image)
        if opened is None:
            raise StoreUnavailable
        with closing(opened):
            for offset in range(0, part.image.size_bytes, STEP_BYTES):
                await turns.turn(STEP_COST)
                length = min(STEP_BYTES, part.image.size_bytes - offset)
                data = b"".join([piece async for piece in opened.read(offset, length)])
                if len(data) < length:
                    raise OSError("an image ended early")
                text = pybase64.b64encode(data)
                del data
                for at in range(0, len(text), SENT_BYTES):
                    yield text[at : at + SENT_BYTES]


class JsonWithImages(web.StreamResponse):
    """Response that holds one JSON object with images in it. parts: of the encoded object."""

    def __init__(self, parts: Sequence[Part], store: ImageStore, sender: ImageSender) -> None:
        super().__init__(headers={hdrs.CONTENT_TYPE: "application/json; charset=utf-8"})
        self._parts, self._store, self._sender = parts, store, sender
        self._is_sent = False
        self._request: web.BaseRequest | None = None
        self.content_length = sum(part.length if isinstance(part, ImageText) else len(part) for part in parts)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._request = request
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the body. Raises ConnectionError if the client has left, or reads nothing for a minute."""
        if not self._is_sent and self._request is not None:
            self._is_sent = True
            await self.send_to(self, self._request)
        await super().write_eof(data)

    async def send_to(self, stream: web.StreamResponse, request: web.BaseRequest) -> None:
        """Write the body to a stream that has begun. Raises ConnectionError."""
        if (transport := request.transport) is None:
            raise ConnectionResetError("the client has left")
        try:
            with self._sender.holding_file(transport):
                async with aclosing(pieces_of(self._parts, self._store, self._sender.turns)) as pieces:
                    async for piece in pieces:
                        await stream.write(piece)
                        await request.writer.drain()
        except (StoreUnavailable, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            logger.warning("An image could not be read to its end: {}", error.__cause__ or error)
            transport.abort()
            raise ConnectionResetError("the image can't be read") from error


def json_with_images(
    encoded: bytes, value: Mapping[str, Any], store: ImageStore, sender: ImageSender
) -> JsonWithImages | None:
    """Return the response for encoded JSON and its value, None if the value has no placeholder."""
    parts = parts_of(encoded, value)
    return JsonWithImages(parts, store, sender) if len(parts) > 1 else None
