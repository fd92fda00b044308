"""JSON responses, and the language of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import hdrs, web

from imagegen.web.http.aiohttp_fastpath import FastJsonResponse
from imagegen.web.http.errors import Language, preferred_language


def language(request: web.Request) -> Language:
    """Return the language of the texts for people in the response."""
    return preferred_language(request.headers.get(hdrs.ACCEPT_LANGUAGE))


def json_response(
    body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """Return the response that holds one JSON object."""
    return FastJsonResponse(orjson.dumps(body), status, headers or {})


def json_bytes(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    """Return the response that holds a JSON object which is encoded already."""
    return FastJsonResponse(body, status, headers or {})


def etag_matches(request: web.Request, etag: str) -> bool:
    """Return whether the client has this version (RFC 9110, 13.1.2: weak comparison)."""
    if hdrs.IF_NONE_MATCH not in request.headers:
        return False
    versions = {etag_sent.value for etag_sent in request.if_none_match or ()}
    return bool(versions & {etag.strip('"'), "*"})
