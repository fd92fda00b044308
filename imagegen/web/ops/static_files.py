"""Files of the package that browsers load: read once, compressed once, sent with an ETag."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

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


_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
_LAST_BLOCK = zlib.compressobj(wbits=-zlib.MAX_WBITS).flush()

T = TypeVar("T")


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


class FileTemplate:
    """File with a place for a text that differs by request. The rest is compressed once, which takes the most time."""

    def __init__(self, body: bytes, place: bytes, content_type: str) -> None:
        self._parts = body.split(place)
        self._deflated = [_deflated(part) for part in self._parts]
        self._digest = hashlib.sha256(body).digest()
        self._content_type = content_type

    def fill(self, text: bytes) -> StaticFile:
        """Return the file with the text in its place."""
        body = text.join(self._parts)
        deflated = _deflated(text).join(self._deflated)
        sums = struct.pack("<II", zlib.crc32(body), len(body))
        etag = hashlib.sha256(self._digest + text).hexdigest()[:32]
        return StaticFile(body, self._content_type, etag, b"".join([_GZIP_HEAD, deflated, _LAST_BLOCK, sums]))


def _deflated(part: bytes) -> bytes:
    """Return a part of a deflate stream that may follow any other part."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return compressor.compress(part) + compressor.flush(zlib.Z_FULL_FLUSH)


class MadeOnce(Generic[T]):
    """Value that takes long to make: the first request has it made in a thread, and all others wait for that."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._making: asyncio.Task[T] | None = None
        self._values: list[T] = []

    async def get(self) -> T:
        """Return the value. Raises what the function that makes it raises; the next call makes it again."""
        if not self._values:
            making, loop = self._making, asyncio.get_running_loop()
            if making is None or making.done() or making.get_loop() is not loop:
                making = self._making = loop.create_task(asyncio.to_thread(self._make))
            self._values = [await asyncio.shield(making)]
        return self._values[0]


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
