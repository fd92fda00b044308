"""Tests of one attempt: its calls, what is recorded before and after each, and how it ends."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.queue.checkpoint import Checkpoint
from imagegen.tasks.image import GivenImage, StoredImage
from imagegen.tasks.retry import Failed, Retry, Succeeded
from imagegen.tasks.task import WaitReason
from tests.support import logged
from tests.worker.attempt_steps import settled, stored_checkpoint
from tests.worker.conftest import MakeHarness, fault, images, loss, refused


async def test_an_attempt_is_recorded_before_its_call_and_returns_images(make_harness: MakeHarness) -> None:
    async def seen(call: Call) -> Reply:
        runs.append(await stored_checkpoint(harness, claim))
        return images(call.count)

    runs: list[Checkpoint | None] = []
    harness = make_harness(seen, pool=False)
    claim = await harness.claim(n=2, seed=7)
    outcome = await harness.run(claim, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 7), (1, 7)]
    assert [(run.phase, run.attempts) for run in runs if run] == [("calling", 1)]


@pytest.mark.parametrize(("side", "counts"), [(1024, [10]), (1536, [5, 5]), (2048, [3, 3, 3, 1]), (4096, [1] * 10)])
async def test_the_images_of_a_call_fit_into_a_response_that_is_read(
    make_harness: MakeHarness, side: int, counts: list[int]
) -> None:
    harness = make_harness(pool=False, per_call=10)
    claim = await harness.claim(n=10, width=side, height=side)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert [call.count for call in harness.provider.calls] == counts


async def test_large_images_that_come_as_links_are_requested_by_one_call(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    harness.provider.images_inline = False
    assert isinstance(await harness.attempts.run(await harness.claim(n=4, width=2048, height=2048)), Succeeded)
    assert [call.count for call in harness.provider.calls] == [4]


async def test_progress_rises_with_each_event(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, per_call=1)
    seen: list[tuple[int, int]] = []
    claim = await harness.claim(n=2)
    harness.instance.task_cache.audiences = ({claim.task.id},)
    harness.instance.task_cache.on_change = lambda task: seen.append((task.progress, len(task.images)))
    await harness.attempts.run(claim)
    assert seen == sorted(seen)
    assert seen[0] == (5, 0)
    assert seen[-1] == (95, 2)


async def test_a_passed_through_image_is_received_and_stored_in_one_event(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passthrough(index: int, _image: GivenImage, seed: int | None) -> StoredImage:
        return StoredImage(index, seed=seed, url="https://example.com")

    harness = make_harness(pool=False, per_call=1)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(harness.image_saver, "passthrough", passthrough)
    claim = await harness.claim(n=2)
    harness.instance.task_cache.audiences = ({claim.task.id},)
    harness.instance.task_cache.on_change = lambda task: seen.append((task.progress, len(task.images)))
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert seen == [(5, 0), (10, 0), (52, 1), (52, 1), (95, 2)]


async def test_progress_of_the_upstream_is_included(make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def halfway(call: Call, watcher: CallObserver) -> Reply:
        for fraction in (0.5, 0.25, 7.0):
            watcher.progress(fraction)
            seen.append(claim.task.progress)
        return images(call.count)

    harness = make_harness(pool=False)
    seen: list[int] = []
    monkeypatch.setattr(harness.provider, "generate", halfway)
    claim = await harness.claim()
    await harness.attempts.run(claim)
    assert seen == [38, 38, 66]


async def test_each_further_call_is_recorded_with_the_images_so_far(make_harness: MakeHarness) -> None:
    async def seen(call: Call) -> Reply:
        runs.append(await stored_checkpoint(harness, claim))
        return images(call.count)

    runs: list[Checkpoint | None] = []
    harness = make_harness(default=seen, pool=False, per_call=1)
    claim = await harness.claim(n=3, seed=10)
    await harness.attempts.run(claim)
    assert [[image.index for image in run.images] for run in runs if run] == [[], [0], [0, 1]]
    assert [run.attempts for run in runs if run] == [1, 1, 1]
    assert harness.provider.seeds == [10, 11, 12]


@pytest.mark.parametrize("status", [500, 503])
async def test_images_survive_a_retry(make_harness: MakeHarness, status: int) -> None:
    harness = make_harness(images(1), fault(status), per_call=1, pool=False)
    claim = await harness.claim(n=3, seed=10)
    outcome = await harness.run(claim, Retry)
    assert (outcome.counts_as_attempt, claim.checkpoint.attempts) == (True, 1)
    await settled(harness, claim, outcome)
    assert [image.index for image in harness.task(claim.task.id).images] == [0]
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert harness.provider.seeds == [10, 11, 11, 12]


async def test_a_rate_limit_counts_no_attempt(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(429, retry_after_s=0.01), pool=False, max_attempts=1)
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    assert outcome == Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False)
    await settled(harness, claim, outcome)
    assert claim.checkpoint.attempts == 0
    assert isinstance(await harness.attempts.run(claim), Succeeded)


async def test_a_rate_limit_after_a_bad_response_counts_an_attempt(make_harness: MakeHarness) -> None:
    harness = make_harness(images(0), fault(429, retry_after_s=0.01), per_call=1, pool=False)
    outcome = await harness.attempts.run(await harness.claim(n=2))
    assert outcome == Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=True)


async def test_an_unreachable_upstream_costs_no_attempt(make_harness: MakeHarness) -> None:
    harness = make_harness(refused(), pool=False)
    outcome = await harness.run(await harness.claim(), Retry)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.UPSTREAM_OVERLOADED, False)


async def test_a_loss_is_recorded_and_the_second_one_ends_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(loss(), loss(), pool=False)
    claim = await harness.claim()
    await settled(harness, claim, await harness.run(claim, Retry))
    assert harness.task(claim.task.id).possibly_billed_twice == 1
    outcome = await harness.run(claim, Failed)
    assert outcome.error.code == "upstream_timeout"
    assert claim.checkpoint.ambiguous_calls == 2


async def test_a_crash_without_attempts_left_interrupts_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    for run in (replace(claim.checkpoint, attempts=3), replace(claim.checkpoint, attempts=1, ambiguous_calls=2)):
        claim.checkpoint = run
        assert (await harness.run(claim, Failed)).error.code == "interrupted"
    assert harness.provider.calls == []


async def test_a_task_past_its_deadline_makes_no_call(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, deadline_s=0.0)
    outcome = await harness.run(await harness.claim(), Failed)
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_timeout", True)
    assert harness.provider.calls == []


async def test_a_failed_attempt_is_logged_in_plain_words(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(500), pool=False)
    with logged("DEBUG", "{message}") as lines:
        await harness.attempts.run(await harness.claim())
    [line] = [line for line in lines if "attempt failed" in line]
    assert "upstream_error (HTTP 500); retry in" in line
    assert "Retry(" not in line


async def test_a_prompt_that_the_upstream_quotes_is_not_logged(make_harness: MakeHarness) -> None:
    refusal = UpstreamError(
        "content_policy", "refused", upstream_detail='The prompt "a cat in a secret place" is unsafe'
    )
    harness = make_harness(refusal, pool=False)
    with logged("DEBUG", "{message}") as lines:
        await harness.attempts.run(await harness.claim("A cat\nin a secret place"))
    [line] = [line for line in lines if "attempt failed" in line]
    assert 'content_policy (The prompt "[prompt]" is unsafe)' in line
