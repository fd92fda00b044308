"""What becomes of images that are paid for while their host, or the store, is away."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from msgspec.structs import replace
from support import eventually

from imagegen.errors import DownloadFailed, ImageRejected, StoreUnavailable
from imagegen.queue.codec import Checkpoint, decode_checkpoint
from imagegen.tasks.image import ImageLink, PaidImage
from imagegen.tasks.retry import Failed, Retry, Succeeded
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import saving

from .conftest import MakeWorkshop, fault, links, pictures


async def stored_run(workshop, claim) -> Checkpoint:
    value = await workshop.instance.connection.commands.get(workshop.instance.keys.checkpoint(claim.task.id))
    return decode_checkpoint(value)[1]


async def again(workshop, claim, outcome):
    """Runs the next attempt after a retry, as the pool does."""
    claim.task = replace(claim.task, possibly_billed_twice=claim.checkpoint.ambiguous_calls)
    await workshop.instance.worker_queue.retry(claim, replace(outcome, delay_s=0.0))
    assert await asyncio.wait_for(workshop.instance.worker_queue.claim(), 5) is claim
    return await workshop.attempts.run(claim)


def urls(images) -> list[str]:
    return [image.url for image in images]


async def test_a_link_that_fails_is_fetched_in_a_later_round_and_no_call_is_made(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(links(2), pool=False, max_attempts=1)
    workshop.keeper.faults = [None, DownloadFailed("503"), DownloadFailed("503")]
    claim = await workshop.claim(n=2, seed=7)
    outcome = await workshop.attempts.run(claim)
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.RETRYING, False)
    assert [image.index for image in claim.checkpoint.images] == [0]
    assert [(paid.index, paid.url, paid.seed) for paid in claim.checkpoint.links] == [
        (1, "https://images.example.com/1", 7)
    ]
    outcome = await again(workshop, claim, outcome)
    assert isinstance(outcome, Retry)
    outcome = await again(workshop, claim, outcome)
    assert isinstance(outcome, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 7), (1, 7)]
    assert claim.task.attempts == 1
    assert len(workshop.provider.calls) == 1


async def test_the_good_case_costs_no_checkpoint_more(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=links(1), pool=False)
    claim = await workshop.claim()
    before = workshop.instance.verbs.meter.commands.copy()
    await workshop.attempts.run(claim)
    after = workshop.instance.verbs.meter.commands
    assert {name: after[name] - before[name] for name in ("start", "retry")} == {"start": 1, "retry": 0}


async def test_the_calls_that_are_left_are_made_once_the_paid_images_are_here(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=links(1), pool=False, per_call=1, max_attempts=1)
    workshop.keeper.faults = [DownloadFailed("503"), None, DownloadFailed("503")]
    claim = await workshop.claim(n=2, seed=10)
    outcome = await workshop.attempts.run(claim)
    outcome = await again(workshop, claim, outcome)
    assert isinstance(outcome, Retry)
    assert isinstance(await again(workshop, claim, outcome), Succeeded)
    assert workshop.provider.seeds == [10, 11]


async def test_another_instance_fetches_what_was_paid_and_calls_for_nothing(make_workshop: MakeWorkshop) -> None:
    one = make_workshop(links(1), pool=False)
    one.keeper.faults = [DownloadFailed("503")]
    claim = await one.claim(seed=3)
    await one.pool._report(claim, replace(await one.attempts.run(claim), delay_s=60.0))
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_workshop(pool=False)
    taken = await asyncio.wait_for(two.instance.worker_queue.claim(), 5)
    outcome = await two.attempts.run(taken)
    assert isinstance(outcome, Succeeded)
    assert urls(two.keeper.fetched) == ["https://images.example.com/0"]
    assert two.provider.calls == []
    assert (taken.checkpoint.ambiguous_calls, outcome.images[0].seed) == (0, 3)


async def test_a_slow_download_is_in_the_checkpoint_before_it_ends(
    make_workshop: MakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(image, *, age_s: float):
        await go_on.wait()
        return await type(workshop.keeper).fetch(workshop.keeper, image, age_s=age_s)

    monkeypatch.setattr(saving, "CHECKPOINT_AFTER_S", 0.0)
    workshop, go_on = make_workshop(links(1), pool=False), asyncio.Event()
    workshop.keeper.fetch = slow
    claim = await workshop.claim()
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: claim.stored_checkpoint is not None and claim.stored_checkpoint.links)
    run = await stored_run(workshop, claim)
    assert (urls(run.links), run.phase, run.calling) == (["https://images.example.com/0"], "calling", False)
    go_on.set()
    assert isinstance(await running, Succeeded)


async def test_a_link_that_outlived_its_life_ends_the_task_without_another_call(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(links(1), pool=False)
    workshop.keeper.faults = [DownloadFailed("503"), DownloadFailed("503")]
    claim = await workshop.claim()
    outcome = await workshop.attempts.run(claim)
    claim.checkpoint = replace(
        claim.checkpoint, links=tuple(replace(paid, received_at=1.0) for paid in claim.checkpoint.links)
    )
    outcome = await again(workshop, claim, outcome)
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "upstream_bad_response"
    assert len(workshop.provider.calls) == 1


async def test_a_dead_link_beside_a_failing_one_is_not_paid_for_again(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(links(2), pool=False)
    workshop.keeper.faults = [ImageRejected("a GIF", lasting=True), DownloadFailed("503")]
    claim = await workshop.claim(n=2)
    outcome = await again(workshop, claim, await workshop.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert outcome.warnings == ("only 1 of 2 images came",)
    assert len(workshop.provider.calls) == 1


async def test_links_are_fetched_though_the_attempts_are_used_up(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, max_attempts=3)
    claim = await workshop.claim()
    paid = PaidImage(0, "https://images.example.com/0", workshop.attempts.clock())
    claim.checkpoint = replace(claim.checkpoint, attempts=3, ambiguous_calls=2, links=(paid,))
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert workshop.provider.calls == []


@pytest.mark.parametrize(
    ("rejections", "calls"),
    [([ImageRejected("a GIF", lasting=True)], 1), ([ImageRejected("cut off", lasting=False)] * 2, 2)],
)
async def test_an_unusable_image_is_asked_for_again_only_if_that_may_help(
    make_workshop: MakeWorkshop, rejections: list[Exception], calls: int
) -> None:
    workshop = make_workshop(default=links(1), pool=False)
    workshop.keeper.faults = list(rejections)
    outcome = await workshop.attempts.run(await workshop.claim())
    assert isinstance(outcome, Failed)
    assert not outcome.error.retryable
    assert len(workshop.provider.calls) == calls


@pytest.mark.parametrize(
    ("answer", "rejection", "calls"),
    [
        (links(1), ImageRejected("a GIF", lasting=True), 2),
        (links(1), ImageRejected("cut off", lasting=False), 3),
        (pictures(0), None, 3),
    ],
)
async def test_eight_images_that_all_are_unusable_are_not_all_paid_for(
    make_workshop: MakeWorkshop, answer, rejection: Exception | None, calls: int
) -> None:
    workshop = make_workshop(default=answer, pool=False, per_call=1)
    workshop.keeper.faults = [rejection] * 16
    assert isinstance(await workshop.attempts.run(await workshop.claim(n=8)), Failed)
    assert len(workshop.provider.calls) == calls


async def test_what_an_answer_left_out_is_asked_for_once_over_all_attempts(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(0), fault(500), pictures(1), pictures(0), per_call=1, pool=False)
    claim = await workshop.claim(n=2)
    outcome = await again(workshop, claim, await workshop.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert [call.first_index for call in workshop.provider.calls] == [0, 1, 1, 0]
    assert (claim.checkpoint.short, claim.checkpoint.given_up) == ((0,), (0,))


async def test_an_image_waits_in_memory_for_its_store_and_no_call_is_made(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, slots=2)
    workshop.keeper.store_faults = [StoreUnavailable()] * 3
    workshop.keeper.health.mark_failed("ENOSPC")
    workshop.keeper.health.mark_ok()
    claim, other = await workshop.claim("one"), await workshop.claim("two")

    async def full(*_: object) -> object:
        workshop.keeper.health.mark_failed("ENOSPC")
        raise StoreUnavailable

    save, workshop.keeper.save = workshop.keeper.save, full
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.task(claim.task.id).reason is WaitReason.STORE_UNAVAILABLE)
    waiting = asyncio.create_task(workshop.attempts.run(other))
    await eventually(lambda: workshop.task(other.task.id).reason is WaitReason.STORE_UNAVAILABLE)
    assert (workshop.task(claim.task.id).state, workshop.task(other.task.id).state) == (
        State.PROCESSING,
        State.PENDING,
    )
    workshop.keeper.save, workshop.keeper.store_faults = save, []
    workshop.keeper.health.mark_ok()
    outcomes = await asyncio.wait_for(asyncio.gather(running, waiting), 10)
    assert all(isinstance(outcome, Succeeded) for outcome in outcomes)
    assert len(workshop.provider.calls) == 2
    assert (workshop.task(claim.task.id).reason, claim.checkpoint.reason) == (None, None)
    assert workshop.keeper.held == 0


async def test_a_store_that_refuses_while_it_seems_to_work_is_tried_again(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    workshop.keeper.store_faults = [StoreUnavailable()]
    assert isinstance(await workshop.attempts.run(await workshop.claim()), Succeeded)
    assert len(workshop.provider.calls) == 1


async def test_a_link_whose_store_is_away_is_in_the_checkpoint_and_survives_a_stop(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(links(1), pool=False)
    workshop.keeper.store_faults = [StoreUnavailable()] * 50
    claim = await workshop.claim()
    workshop.keeper.health._writable.clear()
    workshop.provider.generate = after_writable(workshop)
    running = asyncio.create_task(workshop.attempts.run(claim))
    workshop.keeper.health.mark_ok()
    await eventually(lambda: claim.task.reason is WaitReason.STORE_UNAVAILABLE)
    run = await stored_run(workshop, claim)
    assert (run.reason, len(run.links)) == (WaitReason.STORE_UNAVAILABLE, 1)
    workshop.pacing.quiet()
    assert await asyncio.wait_for(running, 10) == Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False)
    assert claim.checkpoint.ambiguous_calls == 0


def after_writable(workshop):
    async def generate(call, watcher):
        reply = await type(workshop.provider).generate(workshop.provider, call, watcher)
        workshop.keeper.health.mark_failed("ENOSPC")
        return reply

    return generate


async def test_bytes_that_a_stop_cuts_off_are_recorded_as_paid(make_workshop: MakeWorkshop) -> None:
    one = make_workshop(pictures(1), pool=False)
    one.provider.generate = after_writable(one)
    one.keeper.store_faults = [StoreUnavailable()] * 50
    claim = await one.claim()
    running = asyncio.create_task(one.attempts.run(claim))
    await eventually(lambda: claim.task.reason is WaitReason.STORE_UNAVAILABLE)
    running.cancel()
    await asyncio.wait([running])
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_workshop(pool=False)
    taken = await asyncio.wait_for(two.instance.worker_queue.claim(), 5)
    assert isinstance(await two.attempts.run(taken), Succeeded)
    assert taken.checkpoint.ambiguous_calls == 1


async def test_the_deadline_ends_the_wait_for_a_store(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, deadline_s=0.3)
    workshop.keeper.store_faults = [StoreUnavailable()] * 50
    outcome = await asyncio.wait_for(workshop.attempts.run(await workshop.claim()), 5)
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "upstream_timeout"


def test_a_checkpoint_of_the_version_before_is_read_and_an_older_version_reads_ours() -> None:
    run = decode_checkpoint(b'1-0 {"owner":"i","phase":"waiting","attempts":2,"images":[],"asked_again":true}')[1]
    assert (run.links, run.short, run.given_up, run.missing_requested) == ((), (), (), True)
    ours = Checkpoint("i", links=(PaidImage(0, "https://a/b", 1.0, 5),)).encode("1-0")
    assert decode_checkpoint(ours)[1].links[0] == PaidImage(0, "https://a/b", 1.0, 5)


def test_the_delay_of_a_link_grows_with_its_age_and_ends_before_it_dies() -> None:
    def delay_s(age_s: float, url: str = "https://a/b", asked_s: float | None = None) -> float:
        claim = SimpleNamespace(task=SimpleNamespace(id="t"))
        saver = saving.ClaimImageSaver(None, None, claim, 1, 0.0, lambda: False, lambda *_: None, lambda: 1e9)  # type: ignore[arg-type]
        given = saving.ReceivedImage(0, ImageLink(url), None, 1e9 - age_s)
        return saver._later([(given, DownloadFailed("503", retry_after_s=asked_s))]).delay_s

    assert 0.75 <= delay_s(0.0) <= 1.25
    assert 3.75 <= delay_s(10.0) <= 6.25
    assert 15.0 <= delay_s(300.0) <= 25.0
    assert delay_s(0.0, asked_s=9.0) == 9.0
    assert delay_s(595.0) <= 4.0
