"""Tests of the parser of provider jobs, with answers in the shapes of relays."""

from __future__ import annotations

import orjson
import pytest
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.job_polling import JobState
from imagegen.providers.relay_jobs import Acceptance, parse_acceptance, parse_job, poll_addresses
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.support import over_rows

BASE = URL("https://relay.example/v1")
SUBMIT = URL("https://relay.example/v1/images/generations")
LINK = "https://cdn.example/a.png"

SUB2API = {"id": "imgtask_1", "task_id": "imgtask_1", "object": "image.generation.task", "created_at": 1_785_000_000}


def accepted(body: object, status: int = 200, **headers: str) -> Acceptance | None:
    return parse_acceptance(status, headers, orjson.dumps(body))


def state(body: object, status: int = 200, **headers: str) -> JobState:
    return parse_job(status, headers, orjson.dumps(body))


def links(job: JobState) -> list[str]:
    assert job.reply is not None
    return [image.url for image in job.reply.images if isinstance(image, ImageLink)]


@over_rows(
    ("body", "status", "job_id", "guess"),
    [
        ({"code": 200, "data": [{"status": "submitted", "task_id": "task_1"}]}, 200, "task_1", "tasks"),
        ({"data": {"status": "submitted", "task_id": "task_1"}}, 200, "task_1", "tasks"),
        (SUB2API | {"status": "processing", "expires_at": 1_785_086_400}, 202, "imgtask_1", "images/tasks"),
        ({"id": "x", "object": "image.generation.task", "status": "processing"}, 200, "x", "images/tasks"),
        ({"task_id": "task_1", "task_status": "PENDING", "request_id": "r"}, 200, "task_1", "tasks"),
        ({"id": "job-7", "status": "pending"}, 202, "job-7", ""),
        ({"task_id": 12345, "status": "queued"}, 200, "12345", "tasks"),
        ({"request_id": "r", "output": {"task_id": "t", "task_status": "PENDING"}}, 200, "t", "tasks"),
        ({"taskId": "t"}, 200, "t", "tasks"),
        ({"task_id": "t", "status": "queued", "url": "https://relay.example/v1/tasks/t"}, 200, "t", "tasks"),
        ({"task_id": "t", "error": None, "message": ""}, 200, "t", "tasks"),
        ({"created": 1, "data": [], "task_id": "t"}, 200, "t", "tasks"),
    ],
)
def test_a_response_with_a_task_id_and_no_image_is_an_accepted_job(
    body: object, status: int, job_id: str, guess: str
) -> None:
    acceptance = accepted(body, status)
    assert acceptance is not None
    assert (acceptance.id, acceptance.guess) == (job_id, guess)


@over_rows(
    ("body", "status"),
    [
        ({"created": 1, "data": [{"url": LINK}], "task_id": "t"}, 200),
        ({"created": 1, "data": [{"b64_json": "aGVsbG8="}], "task_id": "t"}, 200),
        ({"id": "oX-1", "model": "m", "object": "list", "data": []}, 200),
        ({"id": "chatcmpl-1", "status": "pending"}, 200),
        ({"task_id": "t", "status": "failed", "error": {"message": "no"}}, 200),
        ({"error": {"message": "no task_id was given"}}, 400),
        ({"task_id": "t", "error": {"message": "no credit"}}, 200),
        ({"task_id": "t", "status": "processing", "data": [{"url": LINK}]}, 200),
        ({"task_id": "t"}, 500),
        ({"task_id": "", "status": "submitted"}, 200),
        ({"task_id": {"id": 1}, "status": "submitted"}, 200),
        ({"task_id": "..", "status": "submitted"}, 200),
        (["task_id"], 200),
        ("task", 200),
    ],
)
def test_images_errors_and_answers_without_an_id_are_no_accepted_job(body: object, status: int) -> None:
    assert accepted(body, status) is None


def test_an_acceptance_without_an_id_is_known_by_the_end_of_its_address() -> None:
    for location, job_id in (("/v1/tasks/a%2Fb?x=1", "a/b"), ("https://relay.example/v1/jobs/7", "7")):
        acceptance = parse_acceptance(202, {"Location": location}, b"")
        assert acceptance is not None
        assert (acceptance.id, acceptance.address) == (job_id, location)
    for status, location in ((202, ""), (202, "/"), (202, "/v1/.."), (202, "http://[x/7"), (200, "/v1/tasks/7")):
        assert parse_acceptance(status, {"Location": location}, b"") is None


def test_an_acceptance_names_its_address_and_when_to_poll() -> None:
    job = accepted(SUB2API | {"poll_url": "/v1/images/tasks/imgtask_1", "expires_at": 5.0}, 202, **{"Retry-After": "3"})
    assert job is not None
    assert (job.address, job.retry_after_s, job.expires_at) == ("/v1/images/tasks/imgtask_1", 3.0, 5.0)
    by_header = accepted(SUB2API, 202, Location="/v1/images/tasks/imgtask_1")
    assert by_header is not None
    assert by_header.address == "/v1/images/tasks/imgtask_1"


@over_rows(
    ("address", "first"),
    [
        ("/v1/images/tasks/7?x=1", "https://relay.example/v1/images/tasks/7?x=1"),
        ("tasks/7", "https://relay.example/v1/tasks/7"),
        ("https://relay.example/poll/7#there", "https://relay.example/poll/7"),
        ("http://relay.example/poll/7", "https://relay.example/poll/7"),
        ("https://RELAY.example/poll/7", "https://relay.example/poll/7"),
    ],
)
def test_a_poll_address_on_the_own_host_is_used_and_never_without_tls(address: str, first: str) -> None:
    assert str(poll_addresses(BASE, SUBMIT, "7", address)[0]) == first


@over_rows(
    "address",
    [
        "https://evil.example/v1/tasks/7",
        "//evil.example/v1/tasks/7",
        "https://relay.example.evil.example/tasks/7",
        "https://relay.example@evil.example/tasks/7",
        "https://user:secret@relay.example/tasks/7",
        "https://relay.example:8443/tasks/7",
        "http://relay.example:8080/tasks/7",
        "ftp://relay.example/tasks/7",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://relay.example\\@evil.example/7",
        "https://[/7",
        "http://127.0.0.1/tasks/7",
        "https://relay.example/\r\nX: 1",
    ],
)
def test_a_poll_address_on_another_host_is_never_used(address: str) -> None:
    urls = poll_addresses(BASE, SUBMIT, "7", address)
    assert [str(url) for url in urls] == [
        "https://relay.example/v1/tasks/7",
        "https://relay.example/v1/images/tasks/7",
        "https://relay.example/v1/images/generations/7",
    ]


def test_an_id_stays_one_part_of_the_path() -> None:
    for url in poll_addresses(BASE, SUBMIT, "../../admin?x#y", ""):
        assert url.host == "relay.example"
        assert url.raw_path.endswith("/..%2F..%2Fadmin%3Fx%23y")


@over_rows("word", ["submitted", "pending", "processing", "PENDING", "RUNNING", "IN_PROGRESS", "strange"])
def test_a_job_that_has_not_ended_runs(word: str) -> None:
    assert state({"code": 200, "data": {"status": word, "progress": 40}}).phase == "running"
    assert state({"code": 200, "data": {"status": word, "progress": 40}}).progress == 0.4
    assert state({"task_id": "t", "task_status": word}).phase == "running"
    assert state({"id": "t", "status": word}, 202).phase == "running"
    assert state({"data": {"status": word, "progress": "40%"}}, 200, **{"Retry-After": "2"}).retry_after_s == 2.0
    assert state({"id": "t", "status": word}).unclear is (word == "strange")


@over_rows("body", [{}, {"data": {"id": "t"}}, {"id": "t", "status": "Reviewing"}])
def test_a_job_without_a_known_state_is_unclear(body: dict[str, object]) -> None:
    assert (state(body).phase, state(body).unclear) == ("running", True)
    assert not state(body, 202).unclear


@over_rows(
    "body",
    [
        {"code": 200, "data": {"status": "completed", "result": {"images": [{"url": [LINK], "expires_at": 1}]}}},
        {"code": 200, "data": {"status": "completed", "result": {"images": [{"url": LINK}]}}},
        SUB2API
        | {
            "status": "completed",
            "http_status": 200,
            "image_url": LINK,
            "result": {"created": 1, "data": [{"url": LINK}]},
        },
        SUB2API | {"status": "completed", "image_url": LINK},
        {"task_id": "t", "task_status": "SUCCEED", "output_images": [LINK]},
        {"id": "j", "status": "completed", "status_code": 200, "result": {"created": 1, "data": [{"url": LINK}]}},
        {"code": "success", "data": {"task_id": "t", "status": "SUCCESS", "data": {"data": [{"url": LINK}]}}},
        {"output": {"task_id": "t", "task_status": "SUCCEEDED", "results": [{"url": LINK}]}},
        {"status": "succeeded", "output": [LINK]},
        {"status": "succeeded", "output": LINK},
        {"created": 1, "data": [{"url": LINK}]},
        {"status": "completed", "url": "https://relay.example/v1/tasks/7", "result": {"images": [{"url": LINK}]}},
        {"status": "completed", "result": {"image": {"url": LINK}}},
        {"status": "completed", "imageUrl": LINK},
        {"code": 200, "data": {"taskId": "t", "state": "success", "resultJson": f'{{"resultUrls":["{LINK}"]}}'}},
        {"status": "completed", "result": {"choices": [{"message": {"content": f"Done: ![cat]({LINK})"}}]}},
    ],
)
def test_a_completed_job_has_its_image_wherever_the_relay_puts_it(body: object) -> None:
    job = state(body)
    assert (job.phase, links(job)) == ("done", [LINK])


def test_base64_and_several_images_of_a_job_are_read() -> None:
    encoded = state({"status": "completed", "result": {"data": [{"b64_json": "aGVsbG8="}]}})
    assert encoded.reply is not None
    assert encoded.reply.images == (ImageBytes(b"hello"),)
    assert len(links(state({"data": {"status": "completed", "result": {"images": [{"url": [LINK, LINK]}]}}}))) == 2


def test_a_completed_job_without_an_image_is_a_reply_without_one() -> None:
    job = state({"data": {"status": "completed", "result": {"images": []}}})
    assert job.reply is not None
    assert (job.phase, job.reply.images) == ("done", ())


def test_the_charge_and_the_usage_of_a_job_are_kept() -> None:
    result = {"images": [{"url": [LINK]}], "usage": {"total_tokens": 9}, "size": "512x512"}
    job = state({"code": 200, "data": {"status": "completed", "cost": 0.0425, "result": result}})
    assert job.reply is not None
    assert job.reply.details is not None
    assert job.reply.details.cost_micro_usd == 42_500
    assert (job.reply.details.usage, job.reply.details.size) == ({"total_tokens": 9}, "512x512")


@over_rows(
    ("body", "code", "retryable"),
    [
        (
            {"data": {"status": "failed", "error": "Your prompt was rejected by our safety system"}},
            "content_policy",
            False,
        ),
        (
            {"data": {"status": "failed", "error": {"code": "moderation_blocked", "message": "no"}}},
            "content_policy",
            False,
        ),
        (
            SUB2API | {"status": "failed", "http_status": 400, "error": {"message": "bad size"}},
            "upstream_invalid_request",
            False,
        ),
        (
            SUB2API | {"status": "failed", "http_status": 429, "error": {"message": "slow down"}},
            "upstream_rate_limited",
            True,
        ),
        (SUB2API | {"status": "failed", "http_status": 503, "error": {"message": "busy"}}, "upstream_overloaded", True),
        ({"data": {"status": "failed", "error": {"message": "GPU crashed"}}}, "upstream_error", True),
        ({"data": {"status": "FAILURE", "fail_reason": "余额不足"}}, "upstream_billing", False),
        ({"msg": "success", "data": {"state": "fail", "failMsg": "It is NSFW"}}, "content_policy", False),
        ({"msg": "success", "data": {"state": "fail", "taskId": "t"}}, "upstream_error", True),
        (
            {"task_id": "t", "task_status": "FAILED", "errors": {"message": "inappropriate content"}},
            "content_policy",
            False,
        ),
        (
            {"output": {"task_id": "t", "task_status": "FAILED", "code": "DataInspectionFailed", "message": "no"}},
            "content_policy",
            False,
        ),
        ({"id": "j", "status": "failed", "status_code": 401, "error": {"message": "key"}}, "upstream_auth", False),
        ({"status": "failed"}, "upstream_error", True),
        ({"status": "canceled"}, "upstream_error", False),
        ({"data": {"status": "CANCELLED", "fail_reason": "by the user"}}, "upstream_error", False),
        ({"data": {"status": "cancelled", "error": {"message": "Rate limit exceeded"}}}, "upstream_rate_limited", True),
        (
            {"status": "failed", "error": {"type": "invalid_request_error", "message": "no such size"}},
            "upstream_invalid_request",
            False,
        ),
    ],
)
def test_a_failed_job_fails_as_a_call_with_the_same_error(body: object, code: str, retryable: bool) -> None:
    error = state(body).error
    assert error is not None
    assert (error.code, error.retryable, error.ambiguous) == (code, retryable, False)


@over_rows(
    ("body", "status"),
    [
        ({"error": {"message": "task not found"}}, 404),
        ({}, 410),
        ({"code": 404, "message": "no"}, 200),
        ({"code": 400, "message": "Task does not exist"}, 200),
        ({"code": "task_not_exist", "message": "task_not_exist"}, 200),
        ({"task_id": "t", "task_status": "FAILED", "errors": {"message": "task not found"}}, 200),
        ({"output": {"task_id": "t", "task_status": "UNKNOWN"}}, 200),
        ({"data": {"status": "expired"}}, 200),
    ],
)
def test_a_job_that_the_relay_does_not_find_is_forgotten(body: object, status: int) -> None:
    assert state(body, status).phase == "forgotten"


@over_rows(
    ("body", "status", "code"),
    [
        ({"error": {"message": "down"}}, 500, "upstream_error"),
        ({"error": {"message": "slow"}}, 429, "upstream_rate_limited"),
        ({"error": {"message": "who?"}}, 401, "upstream_auth"),
        ({"code": 500, "message": "database is locked"}, 200, "upstream_error"),
        ({"code": 429, "message": "slow down"}, 200, "upstream_rate_limited"),
        (["no", "object"], 200, "upstream_bad_response"),
    ],
)
def test_a_poll_that_fails_does_not_change_the_state_of_the_job(body: object, status: int, code: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        state(body, status)
    assert caught.value.code == code


def test_the_words_of_an_envelope_that_means_success_are_no_error() -> None:
    error = state({"msg": "success", "code": 200, "data": {"state": "fail", "taskId": "t"}}).error
    assert error is not None
    assert error.detail == "the job failed"
