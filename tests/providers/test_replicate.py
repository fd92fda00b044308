"""Tests of Replicate: the words of its models, the meaning of its errors, jobs, and the list that finds lost ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from yarl import URL

from imagegen.emulator.replicate import PAGE, ReplicateEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import replicate as replicate_module
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, InputImage
from imagegen.providers.replicate import ReplicateProvider
from imagegen.providers.replicate_requests import body_of, sent_request, target_of, warnings_of
from imagegen.providers.replicate_responses import job_error, job_state, parse_acceptance
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.retry import was_never_sent
from tests.emulated_jobs import Recorder, begun_only, emulated, failed, made, quick_polls, replied
from tests.providers.conftest import MakeCall, RawServer, ReadRequest
from tests.support import over_rows

quick = pytest.fixture(quick_polls)
MODEL = "black-forest-labs/flux-schnell"
HASH = "a1" * 32
LINK = "https://a.example/1.png"
LINKS = [f"https://a.example/{number}.png" for number in range(3)]


@pytest.fixture
async def service() -> AsyncIterator[ReplicateEmulator]:
    async with emulated(ReplicateEmulator, job_s=0.05) as service:
        yield service


@pytest.fixture
def replicate(session: aiohttp.ClientSession, service: ReplicateEmulator) -> ReplicateProvider:
    return ReplicateProvider(session, api_key="r8_secret", base_url=service.url, timeout_s=5, channel="main")


# --- requests ---


@over_rows(
    ("model", "path", "version"),
    [
        (MODEL, f"models/{MODEL}/predictions", ""),
        (f"stability-ai/sdxl:{HASH}", "predictions", HASH),
        (HASH, "predictions", HASH),
        ("deployments/me/mine", "deployments/me/mine/predictions", ""),
    ],
)
def test_each_kind_of_model_has_its_route(model: str, path: str, version: str) -> None:
    target = target_of(model)
    assert (target.path, target.version) == (path, version)


@over_rows("model", ["flux", "a/b/c", "../a", "a/..", "a/b:latest", "a/b?x=1", "a/b:" + "g" * 64, "a//b"])
def test_a_name_that_is_no_model_is_not_sent(model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        target_of(model)
    assert (caught.value.code, caught.value.retryable) == ("model_not_available", False)


@over_rows(
    ("model", "given", "sent"),
    [
        (MODEL, {}, {"aspect_ratio": "1:1", "megapixels": "0.25"}),
        (MODEL, {"width": 1344, "height": 768}, {"aspect_ratio": "16:9", "megapixels": None}),
        (MODEL, {"aspectRatio": "21:9"}, {"aspect_ratio": "21:9"}),
        (MODEL, {"steps": 4, "guidanceScale": 3.5}, {"num_inference_steps": 4, "guidance": 3.5}),
        (MODEL, {"outputFormat": "jpeg", "outputCompression": 80}, {"output_format": "jpg", "output_quality": 80}),
        (MODEL, {"outputFormat": "webp"}, {"output_format": "webp"}),
        (MODEL, {"disableSafetyChecker": True}, {"disable_safety_checker": True}),
        (MODEL, {"extra": {"go_fast": True}}, {"go_fast": True}),
        (MODEL, {"extra": {"megapixels": "1"}}, {"megapixels": "1"}),
        ("black-forest-labs/flux-1.1-pro", {"imageUrl": LINK}, {"image_prompt": LINK}),
        ("black-forest-labs/flux-kontext-pro", {"imageUrl": LINK}, {"input_image": LINK}),
        (
            "black-forest-labs/flux-2-pro",
            {"referenceImages": LINKS},
            {"input_image": LINKS[0], "input_image_2": LINKS[1], "input_image_3": LINKS[2]},
        ),
        ("google/nano-banana", {"referenceImages": LINKS[:2]}, {"image_input": LINKS[:2], "aspect_ratio": "1:1"}),
        ("google/nano-banana-pro", {"width": 2048, "height": 2048}, {"resolution": "2K"}),
        (
            "openai/gpt-image-1.5",
            {"quality": "high", "outputFormat": "jpeg"},
            {"quality": "high", "output_format": "jpeg"},
        ),
        (f"stability-ai/sdxl:{HASH}", {"width": 1024, "height": 768}, {"width": 1024, "height": 768}),
        (f"a/b:{HASH}", {"imageUrl": LINK, "mask": LINKS[2]}, {"image": LINK, "mask": LINKS[2]}),
    ],
)
def test_a_field_is_sent_in_the_words_of_the_model(
    make_call: MakeCall, model: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    fields = json.loads(json.dumps(body_of(make_call(model=model, **given))))["input"]
    assert {name: fields.get(name) for name in sent} == sent
    assert not {"model", "n", "steps", "guidance_scale"} & fields.keys()
    assert ("width" in fields) is (HASH in model)


def test_a_version_is_named_in_the_body(make_call: MakeCall) -> None:
    assert body_of(make_call(model=f"a/b:{HASH}"))["version"] == HASH
    assert body_of(make_call(model=MODEL)).keys() == {"input"}


def test_a_call_for_several_images_with_a_seed(make_call: MakeCall) -> None:
    fields: Any = body_of(make_call(model=MODEL, count=3, seed=7, n=3))["input"]
    assert (fields["num_outputs"], fields["seed"]) == (3, 7)


@over_rows("model", ["black-forest-labs/flux-1.1-pro", "google/nano-banana", f"a/b:{HASH}"])
def test_a_model_of_one_image_a_call_is_not_called_for_more(make_call: MakeCall, model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        body_of(make_call(model=model, count=2, n=2))
    assert (caught.value.max_count, caught.value.ambiguous) == (1, False)


def test_what_is_not_sent_as_given_has_a_warning(make_call: MakeCall) -> None:
    assert len(warnings_of(make_call(model=MODEL, width=1000, height=1000, quality="high"))) == 2
    assert warnings_of(make_call(model=f"stability-ai/sdxl:{HASH}")) == ()
    assert warnings_of(make_call(model="google/nano-banana-pro", aspectRatio="16:9", resolution="2K")) == ()


def test_requests_that_send_the_same_have_one_fingerprint(make_call: MakeCall) -> None:
    by_pixels = make_call(model=MODEL, width=1024, height=1024).request
    assert sent_request(by_pixels) == sent_request(make_call(model=MODEL, aspectRatio="1:1").request)
    assert sent_request(by_pixels) != sent_request(make_call(model=MODEL, width=512, height=512).request)


# --- errors ---

ERRORS = [
    # switch of the emulator, code, retryable, ambiguous, part of the detail
    ("400", "upstream_invalid_request", False, False, "not valid JSON"),
    ("401", "upstream_auth", False, False, "operator"),
    ("402", "upstream_billing", False, False, "no credit"),
    ("402_limit", "upstream_billing", False, False, "no credit"),
    ("403", "upstream_auth", False, False, "operator"),
    ("404", "model_not_available", False, False, "could not be found"),
    ("422", "upstream_invalid_request", False, False, "prompt is required"),
    ("422_version", "model_not_available", False, False, "does not exist"),
    ("422_extra", "upstream_invalid_request", False, False, "guidance_scale"),
    ("422_count", "upstream_invalid_request", False, False, "num_outputs"),
    ("429", "upstream_rate_limited", True, False, "throttled"),
    ("500", "upstream_error", True, False, "unexpected"),
    ("502", "upstream_error", True, True, "not JSON"),
    ("503", "upstream_overloaded", True, False, "unavailable"),
    ("504", "upstream_error", True, True, "not JSON"),
]


def refused(name: str, **headers: str) -> UpstreamError:
    refusal = ReplicateEmulator.refusals[name]
    with pytest.raises(UpstreamError) as caught:
        parse_acceptance(RawResponse(refusal.status, headers, refusal.body))
    return caught.value


@over_rows(("name", "code", "retryable", "ambiguous", "detail"), ERRORS)
def test_a_refused_submit_has_its_code(name: str, code: str, retryable: bool, ambiguous: bool, detail: str) -> None:
    error = refused(name)
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, ambiguous)
    assert detail in error.detail


def test_every_refusal_of_the_emulator_is_a_row() -> None:
    assert {row[0] for row in ERRORS} == ReplicateEmulator.refusals.keys()


def test_a_refused_count_or_field_is_named() -> None:
    assert refused("422_count").max_count == 1
    assert "guidance_scale" in refused("422_extra").refused


def test_the_wait_of_a_throttled_submit_is_read_from_its_text() -> None:
    assert refused("429").retry_after_s == 30


JOB_ERRORS = [
    # status, error, code, retryable
    ("failed", "The input or output was flagged as sensitive. (E005)", "content_policy", False),
    ("failed", "NSFW content detected. Try running it again, or try a different prompt.", "content_policy", False),
    ("failed", "All generated images contained NSFW content. Try running it again", "content_policy", False),
    ("failed", "Input validation error: prompt is too long", "upstream_invalid_request", False),
    ("failed", "Prediction interrupted; please retry (code: PA)", "upstream_error", True),
    ("failed", "Director: unexpected error handling prediction (E6716)", "upstream_error", True),
    ("failed", "CUDA out of memory. Tried to allocate 2.00 GiB", "upstream_error", False),
    ("failed", "The prediction timed out", "upstream_timeout", True),
    ("failed", "list index out of range", "upstream_error", True),
    ("failed", "", "upstream_error", True),
    ("canceled", "", "upstream_error", False),
    ("aborted", "", "upstream_overloaded", True),
]


@over_rows(("status", "message", "code", "retryable"), JOB_ERRORS)
def test_a_failed_job_has_its_code(status: str, message: str, code: str, retryable: bool) -> None:
    error = job_error(status, message)
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)
    assert not was_never_sent(error)
    assert error.detail


@over_rows(
    ("fields", "phase", "images"),
    [
        ({"status": "starting"}, "running", None),
        ({"status": "processing"}, "running", None),
        ({"status": "a new word"}, "running", None),
        ({"status": "succeeded", "output": LINK}, "done", 1),
        ({"status": "succeeded", "output": LINKS}, "done", 3),
        ({"status": "succeeded", "output": ["data:image/png;base64,AAAA"]}, "done", 1),
        ({"status": "succeeded", "output": None}, "done", 0),
        ({"status": "succeeded", "output": None, "data_removed": True}, "forgotten", None),
        ({"status": "failed", "error": "x"}, "failed", None),
        ({"status": "canceled"}, "failed", None),
        ({"status": "aborted"}, "failed", None),
    ],
)
def test_a_prediction_is_read(fields: dict[str, Any], phase: str, images: int | None) -> None:
    state = job_state(fields)
    assert (state.phase, None if state.reply is None else len(state.reply.images)) == (phase, images)


def test_progress_is_that_of_the_logs() -> None:
    logs = "Using seed: 7\n  0%|          | 0/4\n 50%|█████     | 2/4"
    assert job_state({"status": "processing", "logs": logs}).progress == 0.5
    assert job_state({"status": "processing", "logs": "100% sure"}).progress is None


# --- jobs ---


async def test_a_job_is_submitted_polled_and_collected(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL, count=2, n=2))
    (handle,) = observer.handles
    assert (handle.provider, handle.channel, len(reply.images)) == ("replicate", "main", 2)
    assert handle.poll_url == f"{service.url}/v1/predictions/{handle.id}"
    assert "r8_secret" not in repr(handle)
    assert service.ledger.sums() == {"submitted": 1, "charged": 1, "cancelled": 0, "listed": 0, "cost_usd": 0.02}


async def test_a_job_that_has_ended_already_is_not_polled(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReplicateEmulator, "_object", done_at_once(ReplicateEmulator._object))
    _, reply = await replied(replicate, make_call(model=MODEL, prompt="a cat {{fault:job job_s=0}}"))
    assert (len(reply.images), service.ledger.jobs[0].polls) == (1, 0)


def done_at_once(method: Callable[..., object]) -> Callable[..., object]:
    return lambda self, running, **_more: method(self, running)


async def test_the_handle_is_kept_before_the_first_poll(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer = Recorder(lambda: service.ledger.jobs[0].polls)
    await replicate.generate(make_call(model=MODEL), observer)
    assert observer.noted == [0]


async def test_a_handle_is_enough_to_collect_the_result(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL))
    bare = JobHandle("replicate", observer.handles[0].id)
    for handle in (observer.handles[0], bare):
        assert (await replicate.resume(handle, Recorder())).images == reply.images
    assert service.ledger.total == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 900", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("stays_open", [False, True])
async def test_a_result_without_the_end_of_its_response_is_collected(
    quick: None,
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    framing: bytes,
    stays_open: bool,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        body = json.dumps({"id": "1", "status": "succeeded", "output": [LINK]}).encode()
        chunk = b"%x\r\n" % len(body) if framing.endswith(b"chunked") else b""
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b%b" % (framing, chunk, body))
        if stays_open:
            await reader.read()

    url = await raw_server(serve)
    replicate = ReplicateProvider(session, api_key="k", base_url=url, timeout_s=0.3 if stays_open else 5)
    async with asyncio.timeout(5):
        reply = await replicate.resume(JobHandle("replicate", "1"), Recorder())
    assert len(reply.images) == 1


@pytest.mark.parametrize("options", ["unknown_s=0.3", "poll_fault=503 polls=4", "poll_fault=429 polls=2"])
async def test_polls_that_do_not_find_the_job_or_fail_do_not_end_it(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall, options: str
) -> None:
    _, reply = await replied(replicate, make_call(model=MODEL, prompt=f"a cat {{{{fault:job {options}}}}}"))
    assert (len(reply.images), service.ledger.total) == (1, 1)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("end=failed", "upstream_error"),
        ("end=failed aborted=1", "upstream_overloaded"),
        ("end=moderated", "content_policy"),
    ],
)
async def test_a_job_that_ends_without_an_image_fails_its_call(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, options: str, code: str
) -> None:
    _, error = await failed(replicate, make_call(model=MODEL, prompt=f"a cat {{{{fault:job {options}}}}}"))
    assert (error.code, error.ambiguous) == (code, False)


async def test_a_job_that_is_gone_is_an_ambiguous_call(quick: None, replicate: ReplicateProvider) -> None:
    with pytest.raises(UpstreamError) as caught:
        await replicate.resume(JobHandle("replicate", "gone", accepted_at=1.0), Recorder())
    assert caught.value.ambiguous


async def test_a_job_is_cancelled_once(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, _ = await replied(replicate, make_call(model=MODEL))
    assert await replicate.cancel(observer.handles[0]) is False  # it is over
    service.set_fault("job job_s=60")
    slow = await begun_only(replicate, make_call(model=MODEL))
    assert await replicate.cancel(slow) is True
    assert service.ledger.sums()["cancelled"] == 1
    with pytest.raises(UpstreamError, match="cancelled"):
        await replicate.resume(slow, Recorder())
    assert await replicate.cancel(JobHandle("replicate", "gone")) is False


async def test_a_revoked_key_is_refused(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    service.revoked.add("r8_secret")
    _, error = await failed(replicate, make_call(model=MODEL))
    assert (error.code, error.retryable) == ("upstream_auth", False)


# --- the list ---

LOST = "a cat {{fault:job answer=lost times=1}}"


async def lost(replicate: ReplicateProvider, call: Call) -> float:
    """Make a call with a lost response, as a process that dies before it; return the time before the call."""
    sent_at = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplicateProvider, "search", JobApiProvider.search)
        observer, error = await failed(replicate, call)
    assert (observer.handles, error.ambiguous) == ([], True)
    return sent_at


async def test_a_call_with_a_lost_response_continues_with_the_job_that_it_began(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL, prompt=LOST))
    assert (len(reply.images), len(observer.handles)) == (1, 1)
    assert service.ledger.sums()["submitted"] == 1


async def test_a_call_that_never_arrived_is_not_found(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    observer, error = await failed(replicate, make_call(model=MODEL, prompt="a cat {{fault:reset}}"))
    assert (observer.handles, error.ambiguous) == ([], True)


async def test_a_list_that_fails_leaves_the_call_ambiguous(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise UpstreamError("upstream_auth", "no list")

    monkeypatch.setattr(ReplicateProvider, "search", fail)
    _, error = await failed(replicate, make_call(model=MODEL, prompt=LOST))
    assert (error.code, error.ambiguous) == ("upstream_error", True)


@pytest.mark.parametrize("model", [MODEL, f"stability-ai/sdxl:{HASH}", "deployments/me/mine"])
async def test_a_job_with_a_lost_response_is_found_and_collected(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall, model: str
) -> None:
    call = make_call(model=model, prompt=LOST, seed=5)
    sent_at = await lost(replicate, call)
    handle = await replicate.find(call, sent_at)
    assert handle is not None
    assert handle.id == service.ledger.jobs[0].id
    assert len((await replicate.resume(handle, Recorder())).images) == 1
    assert service.ledger.sums()["submitted"] == 1


async def test_a_job_that_is_listed_late_is_waited_for(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt="a cat {{fault:job answer=lost unknown_s=1.5}}")
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at) is not None


async def test_neither_of_two_equal_jobs_is_taken(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt="a cat {{fault:job answer=lost}}")
    sent_at = await lost(replicate, call)
    await lost(replicate, call)
    assert await replicate.find(call, sent_at) is None


async def test_a_job_of_another_call_is_not_taken(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    sent_at = time.time()
    call = make_call(model=MODEL)
    await made(replicate, call)  # the same input, and its handle was kept
    for other in (call, make_call(model=MODEL, seed=9), make_call(model="black-forest-labs/flux-dev")):
        assert await replicate.find(other, sent_at) is None
    assert service.ledger.sums()["listed"] == 1


async def test_a_job_from_before_the_call_is_not_taken(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    call = make_call(model=MODEL, prompt=LOST)
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at + 60) is None


async def test_all_pages_of_the_list_are_read(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt=LOST)
    sent_at = await lost(replicate, call)
    for number in range(PAGE + 5):
        await begun_only(replicate, make_call(model=MODEL, prompt=f"another {number}"))
    handle = await replicate.find(call, sent_at)
    assert handle is not None
    assert handle.id == service.ledger.jobs[0].id


async def test_an_incomplete_list_finds_nothing(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "MAX_PAGES", 1)
    call = make_call(model=MODEL, prompt=LOST)
    for number in range(PAGE + 1):
        await begun_only(replicate, make_call(model=MODEL, prompt=f"another {number}"))
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at) is None


async def test_a_list_that_can_not_be_read_now_is_an_error(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL)
    service.revoked.add("r8_secret")
    with pytest.raises(UpstreamError):
        await replicate.find(call, time.time())


async def test_a_call_with_the_bytes_of_an_image_is_not_searched_for(
    replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    async def read() -> AsyncGenerator[bytes, None]:
        yield b"x"

    call = make_call(model=MODEL, imageUrl=LINK)
    call = type(call)(call.request, 1, inputs={LINK: InputImage("image/png", 1, read)})
    assert await replicate.find(call, time.time()) is None


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://api.replicate.com/v1/predictions/1", True),
        ("https://stream.replicate.com/v1/predictions/1", False),
        ("https://api.replicate.com.example/v1/predictions/1", False),
        ("http://127.0.0.1/v1/predictions/1", False),
    ],
)
async def test_the_key_goes_to_addresses_of_replicate_only(
    session: aiohttp.ClientSession, address: str, kept: bool
) -> None:
    replicate = ReplicateProvider(session, api_key="k", base_url="https://api.replicate.com", timeout_s=5)
    assert (replicate.own_address(address) is not None) is kept
    assert replicate.base_url == URL("https://api.replicate.com/v1/")
