"""Owns what a client asks of a submit by headers: fresh pictures, and to be taken once only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import hdrs, web
from msgspec import Struct
from msgspec.structs import replace
from multidict import istr

from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.validation import MAX_FIELD_ERRORS
from imagegen.web.context import SERVICES
from imagegen.web.http.forwarded import client_address

IDEMPOTENCY_KEY = "Idempotency-Key"

_IDEMPOTENCY_KEY = istr(IDEMPOTENCY_KEY)
_VISIBLE = re.compile(r"[!-~]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_ESCAPED = re.compile(r"\\(.)")


class SubmitOptions(Struct, frozen=True):
    """fresh: no picture from before (`Cache-Control: no-cache`); key: the `Idempotency-Key`, one of `client`'s own.

    max_faults: as many are named at most.
    """

    request: web.Request
    fresh: bool = False
    key: str | None = None
    max_faults: int = MAX_FIELD_ERRORS

    @property
    def client(self) -> str:
        return client_address(self.request, self.request.app[SERVICES].trusted_hops)

    @property
    def base(self) -> str:
        """Of the links in what webhooks are sent."""
        return self.request.app[SERVICES].base_url(self.request)

    def of_entry(self, index: int) -> SubmitOptions:
        """The wish for one entry of a batch. No key of a client's has a space in it."""
        return self if self.key is None else replace(self, key=f"{self.key} {index}")


def wish_of(request: web.Request) -> SubmitOptions:
    """Reads the headers. Raises InvalidRequest for a bad key."""
    headers, fresh = request.headers, False
    if hdrs.CACHE_CONTROL in headers:
        directives = ",".join(headers.getall(hdrs.CACHE_CONTROL)).lower()
        fresh = "no-cache" in map(str.strip, directives.split(","))
    return SubmitOptions(
        request, fresh, _key(headers.getall(_IDEMPOTENCY_KEY)) if _IDEMPOTENCY_KEY in headers else None
    )


def body_digest(body: Mapping[str, Any]) -> str:
    """Names a body, whatever its spaces and the order of its fields: 32 hex digits."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _key(given: list[str]) -> str:
    """The key, bare or as a structured field's string: https://datatracker.ietf.org/doc/html/rfc9651#name-strings."""
    text = given[0].strip()
    quoted = _QUOTED.fullmatch(text)
    key = _ESCAPED.sub(r"\1", quoted[1]) if quoted else text
    if len(given) > 1 or not _VISIBLE.fullmatch(key):
        rule = "must be one key of 1 to 255 visible ASCII characters"
        raise InvalidRequest(details=[FieldError(IDEMPOTENCY_KEY, rule)])
    return key
