"""Server of image links on loopback that redirects, sends false headers and breaks off, and fetchers for it."""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from aiohttp.test_utils import TestServer
from PIL import Image
from yarl import URL

from imagegen.byte_budget import ByteBudget
from imagegen.errors import DownloadFailed, ImageRejected
from imagegen.images.fetch import ImageFetcher
from imagegen.images.image_links import Origin
from imagegen.ssrf import guarded_connector
from imagegen.tasks.image import GivenImage, ImageLink
from tests.images.backings import spool_in

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "teal").save(file, "PNG")
    return file.getvalue()


def noise(side: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(file, "PNG", compress_level=0)
    return file.getvalue()


PNG = _png()


@dataclass
class Upstream:
    """Server with scripted paths, and the requests it received."""

    port: int
    paths: dict[str, Handler]
    requests: list[web.Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def link(self, path: str) -> ImageLink:
        return ImageLink(f"http://{self.host}{path}")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.paths[request.path](request)


async def serve() -> AsyncIterator[Upstream]:
    upstream = Upstream(0, {"/ok": answers(body=PNG, content_type="image/jpeg")})
    app = web.Application()
    app.router.add_get("/{path:.*}", upstream.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        upstream.port = server.port or 0
        yield upstream


def make_fetcher(
    session: aiohttp.ClientSession,
    own_hosts: frozenset[str] = frozenset(),
    *,
    timeout_s: float = 30.0,
    folder: Path | None = None,
    memory: ByteBudget | None = None,
    base_url: URL | None = None,
    **options: Any,
) -> ImageFetcher:
    origin = Origin(own_hosts, base_url)
    return ImageFetcher(session, spool_in(folder, memory), origin, timeout_s=timeout_s, **options)


def open_session(own_hosts: frozenset[str], resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    connector = guarded_connector(own_hosts, inner=resolver)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def answers(status: int = 200, **response: object) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, **response)  # type: ignore[arg-type]

    return answer


def redirects(location: str, status: int = 302) -> Handler:
    return answers(status, headers={"Location": location})


async def refusal(fetcher: ImageFetcher, image: GivenImage, age_s: float = 0.0) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        await fetcher.fetch(image, age_s=age_s)
    assert caught.value.code == "upstream_bad_response"
    assert not caught.value.retryable
    assert not caught.value.ambiguous
    return caught.value


async def failure(fetcher: ImageFetcher, link: ImageLink, age_s: float = 0.0) -> DownloadFailed:
    """Return the error of a link that may work later."""
    with pytest.raises(DownloadFailed) as caught:
        await fetcher.fetch(link, age_s=age_s)
    return caught.value


LARGE = noise(700)


def contents(path: Path | None) -> bytes:
    assert path is not None
    return path.read_bytes()
