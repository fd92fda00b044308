"""Tests of DashScope's provider: three shapes, refusals, partial results, and the search for a job in the list."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from imagegen.emulator.dashscope import DashScopeEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import dashscope, job_polling
from imagegen.providers.dashscope import DashScopeProvider
from imagegen.providers.dashscope_requests import (
    IMAGE_TO_IMAGE,
    MESSAGES,
    MESSAGES_AT_ONCE,
    TEXT_TO_IMAGE,
    edits_of,
    fields_of,
    sent_request,
    shape_of,
    warnings_of,
)
from imagegen.providers.dashscope_responses import (
    parse_acceptance,
    parse_job,
    parse_page,
    parse_reply,
    prompt_of,
    response_error,
)
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.job_polling import JobState
from imagegen.providers.protocol import Call
from imagegen.tasks.image import ImageLink
from tests.emulated_jobs import Recorder, emulated, failed, quick_polls
from tests.providers.conftest import MakeCall, details_of
from tests.support import over_rows

MakeProvider = Callable[..., DashScopeProvider]
quick = pytest.fixture(quick_polls)
NOW = 1_795_000_000.0
LINKS = ("https://dashscope-result-bj.oss-cn-beijing.aliyuncs.com/1.png?Expires=1", "https://oss.example/2.png")
OLD, MESSAGE, SYNC = "wanx2.1-t2i-turbo", "wan2.6-t2i", "qwen-image-2.0"


def read(body: object, status: int = 200) -> JobState:
    return parse_job(status, {}, orjson.dumps(body), now_s=NOW)


def sent_fields(call: Call) -> dict[str, Any]:
    return fields_of(call)


def output(**fields: object) -> dict[str, object]:
    return {"request_id": "r", "output": {"task_id": "t", **fields}}


# --- requests ---


@over_rows(
    ("model", "path"),
    [
        ("wanx2.1-t2i-turbo", TEXT_TO_IMAGE),
        ("wan2.2-t2i-flash", TEXT_TO_IMAGE),
        ("wan2.5-t2i-preview", TEXT_TO_IMAGE),
        ("qwen-image", TEXT_TO_IMAGE),
        ("qwen-image-plus", TEXT_TO_IMAGE),
        ("flux-schnell", TEXT_TO_IMAGE),
        ("a-new-model", TEXT_TO_IMAGE),
        ("wanx2.1-imageedit", IMAGE_TO_IMAGE),
        ("wan2.5-i2i-preview", IMAGE_TO_IMAGE),
        ("wan2.6-t2i", MESSAGES),
        ("wan2.7-image-pro", MESSAGES),
        ("wan2.6-image", MESSAGES),
        ("qwen-image-2.0", MESSAGES_AT_ONCE),
        ("qwen-image-2.0-pro", MESSAGES_AT_ONCE),
        ("qwen-image-3.0", MESSAGES_AT_ONCE),
        ("qwen-image-max", MESSAGES_AT_ONCE),
        ("qwen-image-edit-plus", MESSAGES_AT_ONCE),
        ("z-image-turbo", MESSAGES_AT_ONCE),
    ],
)
def test_the_model_decides_the_shape(model: str, path: str) -> None:
    assert shape_of(model).path == path


def test_the_older_shape_has_the_prompts_in_its_input(make_call: MakeCall) -> None:
    call = make_call(model=OLD, n=2, count=2, seed=7, negativePrompt="dog", width=1024, height=768)
    assert fields_of(call) == {
        "model": OLD,
        "input": {"prompt": "a cat", "negative_prompt": "dog"},
        "parameters": {"size": "1024*768", "n": 2, "seed": 7},
    }


@over_rows("model", [MESSAGE, SYNC])
def test_a_message_has_the_prompt_and_all_else_is_a_parameter(make_call: MakeCall, model: str) -> None:
    call = make_call(model=model, negativePrompt="dog", promptUpsampling=False, extra={"watermark": True})
    assert fields_of(call) == {
        "model": model,
        "input": {"messages": [{"role": "user", "content": [{"text": "a cat"}]}]},
        "parameters": {
            "size": "512*512",
            "n": 1,
            "negative_prompt": "dog",
            "prompt_extend": False,
            "watermark": True,
        },
    }


def test_the_number_of_images_is_always_sent_to_models_that_take_it(make_call: MakeCall) -> None:
    assert sent_fields(make_call(model=MESSAGE))["parameters"]["n"] == 1
    assert "n" not in sent_fields(make_call(model="z-image-turbo"))["parameters"]


def test_fields_of_extra_that_belong_to_the_input_are_there(make_call: MakeCall) -> None:
    fields = sent_fields(make_call(model=OLD, extra={"ref_img": "https://a.example/r.png", "ref_strength": 0.5}))
    assert fields["input"] == {"prompt": "a cat", "ref_img": "https://a.example/r.png"}
    assert fields["parameters"]["ref_strength"] == 0.5


def test_input_images_are_where_the_model_expects_them(make_call: MakeCall) -> None:
    first, second = "https://a.example/1.png", "https://a.example/2.png"
    both = {"imageUrl": first, "referenceImages": [second]}
    message = sent_fields(make_call(model="qwen-image-edit", **both))["input"]["messages"][0]["content"]
    assert message == [{"image": first}, {"image": second}, {"text": "a cat"}]
    assert sent_fields(make_call(model="wan2.5-i2i-preview", **both))["input"]["images"] == [first, second]
    edit = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first))["input"]
    assert (edit["base_image_url"], edit["function"]) == (first, "description_edit")
    masked = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first, mask=second))["input"]
    assert (masked["mask_image_url"], masked["function"]) == (second, "description_edit_with_mask")
    own = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first, extra={"function": "expand"}))["input"]
    assert own["function"] == "expand"


def test_only_models_for_edits_take_input_images() -> None:
    assert edits_of(OLD) is None
    assert edits_of(MESSAGE) is None
    assert edits_of("z-image-turbo") is None
    several, masked = edits_of("qwen-image-3.0"), edits_of("wanx2.1-imageedit")
    assert several is not None
    assert several.max_images == 3
    assert masked is not None
    assert masked.mask


def test_what_a_model_does_not_take_is_left_out_with_a_warning(make_call: MakeCall) -> None:
    call = make_call(model=OLD, steps=20, guidanceScale=3, outputFormat="png", quality="high")
    assert sent_fields(call)["parameters"] == {"size": "512*512", "n": 1}
    names = [warning.split()[0] for warning in warnings_of(call)]
    assert names == ["guidance_scale", "output_format", "quality", "steps"]
    sent = sent_request(call.request)
    assert (sent.steps, sent.quality) == (None, None)
    flux = sent_fields(make_call(model="flux-dev", steps=20, guidanceScale=3))["parameters"]
    assert (flux["steps"], flux["guidance"]) == (20, 3)


# --- responses ---


def test_an_acceptance_has_the_id_of_the_job() -> None:
    accepted = parse_acceptance(200, {}, orjson.dumps(output(task_status="PENDING")), now_s=NOW)
    assert (accepted.id, accepted.state, accepted.expires_at) == ("t", None, NOW + 86_400)


@over_rows(
    ("word", "phase"),
    [
        ("PENDING", "running"),
        ("RUNNING", "running"),
        ("SUSPENDED", "running"),
        ("REVIEWING", "running"),
        ("SUCCEEDED", "done"),
        ("FAILED", "failed"),
        ("CANCELED", "failed"),
        ("UNKNOWN", "forgotten"),
    ],
)
def test_each_state_has_its_phase(word: str, phase: str) -> None:
    assert read(output(task_status=word)).phase == phase


def test_a_job_that_was_cancelled_at_the_provider_is_not_begun_again() -> None:
    error = read(output(task_status="CANCELED")).error
    assert error is not None
    assert (error.code, error.retryable, error.status) == ("upstream_error", False, 200)


def test_a_job_of_the_older_shape_has_its_results() -> None:
    body = output(task_status="SUCCEEDED", results=[{"orig_prompt": "a cat", "url": LINKS[0]}, {"url": LINKS[1]}])
    reply = read(body | {"usage": {"image_count": 2}}).reply
    assert reply is not None
    assert reply.images == tuple(ImageLink(link) for link in LINKS)
    assert reply.details is not None
    assert details_of(reply).usage == {"image_count": 2}
    assert prompt_of(orjson.dumps(body)) == "a cat"


def test_a_result_of_messages_has_its_images_and_its_size() -> None:
    contents = [[{"type": "image", "image": LINKS[0]}, {"text": "done"}], [{"image": LINKS[1]}]]
    choices = [{"finish_reason": "stop", "message": {"role": "assistant", "content": part}} for part in contents]
    job = output(task_status="SUCCEEDED", finished=True, choices=choices)
    reply = read(job | {"usage": {"image_count": 2, "size": "1280*720"}}).reply
    assert reply is not None
    assert reply.images == tuple(ImageLink(link) for link in LINKS)
    assert reply.details is not None
    assert reply.details.size == "1280x720"
    assert prompt_of(orjson.dumps(job)) is None
    usage = {"output_image_count": 2, "width": 512, "height": 768}
    at_once = parse_reply(200, {}, orjson.dumps({"output": {"choices": choices}, "usage": usage}), now_s=NOW)
    assert at_once.images == reply.images
    assert at_once.details is not None
    assert at_once.details.size == "512x768"


def test_a_partial_result_has_its_images_and_a_warning() -> None:
    failed = {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."}
    reply = read(output(task_status="SUCCEEDED", results=[{"url": LINKS[0]}, failed])).reply
    assert reply is not None
    assert reply.images == (ImageLink(LINKS[0]),)
    assert reply.warnings == (
        "1 of 2 images failed at the provider: DataInspectionFailed: Output data may contain inappropriate content.",
    )


def test_a_result_with_failed_parts_alone_is_a_failed_job() -> None:
    failed = {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."}
    error = read(output(task_status="SUCCEEDED", results=[failed, failed])).error
    assert error is not None
    assert (error.code, error.retryable) == ("content_policy", False)


ERRORS = [
    (400, "InvalidParameter", "size must be in [512*512, 1440*1440]", "upstream_invalid_request", False),
    (400, "InvalidParameter", "Model not exist.", "model_not_available", False),
    (404, "ModelNotFound", "The model can not be found.", "model_not_available", False),
    (401, "InvalidApiKey", "Invalid API-key provided.", "upstream_auth", False),
    (403, "AccessDenied.Unpurchased", "Access to model denied.", "upstream_auth", False),
    (403, "Model.AccessDenied", "Model access denied.", "upstream_auth", False),
    (400, "Arrearage", "Access denied, please make sure your account is in good standing.", "upstream_billing", False),
    (403, "AllocationQuota.FreeTierOnly", "The free tier of the model is used.", "upstream_billing", False),
    (429, "Throttling", "Requests throttling triggered.", "upstream_rate_limited", True),
    (429, "Throttling.RateQuota", "Requests rate limit exceeded.", "upstream_rate_limited", True),
    (429, "Throttling.AllocationQuota", "You exceeded your current quota.", "upstream_rate_limited", True),
    (400, "DataInspectionFailed", "Input data may contain inappropriate content.", "content_policy", False),
    (400, "IPInfringementSuspect", "Input data is suspected of infringement.", "content_policy", False),
    (500, "InternalError", "An internal error has occurred.", "upstream_error", True),
    (500, "InternalError.Algo", "The algorithm failed.", "upstream_error", True),
    (500, "SystemError", "A system error has occurred.", "upstream_error", True),
    (503, "ModelUnavailable", "Model is unavailable.", "upstream_overloaded", True),
]


@over_rows(("status", "code", "message", "meant", "retryable"), ERRORS)
def test_each_refusal_has_its_code_with_its_status_and_in_a_200(
    status: int, code: str, message: str, meant: str, retryable: bool
) -> None:
    body = orjson.dumps({"code": code, "message": message, "request_id": "r"})
    for arrived in (status, 200):
        with pytest.raises(UpstreamError) as caught:
            parse_acceptance(arrived, {}, body, now_s=NOW)
        error = caught.value
        assert (error.code, error.retryable, error.ambiguous) == (meant, retryable, False)
        with pytest.raises(UpstreamError) as caught:
            parse_reply(arrived, {}, body, now_s=NOW)
        assert caught.value.code == meant


@over_rows(("status", "code", "message", "meant", "retryable"), ERRORS)
def test_a_failed_job_fails_as_a_call_with_the_same_code(
    status: int, code: str, message: str, meant: str, retryable: bool
) -> None:
    error = read(output(task_status="FAILED", code=code, message=message)).error
    assert error is not None
    assert (error.code, error.retryable, error.ambiguous) == (meant, retryable, False)


def test_a_request_that_timed_out_is_ambiguous_but_a_failed_job_is_not() -> None:
    body = {"code": "RequestTimeOut", "message": "Request timed out, please try again later."}
    assert response_error(500, {}, orjson.dumps(body), now_s=NOW).ambiguous
    error = read(output(task_status="FAILED", **body)).error
    assert error is not None
    assert (error.retryable, error.ambiguous) == (True, False)


def test_a_refusal_names_the_reason_of_the_provider() -> None:
    body = {"code": "InvalidParameter", "message": "size must be in [512*512, 1440*1440]"}
    assert response_error(400, {}, orjson.dumps(body), now_s=NOW).detail == "size must be in [512*512, 1440*1440]"


def test_an_answer_that_is_neither_a_job_nor_an_error_is_a_bad_response() -> None:
    for body in (b"{}", b'{"output":{}}', b"[]", b"<html>"):
        with pytest.raises(UpstreamError) as caught:
            parse_acceptance(200, {}, body, now_s=NOW)
        assert caught.value.code == "upstream_bad_response"


@over_rows("body", [{}, {"data": []}, {"data": [{"task_id": "t"}], "total_page": 1}, {"code": "X"}])
def test_a_list_that_can_not_be_read_whole_is_an_error(body: object) -> None:
    with pytest.raises(UpstreamError):
        parse_page(200, {}, orjson.dumps(body))


# --- jobs ---


@pytest.fixture
async def upstream(quick: None) -> AsyncIterator[DashScopeEmulator]:
    async with emulated(DashScopeEmulator, job_s=0.05, price_usd=0.03) as upstream:
        yield upstream


@pytest.fixture
def make_provider(session: aiohttp.ClientSession, upstream: DashScopeEmulator) -> MakeProvider:
    return lambda key="sk-a-key": DashScopeProvider(session, api_key=key, timeout_s=5, base_url=upstream.url)


def prompted(make_call: MakeCall, switch: str = "", model: str = OLD, **fields: Any) -> Call:
    prompt = f"a cat {{{{fault:{switch}}}}}" if switch else "a cat"
    return make_call(model=model, prompt=prompt, count=fields.get("n", 1), **fields)


@pytest.mark.parametrize("model", [OLD, MESSAGE])
async def test_a_job_is_kept_before_its_first_poll_and_any_key_collects_it(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str
) -> None:
    observer = Recorder(lambda: upstream.ledger.jobs[0].polls)
    reply = await make_provider().generate(prompted(make_call, model=model, n=2), observer)
    (handle,) = observer.handles
    assert (observer.noted, handle.provider) == ([0], "dashscope")
    assert "sk-a-key" not in repr(handle)
    assert len(reply.images) == 2
    assert (await make_provider("sk-other").resume(handle, Recorder())).images == reply.images
    sums = upstream.ledger.sums()
    assert (sums["submitted"], sums["charged"], sums["cost_usd"]) == (1, 1, 0.06)


async def test_a_model_that_answers_at_once_begins_no_job(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    observer = Recorder()
    reply = await make_provider().generate(prompted(make_call, model=SYNC), observer)
    assert (len(reply.images), observer.handles) == (1, [])
    usage = details_of(reply).usage
    assert usage is not None
    assert usage["output_image_count"] == 1


async def test_a_partial_job_is_charged_for_what_it_made(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    reply = await make_provider().generate(prompted(make_call, "job end=partial", n=4), Recorder())
    assert len(reply.images) == 3
    assert reply.warnings[0].startswith("1 of 4 images failed")
    assert details_of(reply).usage == {"image_count": 3}
    assert upstream.ledger.sums()["cost_usd"] == 0.09


@pytest.mark.parametrize("switch", ["job unknown_s=0.3", "job polls=3", "job polls=2 poll_fault=429"])
async def test_a_job_is_collected_despite_a_fault_that_passes(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, switch: str
) -> None:
    reply = await make_provider().generate(prompted(make_call, switch), Recorder())
    assert len(reply.images) == 1


@pytest.mark.parametrize("model", [OLD, MESSAGE, SYNC])
@pytest.mark.parametrize(
    ("switch", "code"),
    [
        ("job end=failed", "upstream_error"),
        ("job end=failed code=InvalidParameter", "upstream_invalid_request"),
        ("job end=moderated", "content_policy"),
        ("400", "upstream_invalid_request"),
        ("400_arrearage", "upstream_billing"),
        ("400_model", "model_not_available"),
        ("400_policy", "content_policy"),
        ("401", "upstream_auth"),
        ("403_free", "upstream_billing"),
        ("403_unpurchased", "upstream_auth"),
        ("429", "upstream_rate_limited"),
        ("429_quota", "upstream_rate_limited"),
        ("500", "upstream_error"),
        ("503", "upstream_overloaded"),
        ("200_throttling", "upstream_rate_limited"),
    ],
)
async def test_each_switch_of_the_emulator_has_its_code(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str, switch: str, code: str
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await make_provider().generate(prompted(make_call, switch, model), Recorder())
    assert caught.value.code == code
    assert upstream.ledger.sums()["charged"] == 0


async def test_a_job_that_has_expired_is_forgotten(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().generate(prompted(make_call, "job end=expired"), Recorder())


async def test_only_a_job_that_waits_is_cancelled(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, handles = make_provider(), Recorder()
    await upstream_job(upstream, provider, make_call, handles, "job job_s=60 pending=1")
    assert await provider.cancel(handles.handles[0]) is True
    await upstream_job(upstream, provider, make_call, handles, "job job_s=60 pending=0")
    assert await provider.cancel(handles.handles[1]) is False
    sums = upstream.ledger.sums()
    assert (sums["cancelled"], sums["charged"]) == (1, 1)


async def upstream_job(
    upstream: DashScopeEmulator, provider: DashScopeProvider, make_call: MakeCall, observer: Recorder, switch: str
) -> None:
    """Begin a job and leave it."""
    call = prompted(make_call, switch)
    form = provider.submit_form(call)
    answer = await provider._client.submit(form.path, form.fields, observer, form.headers)
    observer.handles.append(provider.handle_of(provider.read_acceptance(answer), time.time()))


# --- jobs without a handle ---


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search the list at once, and read its jobs quickly."""
    monkeypatch.setattr(dashscope, "LISTED_AFTER_S", -60.0)
    monkeypatch.setattr(dashscope, "READ_DELAY_S", 0.02)
    monkeypatch.setattr(dashscope, "RETRY_DELAYS_S", (0.02, 0.02, 0.02))


async def lose(provider: DashScopeProvider, call: Call) -> float:
    """Make a call with a response that is lost, as a process that dies before it; return when it was sent."""
    sent_at = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DashScopeProvider, "search", JobApiProvider.search)
        observer, error = await failed(provider, call)
    assert (observer.handles, error.ambiguous) == ([], True)
    return sent_at


async def test_a_job_with_a_lost_response_is_found_and_collected(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    handle = await provider.find(call, sent_at)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[0].id
    assert len((await provider.resume(handle, Recorder())).images) == 1
    assert upstream.ledger.sums()["submitted"] == 1


async def test_a_job_is_found_despite_faults_that_pass(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost polls=3 poll_fault=503")
    handle = await provider.find(call, await lose(provider, call))
    assert handle is not None


async def test_a_job_is_found_among_others_of_its_model_by_its_prompt(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    other, provider = make_provider("sk-other"), make_provider()
    for name in ("a dog", "a cow"):
        await other.generate(make_call(model=OLD, prompt=name), Recorder())
    call = prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    handle = await provider.find(call, sent_at - 1)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[2].id


@pytest.mark.parametrize("model", [OLD, MESSAGE])
async def test_neither_of_two_jobs_that_fit_is_taken(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost", model)
    sent_at = await lose(provider, call)
    await lose(provider, call)
    assert await provider.find(call, sent_at) is None


async def test_a_job_of_this_process_is_no_other_calls_job(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "", MESSAGE)
    sent_at = time.time()
    await provider.generate(call, Recorder())
    assert await provider.find(call, sent_at) is None


@pytest.mark.parametrize("moved_s", [-100.0, 10.0])
async def test_a_job_of_another_time_is_not_found(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, moved_s: float
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    assert await provider.find(call, sent_at + moved_s) is None


async def test_a_call_that_never_arrived_has_no_job(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "reset")
    sent_at = await lose(provider, call)
    assert await provider.find(call, sent_at) is None
    assert await provider.find(prompted(make_call, model=SYNC), sent_at) is None


async def test_a_list_of_several_pages_is_read_whole(
    at_once: None,
    make_provider: MakeProvider,
    make_call: MakeCall,
    upstream: DashScopeEmulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dashscope, "MAX_LISTED", 2)
    other, provider = make_provider("sk-other"), make_provider()
    call = prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    for number in range(4):
        await other.generate(make_call(model=OLD, prompt=f"dog {number}"), Recorder())
    handle = await provider.find(call, sent_at)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[0].id
    monkeypatch.setattr(dashscope, "MAX_PAGES", 2)
    assert await provider.find(call, sent_at) is None


async def test_a_list_that_fails_is_an_error_and_not_an_empty_one(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    upstream.revoked.add("sk-a-key")
    with pytest.raises(UpstreamError) as caught:
        await provider.find(call, sent_at)
    assert caught.value.code == "upstream_auth"
