from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from imagegen.errors import ImageRejected, UpstreamError
from imagegen.providers.protocol import Call, CallObserver, Reply, UpstreamLimits
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.image import GivenImage, StoredImage
from imagegen.tasks.retry import ClaimLost, Failed, NotStarted, Outcome, Retry, Succeeded
from imagegen.tasks.task import State, WaitReason
from imagegen.worker.attempt_limits import SeedSupport
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually, logged
from tests.worker.conftest import MakeHarness, WorkerHarness, fault, images, loss, no_model, refused

SLOW = BreakerConfig(probe_s=60.0)


def no_parameter(name: str) -> UpstreamError:
    return UpstreamError("upstream_invalid_request", f"Unsupported use of '{name}'", refused=(name,), status=400)


def no_image() -> UpstreamError:
    return UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)


async def stored_checkpoint(harness: WorkerHarness, claim: Claim) -> Checkpoint | None:
    (value,) = await harness.instance.verbs.read_checkpoints([claim.task.id])
    return None if value is None else decode_checkpoint(value)[1]


async def pause(harness: WorkerHarness, model: str = "m", retry_after_s: float = 60.0) -> None:
    """Pause a model by a rate limit of the upstream."""
    turn = harness.pacing.try_acquire(model)
    assert turn is not None
    with turn:
        harness.pacing.failed(turn, fault(429, retry_after_s=retry_after_s), unfinished=None)


async def settled(harness: WorkerHarness, claim: Claim, outcome: Outcome) -> None:
    """Settle the outcome as the pool does; return when the claim is offered again."""
    await harness.pool._report(claim, outcome)
    if isinstance(outcome, Retry):
        assert await harness.instance.claim() is claim


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


async def test_warnings_of_the_provider_are_reported_once(make_harness: MakeHarness) -> None:
    harness = make_harness(default=images(warnings=("the seed was ignored",)), pool=False, per_call=1)
    outcome = await harness.run(await harness.claim(n=2), Succeeded)
    assert outcome.warnings == ("the seed was ignored",)


async def test_a_refused_parameter_is_dropped_with_a_warning(make_harness: MakeHarness) -> None:
    harness = make_harness(no_parameter("steps"), pool=False)
    outcome = await harness.run(await harness.claim(steps=20), Succeeded)
    assert [call.without for call in harness.provider.calls] == [frozenset(), {"steps"}]
    assert outcome.warnings == ("steps was left out: the model does not support it",)


async def test_a_field_of_the_service_itself_is_left_out_without_a_warning(make_harness: MakeHarness) -> None:
    refusal = UpstreamError("upstream_invalid_request", "no such field", refused=("response_format",), status=400)
    harness = make_harness(refusal, pool=False)
    outcome = await harness.run(await harness.claim(), Succeeded)
    assert outcome.warnings == ()
    assert [call.without for call in harness.provider.calls] == [frozenset(), frozenset({"response_format"})]


async def test_refused_parameters_are_dropped_in_turn_or_together(make_harness: MakeHarness) -> None:
    both = UpstreamError("upstream_invalid_request", "no", refused=("quality", "x_style"), status=400)
    harness = make_harness(no_parameter("steps"), both, pool=False)
    outcome = await harness.run(await harness.claim(steps=20, quality="high", extra={"x_style": 1}), Succeeded)
    dropped = [frozenset(), {"steps"}, {"steps", "quality", "x_style"}]
    assert [call.without for call in harness.provider.calls] == dropped
    assert len(outcome.warnings) == 3


@pytest.mark.parametrize(
    "refusals",
    [
        [no_parameter("n")],
        [no_parameter("prompt")],
        [no_parameter("quality")],
        [no_parameter("steps"), no_parameter("steps")],
    ],
)
async def test_a_parameter_that_is_needed_or_was_not_sent_fails_the_task(
    make_harness: MakeHarness, refusals: list[UpstreamError]
) -> None:
    harness = make_harness(*refusals, pool=False)
    await harness.run(await harness.claim(steps=20), Failed)
    assert len(harness.provider.calls) == len(refusals)


async def test_at_most_sixteen_parameters_are_dropped(make_harness: MakeHarness) -> None:
    names = [f"x_{number}" for number in range(20)]
    harness = make_harness(*map(no_parameter, names), pool=False)
    await harness.run(await harness.claim(extra=dict.fromkeys(names, 1)), Failed)
    assert len(harness.provider.calls) == 17


async def test_a_variant_sends_a_seed_of_its_own_and_records_it(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, per_call=1)
    outcomes = [await harness.run(await harness.claim(variant=number, n=2), Succeeded) for number in (0, 1, 2)]
    plain, first, second = ([image.seed for image in outcome.images] for outcome in outcomes)
    assert plain == [None, None]
    for seed, following in (first, second):
        assert seed is not None
        assert following == seed + 1
    assert set(first).isdisjoint(second)
    assert harness.provider.seeds == [None, None, *first, *second]


async def test_the_clients_seed_comes_before_that_of_a_variant(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    outcome = await harness.run(await harness.claim(variant=3, seed=7), Succeeded)
    assert harness.provider.seeds == [image.seed for image in outcome.images] == [7]


async def test_a_refused_seed_of_a_variant_is_left_out_for_all_later_ones(make_harness: MakeHarness) -> None:
    harness = make_harness(no_parameter("seed"), pool=False)
    outcomes = [await harness.run(await harness.claim(variant=number), Succeeded) for number in (1, 2)]
    first, *later = harness.provider.seeds
    assert first is not None
    assert later == [None, None]
    assert [(image.seed, outcome.warnings) for outcome in outcomes for image in outcome.images] == [(None, ())] * 2
    await harness.attempts.run(await harness.claim(variant=1, model="other"))
    assert harness.provider.seeds[-1] is not None


async def test_a_seed_refused_with_other_fields_is_left_out_with_them(make_harness: MakeHarness) -> None:
    both = UpstreamError("upstream_invalid_request", "no", refused=("seed", "steps"), status=400)
    harness = make_harness(both, pool=False)
    outcome = await harness.run(await harness.claim(variant=1, steps=4), Succeeded)
    assert [(call.seed is None, call.without) for call in harness.provider.calls] == [
        (False, frozenset()),
        (True, frozenset({"steps"})),
    ]
    assert outcome.warnings == ("steps was left out: the model does not support it",)


async def test_a_seed_that_is_refused_though_none_was_sent_fails_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(default=no_parameter("seed"), pool=False)
    for fields in ({"variant": 0}, {"variant": 1}):
        assert isinstance(await harness.attempts.run(await harness.claim(**fields)), Failed)
    assert len(harness.provider.calls) == 3


async def test_a_refused_seed_of_the_client_is_not_recorded_as_sent(make_harness: MakeHarness) -> None:
    harness = make_harness(no_parameter("seed"), pool=False)
    outcome = await harness.run(await harness.claim(seed=7), Succeeded)
    assert [image.seed for image in outcome.images] == [None]
    assert outcome.warnings == ("seed was left out: the model does not support it",)


@pytest.mark.parametrize(
    ("carried", "published", "of_client", "of_variant"),
    [(True, None, 7, True), (True, True, 7, True), (True, False, 7, False), (False, None, None, False)],
)
async def test_seeds_are_sent_where_provider_and_model_take_them(
    make_harness: MakeHarness, carried: bool, published: bool | None, of_client: int | None, of_variant: bool
) -> None:
    harness = make_harness(pool=False)
    support = SeedSupport(lambda _model: carried, lambda _model: published)
    object.__setattr__(harness.attempts, "seeds", support)
    given = await harness.run(await harness.claim(seed=7), Succeeded)
    variant = await harness.run(await harness.claim(variant=1), Succeeded)
    assert [image.seed for image in given.images] == [of_client]
    assert [image.seed is not None for image in variant.images] == [of_variant]


async def test_images_that_are_made_afresh_have_a_number_of_their_own(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    await harness.attempts.run(claim)
    claim.task = replace(claim.task, stale_images=True, images=(StoredImage(0, sha256="a" * 64),))
    claim.checkpoint = Checkpoint(claim.checkpoint.owner)
    await harness.attempts.run(claim)
    assert [call.repeat for call in harness.provider.calls] == [0, claim.task.epoch]


async def test_a_missing_model_is_replaced_by_the_next_within_the_attempt(make_harness: MakeHarness) -> None:
    harness = make_harness(no_model(), no_model(), pool=False, per_call=1, fallback_models=("m", "b", "c", "d"))
    claim = await harness.claim(n=2)
    outcome = await harness.run(claim, Succeeded)
    assert harness.provider.models_called == ["m", "b", "c", "c"]
    assert outcome.warnings == ("m is not available: c was used",)
    assert (claim.checkpoint.attempts, claim.task.model) == (1, "m")


async def test_the_refusal_of_the_requested_model_is_reported(make_harness: MakeHarness) -> None:
    harness = make_harness(no_model("m"), no_model("b"), pool=False, fallback_models=("b",))
    outcome = await harness.run(await harness.claim(), Failed)
    assert (outcome.error.code, outcome.error.detail) == ("model_not_available", "Unable to access model m")


async def test_another_error_of_the_next_model_is_reported_unchanged(make_harness: MakeHarness) -> None:
    refusal = UpstreamError("content_policy", "no", status=422)
    harness = make_harness(no_model("m"), refusal, pool=False, fallback_models=("b",))
    outcome = await harness.run(await harness.claim(), Failed)
    assert outcome.error.code == "content_policy"


async def test_the_next_model_may_refuse_a_parameter(make_harness: MakeHarness) -> None:
    harness = make_harness(no_model(), no_parameter("steps"), pool=False, fallback_models=("b",))
    outcome = await harness.run(await harness.claim(steps=20), Succeeded)
    assert harness.provider.models_called == ["m", "b", "b"]
    assert len(outcome.warnings) == 2


async def test_missing_images_are_requested_once_more_with_new_seeds(make_harness: MakeHarness) -> None:
    harness = make_harness(images(3), pool=False)
    outcome = await harness.run(await harness.claim(n=4, seed=10), Succeeded)
    assert [(call.count, call.first_index, call.seed) for call in harness.provider.calls] == [(4, 0, 10), (1, 3, 14)]
    assert [image.seed for image in outcome.images] == [10, 10, 10, 14]
    assert outcome.warnings == ()


async def test_images_that_stay_missing_cause_a_warning(make_harness: MakeHarness) -> None:
    harness = make_harness(images(2), images(0), pool=False)
    outcome = await harness.run(await harness.claim(n=4), Succeeded)
    assert len(outcome.images) == len(harness.provider.calls) == 2
    assert outcome.warnings == ("only 2 of 4 images came",)


async def test_a_response_without_images_is_a_bad_response(make_harness: MakeHarness) -> None:
    harness = make_harness(default=images(0), pool=False)
    outcome = await harness.run(await harness.claim(n=4), Failed)
    assert outcome.error.code == "upstream_bad_response"
    assert len(harness.provider.calls) == 2


@pytest.mark.parametrize("status", [302, 307])
async def test_a_redirect_of_a_call_is_neither_charged_nor_requested_again(
    make_harness: MakeHarness, status: int
) -> None:
    harness = make_harness(
        default=UpstreamError("upstream_bad_response", "a redirect, which is not followed", status=status), pool=False
    )
    claim = await harness.claim()
    outcome = await harness.run(claim, Failed)
    assert (outcome.error.code, outcome.error.retryable) == ("upstream_bad_response", False)
    assert (len(harness.provider.calls), claim.checkpoint.billed_again, claim.cost.unpriced) == (1, 0, 0)


async def test_a_bad_response_is_requested_once_more(make_harness: MakeHarness) -> None:
    harness = make_harness(no_image(), pool=False)
    assert isinstance(await harness.attempts.run(await harness.claim()), Succeeded)
    harness = make_harness(default=no_image(), pool=False)
    outcome = await harness.run(await harness.claim("other"), Failed)
    assert outcome.error.detail == "HTTP 200, not JSON"
    assert len(harness.provider.calls) == 2


async def test_a_response_that_no_call_can_read_is_not_requested_again(make_harness: MakeHarness) -> None:
    detail = "HTTP 200, compressed by br"
    harness = make_harness(
        default=UpstreamError("upstream_bad_response", detail, status=200, lasting=True), per_call=1, pool=False
    )
    outcome = await harness.run(await harness.claim(), Failed)
    assert (outcome.error.detail, outcome.error.retryable, len(harness.provider.calls)) == (detail, False, 1)
    await harness.attempts.run(await harness.claim("several", n=4))
    assert len(harness.provider.calls) == 1 + 2


async def test_an_invalid_image_is_requested_again_and_affects_no_other(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    harness.image_saver.faults = [ImageRejected("cut off", lasting=False), None]
    outcome = await harness.run(await harness.claim(n=2), Succeeded)
    assert [call.first_index for call in harness.provider.calls] == [0, 0]
    assert [image.index for image in outcome.images] == [0, 1]


async def test_a_call_repeated_after_a_bad_response_is_recorded(make_harness: MakeHarness) -> None:
    harness = make_harness(images(0), images(1), images(2), images(1), pool=False)
    claim = await harness.claim("none came", n=1)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert (claim.checkpoint.billed_again, claim.checkpoint.ambiguous_calls) == (1, 0)
    claim = await harness.claim("too few came", n=3)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert claim.checkpoint.billed_again == 0
    harness.image_saver.faults = [ImageRejected("cut off", lasting=False), None]
    claim = await harness.claim("damaged")
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert claim.checkpoint.billed_again == 1


async def test_an_interrupted_second_request_resumes(make_harness: MakeHarness) -> None:
    harness = make_harness(images(0), images(1), images(0), images(1), fault(500), per_call=1, pool=False)
    claim = await harness.claim(n=3, seed=10)
    outcome = await harness.run(claim, Retry)
    await settled(harness, claim, outcome)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert [(call.first_index, call.seed) for call in harness.provider.calls] == [
        (0, 10), (1, 11), (2, 12), (0, 13), (2, 14), (2, 14)
    ]  # fmt: skip


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


async def test_a_waiting_claim_is_pending_with_a_reason_at_no_command(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.task(claim.task.id).reason is WaitReason.UPSTREAM_RATE_LIMITED)
    task = harness.task(claim.task.id)
    assert (task.state, task.attempts, task.sequence) == (State.PENDING, 0, task.epoch + 1)
    assert task.retry_at == pytest.approx(harness.attempts.clock() + 60.0, abs=1.0)
    assert await stored_checkpoint(harness, claim) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_waiting_claim_starts_at_its_turn(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    await pause(harness, retry_after_s=0.05)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert (claim.task.attempts, claim.task.reason, claim.task.retry_at) == (1, None, None)


async def test_a_lost_claim_ends_its_wait_at_once(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert not harness.pacing.waiters
    assert harness.provider.calls == []


async def test_quiet_leaves_a_waiting_claim_unstarted(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    harness.pacing.quiet()
    assert isinstance(await asyncio.wait_for(running, 20), NotStarted)


@pytest.mark.parametrize(
    ("error", "code"), [(fault(429, retry_after_s=60.0), "upstream_rate_limited"), (refused(), "upstream_overloaded")]
)
async def test_the_deadline_ends_a_wait_and_reports_its_reason(
    make_harness: MakeHarness, error: UpstreamError, code: str
) -> None:
    harness = make_harness(pool=False, tempo=SLOW, deadline_s=0.2)
    claim = await harness.claim()
    for _ in range(2):
        if turn := harness.pacing.try_acquire("m"):
            with turn:
                harness.pacing.failed(turn, error, unfinished=None)
    outcome = await asyncio.wait_for(harness.run(claim, Failed), 20)
    assert outcome.error.code == code
    assert "within 0.2 s" in outcome.error.detail
    assert harness.provider.calls == []


async def test_a_pause_during_an_attempt_ends_it_and_preserves_its_images(
    make_harness: MakeHarness,
) -> None:
    async def then_pause(call: Call) -> Reply:
        await pause(harness)
        return images(call.count)

    harness = make_harness(then_pause, per_call=1, pool=False, tempo=SLOW)
    claim = await harness.claim(n=2)
    outcome = await harness.run(claim, Retry)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.UPSTREAM_RATE_LIMITED, False)
    assert outcome.delay_s == pytest.approx(60.0, abs=1.0)
    assert len(claim.checkpoint.images) == 1


async def test_a_short_pause_during_an_attempt_is_waited_out(make_harness: MakeHarness) -> None:
    full = images(1, limits=UpstreamLimits(remaining=0, reset_s=0.1))
    harness = make_harness(full, per_call=1, pool=False, tempo=BreakerConfig(step_s=1.0))
    claim = await harness.claim(n=2)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    first, second = harness.provider.times
    assert second - first >= 0.09
    assert claim.checkpoint.starts == 1


async def test_quiet_ends_a_wait_during_an_attempt_without_a_count(make_harness: MakeHarness) -> None:
    harness = make_harness(per_call=1, pool=False, rate_per_min=1)
    claim = await harness.claim(n=2)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    assert claim.task.state is State.PROCESSING
    harness.pacing.quiet()
    assert await asyncio.wait_for(running, 20) == Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False)


async def test_a_lost_claim_cancels_its_call_but_not_the_loop(make_harness: MakeHarness) -> None:
    async def hang(_call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        finally:
            dropped.set()
        raise AssertionError

    dropped = asyncio.Event()
    harness = make_harness(hang, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert dropped.is_set()
    assert running.cancelling() == 0


async def test_a_claim_is_lost_even_if_its_call_ignores_cancellation(
    make_harness: MakeHarness,
) -> None:
    async def stubborn(call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return images(call.count)
        raise AssertionError

    harness = make_harness(stubborn, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert running.cancelling() == 0


async def test_a_loop_cancelled_during_a_lost_claim_is_cancelled(make_harness: MakeHarness) -> None:
    async def hang(_call: Call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    harness = make_harness(hang, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_checkpoint_of_a_lost_claim_ends_only_the_attempt(
    make_harness: MakeHarness,
) -> None:
    async def stolen(call: Call) -> Reply:
        key = harness.instance.keys.checkpoint(claim.task.id)
        await harness.instance.connection.commands.set(key, Checkpoint("another").encode("9-0"))
        return images(call.count)

    async def and_then() -> None:
        outcomes.append(await harness.attempts.run(claim))
        await asyncio.sleep(0)
        outcomes.append("and goes on")

    outcomes: list[Outcome | str] = []
    harness = make_harness(stolen, per_call=1, pool=False)
    claim = await harness.claim(n=2)
    await asyncio.wait_for(asyncio.create_task(and_then()), 20)
    assert outcomes == [ClaimLost(), "and goes on"]
    assert len(harness.provider.calls) == 1


async def test_a_claim_lost_earlier_makes_no_call(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.mark_lost()
    assert isinstance(await harness.attempts.run(claim), ClaimLost)
    assert harness.provider.calls == []


async def test_a_released_task_resumes_with_its_images(make_harness: MakeHarness) -> None:
    one = make_harness(images(1), fault(500), per_call=1, pool=False, base_s=60.0)
    claim = await one.claim(n=2, seed=10)
    await one.pool._report(claim, await one.attempts.run(claim))
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness(per_call=1, pool=False)
    taken = await two.instance.claim()
    outcome = await two.run(taken, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 10), (1, 11)]
    assert two.provider.seeds == [11]
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (2, 0)


async def test_no_call_is_made_if_all_images_exist(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.checkpoint = replace(claim.checkpoint, images=(StoredImage(0),))
    assert await harness.attempts.run(claim) == Succeeded((StoredImage(0),))
    assert harness.provider.calls == []


def too_many(most: int) -> UpstreamError:
    detail = f"n must be between 1 and {most}"
    return UpstreamError("upstream_invalid_request", detail, status=400, max_count=most)


async def test_one_image_a_call_means_one_call_for_each_image(make_harness: MakeHarness) -> None:
    harness = make_harness(too_many(1), pool=False)
    claim = await harness.claim(n=3, seed=10)
    outcome = await harness.run(claim, Succeeded)
    assert [(call.count, call.first_index, call.seed) for call in harness.provider.calls] == [
        (3, 0, 10), (1, 0, 10), (1, 1, 11), (1, 2, 12)
    ]  # fmt: skip
    assert [image.seed for image in outcome.images] == [10, 11, 12]
    assert (outcome.warnings, claim.checkpoint.attempts) == ((), 1)


async def test_the_image_limit_of_a_model_is_learned_once(make_harness: MakeHarness) -> None:
    harness = make_harness(too_many(2), pool=False)
    for prompt in ("a", "b"):
        assert len((await harness.run(await harness.claim(prompt, n=4), Succeeded)).images) == 4
    assert [call.count for call in harness.provider.calls] == [4, 2, 2, 2, 2]
    await harness.attempts.run(await harness.claim("c", n=4, model="another"))
    assert harness.provider.calls[-1].count == 4


async def test_a_count_that_is_refused_down_to_one_fails_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(default=too_many(8), pool=False)
    outcome = await harness.run(await harness.claim(n=3), Failed)
    assert outcome.error.code == "upstream_invalid_request"
    assert [call.count for call in harness.provider.calls] == [3, 2, 1]


async def test_a_failed_attempt_is_logged_in_plain_words(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(500), pool=False)
    with logged("DEBUG", "{message}") as lines:
        await harness.attempts.run(await harness.claim())
    [line] = [line for line in lines if "attempt failed" in line]
    assert "upstream_error (HTTP 500); retry in" in line
    assert "Retry(" not in line
