"""Table tests of every error row and odd success of the providers with jobs, played over HTTP: one row for each case of
their documentation."""
# ruff: noqa: E501 - one row on one line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientSession

from imagegen.providers.bfl import BflProvider
from imagegen.providers.dashscope import DashScopeProvider
from imagegen.providers.fal import FalProvider
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.replicate import ReplicateProvider
from tests.played_upstream import (
    AGAIN,
    COOLS,
    IMAGE,
    NO_MODEL,
    OUT,
    Answer,
    PlayedUpstream,
    Row,
    play,
    quick_polls_of_rows,
    with_odd_answers,
)
from tests.providers.conftest import MakeCall

_quick = pytest.fixture(quick_polls_of_rows, autouse=True)


def creating(kind: type[JobApiProvider], session: ClientSession) -> Callable[[str], Any]:
    """Return a function that makes a provider for an address."""
    return lambda url: kind(session, api_key="the-secret-key", base_url=url, timeout_s=30)


# --- fal ---

FAL_ID = "req-1"
FAL_JOB = f"{{BASE}}/fal-ai/flux/requests/{FAL_ID}"
FAL_ACCEPTED = {
    "status": "IN_QUEUE",
    "request_id": FAL_ID,
    "response_url": FAL_JOB,
    "status_url": f"{FAL_JOB}/status",
    "cancel_url": f"{FAL_JOB}/cancel",
    "queue_position": 0,
}
FLAGGED = "The content could not be processed because it contained material flagged by a content checker."


def fal_stage(method: str, path: str) -> str:
    return "submit" if method == "POST" else "poll" if path.endswith("/status") else "result"


def fal_fault(kind: str, message: str, field: str = "prompt") -> dict[str, object]:
    return {"detail": [{"loc": ["body", field], "msg": message, "type": kind, "url": "u", "input": None}]}


def fal_failed(kind: str) -> dict[str, Any]:
    return {"poll": (200, {"status": "COMPLETED", "error": "It failed", "error_type": kind})}


def fal_result(status: int, body: object, **headers: str) -> dict[str, Any]:
    return {"result": (status, body, {name.replace("_", "-"): value for name, value in headers.items()})}


FAL = with_odd_answers(
    Row("accepted", {}, 1),
    Row("accepted, 202 while it waits", {"poll": [(202, {"status": "IN_QUEUE", "queue_position": 1}), (202, {"status": "IN_PROGRESS", "logs": None}), (200, {"status": "COMPLETED"})]}, 1),
    Row("id as a number", {"submit": (200, FAL_ACCEPTED | {"request_id": 17})}, 1),
    Row("addresses abroad", {"submit": (200, FAL_ACCEPTED | dict.fromkeys(("status_url", "response_url", "cancel_url"), "https://foreign.example/fal-ai/flux/requests/req-1"))}, 1),
    Row("no addresses", {"submit": (200, {"request_id": FAL_ID, "status": "IN_QUEUE"})}, 1),
    Row("no id", {"submit": (200, {"status": "IN_QUEUE", "queue_position": 0})}, "upstream_bad_response", paid="yes"),
    Row("422 of a field", {"submit": (422, fal_fault("missing", "field required"))}, "upstream_invalid_request", detail="prompt: field required"),
    Row("422 of the content checker", {"submit": (422, fal_fault("content_policy_violation", FLAGGED))}, "content_policy", detail="content checker"),
    Row("401", {"submit": (401, {"detail": "Cannot access application. Authentication is required to access this app."})}, "upstream_auth", **OUT),
    Row("403", {"submit": (403, {"detail": "Forbidden"})}, "upstream_auth", **OUT),
    Row("403 without balance", {"submit": (403, {"detail": "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."})}, "upstream_billing", **OUT),
    Row("404 of an application", {"submit": (404, {"detail": "Application not found"})}, "model_not_available", **NO_MODEL),
    Row("429", {"submit": (429, {"detail": "Too many requests"})}, "upstream_rate_limited", **COOLS),
    Row("408", {"submit": (408, {"detail": "Request timeout"})}, "upstream_error", retry=True, paid="unsure"),
    Row("500", {"submit": (500, {"detail": "Internal server error", "error_type": "internal_error"})}, "upstream_error", **AGAIN),
    Row("500 in the field message", {"submit": (500, {"message": "Internal server error"})}, "upstream_error", **AGAIN, detail="Internal server error"),
    Row("503 without a runner", {"submit": (503, {"detail": "No runner could be allocated", "error_type": "runner_scheduling_failure"})}, "upstream_overloaded", **AGAIN),
    Row("504", {"submit": (504, {"detail": "Request timed out", "error_type": "request_timeout"})}, "upstream_timeout", retry=True, paid="unsure"),
    Row("504 by the caller's own limit", {"submit": (504, {"detail": "Request timed out"}, {"X-Fal-Request-Timeout-Type": "user"})}, "upstream_timeout"),
    Row("lost, and not to be found", {"poll": (404, {"detail": "Request req-1 not found"})}, "upstream_error", retry=True, paid="unsure"),
    *(Row(f"job: {kind}", fal_failed(kind) | fal_result(status, {"detail": "It failed", "error_type": kind}, X_Fal_Error_Type=kind), code, retry)
      for kind, status, code, retry in (
          ("request_timeout", 504, "upstream_timeout", True), ("startup_timeout", 504, "upstream_timeout", True),
          ("runner_scheduling_failure", 503, "upstream_overloaded", True), ("runner_connection_timeout", 503, "upstream_overloaded", True),
          ("runner_disconnected", 503, "upstream_overloaded", True), ("runner_server_error", 500, "upstream_error", True),
          ("client_cancelled", 499, "upstream_error", False), ("bad_request", 400, "upstream_invalid_request", False),
          ("internal_error", 500, "upstream_error", True),
      )),
    *(Row(f"job: error, result {status}", fal_failed("runner_server_error") | {"result": (status, body)}, "upstream_error", retry=True, detail="It failed")
      for status, body in ((200, ""), (404, {"detail": "Not Found"}), (410, ""), (502, "<html>"))),
    Row("job: a word for failed", {"poll": (200, {"status": "FAILED", "error": "It broke"})}, "upstream_error", retry=True, detail="It broke"),
    Row("job: state as a number", {"poll": (200, {"status": 3})}, "upstream_bad_response", paid="unsure"),
    Row("result: content checker", fal_result(422, fal_fault("content_policy_violation", FLAGGED), X_Fal_Retryable="false"), "content_policy"),
    Row("result: nothing was made", fal_result(422, fal_fault("no_media_generated", "No media"), X_Fal_Retryable="false"), "upstream_bad_response"),
    Row("result: input not to be fetched", fal_result(422, fal_fault("file_download_error", "no file", "image_url"), X_Fal_Retryable="false"), "upstream_invalid_request"),
    Row("result: a service behind it fails", fal_result(400, fal_fault("downstream_service_error", "It failed")), "upstream_error", retry=True),
    Row("result: fails and may be repeated", fal_result(500, fal_fault("internal_server_error", "It failed"), X_Fal_Retryable="true"), "upstream_error", retry=True),
    Row("result: fails for good", fal_result(500, fal_fault("internal_server_error", "It failed"), X_Fal_Retryable="false"), "upstream_error"),
    Row("result: black image", fal_result(200, {"images": [{"url": IMAGE}], "has_nsfw_concepts": [True]}), "content_policy", paid="yes", detail="content checker"),
    Row("result: a part is black", fal_result(200, {"images": [{"url": IMAGE}, {"url": IMAGE}], "has_nsfw_concepts": [True, False]}), 1, detail="1 of 2 images", count=2),
    Row("result: one image as an object", fal_result(200, {"image": {"url": IMAGE, "content_type": "image/png"}, "seed": 7}), 1),
    Row("result: data URI", fal_result(200, {"images": [{"url": "data:image/png;base64,AAAA"}]}), 1),
    Row("result: no image", fal_result(200, {"images": [], "seed": 1}), 0),
    Row("result: no image at first", {"result": [(200, {"images": []}), (200, {"images": []}), (200, {"images": [{"url": IMAGE}]})]}, 1),
    Row("result: a link under another name", fal_result(200, {"image_url": IMAGE}), 1),
    Row("result: images below another field", fal_result(200, {"output": {"images": [{"url": IMAGE}]}}), 1),
    Row("result: expired", fal_result(404, {"detail": "Request not found"}), "upstream_error", retry=True, paid="unsure"),
    Row("result: page", fal_result(200, "<html>"), "upstream_bad_response", paid="unsure"),
    Row("result: empty", fal_result(200, ""), "upstream_bad_response", paid="unsure"),
    Row("result: of another shape", fal_result(200, {"images": "x"}), "upstream_bad_response", paid="unsure"),
    Row("result: key", fal_result(401, {"detail": "no"}), "upstream_auth", paid="unsure", key="out"),
    Row("result: limited, then there", {"result": [(429, {"detail": "slow"}), (503, ""), (200, {"images": [{"url": IMAGE}]})]}, 1),
    job=True,
)  # fmt: skip


async def test_each_answer_of_fal_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    usual = {
        "submit": (200, FAL_ACCEPTED),
        "poll": (200, {"status": "COMPLETED"}),
        **fal_result(200, {"images": [{"url": IMAGE}]}),
    }
    await play(FAL, creating(FalProvider, session), PlayedUpstream(fal_stage, usual), make_call, "fal-ai/flux/dev")


# --- Replicate ---


def prediction(status: object = "starting", **fields: object) -> dict[str, object]:
    job = "{BASE}/v1/predictions/p1"
    urls = {"get": job, "cancel": f"{job}/cancel"}
    fixed: dict[str, object] = {
        "id": "p1",
        "model": "black-forest-labs/flux-schnell",
        "version": "hidden",
        "input": {},
        "output": None,
    }
    return fixed | {"error": None, "logs": "", "metrics": {}, "urls": urls, "status": status} | fields


def replicate_stage(method: str, path: str) -> str:
    return "submit" if method == "POST" else "list" if path.endswith("/predictions") else "poll"


def replicate_error(status: int, title: str, detail: str) -> tuple[int, object]:
    return status, {"title": title, "detail": detail, "status": status}


def ended(status: str, error: str | None = None, **fields: object) -> dict[str, Any]:
    return {"poll": (200, prediction(status, error=error, **fields))}


REPLICATE = with_odd_answers(
    Row("accepted with a 201", {}, 1),
    Row("accepted with a 200, and done", {"submit": (200, prediction("succeeded", output=[IMAGE]))}, 1),
    Row("accepted with a 202", {"submit": (202, prediction())}, 1),
    Row("addresses abroad", {"submit": (201, prediction(urls={"get": "https://foreign.example/p1"}))}, 1),
    Row("no id", {"submit": (201, {"status": "starting"})}, "upstream_bad_response", paid="yes"),
    Row("failed at once", {"submit": (201, prediction("failed", error="NSFW content detected"))}, "content_policy"),
    Row("401", {"submit": replicate_error(401, "Unauthenticated", "You did not pass a valid authentication token")}, "upstream_auth", **OUT),
    Row("402", {"submit": replicate_error(402, "Insufficient credit", "You have insufficient credit to run this model.")}, "upstream_billing", **OUT),
    Row("402 of a limit", {"submit": replicate_error(402, "Monthly spend limit reached", "You have reached your monthly spend limit.")}, "upstream_billing", **OUT),
    Row("403", {"submit": replicate_error(403, "Forbidden", "You do not have permission to perform this action.")}, "upstream_auth", **OUT),
    Row("404", {"submit": replicate_error(404, "Not Found", "The requested resource could not be found.")}, "model_not_available", **NO_MODEL),
    Row("422 of the input", {"submit": replicate_error(422, "Input validation failed", "- input: prompt is required")}, "upstream_invalid_request", detail="prompt is required"),
    Row("422 of the version", {"submit": replicate_error(422, "Invalid version or not permitted", "The specified version does not exist")}, "model_not_available", **NO_MODEL),
    Row("429 with its text", {"submit": (429, {"detail": "Request was throttled. Your rate limit resets in ~30s."})}, "upstream_rate_limited", **COOLS, wait_s=30.0),
    Row("429 with the header", {"submit": (429, {"detail": "Request was throttled. Your rate limit resets in ~30s."}, {"Retry-After": "7"})}, "upstream_rate_limited", **COOLS, wait_s=7.0),
    Row("an error without a title", {"submit": (400, {"error": "bad input"})}, "upstream_invalid_request", detail="bad input"),
    Row("500", {"submit": replicate_error(500, "Internal server error", "An unexpected error occurred")}, "upstream_error", **AGAIN),
    Row("503", {"submit": replicate_error(503, "Service unavailable", "The service is unavailable")}, "upstream_overloaded", **AGAIN),
    Row("job: sensitive", ended("failed", "The input or output was flagged as sensitive. (E005)"), "content_policy"),
    Row("job: NSFW", ended("failed", "NSFW content detected. Try running it again, or try a different prompt."), "content_policy"),
    Row("job: input", ended("failed", "Input validation error: prompt is too long"), "upstream_invalid_request"),
    Row("job: interrupted", ended("failed", "Prediction interrupted; please retry (code: PA)"), "upstream_error", retry=True),
    Row("job: memory", ended("failed", "CUDA out of memory. Tried to allocate 2.00 GiB"), "upstream_error"),
    Row("job: time", ended("failed", "The prediction timed out"), "upstream_timeout", retry=True),
    Row("job: failed without a reason", ended("failed"), "upstream_error", retry=True),
    Row("job: cancelled", ended("canceled"), "upstream_error"),
    Row("job: aborted before its start, which is free", ended("aborted"), "upstream_overloaded", retry=True),
    Row("job: a word for failed", ended("error", "x"), "upstream_error", retry=True),
    Row("job: expired data", ended("succeeded", data_removed=True), "upstream_error", retry=True, paid="unsure"),
    Row("job: state as a number", {"poll": (200, prediction(5))}, "upstream_bad_response", paid="unsure"),
    Row("job: a link alone", ended("succeeded", output=IMAGE), 1),
    Row("job: a data URI", ended("succeeded", output=["data:image/png;base64,AAAA"]), 1),
    Row("job: an object with a link", ended("succeeded", output={"image": IMAGE, "seed": 7}), 1),
    Row("job: an object with a list", ended("succeeded", output={"files": [{"url": IMAGE}]}), 1),
    Row("job: JSON in a text", ended("succeeded", output='["{BASE}/files/1.png"]'), 1),
    Row("job: no image but that of the input", ended("succeeded", input={"image": IMAGE}), 0),
    Row("job: no output", ended("succeeded"), 0),
    Row("job: empty list", ended("succeeded", output=[]), 0),
    Row("job: no output at first", {"poll": [(200, prediction("succeeded")), (200, prediction("succeeded", output=IMAGE))]}, 1),
    Row("accepted with a 200, and done without an output yet", {"submit": (200, prediction("succeeded"))}, 1),
    Row("job: output that is no image", ended("succeeded", output={"text": "x"}), 0),
    Row("poll: limited, then there", {"poll": [(429, {"detail": "Request was throttled."}, {"Retry-After": "0"}), (500, ""), (200, prediction("succeeded", output=IMAGE))]}, 1),
    job=True,
)  # fmt: skip


async def test_each_answer_of_replicate_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    listed: Answer = (200, {"previous": None, "next": None, "results": []})
    usual = {"submit": (201, prediction()), "list": listed, **ended("succeeded", output=[IMAGE])}
    model = "black-forest-labs/flux-schnell"
    await play(
        REPLICATE, creating(ReplicateProvider, session), PlayedUpstream(replicate_stage, usual), make_call, model
    )


# --- Black Forest Labs ---

BFL_ACCEPTED = {"id": "b1", "polling_url": "{BASE}/v1/get_result?id=b1", "cost": 1.4, "input_mp": 0, "output_mp": 0.25}


def bfl_stage(method: str, _path: str) -> str:
    return "submit" if method == "POST" else "poll"


def bfl(status: object, **fields: object) -> dict[str, Any]:
    return {"poll": (200, {"id": "b1", "status": status, "result": None, "progress": None} | fields)}


BFL = with_odd_answers(
    Row("accepted", {}, 1),
    Row("accepted without the id in the address", {"submit": (200, BFL_ACCEPTED | {"polling_url": "{BASE}/v1/get_result"})}, 1),
    Row("id and price in other types", {"submit": (200, BFL_ACCEPTED | {"id": 17, "cost": "1.4"})}, 1),
    Row("address abroad", {"submit": (200, BFL_ACCEPTED | {"polling_url": "https://foreign.example/v1/get_result?id=b1"})}, 1),
    Row("no address", {"submit": (200, {"id": "b1"})}, 1),
    Row("no id", {"submit": (200, {"polling_url": "{BASE}/v1/get_result"})}, "upstream_bad_response", paid="yes"),
    Row("moderated at once", {"submit": (200, {"status": "Request Moderated", "details": {"Moderation Reasons": ["A"]}})}, "content_policy", detail="A"),
    Row("400", {"submit": (400, {"error": "invalid_request", "message": "bad size", "details": {}})}, "upstream_invalid_request", detail="bad size"),
    Row("401", {"submit": (401, {"detail": "Invalid API key"})}, "upstream_auth", **OUT),
    Row("402", {"submit": (402, {"detail": "Insufficient credits"})}, "upstream_billing", **OUT),
    Row("403", {"submit": (403, {"detail": "Not authenticated"})}, "upstream_auth", **OUT),
    Row("403 without credits", {"submit": (403, {"detail": "Insufficient credits"})}, "upstream_billing", **OUT),
    Row("404", {"submit": (404, {"detail": "Not Found"})}, "model_not_available", **NO_MODEL),
    Row("422", {"submit": (422, {"detail": [{"loc": ["body", "width"], "msg": "Input should be a multiple of 16", "type": "multiple_of"}]})}, "upstream_invalid_request", detail="width"),
    Row("422 moderated", {"submit": (422, {"detail": "Request Moderated"})}, "content_policy"),
    Row("429 with its body", {"submit": (429, {"error": "rate_limit_exceeded", "message": "slow", "retry_after": 7})}, "upstream_rate_limited", **COOLS, wait_s=7.0),
    Row("429 with a number as text", {"submit": (429, {"error": "rate_limit_exceeded", "message": "slow", "retry_after": "7"})}, "upstream_rate_limited", **COOLS, wait_s=7.0),
    Row("429 with the header", {"submit": (429, {"error": "rate_limit_exceeded"}, {"X-RateLimit-Limit": "24", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "3"})}, "upstream_rate_limited", **COOLS, wait_s=3.0),
    Row("500", {"submit": (500, {"detail": "Internal Server Error"})}, "upstream_error", **AGAIN),
    Row("502 of its own", {"submit": (502, {"detail": "Bad Gateway"})}, "upstream_error", **AGAIN),
    Row("503", {"submit": (503, {"detail": "overloaded"})}, "upstream_overloaded", **AGAIN),
    Row("job: request moderated", bfl("Request Moderated", details={"Moderation Reasons": ["Safety Filter"]}), "content_policy", detail="Safety Filter"),
    Row("job: content moderated", bfl("Content Moderated"), "content_policy"),
    Row("job: error", bfl("Error", error="GPU lost"), "upstream_error", retry=True, detail="GPU lost"),
    Row("job: failed, in the other field", {"poll": (200, {"id": "b1", "state": "Failed"})}, "upstream_error", retry=True),
    Row("job: another word for failed", bfl("Cancelled"), "upstream_error", retry=True),
    Row("job: not found at first", {"poll": [(404, {"status": "Task not found"}), (200, {"id": "b1", "status": "Task not found"}), (200, {"status": "Pending"}), (200, {"status": "Ready", "result": {"sample": IMAGE}})]}, 1),
    Row("job: not found for long", bfl("Task not found"), "upstream_error", retry=True, paid="unsure"),
    Row("job: link that has ended", bfl("Ready", result={"sample": f"{IMAGE}?se=2020-01-01T00%3A00%3A00Z&sig=x"}), "upstream_error", retry=True, paid="unsure"),
    Row("job: a link under another name", bfl("Ready", result={"sample": None, "image_url": IMAGE}), 1),
    Row("job: a link in place of the result", bfl("Ready", result=IMAGE), 1),
    Row("job: a link beside its usual place", bfl("Ready", sample=IMAGE), 1),
    Row("job: no image", bfl("Ready", result={}), 0),
    Row("job: no result", bfl("Ready"), 0),
    Row("job: state as a number", bfl(3), "upstream_bad_response", paid="unsure"),
    Row("poll: 422", {"poll": (422, {"detail": [{"loc": ["query", "id"], "msg": "bad", "type": "x"}]})}, "upstream_bad_response", paid="unsure"),
    job=True,
)  # fmt: skip


async def test_each_answer_of_bfl_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    usual = {"submit": (200, BFL_ACCEPTED), **bfl("Ready", result={"sample": IMAGE})}
    await play(BFL, creating(BflProvider, session), PlayedUpstream(bfl_stage, usual), make_call, "flux-2-klein-4b")


# --- DashScope ---

SYNC = "qwen-image-2.0"


def dashscope_stage(method: str, path: str) -> str:
    return "submit" if method == "POST" else "list" if path.rstrip("/").endswith("/tasks") else "poll"


def output(usage: object = None, **fields: object) -> tuple[int, object]:
    return 200, {"request_id": "r", "output": {"task_id": "t1"} | fields} | ({"usage": usage} if usage else {})


def refused(status: int, code: str, message: str = "It was refused.") -> dict[str, Any]:
    return {"submit": (status, {"code": code, "message": message, "request_id": "r"})}


MODERATED = {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."}
REFUSALS = [
    # status, code, message, and what follows
    (400, "InvalidParameter", "size must be in [512*512, 1440*1440]", "upstream_invalid_request", {}),
    (400, "InvalidParameter", "Model not exist.", "model_not_available", NO_MODEL),
    (404, "ModelNotFound", "The model can not be found.", "model_not_available", NO_MODEL),
    (401, "InvalidApiKey", "Invalid API-key provided.", "upstream_auth", OUT),
    (403, "AccessDenied.Unpurchased", "Access to model denied.", "upstream_auth", OUT),
    (403, "Workspace.AccessDenied", "Workspace access denied.", "upstream_auth", OUT),
    (400, "Arrearage", "Access denied, please make sure your account is in good standing.", "upstream_billing", OUT),
    (403, "AllocationQuota.FreeTierOnly", "The free tier of the model is used.", "upstream_billing", OUT),
    (429, "Throttling", "Requests throttling triggered.", "upstream_rate_limited", COOLS),
    (429, "Throttling.RateQuota", "Requests rate limit exceeded.", "upstream_rate_limited", COOLS),
    (429, "Throttling.AllocationQuota", "You exceeded your current quota.", "upstream_rate_limited", COOLS),
    (400, "DataInspectionFailed", "Input data may contain inappropriate content.", "content_policy", {}),
    (500, "InternalError", "An internal error has occurred.", "upstream_error", AGAIN),
    (503, "ModelUnavailable", "Model is unavailable.", "upstream_overloaded", AGAIN),
]

DASHSCOPE = with_odd_answers(
    Row("accepted", {}, 1),
    Row("accepted, and done", {"submit": output(task_status="SUCCEEDED", results=[{"url": IMAGE}])}, 1),
    Row("no id", {"submit": (200, {"request_id": "r", "output": {"task_status": "PENDING"}})}, "upstream_bad_response", paid="yes"),
    *(Row(f"{status} {code}: {message}", refused(status, code, message), meant, **follows) for status, code, message, meant, follows in REFUSALS),
    *(Row(f"200 {code}: {message}", refused(200, code, message), meant, **follows) for _, code, message, meant, follows in REFUSALS),
    *(Row(f"at once, 200 {code}: {message}", refused(200, code, message), meant, **follows, model=SYNC) for _, code, message, meant, follows in REFUSALS),
    *(Row(f"job: {code}: {message}", {"poll": output(task_status="FAILED", code=code, message=message)}, meant, bool(follows.get("retry")), elsewhere=follows in (OUT, NO_MODEL), key=str(follows.get("key", "healthy"))) for _, code, message, meant, follows in REFUSALS),
    Row("200 with an unknown code", refused(200, "SomethingNew"), "upstream_error", **AGAIN),
    Row("time-out of the service", refused(500, "RequestTimeOut"), "upstream_error", retry=True, paid="unsure"),
    Row("job: partial", {"poll": output({"image_count": 1}, task_status="SUCCEEDED", results=[{"url": IMAGE}, MODERATED], task_metrics={"TOTAL": 2, "SUCCEEDED": 1, "FAILED": 1})}, 1, detail="1 of 2 images failed", count=2),
    Row("job: each part failed", {"poll": output({"image_count": 0}, task_status="SUCCEEDED", results=[MODERATED, MODERATED])}, "content_policy", count=2),
    Row("job: failed without a reason", {"poll": output(task_status="FAILED")}, "upstream_error", retry=True),
    Row("job: cancelled", {"poll": output(task_status="CANCELED")}, "upstream_error"),
    Row("job: unknown or expired", {"poll": output(task_status="UNKNOWN")}, "upstream_error", retry=True, paid="unsure"),
    Row("job: suspended, then there", {"poll": [output(task_status="PENDING"), output(task_status="SUSPENDED"), output(task_status="RUNNING"), output(task_status="SUCCEEDED", results=[{"url": IMAGE}])]}, 1),
    Row("job: a link under another name", {"poll": output(task_status="SUCCEEDED", results=[{"image_url": IMAGE}])}, 1),
    Row("job: no image", {"poll": output(task_status="SUCCEEDED", results=[])}, 0),
    Row("job: of messages", {"poll": output(task_status="SUCCEEDED", choices=[{"message": {"content": [{"image": IMAGE}]}}])}, 1),
    Row("poll: limited, then there", {"poll": [(429, {"code": "Throttling", "message": "slow"}), output(task_status="SUCCEEDED", results=[{"url": IMAGE}])]}, 1),
    Row("at once: an image", {"submit": (200, {"output": {"choices": [{"message": {"content": [{"image": IMAGE}]}}]}, "usage": {"output_image_count": 1}})}, 1, model=SYNC),
    Row("at once: no image", {"submit": (200, {"output": {"choices": []}})}, 0, model=SYNC),
    job=True,
)  # fmt: skip


async def test_each_answer_of_dashscope_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    usual = {
        "submit": output(task_status="PENDING"),
        "list": (200, {"data": [], "total_page": 0, "total": 0}),
        "poll": output({"image_count": 1}, task_status="SUCCEEDED", results=[{"url": IMAGE}]),
    }
    model = "wan2.2-t2i-flash"
    await play(
        DASHSCOPE, creating(DashScopeProvider, session), PlayedUpstream(dashscope_stage, usual), make_call, model
    )
