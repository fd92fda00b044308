"""Paid images while their host or the image store is unavailable."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.errors import DownloadFailed, ImageRejected, StoreUnavailable
from imagegen.images.store import VerifiedImage
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.image import GivenImage, ImageLink, PaidImage, StoredImage
from imagegen.tasks.retry import Failed, Outcome, Retry, Succeeded
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import saving
from imagegen.worker.pacing import Pacing
from tests.support import eventually
from tests.worker.attempt_steps import settled
from tests.worker.conftest import MakeHarness, ScriptedProvider, WorkerHarness, fault, images, links, only_route, urls


async def stored_checkpoint(harness: WorkerHarness, claim: Claim) -> Checkpoint:
    return decode_checkpoint(await harness.instance.stored(harness.instance.keys.checkpoint(claim.task.id)))[1]


async def run_next_attempt(harness: WorkerHarness, claim: Claim, outcome: Outcome) -> Outcome:
    """Run the next attempt after a retry, as the pool does."""
    assert isinstance(outcome, Retry)
    claim.task = replace(claim.task, possibly_billed_twice=claim.checkpoint.ambiguous_calls)
    await harness.instance.worker_queue.retry(claim, replace(outcome, delay_s=0.0))
    assert await harness.instance.claim() is claim
    return await harness.attempts.run(claim)


async def test_a_link_that_fails_is_fetched_in_a_later_round_and_no_call_is_made(make_harness: MakeHarness) -> None:
    harness = make_harness(links(2), pool=False, max_attempts=1)
    harness.image_saver.faults = [None, DownloadFailed("503"), DownloadFailed("503")]
    claim = await harness.claim(n=2, seed=7)
    first = await harness.run(claim, Retry)
    assert (first.reason, first.counts_as_attempt) == (WaitReason.RETRYING, False)
    assert [image.index for image in claim.checkpoint.images] == [0]
    assert [(paid.index, paid.url, paid.seed) for paid in claim.checkpoint.links] == [
        (1, "https://images.example.com/1", 7)
    ]
    second = await run_next_attempt(harness, claim, first)
    outcome = await run_next_attempt(harness, claim, second)
    assert isinstance(outcome, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 7), (1, 7)]
    assert claim.task.attempts == 1
    assert len(harness.provider.calls) == 1


async def test_a_success_costs_no_extra_checkpoint(make_harness: MakeHarness) -> None:
    harness = make_harness(default=links(1), pool=False)
    claim = await harness.claim()
    before = harness.instance.verbs.meter.commands.copy()
    await harness.attempts.run(claim)
    after = harness.instance.verbs.meter.commands
    assert {name: after[name] - before[name] for name in ("start", "retry")} == {"start": 1, "retry": 0}


async def test_remaining_calls_follow_the_download_of_paid_images(make_harness: MakeHarness) -> None:
    harness = make_harness(default=links(1), pool=False, per_call=1, max_attempts=1)
    harness.image_saver.faults = [DownloadFailed("503"), None, DownloadFailed("503")]
    claim = await harness.claim(n=2, seed=10)
    outcome = await harness.attempts.run(claim)
    outcome = await run_next_attempt(harness, claim, outcome)
    assert isinstance(outcome, Retry)
    assert isinstance(await run_next_attempt(harness, claim, outcome), Succeeded)
    assert harness.provider.seeds == [10, 11]


async def test_another_instance_fetches_paid_images_without_a_call(make_harness: MakeHarness) -> None:
    one = make_harness(links(1), pool=False)
    one.image_saver.faults = [DownloadFailed("503")]
    claim = await one.claim(seed=3)
    await one.pool._report(claim, replace(await one.attempts.run(claim), delay_s=60.0))
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness(pool=False)
    taken = await two.instance.claim()
    outcome = await two.run(taken, Succeeded)
    assert urls(two.image_saver.fetched) == ["https://images.example.com/0"]
    assert two.provider.calls == []
    assert (taken.checkpoint.ambiguous_calls, outcome.images[0].seed) == (0, 3)


async def test_a_slow_download_is_checkpointed_before_it_ends(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(image: GivenImage, *, age_s: float) -> VerifiedImage:
        await go_on.wait()
        return await type(harness.image_saver).fetch(harness.image_saver, image, age_s=age_s)

    monkeypatch.setattr(saving, "SLOW_AFTER_S", 0.0)
    harness, go_on = make_harness(links(1), pool=False), asyncio.Event()
    monkeypatch.setattr(harness.image_saver, "fetch", slow)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: claim.stored_checkpoint is not None and claim.stored_checkpoint.links)
    run = await stored_checkpoint(harness, claim)
    assert (urls(run.links), run.phase, run.calling) == (["https://images.example.com/0"], "calling", False)
    go_on.set()
    assert isinstance(await running, Succeeded)


async def test_an_expired_link_ends_the_task_without_another_call(make_harness: MakeHarness) -> None:
    harness = make_harness(links(1), pool=False)
    harness.image_saver.faults = [DownloadFailed("503"), DownloadFailed("503")]
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    claim.checkpoint = replace(
        claim.checkpoint, links=tuple(replace(paid, received_at=1.0) for paid in claim.checkpoint.links)
    )
    outcome = await run_next_attempt(harness, claim, outcome)
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "upstream_bad_response"
    assert len(harness.provider.calls) == 1


async def test_a_dead_link_next_to_a_failing_one_is_not_paid_again(make_harness: MakeHarness) -> None:
    harness = make_harness(links(2), pool=False)
    harness.image_saver.faults = [ImageRejected("a GIF", lasting=True), DownloadFailed("503")]
    claim = await harness.claim(n=2)
    outcome = await run_next_attempt(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert outcome.warnings == ("only 1 of 2 images came",)
    assert len(harness.provider.calls) == 1


async def test_links_are_fetched_though_the_attempts_are_used_up(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, max_attempts=3)
    claim = await harness.claim()
    paid = PaidImage(0, "https://images.example.com/0", harness.attempts.clock())
    claim.checkpoint = replace(claim.checkpoint, attempts=3, ambiguous_calls=2, links=(paid,))
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert harness.provider.calls == []


@pytest.mark.parametrize(
    ("rejections", "calls"),
    [([ImageRejected("a GIF", lasting=True)], 1), ([ImageRejected("cut off", lasting=False)] * 2, 2)],
)
async def test_an_unusable_image_is_requested_again_only_if_useful(
    make_harness: MakeHarness, rejections: list[Exception], calls: int
) -> None:
    harness = make_harness(default=links(1), pool=False)
    harness.image_saver.faults = list(rejections)
    outcome = await harness.run(await harness.claim(), Failed)
    assert not outcome.error.retryable
    assert len(harness.provider.calls) == calls


@pytest.mark.parametrize(
    ("answer", "rejection", "calls"),
    [
        (links(1), ImageRejected("a GIF", lasting=True), 2),
        (links(1), ImageRejected("cut off", lasting=False), 3),
        (images(0), None, 3),
    ],
)
async def test_eight_unusable_images_are_not_all_paid_again(
    make_harness: MakeHarness, answer: Reply, rejection: Exception | None, calls: int
) -> None:
    harness = make_harness(default=answer, pool=False, per_call=1)
    harness.image_saver.faults = [rejection] * 16
    assert isinstance(await harness.attempts.run(await harness.claim(n=8)), Failed)
    assert len(harness.provider.calls) == calls


async def test_missing_images_are_requested_once_over_all_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(images(0), fault(500), images(1), images(0), per_call=1, pool=False)
    claim = await harness.claim(n=2)
    outcome = await run_next_attempt(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert [call.first_index for call in harness.provider.calls] == [0, 1, 1, 0]
    assert (claim.checkpoint.short, claim.checkpoint.given_up) == ((0,), (0,))


async def test_an_image_waits_in_memory_for_its_store_and_no_call_is_made(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make_harness(pool=False, slots=2)
    harness.image_saver.store_faults = [StoreUnavailable()] * 3
    harness.image_saver.health.mark_failed("ENOSPC")
    harness.image_saver.health.mark_ok()
    claim, other = await harness.claim("one"), await harness.claim("two")

    async def full(*_: object) -> StoredImage:
        harness.image_saver.health.mark_failed("ENOSPC")
        raise StoreUnavailable

    monkeypatch.setattr(harness.image_saver, "save", full)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.task(claim.task.id).reason is WaitReason.STORE_UNAVAILABLE)
    waiting = asyncio.create_task(harness.attempts.run(other))
    await eventually(lambda: harness.task(other.task.id).reason is WaitReason.STORE_UNAVAILABLE)
    assert (harness.task(claim.task.id).state, harness.task(other.task.id).state) == (
        State.PROCESSING,
        State.PENDING,
    )
    monkeypatch.undo()
    harness.image_saver.store_faults = []
    harness.image_saver.health.mark_ok()
    outcomes = await asyncio.wait_for(asyncio.gather(running, waiting), 20)
    assert all(isinstance(outcome, Succeeded) for outcome in outcomes)
    assert len(harness.provider.calls) == 2
    assert (harness.task(claim.task.id).reason, claim.checkpoint.reason) == (None, None)
    assert harness.image_saver.held == 0


async def test_a_save_that_a_healthy_store_refuses_is_retried(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    harness.image_saver.store_faults = [StoreUnavailable()]
    assert isinstance(await harness.attempts.run(await harness.claim()), Succeeded)
    assert len(harness.provider.calls) == 1


class HangingFile(type(Path())):  # type: ignore[misc]  # the class of this system's paths
    """File on a disk that answers once `released` is set."""

    released = threading.Event()

    def exists(self) -> bool:
        return not self.released.wait(40)


@pytest.mark.parametrize("received", [links(1), images(1)], ids=["link", "base64"])
async def test_an_image_whose_file_is_on_a_disk_that_hangs_is_fetched_again_for_a_store_that_works(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, received: Reply
) -> None:
    harness = make_harness(received, pool=False)
    harness.image_saver.store_faults = [StoreUnavailable()]
    spooled = VerifiedImage("image/png", 10, 8, 8, "a" * 64, path=HangingFile("spool/image"))
    again = VerifiedImage("image/png", 10, 8, 8, "a" * 64, b"a picture!")
    saved, fetches = [], iter([spooled, again])

    async def fetch(_image: GivenImage, *, age_s: float) -> VerifiedImage:
        assert age_s >= 0
        harness.image_saver.held += 1
        return next(fetches)

    async def save(task_id: str, index: int, image: VerifiedImage, seed: int | None, describe: Any) -> StoredImage:
        saved.append(image)
        return await type(harness.image_saver).save(harness.image_saver, task_id, index, image, seed, describe)

    monkeypatch.setattr(HangingFile, "released", threading.Event())
    monkeypatch.setattr(saving, "LOOK_S", 0.05)
    monkeypatch.setattr(harness.image_saver, "fetch", fetch)
    monkeypatch.setattr(harness.image_saver, "save", save)
    try:
        assert isinstance(await harness.attempts.run(await harness.claim()), Succeeded)
    finally:
        HangingFile.released.set()
    assert saved == [spooled, again]
    assert (harness.image_saver.held, len(harness.provider.calls)) == (0, 1)


async def test_a_task_does_not_wait_for_the_store_any_more_once_its_image_proves_unusable(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, reasons = make_harness(images(1), images(1), pool=False), []
    harness.image_saver.store_faults = [StoreUnavailable()]
    harness.image_saver.faults = [None, ImageRejected("not an image", lasting=False)]
    claim = await harness.claim()

    async def generate(call: Call, watcher: CallObserver) -> Reply:
        reasons.append((harness.task(claim.task.id).reason, (await stored_checkpoint(harness, claim)).reason))
        return await type(harness.provider).generate(harness.provider, call, watcher)

    monkeypatch.setattr(harness.provider, "generate", generate)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert reasons == [(None, None)] * 2


async def test_a_link_is_checkpointed_while_its_store_is_unavailable(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make_harness(links(1), pool=False)
    harness.image_saver.store_faults = [StoreUnavailable()] * 50
    claim = await harness.claim()
    harness.image_saver.health._writable.clear()
    monkeypatch.setattr(harness.provider, "generate", after_writable(harness))
    running = asyncio.create_task(harness.attempts.run(claim))
    harness.image_saver.health.mark_ok()
    await eventually(lambda: claim.task.reason is WaitReason.STORE_UNAVAILABLE)
    run = await stored_checkpoint(harness, claim)
    assert (run.reason, len(run.links)) == (WaitReason.STORE_UNAVAILABLE, 1)
    harness.pacing.quiet()
    assert await asyncio.wait_for(running, 20) == Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False)
    assert claim.checkpoint.ambiguous_calls == 0


def after_writable(harness: WorkerHarness) -> Callable[[Call, CallObserver], Awaitable[Reply]]:
    async def generate(call: Call, watcher: CallObserver) -> Reply:
        reply = await type(harness.provider).generate(harness.provider, call, watcher)
        harness.image_saver.health.mark_failed("ENOSPC")
        return reply

    return generate


async def test_bytes_that_a_stop_discards_are_recorded_as_paid(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_harness(images(1), pool=False)
    monkeypatch.setattr(one.provider, "generate", after_writable(one))
    one.image_saver.store_faults = [StoreUnavailable()] * 50
    claim = await one.claim()
    running = asyncio.create_task(one.attempts.run(claim))
    await eventually(lambda: claim.task.reason is WaitReason.STORE_UNAVAILABLE)
    running.cancel()
    await asyncio.wait([running])
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness(pool=False)
    taken = await two.instance.claim()
    assert isinstance(await two.attempts.run(taken), Succeeded)
    assert taken.checkpoint.ambiguous_calls == 1


async def test_a_task_that_ends_while_its_link_is_tried_again_has_an_attempt(make_harness: MakeHarness) -> None:
    harness = make_harness(links(2), pool=False, deadline_s=600.0)
    harness.image_saver.faults = [None, *[DownloadFailed("503") for _ in range(9)]]
    claim = await harness.claim(n=2)
    outcome = await harness.attempts.run(claim)
    assert isinstance(outcome, Retry)
    assert claim.checkpoint.attempts == 1
    await settled(harness, claim, outcome)
    await harness.pass_time(700.0)
    last = await harness.attempts.run(claim)
    assert isinstance(last, Succeeded)
    await settled(harness, claim, last)
    assert (await harness.instance.read(claim.task.id)).attempts == 1


async def test_the_deadline_ends_the_wait_for_a_store(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, deadline_s=0.3)
    harness.image_saver.store_faults = [StoreUnavailable()] * 50
    outcome = await asyncio.wait_for(harness.attempts.run(await harness.claim()), 20)
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "upstream_timeout"


def test_this_version_and_the_one_before_read_each_others_checkpoints() -> None:
    run = decode_checkpoint(b'1-0 {"owner":"i","phase":"waiting","attempts":2,"images":[],"asked_again":true}')[1]
    assert (run.links, run.short, run.given_up, run.missing_requested) == ((), (), (), True)
    ours = Checkpoint("i", links=(PaidImage(0, "https://a/b", 1.0, 5),)).encode("1-0")
    assert decode_checkpoint(ours)[1].links[0] == PaidImage(0, "https://a/b", 1.0, 5)


def test_the_delay_of_a_link_grows_with_its_age_and_ends_before_it_dies() -> None:
    def delay_s(age_s: float, url: str = "https://a/b", asked_s: float | None = None) -> float:
        claim: Any = SimpleNamespace(task=SimpleNamespace(id="t", model="m"), checkpoint=Checkpoint("i"))
        unused: Any = None
        permits = Pacing(only_route(ScriptedProvider()))
        saver = saving.ClaimImageSaver(
            unused, unused, claim, 1, lambda: 0.0, permits, lambda *_: None, unused, unused, lambda: 1e9
        )
        given = saving.ReceivedImage(0, ImageLink(url), None, 1e9 - age_s)
        return saver._later([(given, DownloadFailed("503", retry_after_s=asked_s))]).delay_s

    assert 0.75 <= delay_s(0.0) <= 1.25
    assert 3.75 <= delay_s(10.0) <= 6.25
    assert 15.0 <= delay_s(300.0) <= 25.0
    assert delay_s(0.0, asked_s=9.0) == 9.0
    assert delay_s(595.0) <= 4.0


@pytest.mark.parametrize("error", [DownloadFailed("damaged"), ImageRejected("damaged", lasting=True)])
async def test_the_bytes_of_images_that_can_not_be_used_are_freed_without_a_garbage_collection(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, error: DownloadFailed | ImageRejected
) -> None:
    held = []

    async def fetch_damaged(image: GivenImage, *, age_s: float) -> VerifiedImage:
        received = {b"the bytes that came of it"}
        held.append(weakref.ref(received))
        try:
            raise ValueError
        except ValueError as cause:
            raise error from cause

    harness = make_harness(links(2), pool=False)
    monkeypatch.setattr(harness.image_saver, "fetch", fetch_damaged)
    claim = await harness.claim(n=2)
    gc.disable()
    try:
        await harness.attempts.run(claim)
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()
