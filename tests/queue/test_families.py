"""Submits that read the records of their siblings, and those that need not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from imagegen.queue import families
from imagegen.queue.claim import Claim
from imagegen.queue.client_queue import CacheResult
from imagegen.tasks import transitions
from imagegen.tasks.family import RequestFamily, ReusedImages
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task, TaskError
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, family_submission

IMAGES = tuple(StoredImage(index, "image/png", 10, 8, 8, f"{index:x}" * 64) for index in range(16))


@pytest.fixture(autouse=True)
def _other_keys_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the keys of other tests, which share the server, not stop the reading of the records."""
    monkeypatch.setattr(families, "MAX_SCANS", 100_000)


async def reuse(_task_id: str, family: RequestFamily, finished: Sequence[Task]) -> ReusedImages:
    """Return the images of the first finished task, without a store."""
    images = finished[0].images[: family.request.n]
    return ReusedImages(tuple(replace(image, reused=True) for image in images), ("a warning",))


async def made(instance: Instance, prompt: str, n: int, images: tuple[StoredImage, ...] = IMAGES) -> Task:
    """Submit a task and complete it."""
    submitted = await instance.client_queue.submit(family_submission(prompt, n), reuse)
    if submitted.cached is CacheResult.HIT:
        return submitted.task
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    final = transitions.completed(claim.task, images[:n], (), now=time.time(), ttl_s=60)
    return await instance.worker_queue.finish(claim, final)


async def submit_commands(instance: Instance, prompt: str, n: int = 1) -> int:
    """Return how many commands a submit costs."""
    before = instance.connection.meter.commands["submit"]
    await instance.client_queue.submit(family_submission(prompt, n), reuse)
    return instance.connection.meter.commands["submit"] - before


async def loaded(instance: Instance) -> None:
    """Wait until an instance has read the records, which the submit of a new family requests."""
    request_json = family_submission("not submitted", 1).request_json
    await eventually(lambda: not instance.parts.families.may_include(request_json))


async def test_a_new_task_costs_no_command_more_on_a_single_instance(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await loaded(instance)
    await made(instance, "other", 1)
    assert await submit_commands(instance, "new") == 3


async def test_a_new_task_costs_one_command_more_while_a_peer_may_have_a_sibling(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    assert await submit_commands(one, "new") == 4
    assert await submit_commands(two, "new") == 3  # evalsha, mget, xrange: it is joined


async def test_one_command_reads_the_siblings_of_a_whole_batch(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    before = instance.connection.meter.commands["submit"]
    many = [family_submission(f"new {number}", 1) for number in range(20)]
    await asyncio.gather(*(instance.client_queue.submit(each, reuse) for each in many))
    assert instance.connection.meter.commands["submit"] - before == 2 + 2 * 20


async def test_a_restarted_instance_reads_the_families_in_redis(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "SCAN_COUNT", 10)
    monkeypatch.setattr(families, "READ_COUNT", 3)
    before = make_instance()
    for number in range(30):
        await made(before, f"old {number}", 2)
    await before.crash()
    after = make_instance()
    await loaded(after)
    assert all(
        after.parts.families.may_include(family_submission(f"old {number}", 1).request_json) for number in range(30)
    )
    assert (await made(after, "old 7", 1)).images[0].reused
    assert await submit_commands(after, "new") == 3


async def test_too_many_keys_are_not_read(make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MAX_SCANS", 0)
    instance = make_instance(result_ttl_s=0.5)
    request_json = family_submission("new", 1).request_json
    assert instance.parts.families.may_include(request_json)
    await loaded(instance)  # once every record of before has expired


async def test_dropped_families_are_read_from_redis(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "MAX_FAMILIES", 5)
    instance = make_instance()
    await loaded(instance)
    for number in range(10):
        await made(instance, f"old {number}", 2)
    assert (await made(instance, "old 0", 1)).images[0].reused


async def test_a_peer_that_left_may_have_completed_a_sibling(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    waiting = asyncio.create_task(two.claim())
    one.worker_queue.quiet()
    await two.client_queue.submit(family_submission("shared", 2), reuse)
    claim = await asyncio.wait_for(waiting, 20)
    await two.worker_queue.start(claim)
    final = transitions.completed(claim.task, IMAGES[:2], (), now=time.time(), ttl_s=60)
    await two.worker_queue.finish(claim, final)
    await two.parts.release_all()
    await eventually(lambda: one.notifier.alone)
    hit = await one.client_queue.submit(family_submission("shared", 1), reuse)
    assert hit.cached is CacheResult.HIT


async def test_a_hit_from_a_sibling_is_stored_and_has_a_final_sequence(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await made(one, "shared", 4)
    hit = await one.client_queue.submit(family_submission("shared", 2), reuse)
    assert (hit.cached, hit.task.state, hit.task.warnings) == (CacheResult.HIT, State.COMPLETED, ("a warning",))
    stored = await two.read(hit.task.id)
    assert stored == replace(hit.task, request_json=stored.request_json)
    assert stored.request_json == family_submission("shared", 2).request_json
    assert (await one.client_queue.submit(family_submission("shared", 2), reuse)).task == hit.task
    assert (await two.client_queue.submit(family_submission("shared", 2), reuse)).cached is CacheResult.HIT


async def fail(instance: Instance, claim: Claim) -> None:
    error = TaskError("upstream_error", "no", retryable=True)
    await instance.worker_queue.finish(claim, transitions.failed(claim.task, error, now=time.time(), ttl_s=60))


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
async def test_a_failed_or_cancelled_task_is_completed_by_a_sibling(make_instance: MakeInstance, state: State) -> None:
    instance = make_instance()
    old = (await instance.client_queue.submit(family_submission("shared", 2), reuse)).task
    if state is State.CANCELLED:
        await instance.client_queue.cancel(old.id)
    else:
        claim = await instance.claim()
        await instance.worker_queue.start(claim)
        await fail(instance, claim)
    ended = await instance.task(old.id)
    await made(instance, "shared", 4)
    hit = await instance.client_queue.submit(family_submission("shared", 2), reuse)
    assert hit.cached is CacheResult.HIT
    assert hit.task.sequence > ended.sequence
    assert (await instance.read(old.id)).sequence == hit.task.sequence


async def ended_without_success(instance: Instance, state: State, images: tuple[StoredImage, ...]) -> None:
    """Submit a task of four images, and let it fail or be cancelled with some of them."""
    old = (await instance.client_queue.submit(family_submission("shared", 4), reuse)).task
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    claim.task = replace(claim.task, images=images)
    claim.checkpoint = replace(claim.checkpoint, images=images)
    instance.worker_queue.progress(claim, 50)
    if state is State.CANCELLED:
        await instance.client_queue.cancel(old.id)
    else:
        await fail(instance, claim)


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
async def test_a_failed_or_cancelled_sibling_without_an_image_does_not_count(
    make_instance: MakeInstance, state: State
) -> None:
    instance = make_instance()
    await ended_without_success(instance, state, ())
    assert (await instance.client_queue.submit(family_submission("shared", 2), reuse)).cached is CacheResult.MISS


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
async def test_the_images_of_a_failed_or_cancelled_sibling_are_used_on_every_instance(
    make_instance: MakeInstance, state: State
) -> None:
    instance = make_instance()
    await ended_without_success(instance, state, IMAGES[:3])
    for other in (instance, make_instance()):
        hit = await other.client_queue.submit(family_submission("shared", 2), reuse)
        assert hit.cached is CacheResult.HIT
        assert [image.sha256 for image in hit.task.images] == [image.sha256 for image in IMAGES[:2]]


async def test_a_topped_up_task_begins_with_the_reused_images_on_every_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    two_images = await made(one, "shared", 2)
    one.worker_queue.quiet()
    await one.client_queue.submit(family_submission("shared", 4), reuse)
    expected = tuple(replace(image, reused=True) for image in two_images.images)
    task_id = family_submission("shared", 4).task_id
    assert (await two.read(task_id)).images == expected
    await one.crash()
    other = make_instance()
    claim = await other.claim()
    assert (claim.task.id, claim.checkpoint.images) == (task_id, expected)
    await other.worker_queue.start(claim)
    await other.worker_queue.release([claim])
    claim = await other.claim()
    assert claim.checkpoint.images == expected


async def test_siblings_are_not_used_if_the_client_excludes_them(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await made(instance, "shared", 4)
    assert (await instance.client_queue.submit(family_submission("shared", 2))).cached is CacheResult.MISS


async def test_a_full_queue_still_returns_images_of_siblings(make_instance: MakeInstance) -> None:
    instance = make_instance(max_queue=1)
    await made(instance, "shared", 4)
    instance.worker_queue.quiet()
    await instance.client_queue.submit(family_submission("in the way", 1), reuse)
    assert (await instance.client_queue.submit(family_submission("shared", 2), reuse)).cached is CacheResult.HIT
