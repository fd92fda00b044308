"""Tests of calls that an attempt adapts: refused parameters, missing models and the number of images of a call."""

from __future__ import annotations

import pytest

from imagegen.errors import UpstreamError
from imagegen.tasks.retry import Failed, Succeeded
from tests.worker.attempt_steps import no_parameter
from tests.worker.conftest import MakeHarness, images, no_model


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
