"""Tests of paid images whose host does not answer: their tasks hold no slot, and no slot is lost or won by them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from imagegen.errors import DownloadFailed
from imagegen.images.store import VerifiedImage
from imagegen.providers.protocol import Call, Reply
from imagegen.queue import dispatcher
from imagegen.tasks.image import GivenImage, ImageLink
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import pacing, saving
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, links

TARPIT = "tarpit.example"


@dataclass
class SlowHost:
    """A pool of one slot, and a host that answers once `answers` is set, for the images of `slow` prompts.

    held: whether the provider keeps its calls, until `release` is set.
    """

    harness: WorkerHarness
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0

    async def generate(self, call: Call) -> Reply:
        if "held" in call.request.prompt:
            await self.release.wait()
        return links(call.count, host=TARPIT if "slow" in call.request.prompt else "images.example.com")

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        if isinstance(image, ImageLink) and TARPIT in image.url:
            self.asked += 1
            await self.answers.wait()
        return await type(self.harness.image_saver).fetch(self.harness.image_saver, image, age_s=age_s)

    async def waiting(self, *prompts: str, **fields: object) -> list[str]:
        """Submit tasks; return their ids once each waits for an image."""
        before = self.asked
        task_ids = [await self.harness.submit(prompt, **fields) for prompt in prompts]
        await eventually(lambda: self.asked == before + len(prompts))
        return task_ids


@pytest.fixture
async def host(make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> SlowHost:
    monkeypatch.setattr(saving, "SLOW_AFTER_S", 0.01)
    harness = make_harness(slots=1, per_call=1)
    host = SlowHost(harness)
    harness.provider.default = host.generate
    monkeypatch.setattr(harness.image_saver, "fetch", host.fetch)
    return host


async def test_tasks_whose_image_host_never_answers_leave_their_slots_to_others(host: SlowHost) -> None:
    slow = await host.waiting(*(f"slow {number}" for number in range(4)))
    (other,) = await host.harness.finished(await host.harness.submit("other"))
    assert other.state is State.COMPLETED
    assert not any(host.harness.task(task_id).state.is_final for task_id in slow)
    assert host.harness.instance.parts.monitor.local_status().in_flight == 4
    host.answers.set()
    tasks = await host.harness.finished(*slow)
    assert [(task.state, task.attempts) for task in tasks] == [(State.COMPLETED, 1)] * 4
    assert len(host.harness.provider.calls) == 5


async def test_beyond_the_limit_a_task_keeps_its_slot_while_its_image_host_does_not_answer(
    host: SlowHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_AWAY", 1)
    slow = await host.waiting("slow 1", "slow 2")
    claims = [host.harness.instance.parts.dispatcher.claimed[task_id] for task_id in slow]
    await eventually(lambda: all(claim.stored_checkpoint and claim.stored_checkpoint.links for claim in claims))
    other = await host.harness.submit("other")
    await host.harness.instance.connection.ping()
    assert [claim.occupies_slot for claim in claims] == [False, True]
    assert len(host.harness.provider.calls) == 2
    host.answers.set()
    assert {task.state for task in await host.harness.finished(*slow, other)} == {State.COMPLETED}


@pytest.mark.parametrize("is_answering", [False, True], ids=["hangs", "answers with an error"])
async def test_while_no_image_of_a_model_can_be_fetched_few_further_calls_of_it_are_paid(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, is_answering: bool
) -> None:
    monkeypatch.setattr(saving, "SLOW_AFTER_S", 0.01)
    for name in ("UNSAVED_AFTER_S", "MIN_RETRY_S", "MAX_RETRY_S"):
        monkeypatch.setattr(saving, name, 0.02)
    monkeypatch.setattr(pacing, "MAX_UNSAVED", 3)
    harness = make_harness(slots=1, tempo=BreakerConfig(probe_s=60.0))
    works = asyncio.Event()

    async def fetch(image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        if is_answering and not works.is_set():
            raise DownloadFailed("503")
        await works.wait()
        return await type(harness.image_saver).fetch(harness.image_saver, image, age_s=age_s)

    async def generate(call: Call) -> Reply:
        return links(call.count)

    harness.provider.default = generate
    monkeypatch.setattr(harness.image_saver, "fetch", fetch)
    first = [await harness.submit(f"first {number}") for number in range(3)]
    await eventually(lambda: harness.pacing.capacity("m") == 0)
    rest = [await harness.submit(f"then {number}") for number in range(6)]
    other = await harness.submit("of another model", model="other")
    await eventually(lambda: len(harness.provider.calls) == 4)
    await eventually(lambda: len(harness.pool.parking) == 6)
    assert {harness.task(task_id).reason for task_id in rest} == {WaitReason.UPSTREAM_OVERLOADED}
    await harness.pass_time(60.0)
    await eventually(lambda: len(harness.provider.calls) == 5)
    works.set()
    tasks = await harness.finished(*first, other)
    await harness.pass_time(60.0)
    tasks += await harness.finished(*rest)
    assert {(task.state, task.attempts) for task in tasks} == {(State.COMPLETED, 1)}
    assert len(harness.provider.calls) == 10


async def test_a_task_that_waited_for_its_image_makes_its_next_call_in_a_slot(host: SlowHost) -> None:
    (slow,) = await host.waiting("slow", n=2)
    held = await host.harness.submit("held")
    await eventually(lambda: host.harness.provider.running == 1)
    host.answers.set()
    await eventually(lambda: len(host.harness.task(slow).images) == 1)
    third = await host.harness.submit("third")
    host.release.set()
    tasks = await host.harness.finished(slow, held, third)
    assert [(task.state, len(task.images)) for task in tasks] == [(State.COMPLETED, count) for count in (2, 1, 1)]
    assert host.harness.provider.most == 1
    assert [call.request.prompt for call in host.harness.provider.calls] == ["slow", "held", "slow", "third"]


@pytest.mark.parametrize("is_stopping", [False, True], ids=["the deadline", "a stop of the instance"])
async def test_a_task_that_waited_for_its_image_and_then_for_a_slot_until_the_end_makes_no_further_call(
    host: SlowHost, is_stopping: bool
) -> None:
    (slow,) = await host.waiting("slow", n=2)
    held = await host.harness.submit("held")
    await eventually(lambda: host.harness.provider.running == 1)
    host.answers.set()
    await eventually(lambda: len(host.harness.task(slow).images) == 1)
    if is_stopping:
        host.harness.pool.quiet()
    else:
        await host.harness.pass_time(601.0)
    host.release.set()
    await host.harness.finished(held)
    if is_stopping:
        await host.harness.drain(20.0)
        assert host.harness.task(slow).state is State.PENDING
    else:
        (task,) = await host.harness.finished(slow)
        assert (task.state, len(task.images), len(task.warnings)) == (State.COMPLETED, 1, 1)
    assert [call.request.prompt for call in host.harness.provider.calls] == ["slow", "held"]


@pytest.mark.parametrize("returns", [False, True])
async def test_a_cancelled_task_that_waited_for_its_image_leaves_the_number_of_slots_as_it_was(
    host: SlowHost, returns: bool
) -> None:
    (slow,) = await host.waiting("slow", n=2)
    held = await host.harness.submit("held")
    await eventually(lambda: host.harness.provider.running == 1)
    if returns:
        host.answers.set()
        await eventually(lambda: len(host.harness.task(slow).images) == 1)
    await host.harness.instance.client_queue.cancel(slow)
    more = [await host.harness.submit(f"held {number}") for number in range(3)]
    host.release.set()
    assert {task.state for task in await host.harness.finished(held, *more)} == {State.COMPLETED}
    assert host.harness.provider.most == 1
    assert len(host.harness.provider.calls) == 5


async def test_a_stop_waits_for_a_task_that_waits_for_its_image(host: SlowHost) -> None:
    (slow,) = await host.waiting("slow")
    (other,) = await host.harness.finished(await host.harness.submit("other"))
    draining = asyncio.create_task(host.harness.drain(20.0))
    await asyncio.sleep(0)
    host.answers.set()
    await draining
    assert [host.harness.task(task_id).state for task_id in (slow, other.id)] == [State.COMPLETED] * 2
