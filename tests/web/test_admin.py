from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from edge_server import edge_server
from multidict import CIMultiDict

from imagegen.errors import Forbidden, Unauthorized
from imagegen.web.ops.admin import ADMIN, AdminAuth, admin_only, require_admin

TOKEN = "s3cret"


def request_admin_route(
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    *,
    peer: str | None = "127.0.0.1",
    host: str | None = "localhost:3000",
    token: str | None = None,
    on_render: bool = False,
) -> None:
    """Request an admin route; raises the error of the gate."""
    app = web.Application()
    app[ADMIN] = AdminAuth(token, on_render)
    transport = Mock()
    transport.get_extra_info = lambda name, default=None: (peer, 4711) if name == "peername" and peer else default
    given = [*(headers.items() if isinstance(headers, dict) else headers or [])]
    every = CIMultiDict([*([("Host", host)] if host else []), *given])
    require_admin(make_mocked_request("GET", "/metrics", every, transport=transport, app=app))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("headers", [bearer(TOKEN), {"Authorization": f"bearer {TOKEN}"}])
def test_the_token_admits_remote_clients_and_works_on_render(headers) -> None:
    request_admin_route(
        headers | {"X-Forwarded-For": "8.8.8.8"}, peer="8.8.8.8", host="img.example", token=TOKEN, on_render=True
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer(f"{TOKEN}x"),
        bearer("sé"),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"X-Admin-Token": TOKEN},
    ],
)
def test_a_wrong_or_missing_token_is_401_also_from_loopback(headers) -> None:
    with pytest.raises(Unauthorized) as raised:
        request_admin_route(headers, token=TOKEN)
    assert raised.value.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_in_the_query_is_ignored() -> None:
    app = web.Application()
    app[ADMIN] = AdminAuth(TOKEN, on_render=False)
    with pytest.raises(Unauthorized):
        require_admin(make_mocked_request("GET", f"/metrics?token={TOKEN}", app=app))


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "localhost.", "127.0.0.1:3000", "[::1]:3000", "[::1]"])
def test_loopback_is_admitted_without_a_token(peer, host) -> None:
    request_admin_route(peer=peer, host=host)


@pytest.mark.parametrize("peer", ["10.0.0.2", "192.168.1.9", "8.8.8.8", "::ffff:8.8.8.8", "fe80::1", None])
def test_remote_clients_are_rejected_without_a_token(peer) -> None:
    with pytest.raises(Forbidden):
        request_admin_route(peer=peer)


@pytest.mark.parametrize(
    "host",
    ["img.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0", "[::2]", "[::1", None],
)
def test_a_name_that_resolves_to_loopback_is_rejected_without_token(host) -> None:
    with pytest.raises(Forbidden):
        request_admin_route(host=host)


def test_two_host_headers_are_rejected_without_a_token() -> None:
    with pytest.raises(Forbidden):
        request_admin_route([("Host", "img.example")])


@pytest.mark.parametrize(
    "name", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Proto", "x-forwarded-host", "X-FORWARDED-PREFIX"]
)
def test_proxied_requests_are_rejected_without_a_token(name) -> None:
    with pytest.raises(Forbidden):
        request_admin_route({name: ""})


def test_every_client_is_rejected_on_render_without_a_token() -> None:
    with pytest.raises(Forbidden):
        request_admin_route(on_render=True)


def test_the_token_is_in_no_repr() -> None:
    assert TOKEN not in repr(AdminAuth(TOKEN, on_render=False))


@pytest.fixture
async def start(aiohttp_client):
    async def start_app(rule: AdminAuth | None):
        async def secret(_request: web.Request) -> web.Response:
            return web.Response(text="secret")

        app = web.Application()
        app.router.add_get("/metrics", admin_only(secret))
        if rule:
            app[ADMIN] = rule
        return await aiohttp_client(edge_server(app))

    return start_app


async def test_a_guarded_handler_serves_authorized_clients(start) -> None:
    client = await start(AdminAuth(TOKEN, on_render=False))
    answer = await client.get("/metrics", headers=bearer(TOKEN))
    assert (answer.status, await answer.text()) == (200, "secret")


async def test_rejections_match_the_contract(start) -> None:
    client = await start(AdminAuth(TOKEN, on_render=False))
    refused = await client.get("/metrics")
    assert (refused.status, (await refused.json())["code"]) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    client = await start(AdminAuth(None, on_render=True))
    refused = await client.get("/metrics")
    assert (refused.status, (await refused.json())["code"]) == (403, "forbidden")
    assert "WWW-Authenticate" not in refused.headers


async def test_a_token_with_non_ascii_bytes_is_wrong(start) -> None:
    client = await start(AdminAuth(TOKEN, on_render=False))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert b" 401 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()


async def test_the_application_has_no_token_by_default(start) -> None:
    client = await start(None)
    assert (await client.get("/metrics")).status == 200
    assert (await client.get("/metrics", headers={"Via": "1.1 proxy"})).status == 403
