"""Tests of Black Forest Labs' provider: fields, refusals, states, and jobs against its emulator."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from imagegen.emulator.bfl import BflEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.bfl import BflProvider
from imagegen.providers.bfl_requests import edits_of, fields_of, model_path, sent_request, warnings_of
from imagegen.providers.bfl_responses import parse_acceptance, parse_job, submit_error
from imagegen.providers.input_bodies import Base64Image
from imagegen.providers.job_polling import JobState
from imagegen.providers.protocol import Call, InputImage
from imagegen.tasks.image import ImageLink
from tests.emulated_jobs import Recorder, emulated, quick_polls
from tests.providers.conftest import MakeCall, details_of
from tests.support import over_rows

MakeProvider = Callable[..., BflProvider]
quick = pytest.fixture(quick_polls)
NOW = 1_795_000_000.0
LINK = "https://delivery-eu1.bfl.ai/results/a.png?se=2099-01-01T00%3A00%3A00Z&sp=r&sig=abc"
OLD_LINK = "https://delivery-eu1.bfl.ai/results/a.png?se=2020-01-01T00%3A00%3A00Z&sp=r&sig=abc"


def input_image() -> InputImage:
    async def read() -> AsyncGenerator[bytes, None]:
        yield b"png"

    return InputImage("image/png", 3, read)


def state(body: object, status: int = 200, **headers: str) -> JobState:
    return parse_job(status, headers, orjson.dumps(body), now_s=NOW)


@over_rows(
    ("model", "given", "sent"),
    [
        ("flux-2-pro", {"width": 1024, "height": 768}, {"width": 1024, "height": 768}),
        (
            "flux-2-pro",
            {"seed": 7, "outputFormat": "png"},
            {"width": 512, "height": 512, "output_format": "png", "seed": 7},
        ),
        (
            "flux-2-flex",
            {"steps": 20, "guidanceScale": 4.5},
            {"width": 512, "height": 512, "steps": 20, "guidance": 4.5},
        ),
        ("flux-2-pro", {"promptUpsampling": True}, {"width": 512, "height": 512, "prompt_upsampling": True}),
        ("flux-2-max", {"disableSafetyChecker": True}, {"width": 512, "height": 512, "safety_tolerance": 5}),
        ("flux-2-max", {"moderation": "low"}, {"width": 512, "height": 512, "safety_tolerance": 5}),
        ("flux-2-max", {"moderation": "auto"}, {"width": 512, "height": 512}),
        ("flux-2-max", {"moderation": "low", "extra": {"safety_tolerance": 1}}, {"safety_tolerance": 1}),
        ("flux-2-max", {"extra": {"transparent_bg": True}}, {"transparent_bg": True}),
        ("flux-2-pro", {"aspectRatio": "16:9"}, {"width": 1360, "height": 768}),
        ("flux-kontext-pro", {"width": 1024, "height": 768}, {"aspect_ratio": "4:3"}),
        ("flux-pro-1.1-ultra", {"aspectRatio": "21:9", "extra": {"raw": True}}, {"aspect_ratio": "21:9", "raw": True}),
        ("flux-pro-1.1", {}, {"width": 512, "height": 512}),
        ("flux-9-unknown", {"steps": 4}, {"width": 512, "height": 512, "steps": 4}),
    ],
)
def test_each_family_gets_the_fields_that_it_has(
    make_call: MakeCall, model: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    fields = fields_of(make_call(model=model, **given))
    assert fields.pop("prompt") == "a cat"
    assert {name: fields.get(name) for name in sent} == sent
    if "extra" not in given:
        assert fields == sent


def test_a_seed_is_sent_as_the_call_has_it(make_call: MakeCall) -> None:
    assert fields_of(make_call(model="flux-2-pro", seed=11))["seed"] == 11


@over_rows(
    ("model", "names", "max_images", "links"),
    [
        ("flux-2-pro", ["input_image", "input_image_2"], 8, True),
        ("flux-2-klein-4b", ["input_image", "input_image_2"], 4, True),
        ("flux-kontext-max", ["input_image", "input_image_2"], 4, True),
        ("flux-dev", ["image_prompt"], 1, False),
        ("flux-pro-1.0-expand", ["image"], 1, False),
        ("flux-pro-1.0-fill", ["image", "mask"], 1, False),
    ],
)
def test_input_images_are_base64_without_a_prefix(
    make_call: MakeCall, model: str, names: list[str], max_images: int, links: bool
) -> None:
    upload = "upload:" + "0" * 64
    sources: dict[str, object] = {"imageUrl": upload}
    if "input_image_2" in names:
        sources["referenceImages"] = ["https://a.example/b.png"]
    if "mask" in names:
        sources["mask"] = upload
    call = make_call(model=model, **sources)
    image = input_image()
    fields = fields_of(type(call)(call.request, 1, inputs={upload: image}))
    assert [name for name in fields if "image" in name or name == "mask"] == names
    assert fields[names[0]] == Base64Image(image)
    assert fields.get("input_image_2", "https://a.example/b.png") == "https://a.example/b.png"
    edits = edits_of(model)
    assert edits is not None
    assert (edits.max_images, edits.mask, edits.links) == (max_images, "mask" in names, links)
    assert ("width" in fields) == (model.startswith("flux-2") or model == "flux-dev")


def test_what_a_model_does_not_take_is_left_out_with_a_warning(make_call: MakeCall) -> None:
    call = make_call(model="flux-2-pro", steps=20, negativePrompt="dog", quality="high")
    assert fields_of(call) == {"prompt": "a cat", "width": 512, "height": 512}
    assert [warning.split()[0] for warning in warnings_of(call)] == ["negative_prompt", "quality", "steps"]
    sent = sent_request(call.request)
    assert (sent.steps, sent.negative_prompt, sent.quality) == (None, None, None)


def test_a_size_that_becomes_a_ratio_has_a_warning_and_one_fingerprint(make_call: MakeCall) -> None:
    by_size = make_call(model="flux-kontext-pro", width=1024, height=1024)
    by_ratio = make_call(model="flux-kontext-pro", aspectRatio="1:1")
    assert "1:1 was requested" in warnings_of(by_size)[0]
    assert warnings_of(by_ratio) == ()
    assert sent_request(by_size.request) == sent_request(by_ratio.request)


@over_rows("model", ["../credits", "a/b", "flux 2", "", "flux-2-pro?x=1", ".."])
def test_a_model_that_can_not_be_a_part_of_the_path_is_not_called(model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        model_path(model)
    assert caught.value.code == "model_not_available"


def test_an_acceptance_has_the_address_of_polls_and_the_price_in_dollars() -> None:
    body = {"id": "j1", "polling_url": "https://api.us1.bfl.ai/v1/get_result", "cost": 4.5, "output_mp": 1}
    accepted = parse_acceptance(200, {}, orjson.dumps(body))
    assert accepted.poll_url == "https://api.us1.bfl.ai/v1/get_result?id=j1"
    assert (accepted.id, accepted.cost_micro_usd) == ("j1", 45_000)
    with_id = {**body, "polling_url": "https://api.bfl.ai/v1/get_result?id=j1", "cost": None}
    accepted = parse_acceptance(200, {}, orjson.dumps(with_id))
    assert (accepted.poll_url, accepted.cost_micro_usd) == ("https://api.bfl.ai/v1/get_result?id=j1", None)


@over_rows(
    ("status", "body", "code", "retryable", "detail"),
    [
        (400, {"error": "invalid_request", "message": "bad size"}, "upstream_invalid_request", False, "bad size"),
        (401, {"detail": "Invalid API key"}, "upstream_auth", False, "key"),
        (403, {"detail": "Not authenticated"}, "upstream_auth", False, "key"),
        (402, {"detail": "Insufficient credits."}, "upstream_billing", False, "no credit"),
        (403, {"detail": "Insufficient credits"}, "upstream_billing", False, "no credit"),
        (404, {"detail": "Not Found"}, "model_not_available", False, "does not have this model"),
        (422, {"detail": "Request Moderated"}, "content_policy", False, "Moderated"),
        (
            422,
            {"detail": [{"loc": ["body", "width"], "msg": "Input should be a multiple of 16", "type": "multiple_of"}]},
            "upstream_invalid_request",
            False,
            "width: Input should be a multiple of 16",
        ),
        (429, {"error": "rate_limit_exceeded", "message": "slow"}, "upstream_rate_limited", True, "slow"),
        (500, {"detail": "Internal Server Error"}, "upstream_error", True, "Internal"),
        (502, {"detail": "Bad Gateway"}, "upstream_error", True, "Bad"),
        (503, {"detail": "overloaded"}, "upstream_overloaded", True, "overloaded"),
        (200, {"status": "Request Moderated", "details": {"Moderation Reasons": ["A"]}}, "content_policy", False, "A"),
        (200, {"polling_url": "https://api.bfl.ai/v1/get_result"}, "upstream_bad_response", False, ""),
    ],
)
def test_each_refusal_of_a_submit_has_its_code(
    status: int, body: dict[str, Any], code: str, retryable: bool, detail: str
) -> None:
    with pytest.raises(UpstreamError) as caught:
        parse_acceptance(status, {}, orjson.dumps(body))
    assert (caught.value.code, caught.value.retryable, caught.value.ambiguous) == (code, retryable, False)
    assert detail in caught.value.detail


def test_a_field_that_is_refused_by_name_may_be_left_out() -> None:
    body = {
        "detail": [{"loc": ["body", "guidance"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]
    }
    assert submit_error(422, {}, orjson.dumps(body)).refused


def test_the_seconds_to_wait_come_from_header_or_body() -> None:
    body = orjson.dumps({"error": "rate_limit_exceeded", "message": "slow", "retry_after": 7})
    assert submit_error(429, {}, body).retry_after_s == 7
    assert submit_error(429, {"retry-after": "3"}, body).retry_after_s == 3


def test_a_gateway_that_gave_up_leaves_a_submit_ambiguous() -> None:
    assert submit_error(504, {}, b"<html>Gateway Time-out</html>").ambiguous


@over_rows("name", ["status", "state"])
@over_rows(
    ("word", "phase"),
    [
        ("Pending", "running"),
        ("Reviewing", "running"),
        ("Ready", "done"),
        ("Error", "failed"),
        ("Failed", "failed"),
        ("Request Moderated", "failed"),
        ("Content Moderated", "failed"),
        ("Task not found", "forgotten"),
    ],
)
def test_each_state_has_its_phase(name: str, word: str, phase: str) -> None:
    assert state({name: word, "result": {"sample": LINK}}).phase == phase
    assert state({name: word, "result": {"sample": LINK}}).unclear is (word == "Reviewing")


def test_a_ready_job_has_its_image_and_a_running_one_its_progress() -> None:
    ready = state({"status": "Ready", "result": {"sample": LINK, "seed": 5}})
    assert ready.reply is not None
    assert ready.reply.images == (ImageLink(LINK),)
    assert state({"status": "Pending", "progress": 0.4}).progress == 0.4
    empty = state({"status": "Ready", "result": {}})
    assert empty.reply is not None
    assert empty.reply.images == ()


def test_a_job_with_a_dead_link_is_forgotten_by_the_clock_of_the_provider() -> None:
    body = {"status": "Ready", "result": {"sample": OLD_LINK}}
    assert state(body).phase == "forgotten"
    assert state(body, Date="Wed, 01 Jan 2019 00:00:00 GMT").phase == "done"


@over_rows(
    ("body", "code", "retryable", "detail"),
    [
        ({"status": "Error", "error": "GPU lost"}, "upstream_error", True, "GPU lost"),
        ({"status": "Failed", "details": {"message": "no faces"}}, "upstream_error", True, "no faces"),
        ({"status": "Error"}, "upstream_error", True, "the job failed"),
        ({"status": "Error", "error": "blocked by our moderation"}, "content_policy", False, "moderation"),
        ({"status": "Request Moderated"}, "content_policy", False, "Request moderated"),
        (
            {"status": "Content Moderated", "details": {"Moderation Reasons": ["Derivative Works Filter"]}},
            "content_policy",
            False,
            "Derivative Works Filter",
        ),
    ],
)
def test_each_failed_job_has_its_code(body: dict[str, Any], code: str, retryable: bool, detail: str) -> None:
    error = state(body).error
    assert error is not None
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)
    assert detail in error.detail


@over_rows(
    ("status", "body", "code"),
    [
        (429, {"error": "rate_limit_exceeded", "message": "slow"}, "upstream_rate_limited"),
        (500, {"detail": "no"}, "upstream_error"),
        (401, {"detail": "Invalid API key"}, "upstream_auth"),
        (200, {"id": "j"}, "upstream_bad_response"),
    ],
)
def test_a_failed_poll_is_no_state_of_the_job(status: int, body: dict[str, Any], code: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        state(body, status)
    assert caught.value.code == code
    assert state({}, 404).phase == "forgotten"


@pytest.fixture
async def upstream(quick: None) -> AsyncIterator[BflEmulator]:
    async with emulated(BflEmulator, job_s=0.05, price_usd=0.03) as upstream:
        yield upstream


@pytest.fixture
def make_provider(session: aiohttp.ClientSession, upstream: BflEmulator) -> MakeProvider:
    return lambda key="a-key": BflProvider(session, api_key=key, timeout_s=30, base_url=upstream.url)


def prompted(make_call: MakeCall, switch: str = "", **fields: Any) -> Call:
    return make_call(model="flux-2-pro", prompt=f"a cat {{{{fault:{switch}}}}}" if switch else "a cat", **fields)


async def test_a_job_is_kept_before_its_first_poll_and_collected_by_its_handle(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator
) -> None:
    observer = Recorder(lambda: upstream.ledger.jobs[0].polls)
    reply = await make_provider().generate(prompted(make_call, seed=3), observer)
    (handle,) = observer.handles
    assert (observer.noted[0], handle.provider, handle.cost_micro_usd) == (0, "bfl", 30_000)
    assert "a-key" not in repr(handle)
    assert len(reply.images) == 1
    assert details_of(reply).cost_micro_usd == 30_000
    later = await make_provider().resume(handle, Recorder())
    assert later == reply
    assert upstream.ledger.sums() == {
        "submitted": 1,
        "charged": 1,
        "cancelled": 0,
        "listed": 0,
        "cost_usd": 0.03,
    }


@pytest.mark.parametrize(
    "switch", ["job no_id=1", "job unknown_s=0.3", "job unknown_s=0.3 missing=404", "job field=state", "job polls=3"]
)
async def test_a_job_is_collected_despite_a_fault_that_passes(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator, switch: str
) -> None:
    reply = await make_provider().generate(prompted(make_call, switch), Recorder())
    assert len(reply.images) == 1


async def test_the_key_goes_to_no_host_outside_of_the_domain(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator
) -> None:
    observer = Recorder()
    switch = "job address=http://192.0.2.1:9"
    reply = await make_provider().generate(prompted(make_call, switch), observer)
    assert observer.handles[0].poll_url == ""
    assert len(reply.images) == 1


@pytest.mark.parametrize(
    ("switch", "code", "charged"),
    [
        ("job end=failed", "upstream_error", 0),
        ("job end=failed state=Failed", "upstream_error", 0),
        ("job end=moderated", "content_policy", 0),
        ("job end=moderated policy=content reason=Likeness", "content_policy", 0),
        ("402", "upstream_billing", 0),
        ("404", "model_not_available", 0),
        ("422", "upstream_invalid_request", 0),
        ("422_policy", "content_policy", 0),
        ("429", "upstream_rate_limited", 0),
        ("500", "upstream_error", 0),
        ("503", "upstream_overloaded", 0),
    ],
)
async def test_each_switch_of_the_emulator_has_its_code(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator, switch: str, code: str, charged: int
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await make_provider().generate(prompted(make_call, switch), Recorder())
    assert caught.value.code == code
    assert upstream.ledger.sums()["charged"] == charged


@pytest.mark.parametrize(("switch", "submitted"), [("job answer=lost", 1), ("reset", 0), ("502", 0)])
async def test_a_submit_without_an_answer_is_ambiguous_and_has_no_handle(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator, switch: str, submitted: int
) -> None:
    observer = Recorder()
    with pytest.raises(UpstreamError) as caught:
        await make_provider().generate(prompted(make_call, switch), observer)
    assert (caught.value.ambiguous, observer.handles) == (True, [])
    assert upstream.ledger.sums()["submitted"] == submitted
    assert await make_provider().find(prompted(make_call), time.time()) is None


async def test_a_job_that_has_expired_or_has_a_dead_link_is_forgotten(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().generate(prompted(make_call, "job end=expired"), Recorder())


async def test_a_revoked_key_ends_a_job_and_another_one_does_not_find_it(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    observer = Recorder()
    await make_provider().generate(prompted(make_call), observer)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider("other").resume(observer.handles[0], observer)
    upstream.revoked.add("a-key")
    with pytest.raises(UpstreamError) as caught:
        await make_provider().resume(observer.handles[0], observer)
    assert caught.value.code == "upstream_auth"


async def test_a_job_can_not_be_cancelled(
    make_provider: MakeProvider, make_call: MakeCall, upstream: BflEmulator
) -> None:
    observer = Recorder()
    await make_provider().generate(prompted(make_call), observer)
    assert await make_provider().cancel(observer.handles[0]) is None
