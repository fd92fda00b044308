"""Webhooks from the submit to a receiver on loopback only."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

import orjson
import pytest
from aiohttp import ClientConnectorError, web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer, unused_port
from msgspec.structs import replace as changed
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from imagegen.queue import outbox as outbox_module
from imagegen.queue.claim import StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.ssrf import AddressBlocked
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task, TaskError
from imagegen.tasks.webhook import Delivery, DeliveryStatus, Webhook
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.worker.destinations import MAX_HEALTHY, MAX_SLOW_EACH, MAX_UNPROVEN
from imagegen.worker.webhooks import ReceiverResponse, WebhookDispatcher, WebhookSender, webhook_session
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
OWN_SECRET = "whsec_" + base64.b64encode(b"o" * 32).decode()
IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
FINAL = Task("ab" * 16, 17, 18, "d", "m", b"{}", 1.0, State.COMPLETED, finished_at=2.0, images=(IMAGE,))


@pytest.fixture(autouse=True)
def prompt_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 0.05)


@dataclass
class Received:
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def event(self) -> Any:
        return orjson.loads(self.body)


@dataclass
class Receiver:
    """Receiver that answers by `script` in order, then 200, and records every request."""

    script: list[int | web.Response | Callable[[web.Request], Awaitable[web.StreamResponse]]] = field(
        default_factory=list
    )
    got: list[Received] = field(default_factory=list)
    now: int = 0
    most: int = 0
    hold_s: float = 0.0
    server: TestServer = field(init=False)

    @property
    def url(self) -> str:
        return str(self.server.make_url("/hook"))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            self.got.append(Received(dict(request.headers), await request.read(), time.time()))
            await asyncio.sleep(self.hold_s)
            step = self.script.pop(0) if self.script else 200
            if isinstance(step, int):
                return web.Response(status=step)
            return step if isinstance(step, web.Response) else await step(request)
        finally:
            self.now -= 1


@asynccontextmanager
async def receiving(receiver: Receiver, port: int | None = None) -> AsyncIterator[Receiver]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    receiver.server = TestServer(app, port=port)
    async with receiver.server:
        yield receiver


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving(Receiver()) as receiver:
        yield receiver


def body_of(task: Task, webhook: Webhook) -> dict[str, Any]:
    assert task.deliveries == ()
    return {
        "taskId": task.id,
        "status": task.state,
        "data": [{"url": f"{webhook.link_base_url}/{i.index}"} for i in task.images],
    }


class Service:
    """Instance that delivers webhooks; a test ends its tasks."""

    def __init__(self, instance: Instance, deliveries: WebhookDispatcher, *, delivers: bool = True) -> None:
        self.instance = instance
        self.deliveries = deliveries
        self.loop = asyncio.create_task(deliveries.deliver_forever() if delivers else asyncio.Event().wait())

    async def submit(self, name: object, *webhooks: Webhook) -> CacheResult:
        submission_with_webhooks = changed(submission(name), webhooks=webhooks)
        submitted = await self.instance.client_queue.submit(submission_with_webhooks)
        await self.instance.client_queue.add_webhooks(submission_with_webhooks, submitted)
        return submitted.cached

    async def end(self, outcome: State = State.COMPLETED) -> Task:
        claim = await self.instance.claim()
        while await self.instance.worker_queue.start(claim) is StartResult.INHERITED:
            pass
        now = time.time()
        if outcome is State.COMPLETED:
            final = transitions.completed(claim.task, [IMAGE], [], now=now, ttl_s=60)
        else:
            final = transitions.failed(claim.task, TaskError("upstream_error", "no", retryable=True), now=now, ttl_s=60)
        return await self.instance.worker_queue.finish(claim, final)

    async def wait_delivered(self, task_id: str, status: DeliveryStatus = DeliveryStatus.DELIVERED) -> Delivery:
        """Wait until all deliveries of the task have the status; return the first."""

        async def all_have_status() -> bool:
            seen = (await self.instance.task(task_id)).deliveries
            return bool(seen) and all(delivery.status is status for delivery in seen)

        await eventually(all_have_status)
        return (await self.instance.task(task_id)).deliveries[0]

    def delivery(self, task: Task) -> Delivery:
        """Return the first delivery of a finished task, as this instance has it."""
        finished = self.instance.task_cache.finished(task.id)
        assert finished is not None
        return finished.deliveries[0]

    async def outbox_is_empty(self) -> bool:
        return not await self.instance.connection.commands.exists(self.instance.keys.outbox)

    async def crash(self) -> None:
        self.loop.cancel()
        await asyncio.gather(self.loop, return_exceptions=True)
        await self.instance.crash()


StartService = Callable[..., Awaitable[Service]]


@pytest.fixture
async def start(make_instance: MakeInstance) -> AsyncIterator[StartService]:
    async with AsyncExitStack() as stack:

        async def start(
            *,
            secret: str | None = SECRET,
            delays_s: tuple[float, ...] = (0.05,) * 5,
            timeout_s: float = 1.0,
            delivers: bool = True,
            **rules: Any,
        ) -> Service:
            session = await stack.enter_async_context(webhook_session(private=True))
            instance = make_instance(**rules)
            sender = WebhookSender(session, body_of, OperatorSecret(secret), allow_private=True, timeout_s=timeout_s)
            deliveries = WebhookDispatcher(instance.parts.outbox, sender, delays_s=delays_s)
            service = Service(instance, deliveries, delivers=delivers)
            stack.push_async_callback(service.crash)
            return service

        yield start


async def test_a_signed_webhook_follows_the_readable_result(start: StartService, receiver: Receiver) -> None:
    service = await start()
    readable: list[bool] = []

    async def look(request: web.Request) -> web.StreamResponse:
        record, _, _ = await service.instance.verbs.read(submission("a").task_id)
        readable.append(record is not None and b"completed" in record[:20])
        return web.Response()

    receiver.script = [look]
    await service.submit("a", Webhook(receiver.url, "http://base"))
    final = await service.end()
    delivery = await service.wait_delivered(final.id)
    assert readable == [True]
    (got,) = receiver.got
    assert Verifier(SECRET).verify(got.body, got.headers) == got.event
    assert got.event["type"] == "image.completed"
    assert got.event["data"] == {"taskId": final.id, "status": "completed", "data": [{"url": "http://base/0"}]}
    assert got.headers["Content-Type"] == "application/json"
    assert got.headers["User-Agent"].startswith("imagegen/")
    assert (delivery.attempts, delivery.last_status) == (1, 200)


async def test_the_secret_of_a_webhook_overrides_that_of_the_service(start: StartService, receiver: Receiver) -> None:
    service = await start()
    await service.submit("a", Webhook(receiver.url, "", secret=OWN_SECRET))
    await service.wait_delivered((await service.end()).id)
    (got,) = receiver.got
    Verifier(OWN_SECRET).verify(got.body, got.headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(got.body, got.headers)


async def test_without_any_secret_nothing_is_signed(start: StartService, receiver: Receiver) -> None:
    service = await start(secret=None)
    await service.submit("a", Webhook(receiver.url, ""))
    await service.wait_delivered((await service.end()).id)
    assert "webhook-id" in receiver.got[0].headers
    assert "webhook-signature" not in receiver.got[0].headers


@pytest.mark.parametrize("outcome", [State.FAILED, State.CANCELLED])
async def test_other_outcomes_are_delivered_too(start: StartService, receiver: Receiver, outcome: State) -> None:
    service = await start()
    await service.submit("a", Webhook(receiver.url, ""))
    if outcome is State.CANCELLED:
        await service.instance.client_queue.cancel(submission("a").task_id)
    else:
        await service.end(outcome)
    await service.wait_delivered(submission("a").task_id)
    assert receiver.got[0].event["type"] == f"image.{outcome}"


async def test_each_joined_webhook_is_called_with_its_own_id(start: StartService, receiver: Receiver) -> None:
    service = await start()
    kinds = [await service.submit("a", Webhook(receiver.url + str(n), f"http://{n}")) for n in range(5)]
    assert kinds == [CacheResult.MISS] + [CacheResult.COALESCED] * 4
    await service.wait_delivered((await service.end()).id)
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 5
    assert {got.event["data"]["data"][0]["url"] for got in receiver.got} == {f"http://{n}/0" for n in range(5)}


async def test_a_cache_hit_is_delivered_at_once(start: StartService, receiver: Receiver) -> None:
    service = await start()
    await service.submit("a")
    final = await service.end()
    assert await service.submit("a", Webhook(receiver.url, "")) is CacheResult.HIT
    await service.wait_delivered(final.id)
    assert len(receiver.got) == 1


async def test_a_receiver_that_was_down_is_called_once_after_a_restart(start: StartService) -> None:
    port = unused_port()
    one = await start(delays_s=(0.3,) * 5)
    await one.submit("a", Webhook(f"http://127.0.0.1:{port}/hook", ""))
    final = await one.end()
    await eventually(lambda: one.delivery(final).attempts >= 1)
    await eventually(lambda: one.instance.connection.commands.exists(one.instance.keys.delivery_log(final.id)))
    await one.crash()
    async with receiving(Receiver(), port) as receiver:
        two = await start(delays_s=(0.3,) * 5)
        delivery = await two.wait_delivered(final.id)
        assert delivery.attempts >= 2
        (got,) = receiver.got
        Verifier(SECRET).verify(got.body, got.headers)
        assert got.headers["webhook-id"] == f"msg_{final.id}_{final.epoch}_0"
        await eventually(two.outbox_is_empty)


async def never_written(_task: Task, _delivery: Delivery) -> None:
    await asyncio.Event().wait()


async def not_written(_task: Task, _delivery: Delivery) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("record", [never_written, not_written])
async def test_a_crash_after_the_response_repeats_the_delivery_id(
    start: StartService,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[[Task, Delivery], Awaitable[None]],
) -> None:
    one = await start()
    monkeypatch.setattr(one.instance.parts.outbox, "record_attempt", record)
    await one.submit("a", Webhook(receiver.url, ""))
    final = await one.end()
    await eventually(lambda: receiver.got)
    await one.crash()
    two = await start()
    await two.wait_delivered(final.id)
    assert len(receiver.got) == 2
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 1
    assert len({got.body for got in receiver.got}) == 1


async def test_a_delivery_is_retried_until_the_receiver_accepts_it(start: StartService, receiver: Receiver) -> None:
    service = await start()
    receiver.script = [500, 404, web.Response(status=302, headers={"Location": "/elsewhere"})]
    await service.submit("a", Webhook(receiver.url, ""))
    delivery = await service.wait_delivered((await service.end()).id)
    assert (delivery.attempts, delivery.last_status) == (4, 200)
    assert len(receiver.got) == 4
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 1


async def test_a_receiver_that_always_fails_is_given_up(start: StartService, receiver: Receiver) -> None:
    service = await start(delays_s=(0.01, 0.01))
    receiver.script = [500] * 9
    await service.submit("a", Webhook(receiver.url, ""))
    delivery = await service.wait_delivered((await service.end()).id, DeliveryStatus.FAILED)
    assert (delivery.attempts, delivery.last_status) == (3, 500)
    await eventually(service.outbox_is_empty)


async def test_410_ends_the_delivery_at_once(start: StartService, receiver: Receiver) -> None:
    service = await start()
    receiver.script = [410]
    await service.submit("a", Webhook(receiver.url, ""))
    assert (await service.wait_delivered((await service.end()).id, DeliveryStatus.FAILED)).attempts == 1


@pytest.mark.parametrize("as_date", [False, True])
async def test_a_busy_receiver_gets_its_requested_delay(start: StartService, receiver: Receiver, as_date: bool) -> None:
    service = await start()
    value = formatdate(time.time() + 120, usegmt=True) if as_date else "120"
    receiver.script = [web.Response(status=503, headers={"Retry-After": value})]
    await service.submit("a", Webhook(receiver.url, ""))
    final = await service.end()
    await eventually(lambda: service.delivery(final).attempts)
    assert service.delivery(final).due_at == pytest.approx(time.time() + 120, abs=3)


async def test_a_receiver_is_never_called_by_many_at_once(start: StartService, receiver: Receiver) -> None:
    service = await start()
    receiver.hold_s = 0.02
    for n in range(20):
        await service.submit("a", Webhook(f"{receiver.url}/{n}", ""))
    await service.wait_delivered((await service.end()).id)
    assert MAX_UNPROVEN <= receiver.most <= MAX_HEALTHY


async def test_slow_receivers_delay_no_other_host_or_path(start: StartService, receiver: Receiver) -> None:
    service = await start(timeout_s=20)
    async with AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(receiving(Receiver(hold_s=30))) for _ in range(12)]
        for number, host in enumerate(slow):
            for n in range(4):
                await service.submit(f"slow {number}", Webhook(f"{host.url}/{n}", ""))
            await service.end()
        await eventually(lambda: all(host.got for host in slow))
        slow[0].hold_s = 0
        began = time.monotonic()
        await service.submit("other host", Webhook(receiver.url, ""))
        await service.submit("other path", Webhook(str(slow[0].server.make_url("/other/path")), ""))
        finals = [await service.end(), await service.end()]
        for final in finals:
            await service.wait_delivered(final.id)
        assert time.monotonic() - began < 15
        assert max(host.most for host in slow[1:]) <= MAX_SLOW_EACH
        assert len(service.deliveries._under_way) <= 12 * MAX_SLOW_EACH


@pytest.mark.parametrize("restarts", [False, True], ids=["as they come", "after a restart"])
async def test_a_slow_receiver_delays_no_other_and_loses_no_webhook(
    start: StartService, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_HELD_EACH", 4)
    monkeypatch.setattr(outbox_module, "MAX_HELD", 12)
    released = asyncio.Event()

    async def when_released(_request: web.Request) -> web.Response:
        await released.wait()
        return web.Response()

    count, service = 40, await start(delivers=not restarts, timeout_s=60)
    async with receiving(Receiver([when_released] * 40)) as slow:
        finals = []
        for n in range(count):
            await service.submit(n, Webhook(f"{slow.url}/{n}", ""))
            finals.append(await service.end())
        healthy = []
        for n in range(count, count + 5):
            await service.submit(n, Webhook(f"{receiver.url}/{n}", ""))
            healthy.append(await service.end())
        if restarts:
            await service.crash()
            service = await start(timeout_s=60)
        assert len(service.instance.parts.outbox._held) <= 12
        await eventually(lambda: len(receiver.got) == 5)
        assert len(slow.got) <= 8
        released.set()
        for final in [*healthy, *finals]:
            await service.wait_delivered(final.id)
        assert len(slow.got) == count
        await eventually(service.outbox_is_empty)


async def test_a_stop_waits_for_the_running_delivery(start: StartService, receiver: Receiver) -> None:
    service = await start()
    receiver.hold_s = 0.2
    await service.submit("a", Webhook(receiver.url, ""))
    final = await service.end()
    await eventually(lambda: receiver.got)
    await service.deliveries.drain(5)
    assert service.delivery(final).status is DeliveryStatus.DELIVERED


async def test_an_internal_error_is_a_failed_delivery_and_ends_no_loop(start: StartService, receiver: Receiver) -> None:
    service = await start()
    faults = iter([ZeroDivisionError()])

    def broken(task: Task, webhook: Webhook) -> dict[str, Any]:
        for fault in faults:
            raise fault
        return body_of(task, webhook)

    service.deliveries._sender = replace(service.deliveries._sender, body_of=broken)
    await service.submit("a", Webhook(receiver.url, ""))
    assert (await service.wait_delivered((await service.end()).id)).attempts == 2


async def send(
    url: str, *, private: bool = True, resolver: AbstractResolver | None = None, timeout_s: float = 0.5
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
    assert (await send(receiver.url, timeout_s=20)).status == 200
    assert time.monotonic() - began < 10


async def test_a_response_with_large_and_many_headers_counts(receiver: Receiver) -> None:
    receiver.script = [
        web.Response(headers={"Set-Cookie": "a=" + "x" * 30_000} | {f"X-{number}": "x" for number in range(500)})
    ]
    assert (await send(receiver.url, timeout_s=20)).status == 200


async def test_a_late_response_counts_as_missing() -> None:
    async with receiving(Receiver(hold_s=30)) as silent:
        assert (await send(silent.url)).status is None


async def test_cookies_are_not_stored_and_no_proxy_is_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_port()}")
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
        service = Service(
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
