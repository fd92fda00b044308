"""Provider jobs in attempts: resumed and never begun again, within the limits of slot, task and claim."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.errors import DownloadFailed, ImageRejected, UpstreamError
from imagegen.providers.model_rules import ModelTable, Pricing
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.provider_job import AcceptedJob, FailedPolls, JobHandle
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.retry import ClaimLost, Failed, Outcome, Retry, Succeeded
from imagegen.tasks.task import State
from imagegen.worker.job_wait import MAX_FAILED_POLLS, MAX_UNREAD_RETRY_S, MIN_UNREAD_RETRY_S
from imagegen.worker.judge import Judge
from imagegen.worker.permits import Choice
from imagegen.worker.saving import MAX_RENEWALS
from tests.conftest import Instance, MakeInstance
from tests.support import LoopTime, over_rows
from tests.worker.conftest import ScriptedProvider, WorkerHarness, images, links, loss, urls

JOB_WAIT_S = 10.0


@dataclass
class JobProvider(ScriptedProvider):
    """Provider of jobs. `ends` are what its jobs end with, in order; None is a job that runs on.

    pass_time: awaited when a job runs on.
    """

    ends: list[Reply | Exception | None] = field(default_factory=list)
    resumed: list[JobHandle] = field(default_factory=list)
    on_accepted: Callable[[], None] = lambda: None
    pass_time: Callable[[], Awaitable[None]] = lambda: LoopTime().move(JOB_WAIT_S)

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        await super().generate(call, watcher)
        await watcher.accepted(JobHandle("scripted", f"task_{len(self.calls)}"))
        self.on_accepted()
        return await self._end()

    async def resume(self, handle: JobHandle, _watcher: CallObserver) -> Reply:
        self.resumed.append(handle)
        return await self._end()

    async def _end(self) -> Reply:
        end = self.ends.pop(0) if self.ends else images()
        if end is None:
            await self.pass_time()
            await asyncio.get_running_loop().create_future()
        if isinstance(end, Exception):
            raise end
        assert isinstance(end, Reply)
        return end


def harness_of(instance: Instance, *ends: Reply | Exception | None, **rules: Any) -> WorkerHarness[JobProvider]:
    return WorkerHarness(instance, JobProvider(ends=list(ends), max_images_per_call=1), **rules)


@pytest.fixture
async def instance(make_instance: MakeInstance) -> Instance:
    return make_instance()


def job_of(checkpoint: Checkpoint) -> AcceptedJob:
    assert checkpoint.job is not None
    return checkpoint.job


async def run_again(harness: WorkerHarness[Any], claim: Claim, outcome: Outcome) -> Outcome:
    assert isinstance(outcome, Retry)
    await harness.instance.worker_queue.retry(claim, outcome)
    return await harness.attempts.run(claim)


async def test_a_job_that_outlasts_its_slot_is_resumed_by_the_next_attempt(instance: Instance) -> None:
    harness = harness_of(instance, None, job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    outcome = await harness.run(claim, Retry)
    assert not outcome.counts_as_attempt
    assert isinstance(await run_again(harness, claim, outcome), Succeeded)
    assert [handle.id for handle in harness.provider.resumed] == ["task_1"]
    assert (len(harness.provider.calls), claim.checkpoint.attempts, claim.checkpoint.job) == (1, 1, None)


@dataclass
class JobOverJump(JobProvider):
    """Provider that accepts a job after a jump of the server's clock."""

    jump: Callable[[], None] = lambda: None

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        self.jump()
        return await super().generate(call, watcher)

    async def _end(self) -> Reply:
        for _ in range(3):  # turns of the event loop, in which a limit that is over ends the wait
            await asyncio.sleep(0)
        return await super()._end()


async def test_a_paid_job_outlives_a_jump_of_the_servers_clock_over_the_deadline(instance: Instance) -> None:
    harness = WorkerHarness(instance, JobOverJump(max_images_per_call=1), deadline_s=3_600.0)
    harness.provider.jump = lambda: harness.jump(3_700.0)
    await harness.run(await harness.claim(), Succeeded)
    assert len(harness.provider.calls) == 1


class Unread(JobProvider):
    """Provider with a job of which all polls fail but those of the last attempt."""

    attempts = 2

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        if len(self.resumed) == self.attempts:
            return await super().resume(handle, observer)
        self.resumed.append(handle)
        polls = handle.failed_polls
        while True:
            polls = FailedPolls(polls.count + 1, polls.since or time.time() - 50)
            observer.polls_failed(polls)
            await asyncio.sleep(0)


async def test_a_job_whose_claim_is_lost_while_redis_is_to_record_it_is_reported(instance: Instance) -> None:
    harness, dropped = harness_of(instance), list[tuple[Claim, str]]()
    instance.worker_queue.on_job_dropped = lambda claim, handle, _price: dropped.append((claim, handle.id))
    claim = await harness.claim()

    async def generate(_call: Call) -> Reply:
        instance.connection.recovered.clear()
        asyncio.get_running_loop().call_soon(claim.mark_lost)
        return images()

    harness.provider.default = generate
    await harness.run(claim, ClaimLost)
    assert dropped == [(claim, "task_1")]


async def test_a_resumed_job_needs_no_slot(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = harness_of(instance, None, job_wait_s=JOB_WAIT_S)
    claim, held = await harness.claim(), list[bool]()
    outcome = await harness.attempts.run(claim)
    resume = harness.provider.resume

    async def resumed(handle: JobHandle, observer: CallObserver) -> Reply:
        held.append(claim.occupies_slot)
        await LoopTime().move(2 * JOB_WAIT_S)
        return await resume(handle, observer)

    monkeypatch.setattr(harness.provider, "resume", resumed)
    claim.occupies_slot = True
    assert isinstance(await run_again(harness, claim, outcome), Succeeded)
    assert held == [False]


async def test_a_job_with_failing_polls_leaves_its_slot_and_is_resumed(instance: Instance) -> None:
    harness = WorkerHarness(instance, Unread(ends=[None], max_images_per_call=1), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    outcome = await run_again(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Retry)
    assert (round(outcome.delay_s), outcome.counts_as_attempt) == (25, False)
    await instance.worker_queue.retry(claim, outcome)
    stored = await instance.stored(instance.keys.checkpoint(claim.task.id))
    assert job_of(decode_checkpoint(stored)[1]).handle.failed_polls.count == MAX_FAILED_POLLS
    outcome = await harness.run(claim, Retry)
    assert job_of(claim.checkpoint).handle.failed_polls.count == MAX_FAILED_POLLS + 1
    assert isinstance(await run_again(harness, claim, outcome), Succeeded)
    assert (len(harness.provider.calls), len(harness.provider.resumed), claim.checkpoint.attempts) == (1, 3, 1)


@pytest.mark.parametrize(("ago_s", "delay_s"), [(1, MIN_UNREAD_RETRY_S), (3_000, MAX_UNREAD_RETRY_S)])
async def test_the_pause_between_failing_polls_is_bounded(instance: Instance, ago_s: float, delay_s: float) -> None:
    harness = WorkerHarness(instance, Unread(ends=[None], max_images_per_call=1), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    first = await harness.attempts.run(claim)
    polls, job = FailedPolls(3, time.time() - ago_s), job_of(claim.checkpoint)
    claim.checkpoint = replace(claim.checkpoint, job=replace(job, handle=replace(job.handle, failed_polls=polls)))
    second = await run_again(harness, claim, first)
    assert isinstance(second, Retry)
    assert second.delay_s == pytest.approx(delay_s, abs=5)


async def test_a_timeout_within_a_call_is_not_taken_for_an_unfinished_job(instance: Instance) -> None:
    harness = harness_of(instance, TimeoutError())
    claim = await harness.claim()
    with pytest.raises(TimeoutError):
        await harness.attempts.run(claim)


async def test_a_job_is_polled_until_the_deadline_of_its_task(instance: Instance) -> None:
    harness = harness_of(instance, None, deadline_s=15.0)
    harness.provider.pass_time = lambda: harness.pass_time(16)
    outcome = await harness.run(await harness.claim(), Failed)
    assert outcome.keeps_images
    assert len(harness.provider.calls) == 1


async def test_a_job_that_the_provider_has_forgotten_counts_as_ambiguous(instance: Instance) -> None:
    harness = harness_of(instance, None, loss(), loss(), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    outcome = await run_again(harness, claim, await harness.attempts.run(claim))
    assert (claim.checkpoint.ambiguous_calls, claim.checkpoint.job) == (1, None)
    assert isinstance(await run_again(harness, claim, outcome), Failed)
    assert (len(harness.provider.calls), claim.checkpoint.ambiguous_calls) == (2, 2)


async def test_a_failed_job_is_begun_again_as_a_failed_call_is(instance: Instance) -> None:
    busy = UpstreamError("upstream_error", "busy", retryable=True, status=500)
    harness = harness_of(instance, busy, images())
    claim = await harness.claim()
    assert isinstance(await run_again(harness, claim, await harness.attempts.run(claim)), Succeeded)
    assert (len(harness.provider.calls), harness.provider.resumed) == (2, [])


async def test_a_parameter_that_a_resumed_job_refuses_is_left_out(instance: Instance) -> None:
    refusal = UpstreamError("upstream_invalid_request", "no steps", refused=("steps",), status=400)
    harness = harness_of(instance, None, refusal, images(), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim(steps=4)
    outcome = await run_again(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert [call.without for call in harness.provider.calls] == [frozenset(), frozenset({"steps"})]
    assert "steps was left out" in outcome.warnings[0]


async def test_the_images_of_a_task_come_from_its_job_and_the_calls_after_it(instance: Instance) -> None:
    counted = images(details=ReplyDetails(usage={"images": 1}))
    harness = harness_of(instance, counted, None, counted, counted, job_wait_s=JOB_WAIT_S)
    claim = await harness.claim(n=3, seed=5)
    outcome = await run_again(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 5), (1, 6), (2, 7)]
    assert outcome.details == ReplyDetails(usage={"images": 3})
    assert (harness.provider.seeds, len(harness.provider.resumed)) == ([5, 6, 7], 1)


async def test_a_bad_result_of_a_resumed_job_is_requested_once_more(instance: Instance) -> None:
    bad = UpstreamError("upstream_bad_response", "no image", status=200)
    harness = harness_of(instance, None, bad, images(), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    assert isinstance(await run_again(harness, claim, await harness.attempts.run(claim)), Succeeded)
    assert len(harness.provider.calls) == 2


@pytest.mark.parametrize("resumed", [False, True])
async def test_a_job_with_a_state_that_can_not_be_read_is_not_begun_again(instance: Instance, resumed: bool) -> None:
    unreadable = UpstreamError("upstream_bad_response", "a page", ambiguous=True, status=200)
    harness = harness_of(instance, *([None] if resumed else []), unreadable, job_wait_s=JOB_WAIT_S if resumed else 60.0)
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    outcome = await run_again(harness, claim, outcome) if resumed else outcome
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_bad_response", False)
    assert (len(harness.provider.calls), claim.checkpoint.ambiguous_calls, claim.checkpoint.repeated) == (1, 1, 0)


async def test_the_warnings_of_a_resumed_job_are_kept(instance: Instance) -> None:
    harness = harness_of(instance, None, images(warnings=("steps was left out",)), job_wait_s=JOB_WAIT_S)
    claim = await harness.claim()
    outcome = await run_again(harness, claim, await harness.attempts.run(claim))
    assert isinstance(outcome, Succeeded)
    assert outcome.warnings == ("steps was left out",)


@over_rows("recovers", [True, False])
def test_only_another_key_of_its_channel_makes_a_refused_job_again(recovers: bool) -> None:
    asked: list[tuple[str, Choice]] = []

    def answer(model: str, choice: Choice) -> bool:
        asked.append((model, choice))
        return recovers

    unused: Any = None
    pacing: Any = SimpleNamespace(recovers=answer)
    judge = Judge(unused, unused, pacing, lambda: 0.0)
    error = UpstreamError("upstream_auth", "no", ambiguous=True, status=401)
    route = SimpleNamespace(account="key", channel=SimpleNamespace(name="main"))
    permit: Any = SimpleNamespace(route=route, model="m")
    assert judge.cause(permit, error) is error
    assert (error.retryable, error.ambiguous) == (recovers, True)
    assert asked == [("m", Choice("main", keys=frozenset({"key"})))]


async def test_a_cancelled_task_stops_the_polls(instance: Instance) -> None:
    harness = harness_of(instance, None)
    accepted = asyncio.Event()
    harness.provider.on_accepted = accepted.set
    harness.pool.start()
    task_id = await harness.submit()
    await asyncio.wait_for(accepted.wait(), 20)
    await instance.client_queue.cancel(task_id)
    (task,) = await harness.finished(task_id)
    assert task.state is State.CANCELLED
    await harness.drain(1)
    assert len(harness.provider.calls) == 1


async def test_a_job_is_charged_once_or_as_unsure_if_it_is_forgotten(instance: Instance) -> None:
    pricing = Pricing(ModelTable((), "scripted", date(2026, 1, 1)), unknown_micro_usd=700)
    harness = harness_of(instance, None, images(), None, loss(), job_wait_s=JOB_WAIT_S, pricing=pricing)
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    assert (claim.cost.calling, claim.cost.charged) == (700, 0)
    assert isinstance(await run_again(harness, claim, outcome), Succeeded)
    assert (claim.cost.calling, claim.cost.charged, claim.cost.unsure) == (0, 700, 0)
    other = await harness.claim("b")
    await run_again(harness, other, await harness.attempts.run(other))
    assert (other.cost.calling, other.cost.charged, other.cost.unsure) == (0, 700, 700)


def dead(**changes: bool) -> ImageRejected:
    return ImageRejected("The image's link is dead: 403", **{"lasting": True, "renewable": True, **changes})


async def test_a_job_whose_link_died_is_polled_for_a_fresh_one_and_not_paid_again(instance: Instance) -> None:
    pricing = Pricing(ModelTable((), "scripted", date(2026, 1, 1)), unknown_micro_usd=700)
    first = links(host="old.example", details=ReplyDetails(usage={"images": 1}))
    fresh = links(host="new.example", details=ReplyDetails(usage={"images": 1}))
    harness = harness_of(instance, first, fresh, pricing=pricing)
    harness.image_saver.faults = [dead()]
    claim = await harness.claim(seed=5)
    outcome = await harness.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert urls(harness.image_saver.fetched) == ["https://old.example/0", "https://new.example/0"]
    assert (len(harness.provider.calls), len(harness.provider.resumed), outcome.images[0].seed) == (1, 1, 5)
    assert (claim.cost.charged, claim.checkpoint.billed_again, claim.checkpoint.job) == (700, 0, None)
    assert outcome.details == ReplyDetails(usage={"images": 1})


async def test_another_instance_polls_the_job_of_a_link_that_died_while_nobody_fetched_it(
    make_instance: MakeInstance,
) -> None:
    one = harness_of(make_instance(), links(host="old.example"))
    one.image_saver.faults = [DownloadFailed("503")]
    claim = await one.claim()
    await one.pool._report(claim, replace(await one.run(claim, Retry), delay_s=60.0))
    await one.instance.crash()
    await one.instance.parts.release_all()
    other = harness_of(make_instance(), links(host="new.example"))
    other.image_saver.faults = [dead()]
    taken = await other.instance.claim()
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert ([handle.id for handle in other.provider.resumed], other.provider.calls) == (["task_1"], [])
    assert taken.checkpoint.billed_again == 0


async def test_a_link_that_fails_until_its_end_is_renewed(instance: Instance) -> None:
    harness = harness_of(instance, links(host="old.example"), links(host="new.example"))
    harness.image_saver.faults = [DownloadFailed("503"), DownloadFailed("503")]
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    aged = tuple(replace(paid, received_at=1.0) for paid in claim.checkpoint.links)
    claim.checkpoint = replace(claim.checkpoint, links=aged)
    assert isinstance(await run_again(harness, claim, outcome), Succeeded)
    assert (len(harness.provider.calls), len(harness.provider.resumed)) == (1, 1)


@pytest.mark.parametrize(
    ("ends", "polls"),
    [
        ([links(host=f"{number}.example") for number in range(9)], MAX_RENEWALS),
        ([links(), links()], 1),
        ([links(), Reply(())], 1),
        ([links(), loss()], 1),
        ([links(), UpstreamError("upstream_error", "busy", retryable=True, status=500)], 1),
        ([links(), UpstreamError("upstream_bad_response", "no image", status=200)], 1),
    ],
    ids=["dead each time", "the same link", "no link", "forgotten", "failed", "bad"],
)
async def test_a_job_without_a_living_link_ends_its_task_unpaid_after_some_polls(
    instance: Instance, ends: list[Reply | Exception], polls: int
) -> None:
    harness = harness_of(instance, *ends)
    harness.image_saver.faults = [dead() for _ in ends]
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_bad_response", False)
    assert (len(harness.provider.calls), len(harness.provider.resumed)) == (1, polls)
    assert claim.checkpoint.billed_again == 0


async def test_a_job_with_links_of_which_one_died_keeps_its_other_images(instance: Instance) -> None:
    harness = harness_of(instance, links(2, host="old.example"), links(2, host="new.example"))
    harness.provider.max_images_per_call = 2
    harness.image_saver.faults = [None, dead()]
    claim = await harness.claim(n=2)
    outcome = await harness.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert [image.index for image in outcome.images] == [0, 1]
    assert urls(harness.image_saver.fetched) == [
        "https://old.example/0",
        "https://old.example/1",
        "https://new.example/1",
    ]


async def test_a_renewed_job_of_a_spent_task_makes_no_further_call(instance: Instance) -> None:
    harness = harness_of(instance, links(host="old.example"), links(host="new.example"))
    harness.image_saver.faults = [DownloadFailed("503"), dead()]
    claim = await harness.claim(n=2)
    outcome = await harness.attempts.run(claim)
    claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=2)
    outcome = await run_again(harness, claim, outcome)
    assert isinstance(outcome, Succeeded)
    assert (len(outcome.images), len(harness.provider.calls), len(harness.provider.resumed)) == (1, 1, 1)


async def test_a_spent_task_makes_no_call_for_an_image_that_its_job_only_has_damaged(instance: Instance) -> None:
    harness = harness_of(instance, links(), links())
    harness.image_saver.faults = [DownloadFailed("damaged"), dead(lasting=False), dead(lasting=False)]
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=2)
    outcome = await run_again(harness, claim, outcome)
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, len(harness.provider.calls), len(harness.provider.resumed)) == ("interrupted", 1, 1)


@pytest.mark.parametrize("lasting", [True, False], ids=["dead", "damaged"])
async def test_an_image_that_its_renewed_job_does_not_give_is_not_paid_again_beside_others(
    instance: Instance, lasting: bool
) -> None:
    harness = harness_of(instance, *(links(2, host=f"{number}.example") for number in range(9)))
    harness.provider.max_images_per_call = 2
    harness.image_saver.faults = [None, *[dead(lasting=lasting)] * 9]
    claim = await harness.claim(n=2)
    outcome = await harness.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert (len(outcome.images), outcome.warnings) == (1, ("only 1 of 2 images came",))
    assert (len(harness.provider.calls), len(harness.provider.resumed)) == (1, MAX_RENEWALS)
