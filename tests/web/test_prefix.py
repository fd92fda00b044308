"""Tests of a service behind a path prefix: links, redirects, and requests with or without the prefix."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urljoin

import pytest
from aiohttp import ClientResponse

from imagegen.errors import SettingsError
from imagegen.settings import Settings
from tests.support import eventually, over_rows

PUBLIC = "https://h.example/imagegen"
BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}
LATER = {"Prefer": "respond-async"}


def links_of(value: object) -> list[str]:
    """Return every link to this service in a response."""
    if isinstance(value, dict):
        return [link for inner in value.values() for link in links_of(inner)]
    if isinstance(value, list):
        return [link for inner in value for link in links_of(inner)]
    return [value] if isinstance(value, str) and "/api/images/" in value else []


async def check(response: ClientResponse, links: int, base: str = PUBLIC) -> None:
    """Assert that all links of a response, and its Location, are below the base."""
    found = links_of(await response.json())
    assert len(found) >= links
    assert all(link.startswith(f"{base}/api/images/") for link in found), found
    if location := response.headers.get("Location"):
        assert urljoin(f"{base}/", location).startswith(f"{base}/api/images/")


@pytest.mark.parametrize("front", ["", "/imagegen"])
async def test_all_links_have_the_path_of_public_url(start_service: Any, front: str) -> None:
    service = await start_service(public_url=PUBLIC)
    path = f"{front}/api/images/generate"
    await check(await service.post(path, json=BODY), 3)
    done = await service.post(path, json=BODY, params={"wait": "10"})
    await check(done, 1)
    await check(await service.post(path, json=BODY), 3)
    task_id = (await done.json())["taskId"]
    seen = await service.get(f"{front}/api/images/{task_id}")
    await check(seen, 1)
    link = (await seen.json())["data"][0]["url"].removeprefix("https://h.example")
    assert (await service.get(link if front else link.removeprefix("/imagegen"))).status == 200
    await check(await service.post(f"{front}/api/images/batch", json={"requests": [BODY]}), 3)
    v1 = {"prompt": "by an SDK", "size": "64x64"}
    await check(await service.post(f"{front}/v1/images/generations", json=v1, headers=LATER), 3)
    await check(await service.post(f"{front}/v1/images/generations", json=v1), 1)


@pytest.mark.parametrize("front", ["", "/imagegen"])
async def test_the_pages_are_found_below_the_path(start_service: Any, front: str) -> None:
    service = await start_service(public_url=PUBLIC)
    assert (await service.get(f"{front}/")).status == 200
    if front:  # without the slash, the links of the page would lead out of the path
        home = await service.get(front, allow_redirects=False)
        assert (home.status, home.headers["Location"]) == (302, "/imagegen/")
    page = await (await service.get(f"{front}/docs")).text()
    names = re.findall(r'(?:href|src)="([\w./]+)"', page)
    assert {"docs/docs.css", "docs/docs.js", "openapi.json"} <= set(names)
    for name in names:
        seen_as = urljoin(f"{PUBLIC}/docs", name)
        assert seen_as.startswith(f"{PUBLIC}/")
        assert (await service.get(front + seen_as.removeprefix(PUBLIC))).status == 200


@pytest.mark.parametrize(
    "path", ["/imagegenx/healthz", "/imagegen/nothing", "/other/healthz", "/imagegen/imagegen/healthz"]
)
async def test_another_path_is_not_found(start_service: Any, path: str) -> None:
    service = await start_service(public_url=PUBLIC)
    assert (await service.get(path)).status == 404


async def test_an_error_below_the_path_has_the_envelope_of_its_client(start_service: Any) -> None:
    service = await start_service(public_url=PUBLIC)
    for _ in range(2):  # the second request uses the cached route
        openai = await (await service.post("/imagegen/v1/images/generations", json={})).json()
        assert openai["error"]["param"] == "prompt"
        ours = await (await service.post("/imagegen/api/images/generate", json={})).json()
        assert ours["code"] == "invalid_request"
    assert "error" in await (await service.get("/imagegen/v1/nothing")).json()


@pytest.mark.parametrize(
    ("hops", "given", "prefix"),
    [
        (1, "/shop", "/shop"),
        (1, "/a/b/", "/a/b"),
        (0, "/shop", ""),
        (1, "//evil.example", ""),
        (1, "/../x", ""),
        (1, "/a b", ""),
    ],
)
async def test_a_trusted_proxy_may_name_the_path(start_service: Any, hops: int, given: str, prefix: str) -> None:
    service = await start_service(trusted_proxy_hops=hops)
    response = await service.post("/api/images/generate", json=BODY, headers={"X-Forwarded-Prefix": given})
    await check(response, 3, f"http://127.0.0.1:{service.port}{prefix}")
    document = await (await service.get("/openapi.json", headers={"X-Forwarded-Prefix": given})).json()
    assert document["servers"] == [{"url": f"http://127.0.0.1:{service.port}{prefix}"}]


@over_rows(
    "path",
    [
        "/v1//images/generations",
        "/v1/images/generations/",
        "/v1/images//generations//",
        "/images/generations/",
        "/v1/v1//images/generations",
    ],
)
async def test_slashes_too_many_are_the_same_route_on_v1(service: Any, path: str) -> None:
    for _ in range(2):
        response = await service.post(path, json={"prompt": "slashes", "size": "64x64"})
        assert response.status == 200
        assert len((await response.json())["data"]) == 1
    refused = await service.post(path, json={})
    assert (await refused.json())["error"]["param"] == "prompt"


@over_rows("path", ["/v1/models/", "/v1//models", "/models/"])
async def test_slashes_too_many_list_the_models(service: Any, path: str) -> None:
    assert (await service.get(path)).status == 200


async def test_a_webhook_of_a_task_has_links_below_the_path(start_service: Any, aiohttp_server: Any) -> None:
    from aiohttp import web

    bodies: list[Any] = []

    async def receive(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", receive)
    receiver = await aiohttp_server(app)
    service = await start_service(public_url=PUBLIC, webhook_allow_private=True)
    await service.post("/api/images/generate", json={**BODY, "webhook": {"url": str(receiver.make_url("/"))}})
    await eventually(lambda: bodies)
    assert links_of(bodies[0])[0].startswith(f"{PUBLIC}/api/images/")


@pytest.mark.parametrize(
    "url", ["https://h/a b", "https://h/a/../b", "https://h//a", "https://h/{a}", "https://h/a%2Fb"]
)
def test_a_public_url_with_an_odd_path_is_a_fault(url: str) -> None:
    with pytest.raises(SettingsError, match="PUBLIC_URL"):
        Settings.load({"PUBLIC_URL": url}, dotenv=None)
