"""Tests of what the fetcher accepts: kind, size and address of an image; and of what it sends and logs."""

from __future__ import annotations

import gzip
import io

import pytest
from aiohttp import web
from PIL import Image

from imagegen.errors import DownloadFailed, ImageRejected
from imagegen.images.fetch import ImageFetcher
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.images.link_server import PNG, Upstream, answers, make_fetcher, open_session, redirects, refusal

pytestmark = pytest.mark.usefixtures("no_backoff")

ENDLESS_START = PNG[:33] + b"\x7f\xff\xff\xfftEXt"
"""Start of a PNG with a chunk of 2 GiB."""


async def test_a_link_becomes_checked_bytes_of_any_declared_type(fetcher: ImageFetcher, upstream: Upstream) -> None:
    image = await fetcher.fetch(upstream.link("/ok"))
    assert (image.data, image.content_type, image.width, image.height) == (PNG, "image/png", 24, 16)


async def test_bytes_are_checked_without_a_request(fetcher: ImageFetcher, upstream: Upstream) -> None:
    assert (await fetcher.fetch(ImageBytes(PNG))).width == 24
    assert upstream.requests == []


async def test_a_large_image_is_checked(fetcher: ImageFetcher) -> None:
    file = io.BytesIO()
    Image.effect_noise((800, 800), 90).save(file, "PNG")
    assert len(file.getvalue()) > 300_000
    assert (await fetcher.fetch(ImageBytes(file.getvalue()))).width == 800


@pytest.mark.parametrize("data", [b"", b"<html>", PNG[:-1], b"GIF89a", bytes(1_000_001)])
async def test_bytes_that_are_not_an_image_are_rejected(fetcher: ImageFetcher, data: bytes) -> None:
    await refusal(fetcher, ImageBytes(data))


async def test_the_request_names_itself_and_carries_no_credentials(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths["/a"] = answers(302, headers={"Location": "/ok", "Set-Cookie": "session=1; Path=/"})
    await fetcher.fetch(upstream.link("/a"))
    await fetcher.fetch(upstream.link("/a"))
    assert [request.path for request in upstream.requests] == ["/a", "/ok"] * 2
    for request in upstream.requests:
        assert request.headers["User-Agent"].startswith("imagegen/")
        assert not {"Authorization", "Cookie", "Referer"} & request.headers.keys()


async def test_a_signed_link_is_sent_as_it_was_written(fetcher: ImageFetcher, upstream: Upstream) -> None:
    path = "/ok?X-Amz-Signature=a%2Fb%3D%2b&path=x%2Fy+z&t=~%7E"
    upstream.paths["/go"] = redirects(path)
    await fetcher.fetch(upstream.link(path))
    await fetcher.fetch(upstream.link("/go"))
    assert [request.raw_path for request in upstream.requests] == [path, "/go", path]


@pytest.mark.parametrize("port", ["0", "99999", "x"])
async def test_a_link_with_an_impossible_port_is_rejected(fetcher: ImageFetcher, port: str) -> None:
    assert "not a valid address" in (await refusal(fetcher, ImageLink(f"http://127.0.0.1:{port}/x"))).detail


async def test_gzip_of_too_much_is_rejected(upstream: Upstream) -> None:
    upstream.paths["/x"] = answers(body=gzip.compress(ENDLESS_START + bytes(2_000_000)))
    async with open_session(frozenset({upstream.host})) as session:
        fetcher = make_fetcher(session, frozenset({upstream.host}), max_bytes=1_000_000)
        assert "over" in (await refusal(fetcher, upstream.link("/x"))).detail


async def test_a_declared_length_over_the_cap_is_rejected_unread(fetcher: ImageFetcher, upstream: Upstream) -> None:
    async def huge(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(10**12)})
        await response.prepare(request)
        await response.write(PNG)
        return response

    upstream.paths["/x"] = huge
    assert "over 1000000 bytes" in (await refusal(fetcher, upstream.link("/x"))).detail


@pytest.mark.parametrize("squeezed", [False, True])
async def test_an_endless_or_compressed_body_is_read_only_to_the_cap(
    fetcher: ImageFetcher, upstream: Upstream, squeezed: bool
) -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        if squeezed:
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        await response.write(ENDLESS_START)
        while written < 300_000_000:
            await response.write(bytes(100_000))
            written += 100_000
        return response

    upstream.paths["/x"] = endless
    assert "over 1000000 bytes" in (await refusal(fetcher, upstream.link("/x"))).detail
    assert written < 300_000_000


async def test_no_text_shows_the_links_path_or_query(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths |= {"/s3cret-path": answers(403), "/s3cret-503": answers(503), "/s3cret-html": answers(text="<p>")}
    upstream.paths["/s3cret-go"] = redirects("http://10.0.0.1/s3cret?s3cret")
    links = [upstream.link(f"{path}?sig=s3cret").url for path in upstream.paths if path != "/ok"]
    for link in [
        *links,
        "http://\x00s3cret/",
        "http:///s3cret",
        "http://a b/s3cret",
        "s3cret",
        "ftp://s3cret.example/?s3cret",
    ]:
        with pytest.raises((ImageRejected, DownloadFailed)) as caught:
            await fetcher.fetch(ImageLink(link))
        assert isinstance(caught.value, ImageRejected | DownloadFailed)
        detail = caught.value.detail
        assert "s3cret" not in detail.replace("s3cret.example", "")
        assert detail.isprintable()
        assert len(detail) <= 300
