"""Tests of REDIS_URL and REDIS_TOKEN: each usual form of an address, and wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redis.asyncio.connection import parse_url

from imagegen.redis_client.url import sentinel_url
from imagegen.start_checks import warnings
from tests.loaded_settings import faults, load
from tests.support import over_rows


@over_rows(
    ("url", "token", "mapped"),
    [
        ("redis://localhost:6379/0", "", "redis://localhost:6379/0"),
        ("unix:///run/redis.sock?db=2", "", "unix:///run/redis.sock?db=2"),
        ("rediss://default:pw@eu1-x.upstash.io:6379", "", "rediss://default:pw@eu1-x.upstash.io:6379"),
        ("rediss://default:pw@h", "token", "rediss://default:pw@h"),
        ("redis://h?password=pw", "token", "redis://h?password=pw"),
        ("rediss://eu1-x.upstash.io", "to/k=n", "rediss://default:to%2Fk%3Dn@eu1-x.upstash.io"),
        ("rediss://default_ro@h:1", "token", "rediss://default_ro:token@h:1"),
        ("redis://eu1-x.upstash.io:6379", "token", "rediss://default:token@eu1-x.upstash.io:6379"),
        ("https://eu1-x.upstash.io", "to/k=n", "rediss://default:to%2Fk%3Dn@eu1-x.upstash.io:6379"),
        ("https://eu1-x.upstash.io/", "token", "rediss://default:token@eu1-x.upstash.io:6379"),
        ("redis://[::1]:6380", "token", "redis://default:token@[::1]:6380"),
        ("unix:///run/redis.sock", "token", "unix://default:token@/run/redis.sock"),
    ],
)
def test_redis_addresses_are_converted_to_the_form_of_redis_py(url: str, token: str, mapped: str) -> None:
    assert load(REDIS_URL=url, REDIS_TOKEN=token).redis_url == mapped


def test_redis_py_reads_the_token_back_as_it_was() -> None:
    token = "A/b+c=d@e:f%#?"
    url = load(REDIS_URL="https://eu1-x.upstash.io", REDIS_TOKEN=token).redis_url
    parsed: Any = parse_url(url or "")
    assert (parsed["username"], parsed["password"]) == ("default", token)
    assert (parsed["host"], parsed["port"]) == ("eu1-x.upstash.io", 6379)


@over_rows(
    "url",
    [
        "localhost:6379",
        "http://hunter2.upstash.io",
        "redis://",
        "redis://:hunter2@h:0",
        "redis://:hunter2@h:70000",
        "redis://:hunter2/x@h:6379",
        "redis://:hunter2#x@h",
        "redis://h/hunter2",
        "redis://h hunter2",
        "redis-cli -u redis://:hunter2@h",
        "unix://hunter2/redis.sock",
        "unix://",
        "https://eu1-x.upstash.io",
        "https://eu1-x.upstash.io/get/hunter2",
    ],
)
def test_a_wrong_redis_address_is_rejected_and_not_shown(url: str) -> None:
    found = faults(REDIS_URL=url)
    assert list(found) == ["REDIS_URL"]
    assert "hunter2" not in found["REDIS_URL"]


@over_rows(
    "url",
    [
        f"redis://h/{'9' * 5000}",
        "redis://h?db=\u0663",
        "redis://h?socket_read_size=-1",
        "redis://h?socket_read_size=0",
        "redis://h?socket_keepalive=maybe",
        "redis://h?client_name=two%20words",
        "redis://h?client_name=b\u00fccher",
        "rediss://h?ssl_check_hostname=maybe",
        "redis+sentinel://a..b/main",
        "redis+sentinel://h/main/hunter2",
        "redis+sentinel://h/main/hunter2?db=3",
        f"unix:///{'a' * 107}",
    ],
)
def test_an_option_that_would_be_misunderstood_is_a_fault(url: str) -> None:
    found = faults(REDIS_URL=url)
    assert list(found) == ["REDIS_URL"]
    assert "hunter2" not in found["REDIS_URL"]


@over_rows(
    ("url", "database", "warns"),
    [
        ("redis://h/3?db=4", 4, True),
        ("redis://h/3?db=3", 3, False),
        ("redis://h?db=1&db=2", 1, True),
        ("redis://h?db=1&db=1", 1, False),
        ("redis+sentinel://h/main/2?db=3", 3, True),
        ("redis+sentinel://h/main/2", 2, False),
    ],
)
def test_a_database_that_is_named_twice_is_the_one_that_redis_py_takes(
    tmp_path: Path, url: str, database: int, *, warns: bool
) -> None:
    settings = load(REDIS_URL=url, DATA_DIR=str(tmp_path))
    parsed = sentinel_url(settings.redis_url or "")
    assert parse_url(parsed.master_url if parsed else settings.redis_url or "")["db"] == database
    assert len(list(warnings(settings))) == warns


@over_rows("port", ["0", "65536", "99999"])
def test_a_port_that_can_not_be_is_named(port: str) -> None:
    assert "port must be from 1 to 65535" in faults(REDIS_URL=f"redis://h:{port}")["REDIS_URL"]


def test_a_password_that_is_there_twice_is_not_shown(tmp_path: Path) -> None:
    (warning,) = warnings(load(REDIS_URL="redis://h?password=hunter2&password=hunter3", DATA_DIR=str(tmp_path)))
    assert "hunter" not in warning


def test_a_host_may_have_letters_that_are_not_ascii() -> None:
    assert load(REDIS_URL="redis://b\u00fccher.example").redis_url == "redis://b\u00fccher.example"


def test_a_token_without_an_address_is_a_fault() -> None:
    assert list(faults(REDIS_TOKEN="token")) == ["REDIS_TOKEN"]
