"""Routes of the documentation: GET /openapi.json, and /docs, which renders it without requests to other hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import orjson
from aiohttp import web

from imagegen.errors import RouteNotFound
from imagegen.web.handler_services import SERVICES
from imagegen.web.ops.pages import read_pages
from imagegen.web.ops.static_files import STATIC, StaticFile, make_file, send_file

_PAGE = "index.html"

_SERVER = "$SERVER"
_PLACE_OF_SERVER = orjson.dumps(_SERVER)

DocumentBuilder = Callable[[str], Mapping[str, Any]]
"""Builds the OpenAPI document for the base of its paths."""


DOCUMENT_BUILDER = web.AppKey[DocumentBuilder]("document_builder")


async def get_document(request: web.Request) -> web.Response:
    """Return the OpenAPI document; its server is PUBLIC_URL, or the address that the client uses."""
    server = request.app[SERVICES].link_base.url(request)
    return send_file(request, await asyncio.to_thread(_document, request.app[DOCUMENT_BUILDER], server))


async def get_page(request: web.Request) -> web.Response:
    """Return the page that renders it."""
    return await _file(request, _PAGE)


async def get_file(request: web.Request) -> web.Response:
    """Return a file of the page. Raises RouteNotFound."""
    return await _file(request, request.match_info["file"])


async def _file(request: web.Request, name: str) -> web.Response:
    file = (await asyncio.to_thread(_files)).get(name)
    if file is None:
        raise RouteNotFound
    return send_file(request, file)


@lru_cache(maxsize=16)
def _document(build: DocumentBuilder, server: str) -> StaticFile:
    """Return the document for a server. The Host header may name any, so all of them share what takes long."""
    body = _document_anywhere(build).replace(_PLACE_OF_SERVER, orjson.dumps(server))
    return make_file(body, "application/json")


@cache
def _document_anywhere(build: DocumentBuilder) -> bytes:
    return orjson.dumps(build(_SERVER))


@cache
def _files() -> dict[str, StaticFile]:
    return read_pages(STATIC / "docs")
