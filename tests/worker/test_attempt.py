from __future__ import annotations

import asyncio

import pytest
from loguru import logger
from msgspec.structs import replace
from support import eventually

from imagegen.errors import ImageRejected, UpstreamError
from imagegen.providers.protocol import Reply, UpstreamLimits
from imagegen.queue.codec import Checkpoint, decode_checkpoint
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import ClaimLost, Failed, NotStarted, Retry, Succeeded
from imagegen.tasks.task import State, WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig

from .conftest import MakeWorkshop, fault, loss, no_model, pictures, refused

SLOW = BreakerConfig(probe_s=60.0)


def no_parameter(name: str) -> UpstreamError:
    return UpstreamError("upstream_invalid_request", f"Unsupported use of '{name}'", parameter=name, status=400)


def no_picture() -> UpstreamError:
    return UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)


async def stored_run(workshop, claim):
    value = await workshop.instance.connection.commands.get(workshop.instance.keys.checkpoint(claim.task.id))
    return None if value is None else decode_checkpoint(value)[1]


async def pause(workshop, model: str = "m", retry_after_s: float = 60.0) -> None:
    """The upstream limits the rate for a model."""
    with workshop.pacing.try_acquire(model) as turn:
        workshop.pacing.failed(turn, fault(429, retry_after_s=retry_after_s), unfinished=None)


async def settled(workshop, claim, outcome) -> None:
    """What the pool does with an outcome; returns when the claim is offered again."""
    await workshop.pool._report(claim, outcome)
    if isinstance(outcome, Retry):
        assert await asyncio.wait_for(workshop.instance.worker_queue.claim(), 5) is claim


async def test_an_attempt_is_written_before_its_call_and_brings_pictures(make_workshop: MakeWorkshop) -> None:
    async def seen(call) -> Reply:
        runs.append(await stored_run(workshop, claim))
        return pictures(call.count)

    runs: list = []
    workshop = make_workshop(seen, pool=False)
    claim = await workshop.claim(n=2, seed=7)
    outcome = await workshop.attempts.run(claim)
    assert isinstance(outcome, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 7), (1, 7)]
    assert [(run.phase, run.attempts) for run in runs] == [("calling", 1)]


async def test_progress_rises_with_what_happens(make_workshop: MakeWorkshop) -> None:
    workshop, seen = make_workshop(pool=False, per_call=1), []
    claim = await workshop.claim(n=2)
    workshop.instance.task_cache.on_change = lambda task: seen.append((task.progress, len(task.images)))
    await workshop.attempts.run(claim)
    assert seen == sorted(seen)
    assert seen[0] == (5, 0)
    assert seen[-1] == (95, 2)


async def test_a_picture_that_needs_no_keeping_is_received_and_stored_in_one_event(make_workshop: MakeWorkshop) -> None:
    workshop, seen = make_workshop(pool=False, per_call=1), []
    workshop.keeper.passthrough = lambda index, _picture, seed: StoredImage(index, seed=seed, url="https://example.com")
    claim = await workshop.claim(n=2)
    workshop.instance.task_cache.on_change = lambda task: seen.append((task.progress, len(task.images)))
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert seen == [(5, 0), (10, 0), (52, 1), (52, 1), (95, 2)]


async def test_what_the_upstream_says_of_its_work_is_progress_too(make_workshop: MakeWorkshop) -> None:
    async def halfway(call, watcher) -> Reply:
        for fraction in (0.5, 0.25, 7.0):
            watcher.progress(fraction)
            seen.append(claim.task.progress)
        return pictures(call.count)

    workshop, seen = make_workshop(pool=False), []
    workshop.provider.generate = halfway
    claim = await workshop.claim()
    await workshop.attempts.run(claim)
    assert seen == [38, 38, 66]


async def test_each_further_call_is_written_too_with_the_pictures_so_far(make_workshop: MakeWorkshop) -> None:
    async def seen(call) -> Reply:
        runs.append(await stored_run(workshop, claim))
        return pictures(call.count)

    runs: list = []
    workshop = make_workshop(default=seen, pool=False, per_call=1)
    claim = await workshop.claim(n=3, seed=10)
    await workshop.attempts.run(claim)
    assert [[image.index for image in run.images] for run in runs] == [[], [0], [0, 1]]
    assert [run.attempts for run in runs] == [1, 1, 1]
    assert workshop.provider.seeds == [10, 11, 12]


async def test_warnings_of_the_provider_are_told_once(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=pictures(warnings=("the seed was ignored",)), pool=False, per_call=1)
    outcome = await workshop.attempts.run(await workshop.claim(n=2))
    assert outcome.warnings == ("the seed was ignored",)


async def test_a_parameter_that_the_model_refuses_is_left_out_with_a_warning(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(no_parameter("steps"), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(steps=20))
    assert [call.without for call in workshop.provider.calls] == [frozenset(), {"steps"}]
    assert outcome.warnings == ("steps was left out: the model does not support it",)


@pytest.mark.parametrize("steps", [(no_parameter("steps"), no_parameter("width")), (no_parameter("n"),)])
async def test_a_second_parameter_or_one_that_is_needed_fails_the_task(make_workshop: MakeWorkshop, steps) -> None:
    workshop = make_workshop(*steps, pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(steps=20))
    assert isinstance(outcome, Failed)
    assert len(workshop.provider.calls) == len(steps)


async def test_a_model_that_is_gone_is_replaced_by_the_next_one_within_the_attempt(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(no_model(), no_model(), pool=False, per_call=1, fallback_models=("m", "b", "c", "d"))
    claim = await workshop.claim(n=2)
    outcome = await workshop.attempts.run(claim)
    assert workshop.provider.models_called == ["m", "b", "c", "c"]
    assert outcome.warnings == ("m is not available: c was used",)
    assert (claim.checkpoint.attempts, claim.task.model) == (1, "m")


async def test_where_no_model_is_left_the_refusal_of_the_asked_one_is_told(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(no_model("m"), no_model("b"), pool=False, fallback_models=("b",))
    outcome = await workshop.attempts.run(await workshop.claim())
    assert (outcome.error.code, outcome.error.detail) == ("model_not_available", "Unable to access model m")


async def test_another_error_of_the_next_model_is_told_as_it_is(make_workshop: MakeWorkshop) -> None:
    refusal = UpstreamError("content_policy", "no", status=422)
    workshop = make_workshop(no_model("m"), refusal, pool=False, fallback_models=("b",))
    outcome = await workshop.attempts.run(await workshop.claim())
    assert outcome.error.code == "content_policy"


async def test_the_next_model_may_refuse_a_parameter(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(no_model(), no_parameter("steps"), pool=False, fallback_models=("b",))
    outcome = await workshop.attempts.run(await workshop.claim(steps=20))
    assert workshop.provider.models_called == ["m", "b", "b"]
    assert len(outcome.warnings) == 2


async def test_missing_pictures_are_asked_for_once_more_with_seeds_not_sent_yet(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(3), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(n=4, seed=10))
    assert [(call.count, call.first_index, call.seed) for call in workshop.provider.calls] == [(4, 0, 10), (1, 3, 14)]
    assert [image.seed for image in outcome.images] == [10, 10, 10, 14]
    assert outcome.warnings == ()


async def test_pictures_that_stay_away_are_a_warning(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(2), pictures(0), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(n=4))
    assert len(outcome.images) == len(workshop.provider.calls) == 2
    assert outcome.warnings == ("only 2 of 4 images came",)


async def test_no_picture_at_all_is_a_bad_response(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=pictures(0), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(n=4))
    assert outcome.error.code == "upstream_bad_response"
    assert len(workshop.provider.calls) == 2


async def test_a_bad_answer_is_asked_for_once_more(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(no_picture(), pool=False)
    assert isinstance(await workshop.attempts.run(await workshop.claim()), Succeeded)
    workshop = make_workshop(default=no_picture(), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim("other"))
    assert outcome.error.detail == "HTTP 200, not JSON"
    assert len(workshop.provider.calls) == 2


async def test_a_picture_that_is_none_is_asked_for_once_more_and_spoils_no_other(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    workshop.keeper.faults = [ImageRejected("cut off", lasting=False), None]
    outcome = await workshop.attempts.run(await workshop.claim(n=2))
    assert [call.first_index for call in workshop.provider.calls] == [0, 0]
    assert [image.index for image in outcome.images] == [0, 1]


async def test_a_call_that_is_made_again_after_a_useless_answer_is_recorded(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(0), pictures(1), pictures(2), pictures(1), pool=False)
    claim = await workshop.claim("none came", n=1)
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert (claim.checkpoint.billed_again, claim.checkpoint.ambiguous_calls) == (1, 0)
    claim = await workshop.claim("too few came", n=3)
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert claim.checkpoint.billed_again == 0
    workshop.keeper.faults = [ImageRejected("cut off", lasting=False), None]
    claim = await workshop.claim("damaged")
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert claim.checkpoint.billed_again == 1


async def test_a_second_asking_that_was_broken_off_goes_on_where_it_was(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(0), pictures(1), pictures(0), pictures(1), fault(500), per_call=1, pool=False)
    claim = await workshop.claim(n=3, seed=10)
    outcome = await workshop.attempts.run(claim)
    assert isinstance(outcome, Retry)
    await settled(workshop, claim, outcome)
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert [(call.first_index, call.seed) for call in workshop.provider.calls] == [
        (0, 10), (1, 11), (2, 12), (0, 13), (2, 14), (2, 14)
    ]  # fmt: skip


@pytest.mark.parametrize("status", [500, 503])
async def test_pictures_are_kept_over_a_retry(make_workshop: MakeWorkshop, status: int) -> None:
    workshop = make_workshop(pictures(1), fault(status), per_call=1, pool=False)
    claim = await workshop.claim(n=3, seed=10)
    outcome = await workshop.attempts.run(claim)
    assert (outcome.counts_as_attempt, claim.checkpoint.attempts) == (True, 1)
    await settled(workshop, claim, outcome)
    assert [image.index for image in workshop.task(claim.task.id).images] == [0]
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert workshop.provider.seeds == [10, 11, 11, 12]


async def test_a_rate_limit_is_no_attempt(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(fault(429, retry_after_s=0.01), pool=False, max_attempts=1)
    claim = await workshop.claim()
    outcome = await workshop.attempts.run(claim)
    assert outcome == Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False)
    await settled(workshop, claim, outcome)
    assert claim.checkpoint.attempts == 0
    assert isinstance(await workshop.attempts.run(claim), Succeeded)


async def test_a_rate_limit_after_an_answer_that_was_of_no_use_is_one(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(0), fault(429, retry_after_s=0.01), per_call=1, pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(n=2))
    assert outcome == Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=True)


async def test_an_upstream_that_is_not_reached_costs_no_attempt(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(refused(), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim())
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.UPSTREAM_OVERLOADED, False)


async def test_a_loss_is_recorded_and_the_second_one_ends_the_task(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(loss(), loss(), pool=False)
    claim = await workshop.claim()
    outcome = await workshop.attempts.run(claim)
    assert isinstance(outcome, Retry)
    await settled(workshop, claim, outcome)
    assert workshop.task(claim.task.id).possibly_billed_twice == 1
    outcome = await workshop.attempts.run(claim)
    assert outcome.error.code == "upstream_timeout"
    assert claim.checkpoint.ambiguous_calls == 2


async def test_a_task_that_a_crash_left_without_attempts_is_interrupted(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    claim = await workshop.claim()
    for run in (replace(claim.checkpoint, attempts=3), replace(claim.checkpoint, attempts=1, ambiguous_calls=2)):
        claim.checkpoint = run
        assert (await workshop.attempts.run(claim)).error.code == "interrupted"
    assert workshop.provider.calls == []


async def test_a_task_whose_deadline_has_passed_is_not_called_for(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, deadline_s=0.0)
    outcome = await workshop.attempts.run(await workshop.claim())
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_timeout", True)
    assert workshop.provider.calls == []


async def test_a_claim_that_waits_for_its_turn_is_pending_says_why_and_costs_no_command(
    make_workshop: MakeWorkshop,
) -> None:
    workshop = make_workshop(pool=False, tempo=SLOW)
    claim = await workshop.claim()
    await pause(workshop)
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.task(claim.task.id).reason is WaitReason.UPSTREAM_RATE_LIMITED)
    task = workshop.task(claim.task.id)
    assert (task.state, task.attempts, task.sequence) == (State.PENDING, 0, task.epoch + 1)
    assert task.retry_at == pytest.approx(workshop.attempts.clock() + 60.0, abs=1.0)
    assert await stored_run(workshop, claim) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_it_starts_when_its_turn_comes(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    claim = await workshop.claim()
    await pause(workshop, retry_after_s=0.05)
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    assert (claim.task.attempts, claim.task.reason, claim.task.retry_at) == (1, None, None)


async def test_a_claim_that_is_lost_leaves_its_wait_at_once(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, tempo=SLOW)
    claim = await workshop.claim()
    await pause(workshop)
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.pacing._waiters)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 1.0), ClaimLost)
    assert not workshop.pacing._waiters
    assert workshop.provider.calls == []


async def test_quiet_leaves_a_claim_that_waits_unstarted(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False, tempo=SLOW)
    claim = await workshop.claim()
    await pause(workshop)
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.pacing._waiters)
    workshop.pacing.quiet()
    assert isinstance(await asyncio.wait_for(running, 1.0), NotStarted)


@pytest.mark.parametrize(
    ("error", "code"), [(fault(429, retry_after_s=60.0), "upstream_rate_limited"), (refused(), "upstream_overloaded")]
)
async def test_the_deadline_ends_a_wait_with_what_was_waited_for(
    make_workshop: MakeWorkshop, error: UpstreamError, code: str
) -> None:
    workshop = make_workshop(pool=False, tempo=SLOW, deadline_s=0.2)
    claim = await workshop.claim()
    for _ in range(2):
        if turn := workshop.pacing.try_acquire("m"):
            with turn:
                workshop.pacing.failed(turn, error, unfinished=None)
    outcome = await asyncio.wait_for(workshop.attempts.run(claim), 2.0)
    assert outcome.error.code == code
    assert "within 0.2 s" in outcome.error.detail
    assert workshop.provider.calls == []


async def test_a_rest_in_the_midst_of_an_attempt_ends_it_at_no_cost_and_keeps_its_pictures(
    make_workshop: MakeWorkshop,
) -> None:
    async def then_pause(call) -> Reply:
        await pause(workshop)
        return pictures(call.count)

    workshop = make_workshop(then_pause, per_call=1, pool=False, tempo=SLOW)
    claim = await workshop.claim(n=2)
    outcome = await workshop.attempts.run(claim)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.UPSTREAM_RATE_LIMITED, False)
    assert outcome.delay_s == pytest.approx(60.0, abs=1.0)
    assert len(claim.checkpoint.images) == 1


async def test_a_short_wait_in_the_midst_of_an_attempt_is_waited_for(make_workshop: MakeWorkshop) -> None:
    full = pictures(1, limits=UpstreamLimits(remaining=0, reset_s=0.1))
    workshop = make_workshop(full, per_call=1, pool=False, tempo=BreakerConfig(step_s=1.0))
    claim = await workshop.claim(n=2)
    assert isinstance(await workshop.attempts.run(claim), Succeeded)
    first, second = workshop.provider.times
    assert second - first >= 0.09
    assert claim.checkpoint.starts == 1


async def test_quiet_ends_a_wait_in_the_midst_of_an_attempt_and_counts_nothing(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(per_call=1, pool=False, rate_per_min=1)
    claim = await workshop.claim(n=2)
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.pacing._waiters)
    assert claim.task.state is State.PROCESSING
    workshop.pacing.quiet()
    assert await asyncio.wait_for(running, 1.0) == Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False)


async def test_a_claim_that_is_lost_drops_its_call_at_once_and_not_the_loop(make_workshop: MakeWorkshop) -> None:
    async def hang(_call) -> Reply:
        try:
            await asyncio.Event().wait()
        finally:
            dropped.set()
        raise AssertionError

    dropped = asyncio.Event()
    workshop = make_workshop(hang, pool=False)
    claim = await workshop.claim()
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 1.0), ClaimLost)
    assert dropped.is_set()
    assert running.cancelling() == 0


async def test_a_claim_that_is_lost_is_lost_though_the_call_swallows_its_cancellation(
    make_workshop: MakeWorkshop,
) -> None:
    async def stubborn(call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return pictures(call.count)
        raise AssertionError

    workshop = make_workshop(stubborn, pool=False)
    claim = await workshop.claim()
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 1.0), ClaimLost)
    assert running.cancelling() == 0


async def test_a_loop_that_is_cancelled_while_its_claim_is_lost_is_cancelled(make_workshop: MakeWorkshop) -> None:
    async def hang(_call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    workshop = make_workshop(hang, pool=False)
    claim = await workshop.claim()
    running = asyncio.create_task(workshop.attempts.run(claim))
    await eventually(lambda: workshop.provider.calls)
    claim.mark_lost()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_checkpoint_that_finds_the_claim_lost_ends_the_attempt_and_cancels_nobody(
    make_workshop: MakeWorkshop,
) -> None:
    async def stolen(call) -> Reply:
        key = workshop.instance.keys.checkpoint(claim.task.id)
        await workshop.instance.connection.commands.set(key, Checkpoint("another").encode("9-0"))
        return pictures(call.count)

    async def and_then() -> None:
        outcomes.append(await workshop.attempts.run(claim))
        await asyncio.sleep(0)
        outcomes.append("and goes on")

    outcomes: list = []
    workshop = make_workshop(stolen, per_call=1, pool=False)
    claim = await workshop.claim(n=2)
    await asyncio.wait_for(asyncio.create_task(and_then()), 5)
    assert outcomes == [ClaimLost(), "and goes on"]
    assert len(workshop.provider.calls) == 1


async def test_a_claim_that_is_lost_already_is_not_called_for(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    claim = await workshop.claim()
    claim.mark_lost()
    assert isinstance(await workshop.attempts.run(claim), ClaimLost)
    assert workshop.provider.calls == []


async def test_what_was_handed_back_goes_on_with_the_pictures_it_has(make_workshop: MakeWorkshop) -> None:
    one = make_workshop(pictures(1), fault(500), per_call=1, pool=False, base_s=60.0)
    claim = await one.claim(n=2, seed=10)
    await one.pool._report(claim, await one.attempts.run(claim))
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_workshop(per_call=1, pool=False)
    taken = await asyncio.wait_for(two.instance.worker_queue.claim(), 5)
    outcome = await two.attempts.run(taken)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 10), (1, 11)]
    assert two.provider.seeds == [11]
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (2, 0)


async def test_nothing_is_called_for_where_all_pictures_are_there(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    claim = await workshop.claim()
    claim.checkpoint = replace(claim.checkpoint, images=(StoredImage(0),))
    assert await workshop.attempts.run(claim) == Succeeded((StoredImage(0),))
    assert workshop.provider.calls == []


def too_many(most: int) -> UpstreamError:
    detail = f"n must be between 1 and {most}"
    return UpstreamError("upstream_invalid_request", detail, status=400, parameter="n", max_count=most)


async def test_images_that_a_model_makes_one_a_call_are_asked_for_in_as_many_calls(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(too_many(1), pool=False)
    claim = await workshop.claim(n=3, seed=10)
    outcome = await workshop.attempts.run(claim)
    assert [(call.count, call.first_index, call.seed) for call in workshop.provider.calls] == [
        (3, 0, 10), (1, 0, 10), (1, 1, 11), (1, 2, 12)
    ]  # fmt: skip
    assert [image.seed for image in outcome.images] == [10, 11, 12]
    assert (outcome.warnings, claim.checkpoint.attempts) == ((), 1)


async def test_how_many_images_a_model_makes_a_call_is_learned_once(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(too_many(2), pool=False)
    for prompt in ("a", "b"):
        assert len((await workshop.attempts.run(await workshop.claim(prompt, n=4))).images) == 4
    assert [call.count for call in workshop.provider.calls] == [4, 2, 2, 2, 2]
    await workshop.attempts.run(await workshop.claim("c", n=4, model="another"))
    assert workshop.provider.calls[-1].count == 4


async def test_a_count_that_is_refused_down_to_one_fails_the_task(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=too_many(8), pool=False)
    outcome = await workshop.attempts.run(await workshop.claim(n=3))
    assert outcome.error.code == "upstream_invalid_request"
    assert [call.count for call in workshop.provider.calls] == [3, 2, 1]


async def test_a_failed_attempt_is_logged_in_plain_words(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(fault(500), pool=False)
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    await workshop.attempts.run(await workshop.claim())
    logger.remove(sink)
    [line] = [line for line in lines if "attempt failed" in line]
    assert "upstream_error (HTTP 500); retry in" in line
    assert "Retry(" not in line
