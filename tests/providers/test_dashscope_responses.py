"""Tests of DashScope's responses: acceptances, states, results and refusals."""

from __future__ import annotations

import orjson
import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.dashscope_responses import (
    parse_acceptance,
    parse_job,
    parse_page,
    parse_reply,
    prompt_of,
    response_error,
)
from imagegen.providers.job_polling import JobState
from imagegen.tasks.image import ImageLink
from tests.providers.conftest import details_of
from tests.support import over_rows

NOW = 1_795_000_000.0
LINKS = ("https://dashscope-result-bj.oss-cn-beijing.aliyuncs.com/1.png?Expires=1", "https://oss.example/2.png")


def read(body: object, status: int = 200) -> JobState:
    return parse_job(status, {}, orjson.dumps(body), now_s=NOW)


def output(**fields: object) -> dict[str, object]:
    return {"request_id": "r", "output": {"task_id": "t", **fields}}


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
    assert read(output(task_status=word)).unclear is (word in ("SUSPENDED", "REVIEWING"))


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
    body = orjson.dumps({"output": {"choices": choices}, "usage": usage})
    at_once = parse_reply(200, {}, body, now_s=NOW)
    assert at_once.images == reply.images == parse_reply(503, {}, body, now_s=NOW).images
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
