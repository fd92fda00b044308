"""Images in the store that a task does not name: no call is made for them, and their call counts as answered."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.queue.claim import Claim
from imagegen.tasks.cost import Cost
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import ClaimLost, Failed, Retry, Succeeded
from imagegen.tasks.task import WaitReason
from imagegen.worker.attempt import AttemptRunner
from tests.conftest import MakeInstance
from tests.support import eventually
from tests.worker.conftest import WorkerHarness
from tests.worker.lost_calls import cut_off, hang, harness_of, taken_over


def stored(index: int) -> StoredImage:
    return StoredImage(index, "image/png", 10, 8, 8, "b" * 64)


async def killed(
    make_instance: MakeInstance, *, n: int, found: list[StoredImage], **fields: Any
) -> tuple[WorkerHarness[Any], Claim]:
    """Return an instance that took over a task whose owner was killed when it had saved images, and the claim."""
    dead, other = make_instance(), make_instance(start=False)
    claim = await cut_off(harness_of(dead, hang, hang), n=n, **fields)
    one = harness_of(other)
    one.image_saver.found = found
    return one, await taken_over(other, claim)


async def test_a_task_whose_owner_was_killed_after_its_image_was_saved_is_completed_without_a_call(
    make_instance: MakeInstance,
) -> None:
    one, claim = await killed(make_instance, n=1, found=[stored(0)])
    assert claim.checkpoint.billed_again == 1
    assert claim.cost.unsure == 700
    outcome = await one.attempts.run(claim)
    assert outcome == Succeeded((stored(0),))
    assert one.provider.calls == one.provider.searched == []
    assert (claim.checkpoint.billed_again, claim.cost.charged, claim.cost.unsure) == (0, 700, 0)


async def test_an_image_that_is_found_has_the_seed_of_the_call_that_made_it(make_instance: MakeInstance) -> None:
    one, claim = await killed(make_instance, n=2, found=[stored(0)], seed=7)
    outcome = await one.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert [(image.seed, image.sha256[0]) for image in outcome.images] == [(7, "b"), (8, "a")]


async def test_only_images_that_the_store_does_not_have_are_requested(make_instance: MakeInstance) -> None:
    one, claim = await killed(make_instance, n=3, found=[stored(2), stored(0), stored(7)])
    outcome = await one.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert [image.index for image in outcome.images] == [0, 1, 2]
    assert [call.first_index for call in one.provider.calls] == [1]


async def before_start(one: WorkerHarness[Any], *, n: int = 1) -> tuple[Claim, AttemptRunner]:
    """Return a claim of a task that was submitted before the start of an instance, and the runner of that instance."""
    claim = await one.claim(n=n)
    return claim, dataclasses.replace(one.attempts, began_at=one.wall() + 1.0)


async def test_a_task_of_before_a_start_is_charged_for_the_images_that_were_made_for_it(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance())
    claim, attempts = await before_start(one, n=2)
    claim.task = replace(claim.task, cost=Cost(estimated=1_400))
    one.image_saver.found = [stored(0)]
    assert isinstance(await attempts.run(claim), Succeeded)
    assert [call.first_index for call in one.provider.calls] == [1]
    assert claim.cost.charged == 1_400


async def test_a_task_of_since_the_start_is_not_searched_for(make_instance: MakeInstance) -> None:
    one = harness_of(make_instance())
    one.image_saver.found = [stored(0)]
    assert isinstance(await one.attempts.run(await one.claim()), Succeeded)
    assert len(one.provider.calls) == 1


async def test_a_task_that_is_generated_again_does_not_take_its_former_images(make_instance: MakeInstance) -> None:
    one = harness_of(make_instance())
    claim, attempts = await before_start(one)
    claim.task = replace(claim.task, images=(stored(0),), stale_images=True)
    one.image_saver.found = [stored(0)]
    assert isinstance(await attempts.run(claim), Succeeded)
    assert len(one.provider.calls) == 1


async def fail(_task_id: str, _since_s: float) -> list[StoredImage]:
    raise StoreUnavailable


async def test_no_call_is_made_while_the_store_cannot_be_searched(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = harness_of(make_instance())
    claim, attempts = await before_start(one)
    monkeypatch.setattr(one.image_saver, "find", fail)
    outcome = await attempts.run(claim)
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.STORE_UNAVAILABLE, False)
    assert one.provider.calls == []


async def test_a_task_fails_at_its_deadline_if_the_store_could_not_be_searched_until_then(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = harness_of(make_instance(), deadline_s=0.0)
    claim, attempts = await before_start(one)
    monkeypatch.setattr(one.image_saver, "find", fail)
    outcome = await attempts.run(claim)
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_timeout", True)
    assert one.provider.calls == []


async def test_a_task_that_left_the_line_of_its_client_after_a_start_is_searched_for_too(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance())
    claim = await one.claim()
    claim.task = replace(claim.task, created_at=claim.task.created_at - 60.0)
    attempts = dataclasses.replace(one.attempts, began_at=claim.task.created_at + 30.0)
    one.image_saver.found = [stored(0)]
    assert await attempts.run(claim) == Succeeded((stored(0),))
    assert one.provider.calls == []


async def waiting_for_its_store(one: WorkerHarness[Any]) -> tuple[Claim, asyncio.Future[Any]]:
    """Return a claim of before this start whose attempt waits for a store that can't be written."""
    claim, attempts = await before_start(one)
    one.image_saver.health.mark_failed(OSError("not mounted yet"))
    attempt = asyncio.ensure_future(attempts.run(claim))
    await eventually(lambda: claim.task.reason is WaitReason.STORE_UNAVAILABLE)
    return claim, attempt


async def test_the_store_is_searched_once_it_works_since_its_images_may_be_away_with_it(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance())
    _claim, attempt = await waiting_for_its_store(one)
    one.image_saver.found = [stored(0)]
    one.image_saver.health.mark_ok()
    assert await attempt == Succeeded((stored(0),))
    assert one.provider.calls == []


async def test_a_task_ends_by_a_cancel_while_its_store_is_waited_for_before_the_search(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance())
    claim, attempt = await waiting_for_its_store(one)
    await one.instance.client_queue.cancel(claim.task.id)
    assert await attempt == ClaimLost()


async def test_images_in_a_store_that_is_full_are_found_at_the_deadline(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance(), deadline_s=0.0)
    claim, attempts = await before_start(one)
    one.image_saver.health.mark_failed(OSError("the disk is full"))
    one.image_saver.found = [stored(0)]
    assert await attempts.run(claim) == Succeeded((stored(0),))


async def test_images_are_searched_for_by_the_clock_of_the_machine_though_that_of_redis_is_ahead(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    since: list[float] = []

    async def find(_task_id: str, since_s: float) -> list[StoredImage]:
        since.append(since_s)
        return [stored(0)]

    one = harness_of(make_instance())
    claim, attempts = await before_start(one)
    monkeypatch.setattr(one.image_saver, "find", find)
    assert await dataclasses.replace(attempts, clock=lambda: time.time() + 30.0).run(claim) == Succeeded((stored(0),))
    assert since == [pytest.approx(claim.task.epoch / 1e6 - 30.0, abs=1.0)]
