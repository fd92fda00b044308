"""Counts of attempts, waits, outcomes, takeovers and possible double payments."""

from __future__ import annotations

from imagegen.queue.claim import StartResult
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import WaitReason
from tests.conftest import MakeInstance
from tests.queue.command_counts import claim, finished, put, started
from tests.support import submission


async def test_attempts_waits_and_outcomes_are_counted(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await put(instance, "a")
    instance.parts.dispatcher.put(*await claim(instance))
    each = await instance.claim()
    assert await instance.worker_queue.start(each) is StartResult.STARTED
    assert instance.parts.monitor.local_status().in_flight == 1
    await instance.worker_queue.retry(each, Retry(60.0, WaitReason.RETRYING))
    assert instance.parts.monitor.local_status().retrying == 1
    assert await instance.worker_queue.start(each) is StartResult.STARTED
    await finished(instance, each)
    await put(instance, "a")
    meter = instance.connection.meter
    assert {outcome: histogram.count for outcome, histogram in meter.attempts.items()} == {"retry": 1, "completed": 1}
    assert meter.waits.count == 1
    assert meter.finished_by_state() == {"completed": 1, "failed": 0, "cancelled": 0}
    assert (meter.submits["MISS"], meter.submits["HIT"]) == (1, 1)
    assert (meter.images, meter.image_bytes) == (1, 10)


async def test_takeovers_and_possible_double_payments_are_counted(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=0.3)
    await one.client_queue.submit(submission("a"))
    each = await one.claim()
    assert await one.worker_queue.start(each) is StartResult.STARTED
    await one.crash()
    two = make_instance(lease_s=0.3)
    await two.claim()
    meter = two.connection.meter
    assert (meter.takeovers, meter.ambiguous) == (1, 1)


async def test_a_call_that_shutdown_interrupts_is_ambiguous(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await started(instance, "a")
    await put(instance, "b")
    await claim(instance)
    await instance.worker_queue.release(list(instance.parts.dispatcher.held.values()))
    assert instance.connection.meter.ambiguous == 1
