"""S3 server of the tests: buckets in memory, with the calls that the image store makes.

Its responses follow https://docs.aws.amazon.com/AmazonS3/latest/API. It checks no signatures: botocore makes them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from aiohttp import web

METADATA = "x-amz-meta-"


@dataclass(frozen=True)
class S3Object:
    """Object of a bucket. modified_at_s: Unix time."""

    data: bytes
    content_type: str = "binary/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict)
    modified_at_s: float = field(default_factory=time.time)

    @property
    def etag(self) -> str:
        return f'"{_md5(self.data).hex()}"'


Objects = dict[str, S3Object]


class S3Server:
    """Server whose `buckets` a test may read and change.

    page_keys: most keys of one page of a listing. copies_metadata: a copy keeps the metadata of its source, as with
    nanio 0.1. hides: returns whether an object is not shown yet.
    clock: returns the Unix time of saved objects; `date_clock` that of responses, the usual one if it is None.
    refuses: returns the response that a request gets in place of the usual one, or None. delay_s: how long one waits.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, Objects] = {}
        self.clock: Callable[[], float] = time.time
        self.date_clock: Callable[[], float] | None = None
        self.page_keys = 1000
        self.copies_metadata = False
        self.hides: Callable[[str], bool] = lambda _key: False
        self.refuses: Callable[[web.Request], web.Response | None] = lambda _request: None
        self.delay_s: Callable[[web.Request], float] = lambda _request: 0.0
        self.url = ""

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Serve from a thread, so that processes can be clients too."""
        started: Future[Callable[[], object]] = Future()
        thread = threading.Thread(target=asyncio.run, args=[self._run(started)], name="s3", daemon=True)
        thread.start()
        stop = started.result(timeout=60)
        yield
        stop()
        thread.join()

    async def _run(self, started: Future[Callable[[], object]]) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._respond)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0])
        started.set_result(partial(loop.call_soon_threadsafe, stopped.set))
        await stopped.wait()
        await runner.cleanup()

    async def _respond(self, request: web.Request) -> web.Response:
        response = await self._respond_undated(request)
        if self.date_clock is not None:
            response.headers["Date"] = formatdate(self.date_clock(), usegmt=True)
        return response

    async def _respond_undated(self, request: web.Request) -> web.Response:
        if (refusal := self.refuses(request)) is not None:
            await request.read()
            return refusal
        await asyncio.sleep(self.delay_s(request))
        name, _, key = request.path.lstrip("/").partition("/")
        objects = self.buckets.get(name)
        if objects is None:
            return error_response(HTTPStatus.NOT_FOUND, "NoSuchBucket")
        if not key:
            return self._list(objects, request.query)
        if request.method == "PUT":
            return await self._put(objects, key, request)
        if request.method == "DELETE":
            objects.pop(key, None)
            return web.Response(status=HTTPStatus.NO_CONTENT)
        return _get({} if self.hides(key) else objects, key, request)

    def _list(self, objects: Objects, query: Mapping[str, str]) -> web.Response:
        """Return a page of ListObjectsV2. The continuation token is the last key of the page before."""
        after = query.get("continuation-token", "")
        keys = sorted(key for key in list(objects) if key.startswith(query.get("prefix", "")) and key > after)
        most = min(int(query.get("max-keys", self.page_keys)), self.page_keys)
        page = keys[:most]
        rest = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(keys) > most else ""
        text = "".join(_entry(key, objects[key]) for key in page)
        is_truncated = str(bool(rest)).lower()
        return _xml(
            "ListBucketResult",
            f"<EncodingType>url</EncodingType><IsTruncated>{is_truncated}</IsTruncated>{rest}{text}",
        )

    async def _put(self, objects: Objects, key: str, request: web.Request) -> web.Response:
        data, source = await request.read(), request.headers.get("x-amz-copy-source")
        metadata = {
            name.lower().removeprefix(METADATA): value
            for name, value in request.headers.items()
            if name.lower().startswith(METADATA)
        }
        if source is not None:
            bucket, _, source_key = unquote(source).lstrip("/").partition("/")
            if source_key not in self.buckets.get(bucket, {}):
                return error_response(HTTPStatus.NOT_FOUND, "NoSuchKey")
            data = self.buckets[bucket][source_key].data
            if self.copies_metadata:
                metadata = dict(self.buckets[bucket][source_key].metadata)
        elif base64.b64decode(request.headers.get("Content-MD5", "")) not in (b"", _md5(data)):
            return error_response(HTTPStatus.BAD_REQUEST, "BadDigest")
        stored = S3Object(data, request.headers.get("Content-Type", ""), metadata, self.clock())
        objects[key] = stored
        if source is None:
            return web.Response(headers={"ETag": stored.etag})
        return _xml("CopyObjectResult", f"<ETag>{escape(stored.etag)}</ETag>")


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _get(objects: Objects, key: str, request: web.Request) -> web.Response:
    """Return an object or a part of it; aiohttp leaves the body out of the response to a HEAD."""
    found = objects.get(key)
    if found is None:
        return error_response(HTTPStatus.NOT_FOUND, "NoSuchKey")
    headers = {
        "ETag": found.etag,
        "Last-Modified": formatdate(found.modified_at_s, usegmt=True),
        "Content-Type": found.content_type,
        **{METADATA + name: value for name, value in found.metadata.items()},
    }
    part, size = request.http_range, len(found.data)
    if part.start is None:
        return web.Response(body=found.data, headers=headers)
    first, last = part.start, min(part.stop or size, size) - 1
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return web.Response(status=HTTPStatus.PARTIAL_CONTENT, body=found.data[first : last + 1], headers=headers)


def _entry(key: str, found: S3Object) -> str:
    modified = datetime.fromtimestamp(int(found.modified_at_s), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    size = len(found.data)
    return f"<Contents><Key>{quote(key)}</Key><LastModified>{modified}</LastModified><Size>{size}</Size></Contents>"


def error_response(status: HTTPStatus, code: str) -> web.Response:
    """Return an error; aiohttp leaves its body out of the response to a HEAD."""
    return _xml("Error", f"<Code>{code}</Code><Message>{code}</Message>", status)


def _xml(name: str, content: str, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name}>{content}</{name}>'
    return web.Response(status=status, text=text, content_type="application/xml")
