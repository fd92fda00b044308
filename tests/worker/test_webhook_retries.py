"""Tests of deliveries that are repeated: after a crash, a failure or a request to wait, and when they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from imagegen.tasks.task import Task
from imagegen.tasks.webhook import Delivery, DeliveryStatus, Webhook
from tests.support import eventually
from tests.worker.webhook_service import Receiver, StartWebhookInstance, body_of

pytestmark = pytest.mark.usefixtures("prompt_peers")


async def never_written(_task: Task, _delivery: Delivery) -> None:
    await asyncio.Event().wait()


async def not_written(_task: Task, _delivery: Delivery) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("record", [never_written, not_written])
async def test_a_crash_after_the_response_repeats_the_delivery_id(
    start: StartWebhookInstance,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[[Task, Delivery], Awaitable[None]],
) -> None:
    one = await start(delays_s=(60.0,) * 5)
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


async def test_a_delivery_is_retried_until_the_receiver_accepts_it(
    start: StartWebhookInstance, receiver: Receiver
) -> None:
    service = await start()
    receiver.script = [500, 404, web.Response(status=302, headers={"Location": "/elsewhere"})]
    await service.submit("a", Webhook(receiver.url, ""))
    delivery = await service.wait_delivered((await service.end()).id)
    assert (delivery.attempts, delivery.last_status) == (4, 200)
    assert len(receiver.got) == 4
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 1


async def test_a_receiver_that_always_fails_is_given_up(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start(delays_s=(0.01, 0.01))
    receiver.script = [500] * 9
    await service.submit("a", Webhook(receiver.url, ""))
    delivery = await service.wait_delivered((await service.end()).id, DeliveryStatus.FAILED)
    assert (delivery.attempts, delivery.last_status) == (3, 500)
    await eventually(service.outbox_is_empty)


async def test_no_try_waits_for_a_clock_that_went_back(start: StartWebhookInstance, receiver: Receiver) -> None:
    behind_s = 3_600.0
    service = await start(delays_s=(1.0,) * 5, clock=lambda: time.time() - behind_s)
    receiver.script = [500]
    await service.submit("a", Webhook(receiver.url, ""))
    final = await service.end()
    await eventually(lambda: service.delivery(final).attempts == 1)
    await service.submit("b", Webhook(receiver.url, ""))
    await service.wait_delivered((await service.end()).id)  # so that the second try of the first one waits already
    behind_s = 7_200.0
    assert (await service.wait_delivered(final.id)).attempts == 2


async def test_410_ends_the_delivery_at_once(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start()
    receiver.script = [410]
    await service.submit("a", Webhook(receiver.url, ""))
    assert (await service.wait_delivered((await service.end()).id, DeliveryStatus.FAILED)).attempts == 1


@pytest.mark.parametrize("as_date", [False, True])
async def test_a_busy_receiver_gets_its_requested_delay(
    start: StartWebhookInstance, receiver: Receiver, as_date: bool
) -> None:
    service, began = await start(), time.time()
    value = formatdate(began + 120, usegmt=True) if as_date else "120"
    receiver.script = [web.Response(status=503, headers={"Retry-After": value})]
    await service.submit("a", Webhook(receiver.url, ""))
    final = await service.end()
    await eventually(lambda: service.delivery(final).attempts)
    due_at = service.delivery(final).due_at
    assert due_at is not None
    assert began - 3 < due_at - 120 < time.time() + 3


async def test_an_internal_error_is_a_failed_delivery_and_ends_no_loop(
    start: StartWebhookInstance, receiver: Receiver
) -> None:
    service = await start()
    faults = iter([ZeroDivisionError()])

    def broken(task: Task, webhook: Webhook) -> dict[str, Any]:
        for fault in faults:
            raise fault
        return body_of(task, webhook)

    service.deliveries._sender = replace(service.deliveries._sender, body_of=broken)
    await service.submit("a", Webhook(receiver.url, ""))
    assert (await service.wait_delivered((await service.end()).id)).attempts == 2
