"""Tests of the SSRF guard: a table of hostile spellings, and a connector that rejects them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer
from yarl import URL

from imagegen.ssrf import AddressBlocked, PublicResolver, blocked_cause, check_host, guarded_connector, is_public
from tests.support import over_rows

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "93.184.215.14", "104.16.0.1", "151.101.1.69", "172.15.255.255", "172.32.0.1", "192.0.1.1",
    "100.63.255.255", "100.128.0.1", "198.17.0.1", "198.20.0.1", "223.255.255.255", "::ffff:8.8.8.8",
    "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001:82a::200e", "2620:fe::fe", "2003::1",
]  # fmt: skip

NOT_PUBLIC = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250",
    "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "100::1",
    "100:0:0:1::1", "2001::7f00:1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:10::1", "2001:20::1",
    "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fdaa::3", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "2606:4700:4700::1111%1",
]  # fmt: skip

HOSTILE_HOSTS = [
    "127.1", "127.0.1", "0", "0.0", "1", "0x7f000001", "0X7F000001", "0x7f.1", "0x7f.0.0.0x1", "0177.0.0.1",
    "017700000001", "127.0.0.01", "127.00.0.1", "2130706433", "2852039166", "134744072", "8.8.8.010", "1.2.3",
    "256.1.1.1", "127.0.0.1.", "8.8.8.8..", "127.0.0.1.5", "0x", "127.0.0.0x1", "169.254.169.254", "metadata.0",
    "１２７.0.0.1", "127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "①②⑦.0.0.1", "０x7f000001", "²130706433",
    "[::1]", "::1", "::1%lo", "fe80::1%25eth0", "127.0.0.1%0", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "::１",
    "[0:0:0:0:0:0:0:1]", "[64:ff9b::127.0.0.1]", "[fd00::1]", "[::]", "%31%32%37.0.0.1", "8.8.8.8:80", "1::2::3",
    "localhost", "LOCALHOST", "localhost.", "a.localhost", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "", ".", "..", "a..b", ".a",
    "a b.org", "a\0.org", "a/b", "*.org", "user@a.org",
    "x" * 64 + ".org",
    "a." * 127 + "org",
]  # fmt: skip


@over_rows("address", PUBLIC)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@over_rows("address", [*NOT_PUBLIC, "", "127.1", "0x7f000001", "2130706433", "example.com", "[::1]"])
def test_a_special_address_or_spelling_is_not_public(address: str) -> None:
    assert not is_public(address)


def test_parsed_addresses_are_accepted() -> None:
    assert is_public(IPv4Address("8.8.8.8"))
    assert not is_public(IPv4Address("127.0.0.1"))
    assert not is_public(IPv6Address("::ffff:127.0.0.1"))


@over_rows("host", HOSTILE_HOSTS)
def test_a_private_or_malformed_host_is_rejected_without_dns(host: str) -> None:
    with pytest.raises(AddressBlocked):
        check_host(host, 443)


@over_rows("host", [*PUBLIC, "api.together.ai", "example.com.", "1.example.org", "0x7f.example.org", "a-b.c"])
def test_a_public_literal_or_a_name_passes(host: str) -> None:
    check_host(host, 443)


@over_rows(
    ("allowed", "host", "port", "passes"),
    [
        ("127.0.0.1:7860", "127.0.0.1", 7860, True),
        ("127.0.0.1:7860", "127.0.0.1", 7861, False),
        ("127.0.0.1", "127.0.0.1", 9, True),
        ("localhost:80", "LocalHost", 80, True),
        ("::1", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("127.0.0.1:7860", "127.1", 7860, False),
        ("gpu.internal", "evil.gpu.internal.localhost", 80, False),
    ],
)
def test_an_allowed_host_passes_on_its_port_only(allowed: str, host: str, port: int, passes: bool) -> None:
    if passes:
        check_host(host, port, frozenset({allowed}))
    else:
        with pytest.raises(AddressBlocked):
            check_host(host, port, frozenset({allowed}))


class Names(AbstractResolver):
    """Resolver for a table of names; each lookup returns the next answer, then the last one again."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): list(turns) for name, turns in answers.items()}
        self.lookups = 0
        self.closed = False

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        self.lookups += 1
        turns = self.answers[host]
        return [_result(host, port, address) for address in (turns.pop(0) if len(turns) > 1 else turns[0])]

    async def close(self) -> None:
        self.closed = True


def _result(host: str, port: int, address: str) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)


async def test_a_name_with_public_addresses_resolves() -> None:
    names = Names(pics_test=[["93.184.215.14", "2606:4700::1"]])
    found = await PublicResolver(inner=names).resolve("pics.test", 443)
    assert [result["host"] for result in found] == ["93.184.215.14", "2606:4700::1"]


@over_rows("address", NOT_PUBLIC)
async def test_a_name_with_one_private_address_is_rejected(address: str) -> None:
    with pytest.raises(AddressBlocked):
        await PublicResolver(inner=Names(pics_test=[["93.184.215.14", address]])).resolve("pics.test", 443)


async def test_an_allowed_name_does_not_allow_others_of_its_address() -> None:
    names = Names(gpu_test=[["10.0.0.7"]], evil_test=[["10.0.0.7"]])
    resolver = PublicResolver(frozenset({"gpu.test:7860"}), names)
    assert await resolver.resolve("gpu.test", 7860)
    for host, port in (("gpu.test", 22), ("evil.test", 7860)):
        with pytest.raises(AddressBlocked):
            await resolver.resolve(host, port)


async def test_a_literal_never_reaches_the_inner_resolver() -> None:
    names = Names()
    with pytest.raises(AddressBlocked):
        await PublicResolver(inner=names).resolve("0x7f.1", 80)
    assert names.lookups == 0


async def test_a_name_that_can_not_be_encoded_is_rejected() -> None:
    class Strict(Names):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
            host.encode("ascii")
            return []

    with pytest.raises(AddressBlocked):
        await PublicResolver(inner=Strict()).resolve("ä.test", 80)


async def test_closing_closes_the_inner_resolver() -> None:
    names = Names()
    await PublicResolver(inner=names).close()
    assert names.closed


HITS = web.AppKey("hits", list)


@pytest.fixture
async def listener() -> AsyncIterator[TestServer]:
    """Count the requests that arrive on loopback."""

    async def hit(request: web.Request) -> web.Response:
        request.app[HITS].append(request.path)
        return web.Response(text="in")

    app = web.Application()
    app[HITS] = []
    app.router.add_get("/", hit)
    server = TestServer(app, host="127.0.0.1")
    async with server:
        yield server


def hits(listener: TestServer) -> int:
    return len(listener.app[HITS])


class TestConnector:
    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1", "127.1", "0", "2130706433", "0x7f000001", "0177.0.0.1", "１２７.0.0.1", "127。0。0。1",
         "localhost", "[::ffff:127.0.0.1]", "[::1]", "127.0.0.1.", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ"],
    )  # fmt: skip
    async def test_no_spelling_of_loopback_is_connected_to(self, listener: TestServer, host: str) -> None:
        async with aiohttp.ClientSession(connector=guarded_connector()) as session:
            with pytest.raises(aiohttp.ClientConnectorError) as caught:
                await session.get(URL(f"http://{host}:{listener.port}/"))
        assert blocked_cause(caught.value)
        assert hits(listener) == 0

    async def test_a_rebinding_name_is_checked_at_each_lookup(self, listener: TestServer) -> None:
        names = Names(rebind_test=[["93.184.215.14"], ["127.0.0.1"]])
        assert await PublicResolver(inner=names).resolve("rebind.test", 80)
        async with aiohttp.ClientSession(connector=guarded_connector(inner=names)) as session:
            for _ in range(3):
                with pytest.raises(aiohttp.ClientConnectorError) as caught:
                    await session.get(f"http://rebind.test:{listener.port}/")
                assert blocked_cause(caught.value)
        assert names.lookups == 4
        assert hits(listener) == 0

    async def test_a_redirect_to_a_rejected_address_is_rejected(self, listener: TestServer) -> None:
        async def away(_: web.Request) -> web.Response:
            raise web.HTTPFound(listener.make_url("/"))

        app = web.Application()
        app.router.add_get("/", away)
        async with TestServer(app, host="127.0.0.1") as first:
            allowed = frozenset({f"127.0.0.1:{first.port}"})
            async with aiohttp.ClientSession(connector=guarded_connector(allowed)) as session:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await session.get(first.make_url("/"))
        assert hits(listener) == 0

    async def test_an_allowed_host_is_connected_to(self, listener: TestServer) -> None:
        names = Names(gpu_test=[["127.0.0.1"]])
        for host in ("127.0.0.1", "gpu.test"):
            connector = guarded_connector(frozenset({f"{host}:{listener.port}"}), inner=names)
            url = f"http://{host}:{listener.port}/"
            async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as response:
                assert await response.text() == "in"
        assert hits(listener) == 2

    async def test_an_ordinary_failure_is_not_a_refusal(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            connector = guarded_connector(frozenset({f"127.0.0.1:{port}"}))
            async with aiohttp.ClientSession(connector=connector) as session:
                with pytest.raises(aiohttp.ClientConnectorError) as caught:
                    await session.get(f"http://127.0.0.1:{port}/")
        assert blocked_cause(caught.value) is None
        assert blocked_cause(asyncio.CancelledError()) is None
