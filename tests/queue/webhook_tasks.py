"""Tasks with webhooks in Redis, and their deliveries."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as changed

from imagegen.queue.claim import StartResult
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task
from imagegen.tasks.webhook import Delivery, DeliveryStatus, Webhook
from tests.conftest import Instance, MakeInstance
from tests.queue.finishing import end
from tests.support import eventually, submission

UNCOUNTED = {"info", "ping", "hello", "client", "client|setinfo", "script", "script|load", "monitor"}


def hook(path: str = "a", **changes: Any) -> Webhook:
    return replace(Webhook(f"https://hooks.example.com/{path}", "http://here"), **changes)


def with_webhooks(name: object, *webhooks: Webhook) -> Submission:
    return changed(submission(name), webhooks=webhooks)


async def acquainted(make_instance: MakeInstance) -> tuple[Instance, Instance]:
    """Return two instances that know each other, so that none takes the other one for gone."""
    one, two = make_instance(), make_instance()
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    return one, two


async def submit_hooks(instance: Instance, name: object, *webhooks: Webhook) -> Task:
    """Submit a task as a client does; join a running one."""
    submitted = with_webhooks(name, *webhooks)
    return (await instance.client_queue.add_webhooks(submitted, await instance.client_queue.submit(submitted))).task


async def finish(instance: Instance, outcome: str = "completed") -> Task:
    claim = await instance.claim()
    while await instance.worker_queue.start(claim) is StartResult.INHERITED:
        pass
    return await end(instance, claim, outcome)


async def deliver(instance: Instance, status: DeliveryStatus = DeliveryStatus.DELIVERED) -> tuple[Task, Delivery]:
    task, delivery = await asyncio.wait_for(instance.parts.outbox.next(), 20)
    done = replace(delivery, status=status, attempts=delivery.attempts + 1, last_status=200)
    await instance.parts.outbox.record_attempt(task, done)
    return task, done


async def fail_once(instance: Instance, due_in_s: float) -> Delivery:
    task, delivery = await asyncio.wait_for(instance.parts.outbox.next(), 20)
    failed = replace(delivery, attempts=1, last_status=500, due_at=time.time() + due_in_s)
    await instance.parts.outbox.record_attempt(task, failed)
    return failed


async def waiting(instance: Instance) -> dict[bytes, float]:
    rows: Any = await instance.connection.commands.zrange(instance.keys.outbox, 0, -1, withscores=True)
    return dict(rows)


async def nothing_comes(instance: Instance, within_s: float = 0.3) -> bool:
    done, _ = await asyncio.wait([asyncio.create_task(instance.parts.outbox.next())], timeout=within_s)
    return not done


async def check_outbox(instance: Instance) -> None:
    """Wait until the instance has checked the outbox, after the check that may be under way."""
    enough = instance.connection.meter.commands["hooks"] + 5  # a check that takes names over counts 4

    def is_checked() -> bool:
        instance.parts.outbox.check_now()
        return instance.connection.meter.commands["hooks"] >= enough

    await eventually(is_checked)


async def commands(instance: Instance) -> Counter[str]:
    stats = await instance.connection.commands.info("commandstats")
    counts = Counter({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()})
    return Counter({name: count for name, count in counts.items() if name not in UNCOUNTED})


async def counted(instance: Instance, name: str, *webhooks: Webhook) -> Counter[str]:
    before = await commands(instance)
    await finish_and_settle(instance, name, *webhooks)
    return await commands(instance) - before


async def finish_and_settle(instance: Instance, name: str, *webhooks: Webhook) -> None:
    claiming = asyncio.create_task(instance.claim())
    await eventually(lambda: instance.connection.subscriptions.active)
    await submit_hooks(instance, name, *webhooks)
    claim = await asyncio.wait_for(claiming, 20)
    await instance.worker_queue.start(claim)
    await end(instance, claim)
    for _ in webhooks:
        await deliver(instance)
