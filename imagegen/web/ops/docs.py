"""Routes of the documentation: GET /openapi.json, and /docs, which renders it without requests to other hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import orjson
from aiohttp import hdrs, web

from imagegen.errors import RouteNotFound
from imagegen.images.store import OpenedImage
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.handler_services import SERVICES
from imagegen.web.ops.pages import read_pages
from imagegen.web.ops.static_files import STATIC, FileTemplate, MadeOnce, StaticFile, send_file

_PAGE = "index.html"

_SERVER = "$SERVER"
_PLACE_OF_SERVER = orjson.dumps(_SERVER)

DocumentBuilder = Callable[[str], Mapping[str, Any]]
"""Builds the OpenAPI document for the base of its paths."""


class DocumentFile(MadeOnce[FileTemplate]):
    """The OpenAPI document, made in 0.3 s. The Host header may name any server, so that only its place is filled."""

    def __init__(self, build: DocumentBuilder) -> None:
        super().__init__(lambda: FileTemplate(orjson.dumps(build(_SERVER)), _PLACE_OF_SERVER, "application/json"))

    async def for_server(self, server: str) -> StaticFile:
        """Return the document with this server; one object for all clients that use the same."""
        return _filled(await self.get(), server)


@lru_cache(maxsize=4)
def _filled(template: FileTemplate, server: str) -> StaticFile:
    return template.fill(orjson.dumps(server))


DOCUMENT_FILE = web.AppKey("document_file", DocumentFile)


async def get_document(request: web.Request) -> web.StreamResponse:
    """Return the OpenAPI document; its server is PUBLIC_URL, or the address that the client uses.

    It is sent as a large image is, so that clients that read slowly share its bytes.
    """
    file = await request.app[DOCUMENT_FILE].for_server(request.app[SERVICES].link_base.url(request))
    response = send_file(request, file)
    body = response.body
    if not isinstance(body, bytes) or request.method == hdrs.METH_HEAD or response.status != 200:
        return response
    opened = OpenedImage(len(body), data=body)
    return await request.app[IMAGE_SENDER].send(request, opened, range(len(body)), 200, response.headers)


async def get_page(request: web.Request) -> web.Response:
    """Return the page that renders it."""
    return await _file(request, _PAGE)


async def get_file(request: web.Request) -> web.Response:
    """Return a file of the page. Raises RouteNotFound."""
    return await _file(request, request.match_info["file"])


async def _file(request: web.Request, name: str) -> web.Response:
    file = (await _files.get()).get(name)
    if file is None:
        raise RouteNotFound
    return send_file(request, file)


_files = MadeOnce(lambda: read_pages(STATIC / "docs"))
