"""Tests of the client address behind any number of proxies, and of the links in its responses."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from imagegen.web.http.forwarded import TrustedHops, base_url, client_address, valid_host
from tests.support import over_rows

CLOUDFLARE = "172.70.1.9"


def request_from(peer: str | None, *forwarded: str, **headers: str) -> web.Request:
    pairs = CIMultiDict({"Host": "api.example:3000"})
    pairs.extend([("X-Forwarded-For", value) for value in forwarded])
    pairs.update({name.replace("_", "-"): value for name, value in headers.items()})
    details: dict[str, Any] = {"peername": (peer, 50000) if peer else "", "sockname": ("127.0.0.1", 3000)}
    transport = Mock()
    transport.get_extra_info.side_effect = lambda name, default=None: details.get(name, default)
    return make_mocked_request("GET", "/", headers=pairs, transport=transport)


@over_rows("forged", ["1.1.1.1", "1.1.1.1, 2.2.2.2", "unknown", "::1", "\x00"])
def test_without_trusted_proxies_a_forged_header_is_not_read(forged: str) -> None:
    assert client_address(request_from("203.0.113.7", forged), 0) == "203.0.113.7"


@over_rows(
    ("hops", "forwarded", "client"),
    [
        (1, ["198.51.100.1"], "198.51.100.1"),
        (1, ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        (1, ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        (2, ["6.6.6.6, 198.51.100.1, 10.0.0.3"], "198.51.100.1"),
        (2, ["6.6.6.6, 198.51.100.1", "10.0.0.3"], "198.51.100.1"),
        (2, ["198.51.100.1"], "10.0.0.9"),
        (1, ["198.51.100.1:4711"], "198.51.100.1"),
        (1, ["[2001:db8:1:2:3::4]:4711"], "2001:db8:1:2::/64"),
    ],
)
def test_with_n_hops_the_nth_entry_from_the_right_counts(hops: TrustedHops, forwarded: list[str], client: str) -> None:
    assert client_address(request_from("10.0.0.9", *forwarded), hops) == client


@over_rows("garbage", ["", "unknown", "999.1.1.1", "1.1.1.1\t2.2.2.2", "é", "_hidden", "a" * 5000, "1.2.3"])
def test_a_garbled_entry_falls_back_to_the_last_good_hop(garbage: str) -> None:
    assert client_address(request_from("10.0.0.9", garbage), 1) == "10.0.0.9"
    assert client_address(request_from("10.0.0.9", f"{garbage}, 198.51.100.1"), 2) == "198.51.100.1"


@over_rows(
    ("peer", "forwarded", "client"),
    [
        ("::1", [f"198.51.100.1, {CLOUDFLARE}, 10.1.2.3"], "198.51.100.1"),
        ("10.1.2.3", [f"6.6.6.6, 198.51.100.1, {CLOUDFLARE}"], "198.51.100.1"),
        ("10.1.2.3", [f"198.51.100.1, {CLOUDFLARE}", "fd00::7"], "198.51.100.1"),
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),
        ("10.1.2.3", [f"garbage, {CLOUDFLARE}"], "10.1.2.3"),
        ("10.1.2.3", ["10.9.9.9"], "10.1.2.3"),
        ("10.1.2.3", [], "10.1.2.3"),
        ("10.1.2.3", [f"2001:db8::1, 2606:4700::1, {CLOUDFLARE}"], "2606:4700::/64"),
        ("10.1.2.3", [f"6.6.6.6, 104.28.1.1, {CLOUDFLARE}"], "104.28.1.1"),
        (CLOUDFLARE, ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        (CLOUDFLARE, ["6.6.6.6, 104.28.1.1"], "104.28.1.1"),
        ("10.1.2.3", [f"6.6.6.6, 10.9.9.9, {CLOUDFLARE}"], "10.1.2.3"),
        ("10.1.2.3", [f"6.6.6.6, {CLOUDFLARE}, 198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
    ],
)
def test_auto_uses_the_rightmost_address_that_is_not_a_proxy(peer: str, forwarded: list[str], client: str) -> None:
    assert client_address(request_from(peer, *forwarded), "auto") == client


def test_a_customer_has_one_ipv6_network_of_64_bits() -> None:
    first, second = (client_address(request_from(f"2001:db8:0:1::{end}"), 0) for end in ("1", "ffff"))
    assert first == second == "2001:db8:0:1::/64"
    assert client_address(request_from("2001:db8:0:2::1"), 0) != first


def test_a_mapped_address_is_the_ipv4_address_itself() -> None:
    assert client_address(request_from("::ffff:203.0.113.7"), 0) == "203.0.113.7"


def test_a_connection_without_an_address_is_unknown() -> None:
    assert client_address(request_from(None), 0) == "unknown"


def test_a_very_long_chain_is_read_from_its_right_end_only() -> None:
    chain = ", ".join(["10.0.0.1"] * 2000)
    assert client_address(request_from("10.0.0.9", f"198.51.100.1, {chain}"), "auto") == "10.0.0.9"


@over_rows("host", ["localhost", "api.example:3000", "127.0.0.1:80", "[::1]:3000", "[::1]", "my_service-1.internal"])
def test_a_host_name_or_address_is_a_valid_host(host: str) -> None:
    assert valid_host(host)


@over_rows(
    "host",
    [
        "",
        " ",
        "a b",
        "a/b",
        "a@b",
        "a:b",
        "a:",
        "a:99999",
        "a\r\nX: y",
        "a?b",
        "a#b",
        "a,b",
        "[::1",
        "[g::1]",
        ":80",
        "<x>",
    ],
)
def test_other_hosts_are_invalid(host: str) -> None:
    assert not valid_host(host)


@over_rows("host", ["x" * 300, "localhost\n", "é.example"])
def test_a_host_is_short_ascii_to_its_last_character(host: str) -> None:
    assert not valid_host(host)


def test_links_have_the_public_url_if_configured() -> None:
    request = request_from("10.0.0.9", X_Forwarded_Host="evil.example")
    assert base_url(request, "https://pictures.example/", 1) == "https://pictures.example"


def test_links_ignore_forwarding_without_trusted_proxies() -> None:
    request = request_from("10.0.0.9", X_Forwarded_Host="evil.example", X_Forwarded_Proto="https")
    assert base_url(request, None, 0) == "http://api.example:3000"


@over_rows("hops", [1, 2, "auto"])
def test_links_follow_the_trusted_proxy(hops: TrustedHops) -> None:
    request = request_from("10.0.0.9", X_Forwarded_Host="pictures.example", X_Forwarded_Proto="HTTPS")
    assert base_url(request, None, hops) == "https://pictures.example"


def test_one_trusted_proxy_is_believed_and_the_client_is_not() -> None:
    request = request_from(
        "10.0.0.9", X_Forwarded_Host="evil.example, pictures.example", X_Forwarded_Proto="http, https"
    )
    assert base_url(request, None, 1) == "https://pictures.example"


def test_auto_believes_no_forwarding_from_a_public_peer() -> None:
    request = request_from("203.0.113.7", X_Forwarded_Host="evil.example", X_Forwarded_Proto="https")
    assert base_url(request, None, "auto") == "http://api.example:3000"


@over_rows("bad", ["a b", "x\r\nSet-Cookie: y", "a/../b", "javascript:alert(1)", ""])
def test_a_bad_forwarded_value_does_not_get_into_a_link(bad: str) -> None:
    request = request_from("10.0.0.9", X_Forwarded_Host=bad, X_Forwarded_Proto=bad)
    assert base_url(request, None, 1) == "http://api.example:3000"


def test_without_a_usable_host_links_have_the_address_of_the_socket() -> None:
    request = request_from("10.0.0.9", Host="a b")
    assert base_url(request, None, 0) == "http://127.0.0.1:3000"
