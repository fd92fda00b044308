"""Reader of JSON request bodies: limits of size and time, strict parsing, and images in them.

Large `data:` URIs are cut out while the body comes, and spooled. The rest of the body is as small as any other, and is
parsed as any other: memory does not grow with the images.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec
import orjson
import pybase64
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from imagegen.errors import (
    ApiError,
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    CompressedBody,
    FieldError,
    ImageTooLarge,
    InvalidRequest,
    UnsupportedImage,
    UnsupportedMediaType,
)
from imagegen.images.store import VerifiedImage
from imagegen.images.uploads import FILE_FIELD, Uploads, upload_id_of
from imagegen.web.http.body_admission import BODY_ADMISSION, QUICK_BODY_BYTES, STREAMED_BYTES, HeldMemory
from imagegen.web.http.body_stream import AWAITS_CONTINUE, BodyStream, request_body
from imagegen.web.http.error_responses import MAX_BODY_BYTES
from imagegen.web.http.json_faults import NUMBER, UNREADABLE, JsonFault, Reason, json_fault

MAX_DEPTH = 32
MAX_NUMBER_CHARS = 32
MAX_VALUES = 10_000
"""Members and entries of a whole body. A value takes up to 300 bytes of memory and 1 microsecond of the loop's time."""

_IDLE_TIMEOUT_S = 10.0
_STALLS_IN_ALL = 6
"""A body that trickles is given up after this many times the stall, however steadily it comes."""

_LONG_NUMBER = re.compile(rb"(?<![-+.0-9eE])[-+.0-9eE]{19,}")
_FLAT = frozenset({str, int, bool, type(None)})
_UTF8 = frozenset({"utf-8", "utf8"})
_JSON_TYPES = frozenset({"application/json", "application/json; charset=utf-8", "application/json;charset=utf-8"})

_NOT_OBJECT = Reason('必须是JSON对象，例如{"prompt": "一只猫"}', 'it is not an object, such as {"prompt": "a cat"}')
_IN_TEXT = Reason("这是含JSON的字符串，编码了两次", "it is a text with JSON in it: encode the object only once")
_TOO_DEEP = Reason(f"嵌套超过{MAX_DEPTH}层", f"it is over {MAX_DEPTH} levels deep")
_DUPLICATE = Reason("存在重复的键", "a key comes twice in one object")


async def read_body(
    request: web.Request, *, max_bytes: int = MAX_BODY_BYTES, timeout_s: float = _IDLE_TIMEOUT_S
) -> bytes:
    """Return the bytes of a body with a JSON content type.

    Raises UnsupportedMediaType, BodyTooLarge (a declared length: before a byte is read), BodyTimeout if nothing
    came for `timeout_s` seconds, and BadRequest for bad framing.
    """
    check_type(request)
    if (request.content_length or 0) > max_bytes:
        raise BodyTooLarge(limit=max_bytes)
    if hdrs.EXPECT in request.headers and request.get(AWAITS_CONTINUE):
        await request_body(request)
    content = request.content
    try:
        body: bytes = content.read_nowait() if content.is_eof() else await _read_slowly(content, max_bytes, timeout_s)
    except TimeoutError as error:
        raise BodyTimeout from error
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest from error
    except RuntimeError as error:  # aiohttp raises it if the client left before its body was complete
        raise ConnectionResetError from error
    if len(body) > max_bytes:
        raise BodyTooLarge(limit=max_bytes)
    return body


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises InvalidJson, and InvalidRequest over `MAX_VALUES`.

    A flat object without fractions needs no second look if it has as many colons as members: no key came twice.
    """
    if len(body) > MAX_VALUES:
        _bound_values(body)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise (JsonFault(_TOO_DEEP) if "depth limit" in error.msg else json_fault(body, error)) from error
    if type(parsed) is not dict:
        raise _not_object(parsed)
    if body.count(b":") != len(parsed) or not _FLAT.issuperset(map(type, parsed.values())):
        _validate_strictly(body, parsed)
    return parsed


def check_type(request: web.Request, refusal: type[UnsupportedMediaType] = UnsupportedMediaType) -> None:
    """Raise `refusal` unless the body is JSON in UTF-8, CompressedBody if it is compressed.

    Other parameters than the charset mean nothing (https://www.rfc-editor.org/rfc/rfc8259#section-11), and some
    clients add their own, as `odata.metadata=minimal`.
    """
    headers = request.headers
    if hdrs.CONTENT_ENCODING in headers:
        raise CompressedBody
    content_type = headers.get(hdrs.CONTENT_TYPE, "")
    if content_type in _JSON_TYPES:
        return
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    names = (parameter.partition("=") for parameter in parameters)
    charsets = [value.strip(' "') for name, _, value in names if name.strip() == "charset"]
    if kind != "application/json" or not _UTF8.issuperset(charsets):
        raise refusal


async def _read_slowly(content: Any, max_bytes: int, timeout_s: float) -> bytes:
    loop = asyncio.get_running_loop()
    latest = loop.time() + _STALLS_IN_ALL * timeout_s
    body = bytearray()
    async with asyncio.timeout(timeout_s) as deadline:
        while chunk := await content.readany():
            body += chunk
            if len(body) > max_bytes:
                break
            deadline.reschedule(min(latest, loop.time() + timeout_s))
    return bytes(body)


def _bound_values(body: bytes) -> None:
    """Refuse a body of too many values before any of them is made.

    Raises InvalidRequest, or InvalidJson if it is no JSON either.
    """
    if _count_values(body) <= MAX_VALUES:
        return
    outside = _outside_strings(body)
    if outside is not None and _count_values(outside) <= MAX_VALUES:
        return
    try:
        members = _LARGE.decode(body)
    except RecursionError as error:
        raise JsonFault(_TOO_DEEP) from error
    except msgspec.ValidationError as error:
        raise JsonFault(_NOT_OBJECT if _is_shallow(body) else _TOO_DEEP) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JsonFault(UNREADABLE) from error
    largest = max(members.__struct_fields__, key=lambda name: len(getattr(members, name)))
    field = largest if len(getattr(members, largest)) > len(body) // 2 else "body"
    raise InvalidRequest(details=[FieldError(field, f"has too many entries: a request has at most {MAX_VALUES}")])


def _is_shallow(body: bytes) -> bool:
    try:
        _RAW.decode(body)
    except (RecursionError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return not isinstance(error, RecursionError)
    return True


def _count_values(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _outside_strings(body: bytes) -> bytes | None:
    """Return valid JSON without its strings; None if it has more of them than `MAX_VALUES` members."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 4 * MAX_VALUES:
        return None
    return b"".join(body.split(b'"')[::2])


def _not_object(parsed: object) -> JsonFault:
    is_json = isinstance(parsed, str) and parsed.lstrip().startswith("{")
    return JsonFault(_IN_TEXT if is_json else _NOT_OBJECT)


def _validate_strictly(body: bytes, parsed: dict[str, Any]) -> None:
    """Refuse what orjson lets pass: depth, keys that come twice, long numbers, integers over 64 bits (as floats)."""
    members = _count_members(parsed)
    outside = _outside_strings(body) or b""
    if outside.count(b":") != members:
        raise JsonFault(_DUPLICATE)
    for match in _LONG_NUMBER.finditer(outside):
        literal = match[0]
        whole = literal.removeprefix(b"-").isdigit()
        if len(literal) > MAX_NUMBER_CHARS or (whole and not -(2**63) <= int(literal) < 2**64):
            raise JsonFault(NUMBER)


def _count_members(parsed: dict[str, Any]) -> int:
    """Return the number of members of all objects. Raises InvalidJson over `MAX_DEPTH` levels."""
    level: list[Any] = [parsed]
    count = 0
    for _ in range(MAX_DEPTH):
        count += sum(len(value) for value in level if type(value) is dict)
        values = chain.from_iterable(value.values() if type(value) is dict else value for value in level)
        level = [value for value in values if type(value) is dict or type(value) is list]
        if not level:
            return count
    raise JsonFault(_TOO_DEEP)


_LISTS = ("referenceImages", "reference_images", "requests", "images", "webhook", "extra", "imageLoras")
_RAW = msgspec.json.Decoder(msgspec.Raw)
_LARGE = msgspec.json.Decoder(msgspec.defstruct("_Large", [(name, msgspec.Raw, msgspec.Raw(b"")) for name in _LISTS]))
"""Finds the members that may be large without decoding their values."""


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
    StoreUnavailable, TooManyConnections.
    """
    return _Reception(request, uploads)


class _Reception:
    """A class, since a context manager made of a generator takes some microseconds more of each request."""

    __slots__ = ("_body", "_memory", "_request", "_uploads")

    def __init__(self, request: web.Request, uploads: Uploads) -> None:
        self._request, self._uploads = request, uploads
        self._memory: HeldMemory | None = None

    async def __aenter__(self) -> ReceivedBody:
        request, length = self._request, self._request.content_length
        if length is not None and length <= QUICK_BODY_BYTES:
            self._body = ReceivedBody(await read_body(request))
            return self._body
        check_type(request)
        admission = request.app[BODY_ADMISSION]
        self._body, self._memory = ReceivedBody(b""), HeldMemory(admission)
        try:
            await self._receive_large(length, self._memory)
            await admission.turn(len(self._body.raw))
        except BaseException:
            await self.__aexit__()
            raise
        return self._body

    async def _receive_large(self, length: int | None, memory: HeldMemory) -> None:
        if length is not None and length <= MAX_BODY_BYTES:
            await memory.begin(length)
            self._body.raw = await read_body(self._request)
            return
        stream = BodyStream(self._request, self._uploads.max_bytes * 4 // 3 + MAX_BODY_BYTES)
        await memory.begin(STREAMED_BYTES)
        async with aclosing(stream.chunks()) as chunks:
            self._body.raw = await _Cutter(chunks, self._uploads, self._body, memory.grow_to).read()

    async def __aexit__(self, *_: object) -> None:
        if self._memory is not None:
            self._memory.end()
        if self._body.images:
            self._forget_images()

    def _forget_images(self) -> None:
        for image in self._body.images.values():
            self._uploads.discard(image)


async def decoded(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a base64 text. Raises UnsupportedImage if it is none.

    A megabyte takes a third of a millisecond, less than a change of threads for each piece would.
    """
    rest = b""
    async for piece in pieces:
        data, rest = _decode(rest + piece)
        yield data
    if rest:
        yield _decode(rest + b"=" * (-len(rest) % 4))[0]


class _Cutter:
    """Reader of a body that cuts the images out of it.

    ahead: bytes that came and are not looked at; rest: the body without the images, so far. hold: is called with
    the bytes that are in memory in all, and may refuse them.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], uploads: Uploads, body: ReceivedBody, hold: Callable[[int], None]
    ) -> None:
        self._chunks = chunks
        self._hold = hold
        self._uploads = uploads
        self._body = body
        self._ahead = b""
        self._rest = bytearray()

    async def read(self) -> bytes:
        """Read the body to its end; return it without the images. Raises BodyTooLarge, InvalidRequest."""
        uris, has_more = 0, True
        while has_more:
            uri = _URI.search(self._ahead)
            if uri is None:
                self._move(max(len(self._ahead) - _HEAD_BYTES, 0))
                has_more = await self._fill()
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
        self._hold(len(self._ahead) + len(self._rest))
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
