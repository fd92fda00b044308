"""Tests of what an attempt requests again at once: missing images, bad responses and invalid images."""

from __future__ import annotations

import pytest

from imagegen.errors import ImageRejected, UpstreamError
from imagegen.tasks.retry import Failed, Retry, Succeeded
from tests.worker.attempt_steps import settled
from tests.worker.conftest import MakeHarness, fault, images


def no_image() -> UpstreamError:
    return UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)


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


@pytest.mark.parametrize("between", [fault(429, retry_after_s=0.0), fault(500), fault(503)], ids=["429", "500", "503"])
async def test_a_repeat_that_is_refused_is_not_recorded_as_paid(
    make_harness: MakeHarness, between: UpstreamError
) -> None:
    harness = make_harness(images(0), between, images(1), pool=False)
    claim = await harness.claim()
    outcome = await harness.attempts.run(claim)
    if isinstance(outcome, Retry):
        assert claim.checkpoint.billed_again == 0
        await settled(harness, claim, outcome)
        assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert claim.checkpoint.billed_again == len(harness.provider.calls) - 2


async def test_an_interrupted_second_request_resumes(make_harness: MakeHarness) -> None:
    harness = make_harness(images(0), images(1), images(0), images(1), fault(500), per_call=1, pool=False)
    claim = await harness.claim(n=3, seed=10)
    outcome = await harness.run(claim, Retry)
    await settled(harness, claim, outcome)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert [(call.first_index, call.seed) for call in harness.provider.calls] == [
        (0, 10), (1, 11), (2, 12), (0, 13), (2, 14), (2, 14)
    ]  # fmt: skip
