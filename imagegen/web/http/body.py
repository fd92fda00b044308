"""Reader of JSON request bodies: limits of size and time, and strict parsing."""

from __future__ import annotations

import asyncio
import re
from itertools import chain
from typing import Any

import msgspec
import orjson
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from imagegen.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    FieldError,
    InvalidRequest,
    UnsupportedMediaType,
)
from imagegen.web.http.errors import MAX_BODY_BYTES
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
    try:
        return await _read(request.content, max_bytes, timeout_s)
    except TimeoutError as error:
        raise BodyTimeout from error
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest from error
    except RuntimeError as error:  # aiohttp raises it if the client left before its body was complete
        raise ConnectionResetError from error


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises InvalidJson, and InvalidRequest over `MAX_VALUES`.

    A flat object without fractions that has as many colons as members needs no second look: a key that came twice
    would leave a colon over.
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


def check_type(request: web.Request) -> None:
    """Raise UnsupportedMediaType unless the body is JSON that is not compressed."""
    headers = request.headers
    if hdrs.CONTENT_ENCODING in headers:
        raise UnsupportedMediaType
    content_type = headers.get(hdrs.CONTENT_TYPE, "")
    if content_type in _JSON_TYPES:
        return
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    allowed = ("", "charset=utf-8", 'charset="utf-8"', "charset=utf8")
    if kind != "application/json" or any(parameter not in allowed for parameter in parameters):
        raise UnsupportedMediaType


async def _read(content: Any, max_bytes: int, timeout_s: float) -> bytes:
    if content.is_eof():
        body: bytes = content.read_nowait()
    else:
        body = await _read_slowly(content, max_bytes, timeout_s)
    if len(body) > max_bytes:
        raise BodyTooLarge(limit=max_bytes)
    return body


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
