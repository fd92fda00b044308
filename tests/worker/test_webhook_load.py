"""Tests of many webhooks at once: slow receivers delay no other."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from aiohttp import web

from imagegen.queue import outbox as outbox_module
from imagegen.tasks.webhook import Webhook
from imagegen.worker.destinations import MAX_HEALTHY, MAX_SLOW_EACH, MAX_UNPROVEN
from tests.support import eventually
from tests.worker.webhook_service import Receiver, StartWebhookInstance, receiving

pytestmark = pytest.mark.usefixtures("prompt_peers")


async def test_a_receiver_is_never_called_by_many_at_once(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start()
    receiver.hold_s = 0.02
    for n in range(20):
        await service.submit("a", Webhook(f"{receiver.url}/{n}", ""))
    await service.wait_delivered((await service.end()).id)
    assert MAX_UNPROVEN <= receiver.most <= MAX_HEALTHY


async def test_slow_receivers_delay_no_other_host_or_path(start: StartWebhookInstance, receiver: Receiver) -> None:
    service = await start(timeout_s=60)
    async with AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(receiving(Receiver(hold_s=90))) for _ in range(12)]
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
        assert time.monotonic() - began < 50
        assert max(host.most for host in slow[1:]) <= MAX_SLOW_EACH
        await eventually(lambda: len(service.deliveries._under_way) <= 12 * MAX_SLOW_EACH)


@pytest.mark.parametrize("restarts", [False, True], ids=["as they come", "after a restart"])
async def test_a_slow_receiver_delays_no_other_and_loses_no_webhook(
    start: StartWebhookInstance, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, restarts: bool
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
