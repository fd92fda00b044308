"""Tests of fal: the words of its models, the meaning of its errors, and jobs at an emulated queue."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from yarl import URL

from imagegen.emulator.fal import FalEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.fal import FalProvider
from imagegen.providers.fal_requests import fields_of, model_path, sent_request, warnings_of
from imagegen.providers.fal_responses import JobStatus, parse_acceptance, parse_result, parse_status
from imagegen.providers.post import RawResponse
from imagegen.tasks.image import ImageLink
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.retry import was_never_sent
from tests.emulated_jobs import Recorder, begun_only, emulated, failed, quick_polls, replied
from tests.providers.conftest import MakeCall
from tests.support import over_rows

quick = pytest.fixture(quick_polls)
MODEL = "fal-ai/flux/dev"


@pytest.fixture
async def queue() -> AsyncIterator[FalEmulator]:
    async with emulated(FalEmulator, job_s=0.05) as queue:
        yield queue


@pytest.fixture
def fal(session: aiohttp.ClientSession, queue: FalEmulator) -> FalProvider:
    return FalProvider(session, api_key="id:secret", base_url=queue.url, timeout_s=30, channel="main")


# --- requests ---


@over_rows(
    ("given", "sent"),
    [
        ({}, {"image_size": {"width": 512, "height": 512}}),
        ({"width": 1024, "height": 768}, {"image_size": {"width": 1024, "height": 768}}),
        ({"steps": 28, "guidanceScale": 3.5}, {"num_inference_steps": 28, "guidance_scale": 3.5}),
        ({"negativePrompt": "dogs"}, {"negative_prompt": "dogs"}),
        ({"outputFormat": "png"}, {"output_format": "png"}),
        ({"disableSafetyChecker": True}, {"enable_safety_checker": False}),
        ({"promptUpsampling": True}, {"enhance_prompt": True}),
        (
            {"imageLoras": [{"path": "https://a.example/l", "scale": 0.5}]},
            {"loras": [{"path": "https://a.example/l", "scale": 0.5}]},
        ),
        ({"imageUrl": "https://a.example/1.png"}, {"image_url": "https://a.example/1.png"}),
        (
            {"imageUrl": "https://a.example/1.png", "mask": "https://a.example/2.png"},
            {"mask_url": "https://a.example/2.png"},
        ),
        ({"extra": {"safety_tolerance": "2"}}, {"safety_tolerance": "2"}),
    ],
)
def test_a_field_is_sent_in_the_words_of_fal(make_call: MakeCall, given: dict[str, Any], sent: dict[str, Any]) -> None:
    fields = json.loads(json.dumps(fields_of(make_call(model=MODEL, **given))))
    assert {name: fields.get(name) for name in sent} == sent
    assert not {"model", "n", "steps", "width", "height", "sync_mode", "disable_safety_checker"} & fields.keys()


@over_rows(
    ("model", "given", "sent"),
    [
        (
            "fal-ai/nano-banana-2",
            {"aspectRatio": "16:9", "resolution": "2K"},
            {"aspect_ratio": "16:9", "resolution": "2K"},
        ),
        (
            "fal-ai/nano-banana-2",
            {"aspectRatio": "16:9", "resolution": "512"},
            {"aspect_ratio": "16:9", "resolution": "0.5K"},
        ),
        ("fal-ai/nano-banana-2", {"width": 1920, "height": 1080}, {"aspect_ratio": "16:9", "resolution": "2K"}),
        ("openai/gpt-image-2", {"quality": "high"}, {"aspect_ratio": "1:1", "quality": "high"}),
        ("fal-ai/flux-pro/kontext", {"width": 1024, "height": 768}, {"aspect_ratio": "4:3"}),
        (
            "fal-ai/nano-banana-2",
            {"referenceImages": ["https://a.example/1.png"]},
            {"image_urls": ["https://a.example/1.png"]},
        ),
    ],
)
def test_a_model_that_is_sized_by_ratio_gets_no_pixels(
    make_call: MakeCall, model: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    fields = fields_of(make_call(model=model, **given))
    assert {name: fields.get(name) for name in sent} == sent
    assert "image_size" not in fields


def test_a_call_for_several_images_with_a_seed(make_call: MakeCall) -> None:
    fields = fields_of(make_call(model=MODEL, count=3, seed=7, n=3))
    assert (fields["num_images"], fields["seed"]) == (3, 7)


@over_rows("model", ["flux", "../a/b", "a/../b", "a//b", "a/b?fal_webhook=x", "a/b#c", "a/b%2f", " a/b", "a/b/"])
def test_a_name_that_is_no_path_of_a_model_is_not_sent(make_call: MakeCall, model: str) -> None:
    request = make_call(model=MODEL).request
    with pytest.raises(UpstreamError) as caught:
        model_path(type(request)(prompt="a", model=model, width=512, height=512, n=1))
    assert (caught.value.code, caught.value.retryable) == ("model_not_available", False)


def test_an_edit_goes_to_the_model_that_edits(make_call: MakeCall) -> None:
    image = {"imageUrl": "https://a.example/1.png"}
    assert model_path(make_call(model="fal-ai/nano-banana", **image).request) == "fal-ai/nano-banana/edit"
    assert model_path(make_call(model="fal-ai/nano-banana/edit", **image).request) == "fal-ai/nano-banana/edit"
    assert model_path(make_call(model="fal-ai/flux/dev/image-to-image", **image).request).endswith("image-to-image")


def test_what_is_not_sent_as_given_has_a_warning(make_call: MakeCall) -> None:
    call = make_call(model="fal-ai/flux-pro/kontext", width=1000, height=1000, moderation="low")
    assert len(warnings_of(call)) == 2
    assert warnings_of(make_call(model=MODEL)) == ()


def test_requests_that_send_the_same_have_one_fingerprint(make_call: MakeCall) -> None:
    by_pixels = make_call(model="fal-ai/flux-pro/kontext", width=1024, height=1024).request
    by_ratio = make_call(model="fal-ai/flux-pro/kontext", aspectRatio="1:1").request
    assert sent_request(by_pixels) == sent_request(by_ratio)


# --- errors: each row of what fal answers ---

ERRORS = [
    # switch of the emulator, code, retryable, ambiguous, part of the detail
    ("400", "upstream_invalid_request", False, False, "malformed"),
    ("401", "upstream_auth", False, False, "operator"),
    ("403", "upstream_auth", False, False, "operator"),
    ("403_balance", "upstream_billing", False, False, "no credit"),
    ("404", "model_not_available", False, False, "Application not found"),
    ("422", "upstream_invalid_request", False, False, "prompt: field required"),
    ("422_count", "upstream_invalid_request", False, False, "num_images"),
    ("422_extra", "upstream_invalid_request", False, False, "guidance_scale"),
    ("422_policy", "content_policy", False, False, "content checker"),
    ("429", "upstream_rate_limited", True, False, "Too many requests"),
    ("500", "upstream_error", True, False, "Internal server error"),
    ("502", "upstream_error", True, True, "not JSON"),
    ("503", "upstream_overloaded", True, False, "No runner"),
    ("504", "upstream_timeout", True, True, "timed out"),
    ("504_user", "upstream_timeout", False, False, "timed out"),
]


@over_rows(("name", "code", "retryable", "ambiguous", "detail"), ERRORS)
def test_a_refused_submit_has_its_code(name: str, code: str, retryable: bool, ambiguous: bool, detail: str) -> None:
    refusal = FalEmulator.refusals[name]
    with pytest.raises(UpstreamError) as caught:
        parse_acceptance(RawResponse(refusal.status, refusal.headers, refusal.body))
    error = caught.value
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, ambiguous)
    assert detail in error.detail


def test_every_refusal_of_the_emulator_is_a_row() -> None:
    assert {row[0] for row in ERRORS} == FalEmulator.refusals.keys()


def test_a_refused_count_or_field_is_named() -> None:
    refusals = FalEmulator.refusals
    for name, count, fields in (("422_count", 1, ()), ("422_extra", None, ("guidance_scale",))):
        with pytest.raises(UpstreamError) as caught:
            parse_acceptance(RawResponse(422, {}, refusals[name].body))
        assert (caught.value.max_count, caught.value.refused) == (count, fields)


JOB_ERRORS = [
    # error_type of the platform, status, code, retryable
    ("request_timeout", 504, "upstream_timeout", True),
    ("startup_timeout", 504, "upstream_timeout", True),
    ("runner_scheduling_failure", 503, "upstream_overloaded", True),
    ("runner_connection_timeout", 503, "upstream_overloaded", True),
    ("runner_disconnected", 503, "upstream_overloaded", True),
    ("runner_connection_refused", 503, "upstream_overloaded", True),
    ("runner_connection_error", 503, "upstream_overloaded", True),
    ("runner_incomplete_response", 502, "upstream_error", True),
    ("runner_server_error", 500, "upstream_error", True),
    ("client_disconnected", 499, "upstream_error", False),
    ("client_cancelled", 499, "upstream_error", False),
    ("bad_request", 400, "upstream_invalid_request", False),
    ("internal_error", 500, "upstream_error", True),
]


@over_rows(("kind", "status", "code", "retryable"), JOB_ERRORS)
def test_a_failed_job_has_its_code_and_is_not_paid(kind: str, status: int, code: str, retryable: bool) -> None:
    body = b'{"detail":"It failed","error_type":"%b"}' % kind.encode()
    answer = RawResponse(status, {"X-Fal-Error-Type": kind}, body)
    error = parse_result(answer, JobStatus("done", error="It failed", error_type=kind)).error
    assert error is not None
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)
    assert not was_never_sent(error)
    assert "It failed" in error.detail


MODEL_ERRORS = [
    # type, status, X-Fal-Retryable, code, retryable
    ("content_policy_violation", 422, "false", "content_policy", False),
    ("no_media_generated", 422, "false", "upstream_bad_response", False),
    ("image_too_large", 422, "false", "upstream_invalid_request", False),
    ("file_download_error", 422, "false", "upstream_invalid_request", False),
    ("file_download_error", 422, "true", "upstream_error", True),
    ("generation_timeout", 504, "true", "upstream_timeout", True),
    ("internal_server_error", 500, "false", "upstream_error", False),
    ("internal_server_error", 500, "true", "upstream_error", True),
    ("downstream_service_error", 400, "", "upstream_error", True),
    ("downstream_service_unavailable", 500, "true", "upstream_error", True),
]


@over_rows(("kind", "status", "hint", "code", "retryable"), MODEL_ERRORS)
def test_an_error_of_a_model_has_its_code(kind: str, status: int, hint: str, code: str, retryable: bool) -> None:
    body = b'{"detail":[{"loc":["body","prompt"],"msg":"It failed","type":"%b","input":"?"}]}' % kind.encode()
    answer = RawResponse(status, {"X-Fal-Retryable": hint}, body)
    error = parse_result(answer, JobStatus("done")).error
    assert error is not None
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)
    assert not was_never_sent(error)


@over_rows(("status", "body"), [(429, b"{}"), (401, b'{"detail":"no"}'), (502, b"<html>"), (503, b""), (500, b"oops")])
def test_a_result_that_can_not_be_fetched_now_does_not_end_its_job(status: int, body: bytes) -> None:
    with pytest.raises(UpstreamError):
        parse_result(RawResponse(status, {}, body), JobStatus("done"))


def status_of(fields: dict[str, object]) -> JobStatus:
    return parse_status(RawResponse(202, {}, orjson.dumps(fields)))


def progress_of(**fields: object) -> float:
    progress = status_of(fields).progress
    assert progress is not None
    return progress


def test_progress_rises_with_each_place_in_the_queue_and_when_the_job_runs() -> None:
    queued = [progress_of(status="IN_QUEUE", queue_position=place) for place in (100, 7, 3, 1, 0)]
    seen = [*queued, progress_of(status="IN_PROGRESS")]
    assert seen == sorted(set(seen))
    assert 0 < seen[0] < seen[-1] < 0.5


@over_rows("position", [None, -1, True, "3", 1.5])
def test_a_place_in_the_queue_that_is_no_number_shows_no_progress(position: object) -> None:
    assert status_of({"status": "IN_QUEUE", "queue_position": position}).progress is None


def test_a_result_that_is_gone_is_a_forgotten_job() -> None:
    assert parse_result(RawResponse(404, {}, b'{"detail":"gone"}'), JobStatus("done")).phase == "forgotten"


def test_images_that_the_checker_flags_are_left_out() -> None:
    body = b'{"images":[{"url":"https://a.example/1"},{"url":"https://a.example/2"}],"has_nsfw_concepts":[true,false]}'
    reply = parse_result(RawResponse(200, {}, body), JobStatus("done")).reply
    assert reply is not None
    assert reply.images == (ImageLink("https://a.example/2"),)
    assert reply.warnings[0].startswith("1 of 2 images")


def test_a_single_image_is_read() -> None:
    body = b'{"image":{"url":"https://a.example/1"}}'
    reply = parse_result(RawResponse(200, {}, body), JobStatus("done")).reply
    assert reply is not None
    assert reply.images == (ImageLink("https://a.example/1"),)


# --- jobs ---


async def test_a_job_is_submitted_polled_and_collected(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(fal, make_call(model=MODEL, count=2, n=2))
    (handle,) = observer.handles
    assert (handle.provider, handle.channel, len(reply.images)) == ("fal", "main", 2)
    assert handle.poll_url == f"{queue.url}/fal-ai/flux/requests/{handle.id}/status"
    assert "secret" not in repr(handle)
    assert queue.ledger.sums() == {"submitted": 1, "charged": 1, "cancelled": 0, "listed": 0, "cost_usd": 0.02}


async def test_the_handle_is_kept_before_the_first_poll(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    observer = Recorder(lambda: queue.ledger.jobs[0].polls)
    await fal.generate(make_call(model=MODEL), observer)
    assert observer.noted == [0]


async def test_a_handle_is_enough_to_collect_the_result(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(fal, make_call(model=MODEL))
    assert (await fal.resume(observer.handles[0], Recorder())).images == reply.images
    assert queue.ledger.total == 1


async def test_a_job_that_is_not_found_at_first_is_polled_on(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    _, reply = await replied(fal, make_call(model=MODEL, prompt="a cat {{fault:job unknown_s=0.3}}"))
    assert (len(reply.images), queue.ledger.total) == (1, 1)


async def test_polls_that_fail_do_not_end_a_job(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    _, reply = await replied(fal, make_call(model=MODEL, prompt="a cat {{fault:job poll_fault=503 polls=4}}"))
    assert (len(reply.images), queue.ledger.jobs[0].polls >= 5) == (1, True)


async def test_a_key_that_is_refused_while_a_job_runs_leaves_open_whether_it_is_paid(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    _, error = await failed(fal, make_call(model=MODEL, prompt="a cat {{fault:job poll_fault=401 polls=99}}"))
    assert (error.code, error.ambiguous, error.retryable) == ("upstream_auth", True, False)
    assert queue.ledger.jobs[0].polls == job_polling.MIN_USELESS


@pytest.mark.parametrize(
    ("options", "code", "charged"),
    [
        ("end=failed", "upstream_error", False),
        ("end=failed error_type=bad_request failed_status=400", "upstream_invalid_request", False),
        ("end=moderated", "content_policy", True),
        ("end=moderated policy=error", "content_policy", False),
    ],
)
async def test_a_job_that_ends_without_an_image_fails_its_call(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall, options: str, code: str, charged: bool
) -> None:
    _, error = await failed(fal, make_call(model=MODEL, prompt=f"a cat {{{{fault:job {options}}}}}"))
    assert (error.code, error.ambiguous, error.charged) == (code, False, charged)
    assert queue.ledger.sums()["charged"] == charged


async def test_a_job_that_has_expired_is_an_ambiguous_call(
    quick: None, fal: FalProvider, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    handle = JobHandle("fal", "gone", poll_url=f"{fal.base_url}fal-ai/flux/requests/gone/status", accepted_at=1.0)
    with pytest.raises(UpstreamError) as caught:
        await fal.resume(handle, Recorder())
    assert caught.value.ambiguous


async def test_a_lost_answer_to_a_submit_is_an_ambiguous_call(
    quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt="a cat {{fault:job answer=lost}}")
    observer, error = await failed(fal, call)
    assert (observer.handles, error.ambiguous, queue.ledger.sums()["submitted"]) == ([], True, 1)
    assert await fal.find(call, time.time()) is None


async def test_a_job_is_cancelled_once(quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall) -> None:
    observer, _ = await replied(fal, make_call(model=MODEL))
    running = observer.handles[0]
    assert await fal.cancel(running) is False  # it is over
    queue.set_fault("job job_s=60")
    slow = await begun_only(fal, make_call(model=MODEL))
    assert await fal.cancel(slow) is True
    assert queue.ledger.sums()["cancelled"] == 1
    with pytest.raises(UpstreamError, match="cancelled"):
        await fal.resume(slow, Recorder())


async def test_a_cancellation_without_an_answer_is_not_confirmed(
    fal: FalProvider, queue: FalEmulator, make_call: MakeCall
) -> None:
    handle = JobHandle("fal", "1", cancel_url="http://127.0.0.1:9/fal-ai/flux/requests/1/cancel")
    assert await fal.cancel(handle) is None
    assert await fal.cancel(JobHandle("fal", "1")) is None
    assert await fal.cancel(JobHandle("bfl", "1", cancel_url=f"{queue.url}/a/b/requests/1/cancel")) is None


async def test_a_revoked_key_is_refused(quick: None, fal: FalProvider, queue: FalEmulator, make_call: MakeCall) -> None:
    queue.revoked.add("id:secret")
    _, error = await failed(fal, make_call(model=MODEL))
    assert (error.code, error.retryable) == ("upstream_auth", False)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://queue.fal.run/fal-ai/flux/requests/1/status", True),
        ("https://eu.queue.fal.run/fal-ai/flux/requests/1/status", True),
        ("https://fal.run.example/requests/1/status", False),
        ("https://notfal.run/requests/1/status", False),
        ("http://eu.queue.fal.run/requests/1/status", False),
        ("https://queue.fal.run:8443/requests/1/status", False),
        ("https://me@queue.fal.run/requests/1/status", False),
        ("http://127.0.0.1/requests/1/status", False),
        ("//evil.example/requests/1", False),
    ],
)
async def test_the_key_goes_to_addresses_of_fal_only(session: aiohttp.ClientSession, address: str, kept: bool) -> None:
    fal = FalProvider(session, api_key="k", base_url="https://queue.fal.run", timeout_s=30)
    assert (fal.own_address(address) is not None) is kept
    assert fal.base_url == URL("https://queue.fal.run/")
