"""Files of the package that browsers load: read once, compressed once, sent with an ETag."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aiohttp import hdrs, web

from imagegen.web.http.responses import etag_matches

HTML = "text/html"
TYPES = {
    ".html": HTML,
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
STATIC = Path(__file__).parent.parent / "static"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
}
"""For browsers that read no CSP, and against what a page of ours never needs."""

REVALIDATED = "no-cache"

_MIN_SAVING = 0.9
"""A compressed body is kept if it has at most this part of the size."""


class StaticFile(NamedTuple):
    """Body of a response, with its gzip form if that is smaller."""

    body: bytes
    content_type: str
    etag: str
    compressed: bytes | None


def make_file(body: bytes, content_type: str) -> StaticFile:
    """Return the file of a body."""
    compressed = gzip.compress(body, 9, mtime=0)
    is_smaller = len(compressed) <= len(body) * _MIN_SAVING
    return StaticFile(body, content_type, hashlib.sha256(body).hexdigest()[:32], compressed if is_smaller else None)


def read_folder(folder: Path) -> dict[str, StaticFile]:
    """Return the files of a folder by name; those of unknown types are left out."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in TYPES)
    return {path.name: make_file(path.read_bytes(), TYPES[path.suffix]) for path in paths}


def version_of(files: Mapping[str, StaticFile]) -> str:
    """Return a name of this content of a folder."""
    digest = hashlib.sha256("\n".join(f"{name} {file.etag}" for name, file in sorted(files.items())).encode())
    return digest.hexdigest()[:12]


def send_file(
    request: web.Request, file: StaticFile, *, cache: str = REVALIDATED, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return the response with a file, compressed if the client takes gzip; 304 if the client has it."""
    body, etag = file.body, f'"{file.etag}"'
    sent = {hdrs.CACHE_CONTROL: cache, "Content-Security-Policy": CSP, hdrs.VARY: hdrs.ACCEPT_ENCODING}
    if file.content_type == HTML:
        sent |= PAGE_HEADERS
    sent |= headers or {}
    if file.compressed is not None and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        body, etag = file.compressed, f'"{file.etag}-gzip"'
        sent[hdrs.CONTENT_ENCODING] = "gzip"
    sent[hdrs.ETAG] = etag
    if etag_matches(request, etag):
        sent.pop(hdrs.CONTENT_ENCODING, None)
        return web.Response(status=304, headers=sent)
    charset = None if file.content_type == "application/json" else "utf-8"
    return web.Response(body=body, headers=sent, content_type=file.content_type, charset=charset)


def accepts_gzip(accepted: str) -> bool:
    """Return whether an Accept-Encoding header accepts gzip (RFC 9110, 12.5.3)."""
    weights = {}
    for part in accepted.lower().split(","):
        name, _, parameter = part.partition(";")
        key, _, value = parameter.partition("=")
        weights[name.strip()] = value.strip() if key.strip() == "q" else "1"
    weight = weights.get("gzip", weights.get("*", "0"))
    return weight.strip("0.") != ""
