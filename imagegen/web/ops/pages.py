"""Routes of the pages for people: the studio at GET /, and the scripts, styles and icons that pages load.

The assets are in `web/static/studio/`, with the page of the studio. In every page, `$ASSETS` is their address. All
pages share `base.css`, `header.js`, `ui.js`, `dialogs.js`, `strings.js`, `api.js` and `preferences.js`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from imagegen.errors import RouteNotFound
from imagegen.web.handler_services import SERVICES
from imagegen.web.ops.static_files import (
    CSP,
    HTML,
    REVALIDATED,
    STATIC,
    MadeOnce,
    StaticFile,
    make_file,
    read_folder,
    send_file,
    version_of,
)

_FOLDER = STATIC / "studio"
_STUDIO, _BOARD = "index.html", "board.html"
_PLACE_OF_ASSETS = b"$ASSETS"
_IMMUTABLE = "public, max-age=31536000, immutable"
_PAGE_CSP = {"Content-Security-Policy": f"{CSP}; require-trusted-types-for 'script'; trusted-types 'none'"}
"""Trusted Types: the browser refuses every use of a text as markup or script."""


class _Assets(NamedTuple):
    """Files by name, and the version of all together."""

    files: dict[str, StaticFile]
    version: str


async def get_studio(request: web.Request) -> web.Response:
    """Return the page of the studio; redirect to its address if the path of PUBLIC_URL has no slash at its end."""
    if not request.raw_path.partition("?")[0].endswith("/"):
        raise web.HTTPFound(request.app[SERVICES].link_base.path(request, "/"))
    return await send_page(request, _STUDIO)


async def get_board_page(request: web.Request) -> web.Response:
    """Return the page of the board, which has no data."""
    return await send_page(request, _BOARD)


async def send_page(request: web.Request, name: str) -> web.Response:
    """Return the response with a page by its file name."""
    return send_file(request, (await _pages.get())[name], headers=_PAGE_CSP)


async def get_asset(request: web.Request) -> web.Response:
    """Return a file that a page loads. Raises RouteNotFound.

    The address has the version of all assets, so that a browser may keep them. The page of another version, for
    example while deploys overlap, gets these files too, but does not keep them.
    """
    assets = await _made_assets.get()
    asset = assets.files.get(request.match_info["file"])
    if asset is None:
        raise RouteNotFound
    is_current = request.match_info["version"] == assets.version
    return send_file(request, asset, cache=_IMMUTABLE if is_current else REVALIDATED)


def read_pages(folder: Path) -> dict[str, StaticFile]:
    """Return the files of a folder by name; in its pages, `$ASSETS` is the address of the assets."""
    address = f"assets/{_assets().version}".encode()
    files = read_folder(folder)
    pages = {
        name: file.body.replace(_PLACE_OF_ASSETS, address) for name, file in files.items() if file.content_type == HTML
    }
    return files | {name: make_file(body, HTML) for name, body in pages.items()}


@cache
def _assets() -> _Assets:
    files = {name: file for name, file in read_folder(_FOLDER).items() if file.content_type != HTML}
    return _Assets(files, version_of(files))


_made_assets = MadeOnce(_assets)
_pages = MadeOnce(lambda: read_pages(_FOLDER))
