"""Tests of the emulator's image links: real images, expiry, and named faults."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from io import BytesIO

import aiohttp
import pytest
from PIL import Image, UnidentifiedImageError

from imagegen.emulator.small_images import DrawnImage, digest_of, draw
from tests.emulator.conftest import Ask
from tests.emulator_fixtures import EmulatedUpstream

GetLink = Callable[..., Awaitable[str]]


async def fetch(session: aiohttp.ClientSession, url: str, **options: object) -> tuple[aiohttp.ClientResponse, bytes]:
    async with session.get(url, **options) as response:  # type: ignore[arg-type]
        return response, await response.read()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 333), (1025, 64)])
def test_a_drawn_image_is_whole_and_has_its_size(kind: str, width: int, height: int) -> None:
    image = Image.open(BytesIO(draw(DrawnImage(kind, width, height, digest_of("a cat", 1, 0)))))
    image.load()
    assert (image.format, image.size) == (kind.upper(), (width, height))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_prompt_seed_and_index_determine_the_image(kind: str) -> None:
    inputs = [("a cat", 1, 0), ("a cat", 1, 1), ("a cat", 2, 0), ("a dog", 1, 0), ("a cat", 1, 0)]
    drawn = [draw(DrawnImage(kind, 64, 64, digest_of(*arguments))) for arguments in inputs]
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[4]


async def test_a_short_link_redirects_to_an_imgproxy_address(link: GetLink, session: aiohttp.ClientSession) -> None:
    url = await link()
    response, _ = await fetch(session, url, allow_redirects=False)
    host, _, path = response.headers["Location"].partition("/imgproxy/")
    _, kind, source = path.split("/")
    assert (response.status, kind) == (302, "format:jpeg")
    assert url.startswith(host)
    assert b"X-Amz-Expires=3600" in base64.urlsafe_b64decode(source + "==")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
async def test_the_link_returns_the_requested_format(link: GetLink, session: aiohttp.ClientSession, kind: str) -> None:
    response, data = await fetch(session, await link(output_format=kind))
    assert response.content_type == f"image/{kind}"
    assert Image.open(BytesIO(data)).format == kind.upper()


async def test_a_call_without_a_seed_never_repeats_an_image(link: GetLink, session: aiohttp.ClientSession) -> None:
    random = [(await fetch(session, await link()))[1] for _ in range(2)]
    seeded = [(await fetch(session, await link(seed=5)))[1] for _ in range(2)]
    assert random[0] != random[1]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize("agent", ["", " "])
async def test_a_blank_user_agent_is_rejected(link: GetLink, session: aiohttp.ClientSession, agent: str) -> None:
    url = await link()
    redirect, _ = await fetch(session, url, allow_redirects=False)
    for address in (url, redirect.headers["Location"]):
        response, data = await fetch(session, address, headers={"User-Agent": agent}, allow_redirects=False)
        assert (response.status, data) == (403, b"error code: 1010")


async def test_expired_links_fail_and_new_ones_work(
    upstream: EmulatedUpstream, link: GetLink, session: aiohttp.ClientSession
) -> None:
    old = await link()
    upstream.expire_links()
    response, data = await fetch(session, old)
    assert response.status == 403
    assert b"Request has expired" in data
    assert (await fetch(session, await link()))[0].status == 200
    async with session.post(upstream.url + "/_emulator/expire") as response:
        assert response.status == 204


async def test_links_expire_by_age(session: aiohttp.ClientSession) -> None:
    async with EmulatedUpstream(link_ttl_s=0) as upstream:
        request = {"model": "m", "prompt": "a cat"}
        headers = {"Authorization": "Bearer any"}
        async with session.post(upstream.url + "/images/generations", json=request, headers=headers) as response:
            url = (await response.json())["data"][0]["url"]
        assert (await fetch(session, url))[0].status == 403


async def test_an_unknown_link_is_a_404(upstream: EmulatedUpstream, session: aiohttp.ClientSession) -> None:
    assert (await fetch(session, upstream.url + "/shrt/0123456789abcdef"))[0].status == 404


@pytest.mark.parametrize(
    ("fault", "status", "content_type", "start"),
    [
        ("image_404", 404, "text/plain", b"Not Found"),
        ("image_403", 403, "text/plain", b"Forbidden"),
        ("image_500", 500, "text/plain", b"Internal"),
        ("image_expired", 403, "application/xml", b"<?xml"),
        ("image_empty", 200, "text/plain", b""),
        ("image_html", 200, "text/html", b"<!DOCTYPE html>"),
        ("image_html_as_png", 200, "image/png", b"<!DOCTYPE html>"),
        ("image_svg", 200, "image/svg+xml", b"<svg"),
        ("image_wrong_type", 200, "text/html", b"\xff\xd8\xff"),
        ("image_truncated_png", 200, "image/png", b"\x89PNG"),
        ("image_truncated_jpeg", 200, "image/jpeg", b"\xff\xd8\xff"),
    ],
)
async def test_a_link_fails_with_its_named_fault(
    link: GetLink, session: aiohttp.ClientSession, *, fault: str, status: int, content_type: str, start: bytes
) -> None:
    response, data = await fetch(session, await link(f"{{{{fault:{fault}}}}}"))
    assert (response.status, response.content_type) == (status, content_type)
    assert data.startswith(start)
    if fault.startswith("image_truncated"):
        with pytest.raises((OSError, UnidentifiedImageError)):
            Image.open(BytesIO(data)).load()


async def test_links_redirect_in_circles_or_to_a_private_address(link: GetLink, session: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.TooManyRedirects):
        await fetch(session, await link("{{fault:image_redirect_loop}}"))
    for marker, target in (
        ("", "http://169.254.169.254/latest/meta-data/"),
        (" target=http://10.9.9.9/", "http://10.9.9.9/"),
    ):
        url = await link(f"{{{{fault:image_redirect_private{marker}}}}}")
        response, _ = await fetch(session, url, allow_redirects=False)
        assert response.headers["Location"] == target


async def test_a_link_may_fail_only_its_first_fetches(link: GetLink, session: aiohttp.ClientSession) -> None:
    url = await link("{{fault:image_500 link_times=2}}")
    assert [(await fetch(session, url))[0].status for _ in range(3)] == [500, 500, 200]


async def test_only_the_image_at_the_index_is_corrupted(ask: Ask, session: aiohttp.ClientSession) -> None:
    body = await (await ask("{{fault:image_404 index=1}}", n=2)).json()
    assert [(await fetch(session, entry["url"]))[0].status for entry in body["data"]] == [200, 404]


async def test_corrupted_bytes_are_sent_as_base64(ask: Ask) -> None:
    body = await (await ask("{{fault:image_svg}}", response_format="base64")).json()
    assert base64.b64decode(body["data"][0]["b64_json"]).startswith(b"<svg")
    body = await (await ask("{{fault:image_404}}", response_format="base64")).json()
    assert base64.b64decode(body["data"][0]["b64_json"]).startswith(b"\xff\xd8\xff")


async def test_a_huge_image_never_ends(link: GetLink, session: aiohttp.ClientSession) -> None:
    received = 0
    async with session.get(await link("{{fault:image_huge}}")) as response:
        first = await response.content.readexactly(1000)
        while received < 40 * 1024 * 1024:
            received += len(await response.content.readany())
    assert first.startswith(b"\xff\xd8\xff")
    assert first.endswith(bytes(800))


@pytest.mark.parametrize("fault", ["image_short", "image_reset"])
async def test_an_image_is_truncated(link: GetLink, session: aiohttp.ClientSession, fault: str) -> None:
    with pytest.raises(aiohttp.ClientError):
        await fetch(session, await link(f"{{{{fault:{fault}}}}}"))


@pytest.mark.parametrize("fault", ["image_hang", "image_slow interval_s=0.5"])
async def test_an_image_stalls_its_client(link: GetLink, session: aiohttp.ClientSession, fault: str) -> None:
    with pytest.raises(TimeoutError):
        await fetch(session, await link(f"{{{{fault:{fault}}}}}"), timeout=aiohttp.ClientTimeout(total=0.3))


@pytest.mark.parametrize(("mode", "size"), [("png", (64, 64)), ("tiny", (8, 8))])
async def test_a_benchmark_requests_cheap_images(
    session: aiohttp.ClientSession, mode: str, size: tuple[int, int]
) -> None:
    async with EmulatedUpstream(image=mode) as upstream:
        request = {"model": "m", "prompt": "a cat", "width": 64, "height": 64}
        headers = {"Authorization": "Bearer any"}
        async with session.post(upstream.url + "/images/generations", json=request, headers=headers) as response:
            url = (await response.json())["data"][0]["url"]
        image = Image.open(BytesIO((await fetch(session, url))[1]))
        assert (image.format, image.size) == ("PNG", size)
