"""Tests of one request to a receiver: its response, its connection, and addresses that are never connected."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import ClientConnectorError, web
from aiohttp.abc import AbstractResolver, ResolveResult

from imagegen.ssrf import AddressBlocked
from imagegen.tasks.task import State, Task
from imagegen.tasks.webhook import Delivery, DeliveryStatus, Webhook
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.worker.webhooks import ReceiverResponse, WebhookDispatcher, WebhookSender, webhook_session
from tests.conftest import MakeInstance
from tests.ports import free_port
from tests.support import eventually
from tests.worker.webhook_service import IMAGE, SECRET, Receiver, WebhookInstance, body_of, receiving

pytestmark = pytest.mark.usefixtures("prompt_peers")

FINAL = Task("ab" * 16, 17, 18, "d", "m", b"{}", 1.0, State.COMPLETED, finished_at=2.0, images=(IMAGE,))


async def send(
    url: str, *, private: bool = True, resolver: AbstractResolver | None = None, timeout_s: float = 20.0
) -> ReceiverResponse:
    async with webhook_session(private=private, resolver=resolver) as session:
        sender = WebhookSender(session, body_of, OperatorSecret(SECRET), allow_private=private, timeout_s=timeout_s)
        return await sender.send(FINAL, Delivery(Webhook(url, ""), 0))


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        while True:
            await response.write(b"x" * 65_536)
    except (ConnectionError, asyncio.CancelledError):
        return response


async def test_an_endless_response_is_not_read(receiver: Receiver) -> None:
    receiver.script = [endless]
    began = time.monotonic()
    assert (await send(receiver.url)).status == 200
    assert time.monotonic() - began < 10


async def test_a_response_with_large_and_many_headers_counts(receiver: Receiver) -> None:
    receiver.script = [
        web.Response(headers={"Set-Cookie": "a=" + "x" * 30_000} | {f"X-{number}": "x" for number in range(500)})
    ]
    assert (await send(receiver.url)).status == 200


async def test_a_late_response_counts_as_missing() -> None:
    async with receiving(Receiver(hold_s=30)) as silent:
        assert (await send(silent.url, timeout_s=0.5)).status is None


async def test_cookies_are_not_stored_and_no_proxy_is_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    receiver.script = [web.Response(headers={"Set-Cookie": "a=b"})]
    async with webhook_session(private=True) as session:
        sender = WebhookSender(session, body_of, allow_private=True)
        for _ in range(2):
            assert (await sender.send(FINAL, Delivery(Webhook(receiver.url, ""), 0))).status == 200
    assert "Cookie" not in receiver.got[1].headers


HOSTILE_HOSTS = [
    "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "0", "0.0.0.0", "0x7f000001", "0x7f.1", "0177.0.0.1",
    "017700000001", "2130706433", "127.0.0.1.", "127.0.0.01", "%31%32%37.0.0.1", "１２７.0.0.1", "127。0。0。1",
    "①②⑦.0.0.1", "localhost", "LOCALHOST", "localhost.", "a.localhost", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1%25lo]", "[fd00::1]", "user@127.0.0.1", "a.org@127.0.0.1",
    "a.org\\@127.0.0.1", "10.0.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "[v1.x]", "",
    # names, by the answers of the injected resolver
    "loopback.example", "six.example", "mapped.example", "private.example", "mixed.example", "nat64.example",
    "sixtofour.example", "any.example", "rebinding.example", "metadata", "redis",
]  # fmt: skip

NAMES = {
    "loopback.example": ["127.0.0.1"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "private.example": ["10.0.0.1"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "any.example": ["0.0.0.0"],
    "metadata": ["169.254.169.254"],
    "redis": ["127.0.0.1"],
}


class Names(AbstractResolver):
    """Resolver by NAMES; `rebinding.example` is first public and private, then loopback."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = NAMES.get(host, ["127.0.0.1"])
        if host == "rebinding.example" and self.asked.count(host) == 1:
            addresses = ["93.184.215.14", "10.0.0.1"]
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0, flags=0,
            )
            for address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        """Do nothing."""


@asynccontextmanager
async def listening_everywhere() -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield the port of listeners on every local address, and the connections they accepted."""
    accepted: list[Any] = []

    def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(accept, "0.0.0.0", 0)
    port = server.sockets[0].getsockname()[1]
    servers = [server]
    with suppress(OSError):  # a machine without IPv6
        servers.append(await asyncio.start_server(accept, "::", port, family=socket.AF_INET6))
    yield port, accepted
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_hostile_addresses_are_never_connected(make_instance: MakeInstance) -> None:
    instance, resolver = make_instance(), Names()
    async with listening_everywhere() as (port, accepted), webhook_session(private=False, resolver=resolver) as session:
        _, probe = await asyncio.open_connection("127.0.0.1", port)
        probe.close()
        await eventually(lambda: len(accepted) == 1)
        service = WebhookInstance(
            instance, WebhookDispatcher(instance.parts.outbox, WebhookSender(session, body_of), delays_s=(0.01,))
        )
        urls = [f"https://{host}:{port}/hook" for host in HOSTILE_HOSTS]
        urls += [f"http://loopback.example:{port}/", f"http://127.0.0.1:{port}/"]
        assert len(urls) >= 50
        for index in range(0, len(urls), 10):
            webhooks = [Webhook(url, "") for url in urls[index : index + 10]]
            await service.submit(str(index), *webhooks)
            delivery = await service.wait_delivered((await service.end()).id, DeliveryStatus.FAILED)
            assert (delivery.attempts, delivery.last_status) == (2, None)
        assert len(accepted) == 1
        assert resolver.asked.count("rebinding.example") == 2
        assert set(NAMES) <= set(resolver.asked)
        await service.crash()


async def test_the_address_guard_causes_the_refusal() -> None:
    async with webhook_session(private=False, resolver=Names()) as session:
        with pytest.raises(ClientConnectorError) as refused:
            await session.post("https://loopback.example/")
        assert isinstance(refused.value.os_error, AddressBlocked)


async def test_addresses_that_became_private_are_refused(receiver: Receiver) -> None:
    assert (await send(receiver.url)).status == 200
    assert (await send(receiver.url, private=False)).status is None
    assert len(receiver.got) == 1
