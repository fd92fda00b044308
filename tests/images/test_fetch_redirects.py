"""Tests of where a link may lead: redirects, aliases of the upstream, and private addresses."""

from __future__ import annotations

import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from imagegen.images import fetch
from imagegen.images.fetch import ImageFetcher
from imagegen.tasks.image import ImageLink
from tests.images.link_server import (
    PNG,
    Handler,
    Upstream,
    answers,
    failure,
    make_fetcher,
    open_session,
    redirects,
    refusal,
    serve,
)

pytestmark = pytest.mark.usefixtures("no_backoff")

stranger = pytest.fixture(serve)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_three_redirects_are_followed(fetcher: ImageFetcher, upstream: Upstream, status: int) -> None:
    upstream.paths |= {"/1": redirects("/2", status), "/2": redirects("3", status)}
    upstream.paths["/3"] = redirects(upstream.link("/ok").url, status)
    assert (await fetcher.fetch(upstream.link("/1"))).width == 24


async def test_a_fourth_redirect_or_a_loop_is_rejected(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths |= {f"/{n}": redirects(f"/{n + 1}") for n in range(4)} | {"/loop": redirects("/loop")}
    upstream.paths["/4"] = upstream.paths["/ok"]
    for path in ("/0", "/loop"):
        upstream.requests.clear()
        assert "redirects" in (await refusal(fetcher, upstream.link(path))).detail
        assert len(upstream.requests) == 4


@pytest.mark.parametrize(
    "link",
    [
        "/ok?size=1",
        "../ok",
        "http://127.0.0.1:{port}/ok",
        "http://127.1:{port}/ok",
        "http://0.0.0.0:{port}/ok",
        "http://2130706433:{port}/ok",
        "http://localhost/ok",
        "https://localhost:{port}/ok",
        "http://[::1]:{port}/ok",
        "http://[::ffff:127.0.0.1]:{port}/ok",
        "http://comfyui:8188/ok",
        "//127.0.0.1:{port}/ok",
    ],
)
async def test_an_alias_of_the_upstream_is_fetched_from_the_upstream(
    fetcher: ImageFetcher, upstream: Upstream, stranger: Upstream, link: str
) -> None:
    assert (await fetcher.fetch(ImageLink(link.format(port=stranger.port)))).data == PNG
    assert [request.path for request in upstream.requests] == ["/ok"]
    assert stranger.requests == []


async def test_a_redirect_of_another_host_is_not_relative_to_the_upstream(
    upstream: Upstream, stranger: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger.paths["/go"] = redirects(f"http://localhost:{upstream.port}/ok")
    async with open_session(frozenset({upstream.host, stranger.host})) as session:
        fetcher = make_fetcher(session, frozenset({upstream.host}), base_url=URL(f"http://{upstream.host}"))
        monkeypatch.setattr(fetch, "check_host", lambda *_: None)
        await refusal(fetcher, stranger.link("/go"))
    assert upstream.requests == []


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://user:secret@{own}/ok",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "ftp://example.org/x",
        "http://[::1",
    ],
)
async def test_a_redirect_or_link_to_a_private_address_is_rejected(
    fetcher: ImageFetcher, upstream: Upstream, stranger: Upstream, location: str
) -> None:
    target = location.format(port=stranger.port, own=upstream.host)
    upstream.paths["/go"] = redirects(target)
    await refusal(fetcher, upstream.link("/go"))
    await refusal(fetcher, ImageLink(target))
    assert [request.path for request in upstream.requests] == ["/go"]
    assert stranger.requests == []


@pytest.mark.parametrize("handler", [redirects(""), answers(302), answers(307, headers={"Location": "  "})])
async def test_a_redirect_to_nowhere_may_pass(fetcher: ImageFetcher, upstream: Upstream, handler: Handler) -> None:
    upstream.paths["/x"] = handler
    await failure(fetcher, upstream.link("/x"))
    await refusal(fetcher, upstream.link("/x"), age_s=120.0)


class Everywhere(AbstractResolver):
    """Resolver with every name on loopback."""

    async def resolve(self, host: str, port: int = 0, family: object = None) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass


async def test_a_name_with_a_private_address_is_rejected_without_retry(stranger: Upstream) -> None:
    async with open_session(frozenset(), Everywhere()) as session:
        fetcher = make_fetcher(session)
        error = await refusal(fetcher, ImageLink(f"http://pics.example.org:{stranger.port}/ok"))
    assert "not public" in error.detail
    assert stranger.requests == []


async def test_the_providers_own_name_may_be_private(stranger: Upstream) -> None:
    own = frozenset({f"gpu.example.org:{stranger.port}"})
    async with open_session(own, Everywhere()) as session:
        fetcher = make_fetcher(session, own, timeout_s=30)
        image = await fetcher.fetch(ImageLink(f"http://gpu.example.org:{stranger.port}/ok"))
    assert image.width == 24
