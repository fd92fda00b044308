"""Request bodies as they come: raw bytes and multipart forms, bounded in size, parts and time."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from aiohttp import BodyPartReader, MultipartReader, StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import BadContentDispositionHeader, BadContentDispositionParam

from imagegen.errors import BadRequest, BodyTimeout, BodyTooLarge, CompressedBody, FieldError, InvalidRequest

STALL_S = 10.0
TRICKLE_S = 60.0
"""A body may take this long, and longer if it comes at `SLOWEST_BYTES_PER_S`, however steadily it comes."""

SLOWEST_BYTES_PER_S = 16 * 1024

FORM_BYTES = 64 * 1024
"""What a form may take besides its files: boundaries, headers and the text before and after the parts."""

MAX_PART_HEADERS = 16
MAX_PART_LINES = MAX_PART_HEADERS + 4
"""Lines that a form may have for each of its parts, before the first one too. aiohttp reads a text before the first
part line by line in one turn of the event loop, however long it is: 1 MiB of line ends takes 140 ms."""

MAX_HEADER_BYTES = 4_096
MAX_NAME_CHARS = 60

AWAITS_CONTINUE = web.RequestKey[bool]("awaits_continue")
"""Whether the client sends the body only after a 100, which a refused request does not get."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CHUNK_BYTES = 64 * 1024
_PLAIN = frozenset({"", "binary", "8bit", "7bit"})
_NOT_A_FORM = FieldError("body", "is not a valid multipart form")
_Result = TypeVar("_Result")

for _warning in (BadContentDispositionHeader, BadContentDispositionParam):  # such a part has no name, and is refused
    warnings.filterwarnings("ignore", category=_warning)


class BodyStream:
    """The body of one request, which is read once.

    max_bytes: of the whole body. Raises BodyTooLarge at once if the declared length is over it, and
    CompressedBody.
    """

    def __init__(self, request: web.Request, max_bytes: int) -> None:
        if hdrs.CONTENT_ENCODING in request.headers:
            raise CompressedBody
        if (request.content_length or 0) > max_bytes:
            raise BodyTooLarge(limit=max_bytes)
        self._request = request
        self._content = request.content
        self._max_bytes = max_bytes
        self._time = asyncio.get_running_loop().time
        self._began_at = self._time()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes. Raises BodyTooLarge, BodyTimeout, BadRequest, ConnectionResetError if the client left."""
        await request_body(self._request)
        while chunk := await self._arrival(self._content.readany()):
            yield chunk

    async def parts(self, max_parts: int) -> AsyncGenerator[FormPart, None]:
        """Yield the parts of a multipart form; unread bytes of a part are skipped.

        Raises as `chunks`, and InvalidRequest for more than `max_parts`.
        """
        with _errors():
            reader = MultipartReader(
                self._request.headers,
                cast(StreamReader, _BoundedLines(self._content, MAX_PART_LINES * (max_parts + 1))),
                max_field_size=MAX_HEADER_BYTES,
                max_headers=MAX_PART_HEADERS,
            )
        await request_body(self._request)
        for _ in range(max_parts):
            part = await self._arrival(reader.next())
            if part is None:
                return
            if not isinstance(part, BodyPartReader):
                raise BadRequest(details=[_NOT_A_FORM])
            yield FormPart(part, self)
        if await self._arrival(reader.next()) is not None:
            raise InvalidRequest(details=[FieldError("body", f"must have at most {max_parts} parts")])

    async def read_part(self, part: BodyPartReader) -> bytes:
        """Return the next bytes of a part, none at its end. Raises as `chunks`."""
        return await self._arrival(part.read_chunk(_CHUNK_BYTES))

    async def _arrival(self, reading: Awaitable[_Result]) -> _Result:
        latest = self._began_at + TRICKLE_S + self._content.total_bytes / SLOWEST_BYTES_PER_S
        with _errors():
            async with asyncio.timeout_at(min(latest, self._time() + STALL_S)):
                result = await reading
        if self._content.total_bytes > self._max_bytes:
            raise BodyTooLarge(limit=self._max_bytes)
        return result


class _BoundedLines:
    """Content of a form, of which at most `count` lines may be read. Raises ValueError over them.

    The bytes of parts are not read by lines.
    """

    def __init__(self, content: StreamReader, count: int) -> None:
        self._content = content
        self._left = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def readline(self, **options: Any) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("The form has too many lines")
        return await self._content.readline(**options)


async def request_body(request: web.Request) -> None:
    """Let a client that waits with its body send it. Called before the first byte is read."""
    if request.get(AWAITS_CONTINUE) and not request.content.is_eof():
        request[AWAITS_CONTINUE] = False
        await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # the response has not begun


class FormPart:
    """One part of a multipart form.

    name: empty if it has none. filename: None if it has none. content_type: as the client declares it.
    """

    def __init__(self, part: BodyPartReader, body: BodyStream) -> None:
        self._part = part
        self._body = body
        with _errors():
            name = (part.name or "")[:MAX_NAME_CHARS]
            self.name = name.encode(errors="replace").decode()  # bytes that are no UTF-8 can't be in an error
            self.filename = part.filename
        self.content_type = part.headers.get(hdrs.CONTENT_TYPE, "").lower()
        if part.headers.get(hdrs.CONTENT_TRANSFER_ENCODING, "").lower() not in _PLAIN:
            raise InvalidRequest(details=[FieldError(self.name or "body", "must be sent without an encoding")])

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes. Raises as `BodyStream.chunks`."""
        while chunk := await self._body.read_part(self._part):
            yield chunk

    async def text(self, max_bytes: int, rule: str = "") -> str:
        """Return the part as text. Raises InvalidRequest if it is longer, or not UTF-8; else as `chunks`.

        rule: text of that error; empty for one about its length or its encoding.
        """
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if len(data) > max_bytes:
                raise InvalidRequest(details=[FieldError(self.name, rule or f"must have at most {max_bytes} bytes")])
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(details=[FieldError(self.name, rule or "must be UTF-8")]) from error


def is_form(request: web.Request) -> bool:
    """Return whether the body is a multipart form."""
    return request.content_type == "multipart/form-data"


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of aiohttp's readers into ours."""
    try:
        yield
    except TimeoutError as error:
        raise BodyTimeout from error
    except web.RequestPayloadError as error:
        raise BadRequest from error
    except (HttpProcessingError, ValueError, AssertionError, Warning) as error:
        raise BadRequest(details=[_NOT_A_FORM]) from error
    except RuntimeError as error:  # aiohttp raises it if the client left before its body was complete
        raise ConnectionResetError from error
