"""Tests of the gate before the admin routes."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, make_mocked_request
from edge_server import edge_server

from imagegen.errors import Unauthorized
from imagegen.web.ops.admin import ADMIN, AdminAuth, admin_only, require_admin

TOKEN = "a-token-of-some-length"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def request_admin_route(headers: dict[str, str], *, path: str = "/metrics", token: str | None = TOKEN) -> None:
    """Request an admin route; raises the error of the gate."""
    app = web.Application()
    if token is not None:
        app[ADMIN] = AdminAuth(token)
    require_admin(make_mocked_request("GET", path, headers, app=app))


@pytest.mark.parametrize("headers", [bearer(TOKEN), {"Authorization": f"bearer  {TOKEN}"}])
def test_the_token_admits_a_client_of_any_address(headers: dict[str, str]) -> None:
    request_admin_route(headers | {"X-Forwarded-For": "8.8.8.8", "Host": "img.example"})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost"},
        bearer("wrong"),
        bearer(""),
        bearer(f"{TOKEN}x"),
        bearer(TOKEN[:-1]),
        bearer("sé"),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"X-Admin-Token": TOKEN},
    ],
)
def test_a_wrong_or_missing_token_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized) as raised:
        request_admin_route(headers)
    assert raised.value.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_in_the_query_is_ignored() -> None:
    with pytest.raises(Unauthorized):
        request_admin_route({}, path=f"/metrics?token={TOKEN}")


@pytest.mark.parametrize("headers", [{}, bearer(""), bearer("None")])
def test_an_application_without_a_token_has_no_admin(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        request_admin_route(headers, token=None)


@pytest.fixture
async def client(aiohttp_client) -> TestClient:
    async def secret(_request: web.Request) -> web.Response:
        return web.Response(text="secret")

    app = web.Application()
    app.router.add_get("/metrics", admin_only(secret))
    app[ADMIN] = AdminAuth(TOKEN)
    return await aiohttp_client(edge_server(app))


async def test_a_guarded_handler_serves_the_admin_alone(client: TestClient) -> None:
    served = await client.get("/metrics", headers=bearer(TOKEN))
    assert (served.status, await served.text()) == (200, "secret")
    refused = await client.get("/metrics")
    assert (refused.status, (await refused.json())["code"]) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"


async def test_a_token_with_non_ascii_bytes_is_wrong(client: TestClient) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert b" 401 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()
