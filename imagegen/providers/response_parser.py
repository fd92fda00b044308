"""Parser of image services' responses: images, and the meaning of each refusal. No I/O.

Together's, OpenAI's, FastAPI's (`{"detail": …}`) and A1111's shapes are read by the same lenient code, since none of
them keeps to its own specification.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from urllib.parse import unquote_to_bytes, urlsplit

import orjson
import pybase64
from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.formats import declares_base64, plain_base64
from imagegen.providers.details_parser import parse_details
from imagegen.providers.gateway_statuses import NEVER_REACHED, may_have_run
from imagegen.providers.large_body import LARGE_BYTES, MAX_IMAGES_READ, load_json, load_object, parse_large
from imagegen.providers.odd_replies import find_images
from imagegen.providers.protocol import Reply
from imagegen.providers.rate_limit_headers import read_limits, retry_after_s
from imagegen.providers.refusal_codes import (
    highest_count,
    is_of_model,
    is_unexplained,
    lasting,
    names_rate_limit,
)
from imagegen.providers.refused_fields import refused_fields
from imagegen.tasks.image import GivenImage, ImageBase64, ImageBytes, ImageLink

MAX_DETAIL_CHARS = 300
MAX_LINK_CHARS = 16_384

_LONGEST_READ_CHARS = 4_000
_SHORTEST_SECRET_CHARS = 4

_REFUSED = frozenset({400, 404, 412, 413, 415, 422, 451})
"""Statuses of refusals that may name a field or a count."""

_GONE = frozenset({404, 410})
_OF_CHANNEL = frozenset({404, 405, 407, 410, 421, 423, 426, 451})
"""Statuses of refusals by the address, by a proxy before it, or by the law of its country, not of the request."""

_GATEWAY_PAGES = range(400, 500)
_FOR_LEGAL_REASONS = 451
_ABOUT_CONTENT = re.compile(r"prompt|content|image|text|input|内容|提示", re.IGNORECASE)
_CODE_OF_STATUS = {
    401: "upstream_auth",
    402: "upstream_billing",
    403: "upstream_auth",
    408: "upstream_error",
    409: "upstream_error",
    425: "upstream_error",
    429: "upstream_rate_limited",
    460: "upstream_error",
    499: "upstream_error",
    503: "upstream_overloaded",
    529: "upstream_overloaded",
}
_RETRYABLE = frozenset({"upstream_rate_limited", "upstream_overloaded", "upstream_error"})
_STATUS_OF_CODE = {
    "invalid_request_error": 400,
    "permission_error": 403,
    "not_found_error": 404,
    "server_error": 500,
    "api_error": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "service_unavailable": 503,
    "service_unavailable_error": 503,
    "server_overloaded": 503,
    "engine_overloaded_error": 503,
    "overloaded_error": 529,
}
"""Status that an error under a 200 means, by its type or code. Relays send those of OpenAI and Anthropic so:
https://docs.claude.com/en/api/errors"""

_MESSAGE_NAMES = ("msg", "error_msg", "errmsg", "error_message", "errorMessage")
"""Of relays, besides the usual ones."""

_ROUTE = re.compile(r"not found$|invalid url", re.IGNORECASE)
_ERROR_STATUS = re.compile(r"[45][0-9]{2}")
_MASKED_KEY = re.compile(r"\S{0,80}\*{3,}\S{0,80}")
_HTML = re.compile(r"<\s*(?:!doctype|html|head|body)\b", re.IGNORECASE)

_BASE64_IMAGE = re.compile(r"(?:iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/\s_-]{64}")
"""How the base64 of a PNG, a JPEG or a WebP begins."""

_PLAIN_LINK = re.compile(r"https?://[a-z0-9.-]+/[!-~]*")
"""Form of most links, so that few need a full parse to check that they name a host."""

_BASE64_FIELDS = ("b64_json", "base64", "image")

_OPERATOR_MUST_ACT = {
    "upstream_auth": "The provider does not accept this service's key; the operator of this service must act",
    "upstream_billing": "This service's account with the provider has no credit; the operator of this service must act",
}
"""What the client reads; the provider's advice is for the owner of the key."""


class _ErrorInfo(Struct, frozen=True):
    """Details of an error response; empty if absent.

    param: the request field that it names. codes: its code, type, name, status and reasons, lower case.
    """

    message: str
    kind: str
    code: str
    param: str
    codes: tuple[str, ...]


def parse_reply(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> Reply:
    """Read the response to a generation. Raises UpstreamError for anything else.

    Entries that hold no usable image are left out, so `images` may be short or empty.
    headers: found by their names in any case, as aiohttp's are; secret: what no text may show;
    now_s: Unix time, used for a `Retry-After` date where the answer has no `Date`.
    """
    if len(body) > LARGE_BYTES:
        large = parse_large(body)
        images = _images(large.items) if large and _may_hold_images(status, large.fields) else ()
        if large and images:
            return Reply(images, read_limits(headers), details=parse_details(large.fields))
    fields = load_object(body)
    items = _items(fields) if fields is not None and _may_hold_images(status, fields) else None
    if not 200 <= status < 300:
        items = [item for item in items or () if _is_image(item)] or None
    images = _images(items or ())
    if not images and 200 <= status < 300 and not (fields and _names_error(fields)):
        images = search_images(body)
        items = list(images) or items
    if items is None or (not items and fields and _names_error(fields)):
        raise error_from_response(status, headers, body, secret=secret, now_s=now_s)
    if not images and (fault := _fault_of_item(items)):
        raise error_from_response(status, headers, orjson.dumps(fault), secret=secret, now_s=now_s)
    return Reply(images, read_limits(headers), details=parse_details(fields or {}))


def _may_hold_images(status: int, fields: Mapping[str, object]) -> bool:
    """Return whether the images in a response are its result: under a status of an error, if it names no error.

    They are made then, and may be paid for, as where a gateway replaces the status of a response that comes late.
    """
    return 200 <= status < 300 or (status >= 400 and not (_names_error(fields) or fields.get("detail")))


def search_images(body: bytes | bytearray) -> tuple[GivenImage, ...]:
    """Return the images of a response, or of the result of a job, that has none at its usual place."""
    return _images(find_images(body))


def error_from_response(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> UpstreamError:
    """Return the error that a failed response means. It is classed by its status, not by its type:
    Together sends `credit_limit` with a 402 and with a 429."""
    fields = _error_object(body)
    info = _error_info(fields or {})
    effective_status = _effective_status(status, fields or {}, info)
    max_count = _max_count(effective_status, info)
    refused = _refused_fields(effective_status, fields or {}, info)
    is_about_fields = bool(max_count or refused)
    code = "upstream_invalid_request" if is_about_fields else _code(effective_status, info, is_json=fields is not None)
    retryable = code in _RETRYABLE
    text = _detail(status, body, fields, info, secret)
    refusal = effective_status, info.codes, info.message[:_LONGEST_READ_CHARS], info.param
    return UpstreamError(
        code,
        _client_detail(code, text),
        retryable=retryable,
        ambiguous=retryable and may_have_run(status, body, is_own_error=_is_own_error(fields)),
        unreached=retryable and status in NEVER_REACHED,
        retry_after_s=retry_after_s(code, headers, info.message[:_LONGEST_READ_CHARS], now_s) if retryable else None,
        refused=refused,
        max_count=max_count,
        status=status,
        upstream_detail=text,
        of_channel=code == "upstream_invalid_request" and not is_about_fields and _is_of_channel(status, body, fields),
        of_model=code in ("upstream_auth", "upstream_billing") and is_of_model(*refusal),
        unexplained=code == "upstream_auth" and is_unexplained(*refusal),
    )


def _is_of_channel(status: int, body: bytes | bytearray, fields: dict[str, object] | None) -> bool:
    """Return whether a refusal is about the address that was called, or is a page of a gateway, and of no request."""
    is_page = fields is None and status in _GATEWAY_PAGES and _HTML.search(body[:2_000].decode(errors="replace"))
    return status in _OF_CHANNEL or bool(is_page)


def parse_models(listing: object) -> tuple[Mapping[str, object], ...]:
    """Return the image models of a list of models, in either of its shapes: a bare array, or `{"data": […]}`."""
    entries = listing.get("data") if isinstance(listing, dict) else listing
    return tuple(
        entry
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry.get("type") in ("image", None)
    )


def _images(items: Iterable[object]) -> tuple[GivenImage, ...]:
    return tuple([image for item in islice(items, MAX_IMAGES_READ) if (image := parse_image(item)) is not None])


def _items(fields: dict[str, object]) -> list[object] | None:
    data, images = fields.get("data"), fields.get("images")
    if isinstance(data, list) and (data or not isinstance(images, list)):
        return data
    if isinstance(images, list):
        return images
    return next(([value] for value in (data, images) if _is_image(value)), None)


def _is_image(value: object) -> bool:
    """Return whether a value in place of a list holds base64, or a link to any host."""
    if isinstance(value, str):
        return _linked(value) is not None or _BASE64_IMAGE.match(value) is not None
    image = parse_image(value) if isinstance(value, dict) else None
    return _linked(image.url) is not None if isinstance(image, ImageLink) else image is not None


def _fault_of_item(items: list[object]) -> dict[str, object] | None:
    """Return the error in place of an image: https://www.volcengine.com/docs/82379/1541523"""
    for item in items[:MAX_IMAGES_READ]:
        if isinstance(item, dict) and isinstance(error := item.get("error"), dict):
            return {"error": error}
    return None


def parse_image(item: object) -> GivenImage | None:
    """Return the image of an entry: a text, or an object with a link or base64; None if it holds none."""
    if not isinstance(item, dict):
        if isinstance(item, str):
            return _linked(item) or _decoded(item)
        return item if isinstance(item, ImageBase64 | ImageBytes) else None
    for name in _BASE64_FIELDS:
        if name not in item:
            continue
        text = item[name]
        if isinstance(text, ImageBase64):
            return text
        if isinstance(text, str) and (image := _decoded(text)):
            return image
    url = item.get("url")
    return url if isinstance(url, ImageBase64) else _link(url) if isinstance(url, str) else None


def _linked(text: str) -> ImageLink | ImageBytes | None:
    if _PLAIN_LINK.fullmatch(text):
        return ImageLink(text)
    if text[:5].lower() == "data:":
        return _decoded(text)
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    return ImageLink(text) if parts.scheme in ("http", "https") and parts.hostname else None


def _link(text: str) -> ImageLink | ImageBytes | None:
    """Read a field for a link: a relative one, or one that the fetcher refuses with a text. It may hold base64."""
    text = text.strip()
    if _BASE64_IMAGE.match(text) and (image := _decoded(text)):
        return image
    if not text or len(text) > MAX_LINK_CHARS or text[:5].lower() == "data:":
        return _linked(text)
    return ImageLink(text)


def _decoded(text: str) -> ImageBytes | None:
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not declares_base64(head):
            return ImageBytes(unquote_to_bytes(text)) if text and head[:11].lower() == "data:image/" else None
    data = _decoded_base64(text.encode(errors="replace"))
    return ImageBytes(data) if data else None


def _decoded_base64(text: bytes) -> bytes | None:
    for normalize in (bytes, plain_base64):
        form = normalize(text)
        with suppress(ValueError):
            return pybase64.b64decode(form + b"=" * (-len(form) % 4), validate=True)
    return None


def _error_object(body: bytes | bytearray) -> dict[str, object] | None:
    """Return the error object of an answer; Google's OpenAI-compatible route wraps it in a list."""
    try:
        value = load_json(body)
    except orjson.JSONDecodeError:
        return None
    first = value[0] if isinstance(value, list) and len(value) == 1 else value
    return first if isinstance(first, dict) else None


def _is_own_error(fields: dict[str, object] | None) -> bool:
    """Return whether the error is the service's own: Cloudflare's problem details, a gateway's `message` are not."""
    return fields is not None and bool(fields.get("error") or fields.get("detail")) and "cloudflare_error" not in fields


def _error_info(fields: dict[str, object]) -> _ErrorInfo:
    error = fields.get("error") or fields.get("errors")
    inner = error if isinstance(error, dict) else fields
    base = fields.get("base_resp")  # MiniMax
    base = base if isinstance(base, dict) else {}
    texts = [inner.get("message"), inner.get("detail"), inner.get("errors"), error, base.get("status_msg")]
    texts += [inner.get(name) for name in _MESSAGE_NAMES]
    return _ErrorInfo(
        message=next((text for value in texts if (text := _sentence(value))), ""),
        kind=str(inner.get("type") or "").lower()[:100],
        code=str(inner.get("code") or "").lower()[:100],
        param=str(inner.get("param") or "")[:100],
        codes=tuple(_codes(fields, inner, base)),
    )


def _codes(fields: dict[str, object], inner: dict[str, object], base: dict[str, object]) -> Iterator[str]:
    """Return every short word by which an error names its kind, in any place that the services use."""
    places: list[object] = [inner.get(name) for name in ("code", "type", "name", "status", "error_type", "reason")]
    places += [fields.get("code"), fields.get("error"), fields.get("error_type")]
    for name in ("inner_error", "innererror"):  # Azure
        nested = inner.get(name)
        places.append(nested.get("code") if isinstance(nested, dict) else None)
    for name in ("detail", "details", "errors"):  # fal's and Google's lists
        entries = inner.get(name)
        for entry in entries[:10] if isinstance(entries, list) else ():
            places += [entry.get("type"), entry.get("reason")] if isinstance(entry, dict) else [entry]
    if base.get("status_code"):
        places.append(f"minimax:{base['status_code']}")
    for value in places:
        if isinstance(value, str | int) and not isinstance(value, bool) and len(text := str(value)) <= 100:
            yield text.lower()


def _sentence(value: object) -> str:
    """Return a text unchanged; of FastAPI's list of faults the places and messages, never the `input` it echoes."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    if value and all(isinstance(entry, str) for entry in value):
        return "; ".join(value[:10])
    faults = [fault for fault in value[:10] if isinstance(fault, dict) and isinstance(fault.get("msg"), str)]
    places = (fault["loc"][-1] if isinstance(fault.get("loc"), list) and fault["loc"] else "" for fault in faults)
    return "; ".join(f"{place}: {fault['msg']}".removeprefix(": ") for place, fault in zip(places, faults, strict=True))


def _effective_status(status: int, fields: dict[str, object], info: _ErrorInfo) -> int:
    """Return the status, 429 for a rate limit under another one; for an error object under a 2xx the status that it
    names or that its type or code means."""
    if names_rate_limit(status, info.codes, info.message[:_LONGEST_READ_CHARS]):
        return 429
    if not 200 <= status < 300 or not _names_error(fields):
        return status
    if _ERROR_STATUS.fullmatch(info.code):
        return int(info.code)
    if _lasting(status, info):
        return status
    return next((_STATUS_OF_CODE[code] for code in info.codes if code in _STATUS_OF_CODE), status)


def _names_error(fields: Mapping[str, object]) -> bool:
    """Return whether an object holds an error, or is a relay's envelope of one: `{"code": 401, "message": …}`."""
    return bool(fields.get("error")) or _ERROR_STATUS.fullmatch(str(fields.get("code"))) is not None


def _code(status: int, info: _ErrorInfo, *, is_json: bool) -> str:
    if code := _lasting(status, info):
        return code
    if status == _FOR_LEGAL_REASONS and is_json and _ABOUT_CONTENT.search(info.message[:_LONGEST_READ_CHARS]):
        return "content_policy"
    if status in _CODE_OF_STATUS:
        return _CODE_OF_STATUS[status]
    if 500 <= status < 600:
        return "upstream_error"
    if 400 <= status < 500 or 200 <= status < 300:
        return _code_of_text(status, info, is_json=is_json)
    return "upstream_bad_response"


def _lasting(status: int, info: _ErrorInfo) -> str | None:
    return lasting(status, info.codes, info.message[:_LONGEST_READ_CHARS], info.param)


def _code_of_text(status: int, info: _ErrorInfo, *, is_json: bool) -> str:
    if status in _GONE and is_json and not _ROUTE.match(info.message[:_LONGEST_READ_CHARS]):
        return "model_not_available"
    return "upstream_bad_response" if status < 400 else "upstream_invalid_request"


def _max_count(status: int, info: _ErrorInfo) -> int | None:
    if status not in _REFUSED or _lasting(status, info):
        return None
    return highest_count(info.param, info.message[:_LONGEST_READ_CHARS])


def _client_detail(code: str, text: str) -> str:
    """Return what the client reads: the provider's words, but no details of this service's own account."""
    if code == "upstream_billing" and (words := re.match(r"[^.,;:([<\n]{3,80}", text)):
        return f"{_OPERATOR_MUST_ACT[code]} ({words[0].strip()})"
    return _OPERATOR_MUST_ACT.get(code, text)


def _refused_fields(status: int, fields: dict[str, object], info: _ErrorInfo) -> tuple[str, ...]:
    """Return the fields that a refusal names, none if it is about another thing: no repeat without them would help."""
    if status not in _REFUSED or _lasting(status, info):
        return ()
    error = fields.get("error")
    inner = error if isinstance(error, dict) else fields
    return refused_fields(inner, info.message[:_LONGEST_READ_CHARS], info.code, info.param)


def _detail(
    status: int, body: bytes | bytearray, fields: dict[str, object] | None, info: _ErrorInfo, secret: str
) -> str:
    if 300 <= status < 400:
        return f"HTTP {status}, a redirect, which is not followed"
    if not body.strip():
        return f"HTTP {status}, empty body"
    if fields is None:
        return f"HTTP {status}, not JSON"
    return sanitize_detail(info.message, secret) or f"HTTP {status}, nothing usable in it"


def sanitize_detail(message: str, secret: str = "") -> str:
    """Return an upstream text that may be shown: short, on one line, without the secret, empty for an HTML page."""
    if len(secret) >= _SHORTEST_SECRET_CHARS:
        message = message.replace(secret, "[key]")
    message = _MASKED_KEY.sub("[key]", message[:_LONGEST_READ_CHARS])
    if _HTML.search(message):
        return ""
    plain = "".join(" " if unicodedata.category(c).startswith("C") else c for c in message)
    text = " ".join(plain.split())
    return text if len(text) <= MAX_DETAIL_CHARS else text[: MAX_DETAIL_CHARS - 1] + "…"
