"""Tests that separate this service's own addresses, in every spelling, from other services of the same machine."""

from __future__ import annotations

import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from imagegen.own_addresses import ForeignResolver, OwnAddresses
from imagegen.ssrf import AddressBlocked
from tests.support import over_rows

LOOPBACK = OwnAddresses([("127.0.0.1", 3000)], "https://images.example.com/base")
EVERYWHERE = OwnAddresses([("0.0.0.0", 3000), ("::", 3000)])


@over_rows(
    ("own", "host", "port"),
    [
        *[
            (LOOPBACK, host, 3000)
            for host in ("127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.0.0.1.")
        ],
        *[(LOOPBACK, host, 3000) for host in ("localhost", "LOCALHOST", "localhost.", "a.localhost", "0.0.0.0", "::")],
        *[(LOOPBACK, host, 3000) for host in ("[::ffff:127.0.0.1]", "::ffff:7f00:1", "１２７.0.0.1")],
        *[(LOOPBACK, "images.example.com", port) for port in (443, 80, 3000)],
        *[(LOOPBACK, host, 443) for host in ("IMAGES.Example.com", "images.example.com.", "images。example。com")],
        *[(EVERYWHERE, host, 3000) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "0.0.0.0")],
    ],
)
def test_addresses_of_this_service_are_rejected(own: OwnAddresses, host: str, port: int) -> None:
    with pytest.raises(AddressBlocked):
        own.check(host, port)


@over_rows(
    ("own", "host", "port"),
    [
        (LOOPBACK, "127.0.0.1", 3001),
        (LOOPBACK, "localhost", 8080),
        (LOOPBACK, "127.0.0.2", 3000),
        (LOOPBACK, "::1", 3000),
        (LOOPBACK, "images.example.com", 8443),
        (LOOPBACK, "hooks.example.com", 443),
        (LOOPBACK, "example.com", 443),
        (EVERYWHERE, "93.184.215.14", 3000),
        (EVERYWHERE, "2606:2800:220:1::1", 3000),
        (EVERYWHERE, "localhost", 3001),
        (OwnAddresses(), "127.0.0.1", 3000),
    ],
)
def test_addresses_of_other_services_are_accepted(own: OwnAddresses, host: str, port: int) -> None:
    own.check(host, port)


def test_the_host_of_the_current_request_is_an_own_address() -> None:
    with pytest.raises(AddressBlocked):
        LOOPBACK.check("other.example.com", 443, ["http://OTHER.example.com"])
    LOOPBACK.check("other.example.com", 8443, ["http://other.example.com"])


async def test_a_name_that_resolves_to_this_service_is_rejected() -> None:
    class Names(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=family, proto=0, flags=0)]

        async def close(self) -> None:
            """Do nothing."""

    resolver = ForeignResolver(LOOPBACK, Names())
    with pytest.raises(AddressBlocked):
        await resolver.resolve("rebound.example.com", 3000)
    assert len(await resolver.resolve("rebound.example.com", 3001)) == 1
