"""Receivers of webhooks on loopback, and instances that deliver to them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace as changed

from imagegen.queue.claim import StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task, TaskError
from imagegen.tasks.webhook import Delivery, DeliveryStatus, Webhook
from imagegen.worker.webhooks import WebhookDispatcher
from tests.conftest import Instance
from tests.support import eventually, submission

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


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


def body_of(task: Task, webhook: Webhook) -> dict[str, Any]:
    assert task.deliveries == ()
    return {
        "taskId": task.id,
        "status": task.state,
        "data": [{"url": f"{webhook.link_base_url}/{i.index}"} for i in task.images],
    }


class WebhookInstance:
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


StartWebhookInstance = Callable[..., Awaitable[WebhookInstance]]
