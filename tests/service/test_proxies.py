"""A service with proxies: one for its upstream and another for webhooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.forward_proxy import ForwardProxy
from tests.service.running import Service, calls_about, eventually, run_to_its_end


@pytest.mark.parametrize("lower", [False, True])
def test_an_upstream_and_its_links_are_reached_through_the_proxy(
    start_service: Callable[..., Service], upstream: EmulatorProcess, lower: bool
) -> None:
    with ForwardProxy({"api.vendor.example": int(upstream.url.rpartition(":")[2])}, login="user:hunter2") as proxy:
        name = "http_proxy" if lower else "HTTP_PROXY"
        settings = {name: f"http://user:hunter2@{proxy.address}", "WEBHOOK_ALLOW_PRIVATE": "true"}
        service = start_service("http://api.vendor.example", **settings)
        task = service.made(prompt=f"by proxy {lower}")
        assert service.get(task["data"][0]["url"]).status == 200
        assert len(calls_about(upstream, f"by proxy {lower}")) == 1
        assert proxy.requests[0] == "POST http://api.vendor.example/v1/images/generations"
        assert any(line.startswith("GET http://api.vendor.example/") for line in proxy.requests)
        assert f"go through the proxy http://***@{proxy.address}" in service.log
        assert "hunter2" not in service.log


def test_a_loopback_upstream_and_one_in_no_proxy_are_called_directly(
    start_service: Callable[..., Service], upstream: EmulatorProcess
) -> None:
    with ForwardProxy({}) as proxy:
        service = start_service(upstream.url, HTTP_PROXY=proxy.address, NO_PROXY="example.com, 10.0.0.0/8")
        service.made(prompt="past the proxy")
        assert proxy.requests == []


def test_webhooks_go_through_their_own_proxy_only(start_service: Callable[..., Service]) -> None:
    with ForwardProxy({}) as own, ForwardProxy({}) as other:
        service = start_service(WEBHOOK_PROXY=f"http://{own.address}", HTTPS_PROXY=f"http://{other.address}")
        service.made(prompt="delivered by proxy", webhook={"url": "https://receiver.vendor.example/hook"})
        service.until(service.accepted(prompt="delivered by proxy"), "completed")
        eventually(lambda: "CONNECT receiver.vendor.example:443" in own.requests)
        assert other.requests == []


def test_an_unusable_proxy_is_reported_in_one_message(tmp_path: Path) -> None:
    ended = run_to_its_end(tmp_path, HTTPS_PROXY="socks5://user:hunter2@127.0.0.1:1080")
    assert ended.returncode == 2
    assert ended.stderr.startswith("HTTPS_PROXY: ")
    assert len(ended.stderr.splitlines()) == 1
    assert "hunter2" not in ended.stderr
