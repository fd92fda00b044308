"""Tests of outbound proxies: the calls that use one, the SSRF guard, and the meaning of a proxy's refusal."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from pytest_aiohttp import AiohttpServer
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.http_client import ProviderClient
from imagegen.proxies import Proxies, ProxyConnector
from imagegen.ssrf import AddressBlocked, blocked_cause, guarded_connector
from imagegen.tasks.retry import was_never_sent
from tests.emulated_jobs import Recorder
from tests.forward_proxy import ForwardProxy
from tests.ports import free_port
from tests.support import over_rows

PROXY = "http://proxy.example:3128"


class Names(AbstractResolver):
    """Resolver for a fixed table of names."""

    def __init__(self, **addresses: str) -> None:
        self.addresses = {name.replace("_", "."): address for name, address in addresses.items()}
        self.lookups: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.lookups.append(host)
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [ResolveResult(hostname=host, host=self.addresses[host], port=port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        """Do nothing."""


@over_rows(
    ("url", "exceptions", "goes_through"),
    [
        ("https://api.example.com/v1", (), True),
        ("http://api.example.com/v1", (), False),
        ("https://api.example.com/v1", ("example.com",), False),
        ("https://api.example.com/v1", (".example.com",), False),
        ("https://api.example.com/v1", ("*.example.com",), False),
        ("https://API.example.com./v1", ("api.example.com",), False),
        ("https://anotherexample.com/v1", ("example.com",), True),
        ("https://api.example.com/v1", ("api.example.com:443",), False),
        ("https://api.example.com:8443/v1", ("api.example.com:443",), True),
        ("https://api.example.com/v1", ("api.example.com:٤٤٣",), True),
        ("https://api.example.com/v1", ("*",), False),
        ("https://10.1.2.3/v1", ("10.0.0.0/8",), False),
        ("https://11.1.2.3/v1", ("10.0.0.0/8",), True),
        ("https://[2001:db8::1]/v1", ("2001:db8::/32",), False),
        ("https://[2001:db8::1]:8443/v1", ("[2001:db8::1]:8443",), False),
        ("https://localhost/v1", (), False),
        ("https://127.0.0.1:7860/v1", (), False),
        ("https://[::1]:7860/v1", (), False),
        ("https://a.localhost/v1", (), False),
        ("https://192.168.1.5:7860/v1", (), True),
    ],
)
def test_the_proxy_of_a_url(url: str, exceptions: tuple[str, ...], goes_through: bool) -> None:
    assert Proxies(None, PROXY, exceptions).of(URL(url)) == (URL(PROXY) if goes_through else None)


def test_credentials_are_never_shown() -> None:
    proxies = Proxies("http://user:hunter2@a:1", "https://user:hunter2@b:2", ("c",))
    assert proxies.masked == "https://***@b:2 and http://***@a:1 (not for c)"
    assert "hunter2" not in repr(proxies) + proxies.masked


async def hello(request: web.Request) -> web.Response:
    return web.json_response({"data": [], "host": request.host, "proxied": "Proxy-Authorization" in request.headers})


@pytest.fixture
async def port(aiohttp_server: AiohttpServer) -> int:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hello)
    server = await aiohttp_server(app)
    assert server.port
    return server.port


async def test_a_paid_post_and_a_lookup_use_the_proxy_with_its_login(port: int) -> None:
    with ForwardProxy({"api.vendor.example": port}, login="user:p@ss") as proxy:
        connector = ProxyConnector(Proxies(http=f"http://user:p%40ss@{proxy.address}"))
        async with aiohttp.ClientSession(connector=connector) as session:
            upstream = ProviderClient(session, URL("http://api.vendor.example/v1"), "images/generations", 5)
            for _ in range(2):
                assert (await upstream.generate({"prompt": "a"}, Recorder())).images == ()
            assert await upstream.get_json("models") == {"data": [], "host": "api.vendor.example", "proxied": False}
    assert proxy.requests == ["POST http://api.vendor.example/v1/images/generations"] * 2 + [
        "GET http://api.vendor.example/v1/models"
    ]


@over_rows("status", [407, 502, 503, 504, 403])
async def test_a_refused_tunnel_means_that_nothing_was_sent(status: int) -> None:
    with ForwardProxy({}, status=status) as proxy:
        connector = ProxyConnector(Proxies(https=f"http://{proxy.address}"))
        async with aiohttp.ClientSession(connector=connector) as session:
            upstream = ProviderClient(session, URL("https://api.vendor.example/v1"), "images/generations", 5)
            observer = Recorder()
            for call in (upstream.generate({"prompt": "a"}, observer), upstream.get_json("models")):
                with pytest.raises(UpstreamError) as caught:
                    await call
                assert was_never_sent(caught.value)
                assert "proxy" in caught.value.detail
            assert observer.sent_count == 0
    assert proxy.requests == ["CONNECT api.vendor.example:443"] * 2


async def test_a_login_rejected_by_a_plain_proxy_means_nothing_was_paid(port: int) -> None:
    with ForwardProxy({"api.vendor.example": port}, login="user:right") as proxy:
        connector = ProxyConnector(Proxies(http=f"http://user:wrong@{proxy.address}"))
        async with aiohttp.ClientSession(connector=connector) as session:
            upstream = ProviderClient(session, URL("http://api.vendor.example/v1"), "images/generations", 5)
            with pytest.raises(UpstreamError) as caught:
                await upstream.generate({"prompt": "a"}, Recorder())
    assert was_never_sent(caught.value)


async def test_an_unreachable_proxy_means_that_nothing_was_sent() -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    async with aiohttp.ClientSession(connector=ProxyConnector(Proxies(http=gone, https=gone))) as session:
        for scheme in ("http", "https"):
            upstream = ProviderClient(session, URL(f"{scheme}://api.vendor.example/v1"), "images/generations", 5)
            with pytest.raises(UpstreamError, match="no connection to its proxy") as caught:
                await upstream.generate({"prompt": "a"}, Recorder())
            assert was_never_sent(caught.value)


async def fetch(session: aiohttp.ClientSession, url: str) -> AddressBlocked | int | None:
    """Return the status, the refusal, or None for another error."""
    try:
        async with session.get(url) as response:
            return response.status
    except aiohttp.ClientError as error:
        return blocked_cause(error)


async def test_a_proxied_link_to_a_private_address_is_rejected(port: int) -> None:
    names = Names(inner_example="10.0.0.5", public_example="93.184.215.14", proxy_example="127.0.0.1")
    targets = dict.fromkeys(["unknown.example", "inner.example", "public.example", "10.0.0.5", "127.0.0.1"], port)
    with ForwardProxy(targets) as proxy:
        proxy_port = int(proxy.address.partition(":")[2])
        proxies = Proxies(http=f"http://proxy.example:{proxy_port}", exceptions=("proxy.example",))
        async with aiohttp.ClientSession(connector=guarded_connector(proxies=proxies, inner=names)) as session:
            assert await fetch(session, "http://unknown.example/a.png") == 200
            assert await fetch(session, "http://public.example/a.png") == 200
            lookups = list(proxy.requests)
            for refused in (
                "http://inner.example/a.png",
                "http://10.0.0.5/a.png",
                "http://127.0.0.1/a.png",
                "http://localhost/a.png",
                f"http://127.0.0.1:{proxy_port}/a.png",
                f"http://proxy.example:{proxy_port}/a.png",
            ):
                assert isinstance(await fetch(session, refused), AddressBlocked), refused
            assert proxy.requests == lookups


async def test_a_name_with_slow_dns_is_left_to_the_proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagegen.ssrf.ROUTE_CACHE_S", 0.05)

    class Silent(Names):
        async def resolve(self, *args: object, **options: object) -> list[ResolveResult]:
            await asyncio.Event().wait()
            raise AssertionError

    with ForwardProxy({"unknown.example": port}) as proxy:
        connector = guarded_connector(proxies=Proxies(http=f"http://{proxy.address}"), inner=Silent())
        async with aiohttp.ClientSession(connector=connector) as session:
            assert await fetch(session, "http://unknown.example/a.png") == 200
