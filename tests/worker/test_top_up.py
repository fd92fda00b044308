"""Attempts of tasks that have images of another task before their first call."""

from __future__ import annotations

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.queue.claim import Claim
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import Failed, Succeeded
from tests.worker.conftest import MakeHarness, WorkerHarness, images

REUSED = (StoredImage(0, sha256="a" * 64, reused=True), StoredImage(2, sha256="b" * 64, reused=True))


async def claimed(harness: WorkerHarness, **fields: object) -> Claim:
    claim = await harness.claim(n=4, **fields)
    claim.checkpoint = replace(claim.checkpoint, images=REUSED)
    return claim


async def test_only_missing_images_are_requested(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    outcome = await harness.run(await claimed(harness, seed=7), Succeeded)
    assert [image.index for image in outcome.images] == [0, 1, 2, 3]
    assert [image.reused for image in outcome.images] == [True, False, True, False]
    assert sum(call.count for call in harness.provider.calls) == 2
    assert outcome.warnings == ()


async def test_the_first_checkpoint_has_the_reused_images(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await claimed(harness)
    await harness.instance.worker_queue.start(claim)
    assert claim.stored_checkpoint is not None
    assert claim.stored_checkpoint.images == REUSED


async def test_a_task_without_a_new_image_fails(make_harness: MakeHarness) -> None:
    harness = make_harness(default=images(0), pool=False)
    outcome = await harness.run(await claimed(harness), Failed)
    assert outcome.error.code == "upstream_bad_response"


async def test_a_refused_call_fails_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(UpstreamError("content_policy", "no", status=400), pool=False)
    outcome = await harness.run(await claimed(harness), Failed)
    assert outcome.error.code == "content_policy"


async def test_reused_images_are_no_result_at_the_deadline(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, deadline_s=0.0)
    assert isinstance(await harness.attempts.run(await claimed(harness)), Failed)
    assert harness.provider.calls == []


async def test_some_new_images_complete_the_task_with_a_warning(make_harness: MakeHarness) -> None:
    harness = make_harness(images(1), default=images(0), pool=False)
    outcome = await harness.run(await claimed(harness), Succeeded)
    assert [image.reused for image in outcome.images].count(False) == 1
    assert outcome.warnings == ("only 3 of 4 images came",)


async def test_only_new_images_are_counted_as_stored(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await claimed(harness)
    before = harness.instance.connection.meter.images
    await harness.pool._report(claim, await harness.attempts.run(claim))
    assert harness.instance.connection.meter.images - before == 2
