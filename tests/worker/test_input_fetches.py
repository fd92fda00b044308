"""Tests of input images that come slowly: they hold no slot, are fetched once, and none is left behind."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from imagegen.errors import DownloadFailed
from imagegen.images.store import VerifiedImage
from imagegen.providers.protocol import Edits
from imagegen.tasks.image import GivenImage, ImageLink
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import input_fetches
from imagegen.worker.input_fetches import Images, InputFetches
from imagegen.worker.inputs import InputOpener
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, failure
from tests.worker.input_fakes import LINK, FakeFetcher, FakeSpool, FakeUploads

TARPIT = "https://tarpit.example/a.png"


@dataclass
class SlowFetcher(FakeFetcher):
    """Fetcher of which every image comes once `host` is set."""

    host: asyncio.Event = field(default_factory=asyncio.Event)

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        fetched = await super().fetch(image, age_s=age_s) if self.error is None else None
        await self.host.wait()
        if self.error is not None:
            raise self.error
        assert fetched is not None
        return fetched


@dataclass
class SlowInputs:
    """A pool of one slot, and a host of input images that answers once it is released."""

    harness: WorkerHarness
    fetcher: SlowFetcher
    spool: FakeSpool
    opener: InputOpener

    async def waiting(self, **fields: object) -> str:
        """Submit an edit, and wait until it has given its slot up; return its id."""
        task_id = await self.harness.submit(**{"prompt": "edit", "image_url": TARPIT} | fields)
        await eventually(lambda: self.harness.task(task_id).reason is WaitReason.RETRYING)
        return task_id


@pytest.fixture
async def slow(make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> SlowInputs:
    monkeypatch.setattr(input_fetches, "SLOT_WAIT_S", 0.01)
    monkeypatch.setattr(input_fetches, "MIN_RETRY_S", 0.01)
    monkeypatch.setattr(input_fetches, "MAX_RETRY_S", 0.05)
    monkeypatch.setattr(input_fetches, "LOOK_S", 0.05, raising=False)
    fetcher, spool = SlowFetcher(), FakeSpool()
    opener = InputOpener(FakeUploads(), fetcher, spool)
    harness = make_harness(inputs=opener, slots=1)
    harness.provider.editable = Edits(links=False)
    return SlowInputs(harness, fetcher, spool, opener)


def fetch_tasks() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == input_fetches.TASK_NAME]


async def test_a_task_whose_input_images_come_slowly_leaves_its_slot_to_others(slow: SlowInputs) -> None:
    edits = [await slow.harness.submit(prompt=f"edit {number}", image_url=TARPIT) for number in range(4)]
    (other,) = await slow.harness.finished(await slow.harness.submit(prompt="other"))
    assert other.state is State.COMPLETED
    assert all(not slow.harness.task(task_id).state.is_final for task_id in edits)
    slow.fetcher.host.set()
    tasks = await slow.harness.finished(*edits)
    assert [(task.state, task.attempts) for task in tasks] == [(State.COMPLETED, 1)] * 4
    assert (len(slow.fetcher.fetched), len(slow.harness.provider.calls), slow.spool.discarded) == (4, 5, 4)


async def test_a_slow_link_that_fails_in_the_end_fails_its_task_without_a_call(slow: SlowInputs) -> None:
    slow.fetcher.error = DownloadFailed("the host sends nothing")
    task_id = await slow.waiting()
    slow.fetcher.host.set()
    (task,) = await slow.harness.finished(task_id)
    assert (task.state, task.attempts, failure(task).code) == (State.FAILED, 0, "upstream_invalid_request")
    assert slow.harness.provider.calls == []


async def left_waiting(slow: SlowInputs, wanted: list[bool]) -> None:
    """Begin a fetch, of which the task gives its slot up."""

    async def fetch_all() -> Images:
        return [await slow.fetcher.fetch(ImageLink(TARPIT), age_s=math.inf)]

    with pytest.raises(input_fetches.SlowInputs):
        await slow.opener.fetches.images(("task", TARPIT), fetch_all, slow.spool.discard, lambda: bool(wanted))


async def test_fetched_images_of_a_task_that_is_cancelled_before_it_takes_them_are_discarded(slow: SlowInputs) -> None:
    wanted = [True]
    await left_waiting(slow, wanted)
    slow.fetcher.host.set()
    await asyncio.wait(fetch_tasks())
    assert slow.spool.discarded == 0
    wanted.clear()
    await eventually(lambda: slow.spool.discarded == 1)


async def test_fetched_images_that_no_attempt_takes_in_time_are_discarded(
    slow: SlowInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_fetches, "KEPT_S", 0.05)
    await left_waiting(slow, [True])
    slow.fetcher.host.set()
    await eventually(lambda: slow.spool.discarded == 1)


async def test_the_fetch_of_a_cancelled_task_ends_and_takes_no_place_of_others(
    slow: SlowInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_fetches, "MAX_SLOW", 1)
    cancelled = await slow.waiting()
    (fetch,) = fetch_tasks()
    await slow.harness.instance.client_queue.cancel(cancelled)
    await asyncio.wait([fetch])
    await slow.waiting(prompt="second")
    (other,) = await slow.harness.finished(await slow.harness.submit(prompt="other"))
    assert other.state is State.COMPLETED


async def test_at_the_end_of_the_service_no_fetch_and_no_image_is_left(slow: SlowInputs) -> None:
    await slow.waiting()
    running = fetch_tasks()
    assert len(running) == 1
    await slow.harness.drain(0.0)
    await slow.opener.fetches.close()
    assert all(task.cancelled() for task in running)
    assert slow.harness.provider.calls == []


async def test_fetched_images_that_no_attempt_took_are_discarded_at_the_end(slow: SlowInputs) -> None:
    task_id = await slow.waiting()
    await slow.harness.instance.client_queue.cancel(task_id)
    slow.fetcher.host.set()
    await asyncio.wait(fetch_tasks())
    await slow.opener.fetches.close()
    assert slow.spool.discarded == 1


async def test_beyond_the_limit_of_slow_fetches_a_task_waits_in_its_slot(
    slow: SlowInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_fetches, "MAX_SLOW", 1)
    first = await slow.waiting()
    second = await slow.harness.submit(prompt="second", image_url=LINK)
    await eventually(lambda: slow.fetcher.fetched == [TARPIT, LINK])
    slow.fetcher.host.set()
    tasks = await slow.harness.finished(first, second)
    assert [task.state for task in tasks] == [State.COMPLETED] * 2


async def test_an_attempt_fetches_again_while_the_fetch_of_a_cancelled_one_still_ends() -> None:
    fetches, began, end = InputFetches(), asyncio.Event(), asyncio.Event()

    async def endless() -> Images:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await end.wait()
        return ()

    async def quick() -> Images:
        return ()

    first = asyncio.create_task(fetches.images(("task", LINK), endless, FakeSpool().discard, lambda: True))
    await began.wait()
    first.cancel()
    await asyncio.wait([first])
    assert await fetches.images(("task", LINK), quick, FakeSpool().discard, lambda: True) == ()
    end.set()
