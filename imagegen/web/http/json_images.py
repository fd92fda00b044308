"""Reader of JSON bodies with images in them: large `data:` URIs are cut out while the body comes, and spooled.

The rest of the body is as small as any other, and is parsed as any other: memory does not grow with the images.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import pybase64
from aiohttp import web

from imagegen.errors import ApiError, BodyTooLarge, FieldError, ImageTooLarge, InvalidRequest, UnsupportedImage
from imagegen.images.store import VerifiedImage
from imagegen.images.uploads import FILE_FIELD, Uploads, upload_id_of
from imagegen.web.http.body import check_type, read_body
from imagegen.web.http.body_stream import BodyStream
from imagegen.web.http.errors import MAX_BODY_BYTES

KEPT_URI_BYTES = 32 * 1024
"""A shorter URI stays in the body."""

MAX_URIS = 1_000
"""URIs of one body, short ones too: a batch may have 850."""

_HEAD_BYTES = 256
_CONTEXT_BYTES = 8_192
_URI = re.compile(rb'"\s{0,8}data:image\\?/[a-z0-9.+-]{1,40}(?:;[a-z0-9=._-]{1,40}){0,2};base64,', re.IGNORECASE)
_ENTRIES = rb'(?:\s*(?:"[^"]*"|\{[^{}]*\})\s*,)*'
_IMAGE_FIELD = re.compile(
    rb'"(?:imageUrl|image_url|image|mask|url)"\s*:\s*\Z'
    rb'|"(?:referenceImages|reference_images|image|images)"\s*:\s*\[' + _ENTRIES + rb"\s*\Z"
)
"""What precedes the value of a field that takes images."""

_NONCE = secrets.token_hex(12)
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclass(slots=True)
class ReceivedBody:
    """JSON body. images: cut out of it and spooled, by the upload id that is in their place.

    refusals: errors of texts that are no images, by the text in their place.
    """

    raw: bytes
    images: dict[str, VerifiedImage] = field(default_factory=dict)
    refusals: dict[str, ApiError] = field(default_factory=dict)


def receive_json(request: web.Request, uploads: Uploads) -> _Reception:
    """Return a context with the JSON body of up to 1 MiB besides the images in it, which are forgotten at the end.

    Raises UnsupportedMediaType, BodyTooLarge (a declared length: before a byte is read), BodyTimeout, BadRequest,
    StoreUnavailable.
    """
    return _Reception(request, uploads)


class _Reception:
    """A class, since a context manager made of a generator takes some microseconds more of each request."""

    __slots__ = ("_body", "_request", "_uploads")

    def __init__(self, request: web.Request, uploads: Uploads) -> None:
        self._request = request
        self._uploads = uploads

    async def __aenter__(self) -> ReceivedBody:
        request, length = self._request, self._request.content_length
        if length is not None and length <= MAX_BODY_BYTES:
            self._body = ReceivedBody(await read_body(request))
            return self._body
        check_type(request)
        self._body = ReceivedBody(b"")
        try:
            stream = BodyStream(request, self._uploads.max_bytes * 4 // 3 + MAX_BODY_BYTES)
            async with aclosing(stream.chunks()) as chunks:
                self._body.raw = await _Cutter(chunks, self._uploads, self._body).read()
        except BaseException:
            self._forget_images()
            raise
        return self._body

    async def __aexit__(self, *_: object) -> None:
        if self._body.images:
            self._forget_images()

    def _forget_images(self) -> None:
        for image in self._body.images.values():
            self._uploads.discard(image)


async def decoded(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a base64 text. Raises UnsupportedImage if it is none.

    A megabyte takes a third of a millisecond, less than a change of threads for each piece would.
    """
    held = b""
    async for piece in pieces:
        data, held = _decode(held + piece)
        yield data
    if held:
        yield _decode(held + b"=" * (-len(held) % 4))[0]


class _Cutter:
    """Reads a body, and cuts the images out of it.

    ahead: bytes that came and are not looked at; rest: the body without the images, so far.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], uploads: Uploads, body: ReceivedBody) -> None:
        self._chunks = chunks
        self._uploads = uploads
        self._body = body
        self._ahead = b""
        self._rest = bytearray()

    async def read(self) -> bytes:
        """Read the body to its end; return it without the images. Raises BodyTooLarge, InvalidRequest."""
        uris, more = 0, True
        while more:
            uri = _URI.search(self._ahead)
            if uri is None:
                self._move(max(len(self._ahead) - _HEAD_BYTES, 0))
                more = await self._fill()
                continue
            uris += 1
            if uris > MAX_URIS:
                raise InvalidRequest(details=[FieldError("body", f"has too many images: at most {MAX_URIS}")])
            is_long = await self._is_long(uri.end())
            self._move(uri.start() + 1)
            head_bytes = uri.end() - uri.start() - 1
            if is_long and self._takes_image():
                self._ahead = self._ahead[head_bytes:]
                self._rest += await self._cut()
            else:
                self._move(head_bytes)
        self._move(len(self._ahead))
        return bytes(self._rest)

    async def _fill(self) -> bool:
        """Get more bytes; return whether there were any."""
        chunk = await anext(self._chunks, b"")
        self._ahead += chunk
        return bool(chunk)

    def _move(self, count: int) -> None:
        """Move bytes from ahead to the rest."""
        self._rest += self._ahead[:count]
        self._ahead = self._ahead[count:]
        if len(self._rest) > MAX_BODY_BYTES:
            raise BodyTooLarge(limit=MAX_BODY_BYTES)

    async def _is_long(self, start: int) -> bool:
        """Return whether the text from `start` on is too long to stay in the body."""
        while (end := self._ahead.find(b'"', start)) < 0 and len(self._ahead) - start <= KEPT_URI_BYTES:
            if not await self._fill():
                return False
        return (len(self._ahead) if end < 0 else end) - start > KEPT_URI_BYTES

    def _takes_image(self) -> bool:
        """Return whether the text that begins here is the value of a field that takes images."""
        return _IMAGE_FIELD.search(bytes(self._rest[-_CONTEXT_BYTES:-1])) is not None

    async def _cut(self) -> bytes:
        """Spool the image that begins here; return what takes its place in the body."""
        pieces = self._pieces()
        try:
            async with aclosing(decoded(pieces)) as data:
                image = await self._uploads.receive(data)
        except (UnsupportedImage, ImageTooLarge) as error:
            place = f"data:image/{_NONCE}-{len(self._body.refusals)}"
            self._body.refusals[place] = error.with_traceback(None)  # its frames hold what came of the image
            async for _ in pieces:
                pass
            return place.encode()
        place = upload_id_of(image)
        if place in self._body.images:
            self._uploads.discard(image)
        else:
            self._body.images[place] = image
        async for _ in pieces:
            pass
        return place.encode()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes up to the end of the text, and leave its quote."""
        while (end := self._ahead.find(b'"')) < 0:
            piece, self._ahead = self._ahead, b""
            yield piece
            if not await self._fill():
                return
        piece, self._ahead = self._ahead[:end], self._ahead[end:]
        yield piece


def _decode(text: bytes) -> tuple[bytes, bytes]:
    """Return the bytes of a text, and its end that is not decoded yet. Line ends and JSON escapes in it do no harm."""
    whole = len(text) // 4 * 4
    with suppress(ValueError):
        return pybase64.b64decode(memoryview(text)[:whole], validate=True), text[whole:]
    rest = b"\\" if text.endswith(b"\\") else b""
    text = text.removesuffix(rest).replace(b"\\/", b"/").replace(b"\\r", b"").replace(b"\\n", b"")
    plain = b"".join(text.split()).translate(_TO_STANDARD)
    whole = len(plain) // 4 * 4
    try:
        return pybase64.b64decode(plain[:whole], validate=True), plain[whole:] + rest
    except ValueError as error:
        raise UnsupportedImage(details=[FieldError(FILE_FIELD, "it is not valid base64")]) from error
