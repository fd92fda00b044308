"""Routes of the studio: its page at GET /, and the scripts, styles and icons that pages load."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import NamedTuple

from aiohttp import web

from imagegen.errors import RouteNotFound
from imagegen.web.ops.static_files import (
    CSP,
    HTML,
    REVALIDATED,
    STATIC,
    StaticFile,
    make_file,
    read_folder,
    send_file,
    version_of,
)

_FOLDER = STATIC / "studio"
_PAGE = "index.html"
_PLACE_OF_ASSETS = b"$ASSETS"
_IMMUTABLE = "public, max-age=31536000, immutable"
_PAGE_CSP = {"Content-Security-Policy": f"{CSP}; require-trusted-types-for 'script'; trusted-types 'none'"}
"""Trusted Types: the browser refuses every use of a text as markup or script."""


class _Studio(NamedTuple):
    page: StaticFile
    assets: dict[str, StaticFile]
    version: str


async def get_page(request: web.Request) -> web.Response:
    """Return the page of the studio."""
    studio = await asyncio.to_thread(_studio)
    return send_file(request, studio.page, headers=_PAGE_CSP)


async def get_asset(request: web.Request) -> web.Response:
    """Return a file that a page loads. Raises RouteNotFound.

    The address has the version of all assets, so that a browser keeps them for ever. The page of another version, for
    example while deploys overlap, gets these files too, but does not keep them.
    """
    studio = await asyncio.to_thread(_studio)
    asset = studio.assets.get(request.match_info["file"])
    if asset is None:
        raise RouteNotFound
    is_current = request.match_info["version"] == studio.version
    return send_file(request, asset, cache=_IMMUTABLE if is_current else REVALIDATED)


@cache
def _studio() -> _Studio:
    files = read_folder(_FOLDER)
    page = files.pop(_PAGE)
    version = version_of(files)
    body = page.body.replace(_PLACE_OF_ASSETS, f"assets/{version}".encode())
    return _Studio(make_file(body, HTML), files, version)
