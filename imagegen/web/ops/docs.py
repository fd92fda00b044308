"""Routes of the documentation: GET /openapi.json, and /docs, which renders it without requests to other hosts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from aiohttp import hdrs, web

from imagegen.errors import RouteNotFound
from imagegen.web.context import SERVICES
from imagegen.web.http.responses import etag_matches

_FOLDER = Path(__file__).parent.parent / "static" / "docs"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = "index.html"
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
}
"""For browsers that read no CSP, and against what a page of ours never needs."""

DocumentBuilder = Callable[[str], Mapping[str, Any]]
"""Builds the OpenAPI document for the base of its paths."""


class _File(NamedTuple):
    body: bytes
    content_type: str
    etag: str


DOCUMENT_BUILDER = web.AppKey[DocumentBuilder]("document_builder")


async def get_document(request: web.Request) -> web.Response:
    """Return the OpenAPI document; its server is PUBLIC_URL, or the path prefix that clients see."""
    services = request.app[SERVICES]
    server = services.public_url or services.local_url(request, "") or "/"
    return _response(request, await asyncio.to_thread(_document, request.app[DOCUMENT_BUILDER], server))


async def get_page(request: web.Request) -> web.Response:
    """Return the page that renders it."""
    return await _file(request, _PAGE)


async def get_file(request: web.Request) -> web.Response:
    """Return a file of the page. Raises RouteNotFound."""
    return await _file(request, request.match_info["file"])


async def home(request: web.Request) -> web.Response:
    """Redirect to the documentation."""
    raise web.HTTPFound(request.app[SERVICES].local_url(request, "/docs"))


async def _file(request: web.Request, name: str) -> web.Response:
    file = (await asyncio.to_thread(_files)).get(name)
    if file is None:
        raise RouteNotFound
    return _response(request, file)


def _response(request: web.Request, file: _File) -> web.Response:
    headers = {hdrs.ETAG: file.etag, hdrs.CACHE_CONTROL: "no-cache", "Content-Security-Policy": _CSP}
    if file.content_type == _TYPES[".html"]:
        headers |= _PAGE_HEADERS
    if etag_matches(request, file.etag):
        return web.Response(status=304, headers=headers)
    charset = None if file.content_type == "application/json" else "utf-8"
    return web.Response(body=file.body, headers=headers, content_type=file.content_type, charset=charset)


@lru_cache(maxsize=4)
def _document(build: DocumentBuilder, server: str) -> _File:
    return _make_file(orjson.dumps(build(server)), "application/json")


@cache
def _files() -> dict[str, _File]:
    paths = [path for path in _FOLDER.iterdir() if path.suffix in _TYPES]
    return {path.name: _make_file(path.read_bytes(), _TYPES[path.suffix]) for path in paths}


def _make_file(body: bytes, content_type: str) -> _File:
    return _File(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
