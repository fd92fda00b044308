"""Webhooks from the submit to a receiver on loopback: signed, for each outcome, and after a restart."""

from __future__ import annotations

import base64

import pytest
from aiohttp import web
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from imagegen.queue.client_queue import CacheResult
from imagegen.tasks.task import State
from imagegen.tasks.webhook import DeliveryStatus, Webhook
from tests.ports import free_port
from tests.support import eventually, submission
from tests.worker.webhook_service import SECRET, Receiver, StartWebhookInstance, receiving

pytestmark = pytest.mark.usefixtures("prompt_peers")

OWN_SECRET = "whsec_" + base64.b64encode(b"o" * 32).decode()


async def test_a_signed_webhook_follows_the_readable_result(start: StartWebhookInstance, receiver: Receiver) -> None:
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


async def test_the_secret_of_a_webhook_overrides_that_of_the_service(
    start: StartWebhookInstance, receiver: Receiver
) -> None:
    service = await start()
    await service.submit("a", Webhook(receiver.url, "", secret=OWN_SECRET))
    await service.wait_delivered((await service.end()).id)
    (got,) = receiver.got
    Verifier(OWN_SECRET).verify(got.body, got.headers)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(got.body, got.headers)


async def test_without_any_secret_nothing_is_signed(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start(secret=None)
    await service.submit("a", Webhook(receiver.url, ""))
    await service.wait_delivered((await service.end()).id)
    assert "webhook-id" in receiver.got[0].headers
    assert "webhook-signature" not in receiver.got[0].headers


@pytest.mark.parametrize("outcome", [State.FAILED, State.CANCELLED])
async def test_other_outcomes_are_delivered_too(
    start: StartWebhookInstance, receiver: Receiver, outcome: State
) -> None:
    service = await start()
    await service.submit("a", Webhook(receiver.url, ""))
    if outcome is State.CANCELLED:
        await service.instance.client_queue.cancel(submission("a").task_id)
    else:
        await service.end(outcome)
    await service.wait_delivered(submission("a").task_id)
    assert receiver.got[0].event["type"] == f"image.{outcome}"


async def test_each_joined_webhook_is_called_with_its_own_id(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start()
    kinds = [await service.submit("a", Webhook(receiver.url + str(n), f"http://{n}")) for n in range(5)]
    assert kinds == [CacheResult.MISS] + [CacheResult.COALESCED] * 4
    await service.wait_delivered((await service.end()).id)
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 5
    assert {got.event["data"]["data"][0]["url"] for got in receiver.got} == {f"http://{n}/0" for n in range(5)}


async def test_a_cache_hit_is_delivered_at_once(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start()
    await service.submit("a")
    final = await service.end()
    assert await service.submit("a", Webhook(receiver.url, "")) is CacheResult.HIT
    await service.wait_delivered(final.id)
    assert len(receiver.got) == 1


async def test_a_receiver_that_was_down_is_called_once_after_a_restart(start: StartWebhookInstance) -> None:
    port = free_port()
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


async def test_a_stop_waits_for_the_running_delivery(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start()
    receiver.hold_s = 0.2
    await service.submit("a", Webhook(receiver.url, ""))
    final = await service.end()
    await eventually(lambda: receiver.got)
    await service.deliveries.drain(20)
    assert service.delivery(final).status is DeliveryStatus.DELIVERED
