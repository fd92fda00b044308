"""Table tests of every error row and odd success of the providers that answer at once, and of relays' jobs, played over
HTTP: one row for each case of their documentation."""
# ruff: noqa: E501 - one row on one line

from __future__ import annotations

import base64
from typing import Any

import aiohttp
import pytest

from imagegen.providers.chat_images import ChatImagesProvider
from imagegen.providers.gemini import GeminiProvider
from imagegen.providers.openai import OpenAICompatibleProvider
from imagegen.providers.siliconflow import SiliconFlowProvider
from imagegen.providers.together import TogetherProvider
from tests.played_upstream import (
    AGAIN,
    COOLS,
    FOREIGN,
    GATEWAY_PAGE,
    IMAGE,
    NO_MODEL,
    OUT,
    PlayedUpstream,
    Row,
    play,
    quick_polls_of_rows,
    with_odd_answers,
)
from tests.providers.conftest import MakeCall

B64 = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()
URI = f"data:image/png;base64,{B64}"
UNSURE: dict[str, Any] = {"retry": True, "paid": "unsure"}
EMPTY: dict[str, Any] = {"code": "upstream_bad_response", "paid": "yes"}


_quick = pytest.fixture(quick_polls_of_rows, autouse=True)


def stage(method: str, _path: str) -> str:
    return "submit" if method == "POST" else "poll"


def answering(usual: object) -> PlayedUpstream:
    """Return an upstream that usually answers a submit so."""
    return PlayedUpstream(stage, {"submit": (200, usual), "poll": (200, POLLED)})


def row_of(
    name: str, status: int, body: object, code: str | int, headers: dict[str, str] | None = None, **follows: Any
) -> Row:
    return Row(name, {"submit": (status, body, headers or {})}, code, **follows)


# --- Gemini ---


def google(code: int, status: str, message: str, *details: object) -> dict[str, object]:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def candidate(*parts: object, end: str = "STOP", drawn: int = 1290) -> dict[str, object]:
    tokens = [{"modality": "IMAGE", "tokenCount": drawn}] if drawn else []
    usage = {"promptTokenCount": 5, "candidatesTokenCount": drawn, "candidatesTokensDetails": tokens}
    content = {"content": {"parts": list(parts), "role": "model"}} if parts else {}
    return {"candidates": [content | {"finishReason": end}], "usageMetadata": usage}


DRAWN = {"inlineData": {"mimeType": "image/png", "data": B64}}
DRAFT = {"inlineData": {"mimeType": "image/png", "data": B64.replace("A", "B")}, "thought": True}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "12s"}
INVALID_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}

GEMINI = with_odd_answers(
    row_of("image", 200, candidate(DRAWN), 1),
    row_of("image with text", 200, candidate({"text": "Here it is."}, DRAWN), 1),
    row_of("image in a thought", 200, candidate(DRAWN | {"thought": True}), **EMPTY),
    row_of("list of a streamed response", 200, [candidate({"text": "Here"}, end=""), candidate(DRAWN)], 1),
    row_of("draft before the image of a list", 200, [candidate(DRAFT), candidate(DRAWN)], 1),
    row_of("list of a draft", 200, [candidate(DRAFT)], **EMPTY),
    row_of("Markdown link after a thought", 200, candidate({"text": "Hm.", "thought": True}, {"text": f"![]({IMAGE})"}), 1),
    row_of("Markdown image in the text", 200, candidate({"text": f"Here: ![cat]({URI})"}), 1),
    row_of("Markdown link in the text", 200, candidate({"text": f"Here: ![cat]({IMAGE})"}), 1),
    row_of("image in snake case", 200, candidate({"inline_data": {"mime_type": "image/png", "data": B64}}), 1),
    row_of("400", 400, google(400, "INVALID_ARGUMENT", "Request contains an invalid argument."), "upstream_invalid_request"),
    row_of("400 in a list", 400, [google(400, "INVALID_ARGUMENT", "Bad.")], "upstream_invalid_request"),
    row_of("400 of a key", 400, google(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", INVALID_KEY), "upstream_auth", **OUT),
    row_of("400 of a key that has expired", 400, google(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key."), "upstream_auth", **OUT),
    row_of("400 of the region", 400, google(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), "upstream_auth", **OUT),
    row_of("400 of the region without billing", 400, google(400, "FAILED_PRECONDITION", "Gemini API free tier is not available in your country. Please enable billing; this requires billing to be enabled."), "upstream_billing", **OUT),
    row_of("403", 403, google(403, "PERMISSION_DENIED", "Permission denied."), "upstream_auth", **OUT),
    row_of("404", 404, google(404, "NOT_FOUND", "models/x is not found for API version v1beta"), "model_not_available", **NO_MODEL),
    row_of("429 with RetryInfo", 429, google(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted.", RETRY_INFO), "upstream_rate_limited", **COOLS, wait_s=12.0),
    row_of("429 with its text", 429, google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota. Quota exceeded for metric: x, limit: 10. Please retry in 7.5s."), "upstream_rate_limited", **COOLS, wait_s=7.5),
    row_of("429 of the free tier", 429, google(429, "RESOURCE_EXHAUSTED", "Quota exceeded for metric: x, limit: 0. Please retry in 12s."), "upstream_billing", **OUT),
    row_of("429 without prepaid credits", 429, google(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted."), "upstream_billing", **OUT),
    row_of("499", 499, google(499, "CANCELLED", "The operation was cancelled."), "upstream_error", **UNSURE),
    row_of("500", 500, google(500, "INTERNAL", "An internal error has occurred."), "upstream_error", **AGAIN),
    row_of("503", 503, google(503, "UNAVAILABLE", "The model is overloaded."), "upstream_overloaded", **AGAIN),
    row_of("504", 504, google(504, "DEADLINE_EXCEEDED", "Deadline expired."), "upstream_error", **UNSURE),
    row_of("error under a 200", 200, google(503, "UNAVAILABLE", "The model is overloaded."), "upstream_overloaded", retry=True, elsewhere=True),
    *(row_of(f"prompt blocked: {reason}", 200, {"promptFeedback": {"blockReason": reason}, "usageMetadata": {"promptTokenCount": 5}}, "content_policy", detail=reason)
      for reason in ("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "IMAGE_SAFETY", "OTHER")),
    *(row_of(f"ended: {end}", 200, candidate(end=end, drawn=0), "content_policy", detail=end)
      for end in ("SAFETY", "PROHIBITED_CONTENT", "RECITATION", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION")),
    row_of("ended: IMAGE_SAFETY after the image was made", 200, candidate(end="IMAGE_SAFETY"), "content_policy", paid="yes"),
    *(row_of(f"ended: {end}", 200, candidate(end=end, drawn=0), **EMPTY) for end in ("IMAGE_OTHER", "NO_IMAGE", "STOP", "MAX_TOKENS")),
    row_of("a refusal in words", 200, candidate({"text": "I can't generate images of that kind."}), "content_policy", paid="yes"),
    row_of("a question in words", 200, candidate({"text": "Which colour?"}), **EMPTY, detail="Which colour?"),
    row_of("candidates of another shape", 200, {"candidates": "x"}, **EMPTY),
    row_of("bytes that are no base64", 200, candidate({"inlineData": {"data": "!"}}), **EMPTY),
)  # fmt: skip


async def test_each_answer_of_gemini_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> GeminiProvider:
        return GeminiProvider(session, api_key="the-secret-key", base_url=url, timeout_s=30)

    await play(GEMINI, create, answering(candidate(DRAWN)), make_call, "gemini-2.5-flash-image")


# --- images behind a chat ---


def chat(end: str = "stop", usage: object = None, **message: object) -> dict[str, object]:
    reply = {"choices": [{"message": {"role": "assistant", "content": ""} | message, "finish_reason": end}]}
    return reply | ({"usage": usage} if usage else {})


CHAT = with_odd_answers(
    row_of("list of images", 200, chat(images=[{"type": "image_url", "image_url": {"url": URI}}]), 1),
    row_of("data URI in Markdown", 200, chat(content=f"![image]({URI})"), 1),
    row_of("link in Markdown", 200, chat(content="![image](https://a.example/1.png)"), 1),
    row_of("withheld", 200, chat("content_filter"), "content_policy"),
    row_of("withheld and charged", 200, chat("IMAGE_SAFETY", {"completion_tokens": 9}), "content_policy", paid="yes"),
    row_of("a refusal in words", 200, chat(content="I cannot create that image."), "content_policy", paid="yes"),
    row_of("other words", 200, chat(content="Which colour?"), **EMPTY, detail="Which colour?"),
    row_of("no choices", 200, {"choices": []}, **EMPTY),
    row_of("error in a choice", 200, {"choices": [{"error": {"code": 502, "message": "Provider failed"}}]}, "upstream_error", **AGAIN),
    row_of("error under a 200", 200, {"error": {"code": 429, "message": "slow down"}}, "upstream_rate_limited", **COOLS),
    row_of("402", 402, {"error": {"code": 402, "message": "Insufficient credits"}}, "upstream_billing", **OUT),
    row_of("403 moderated", 403, {"error": {"code": 403, "message": "Your input was flagged by moderation", "metadata": {"reasons": ["x"]}}}, "content_policy"),
    row_of("404 of a model", 404, {"error": {"code": 404, "message": "No endpoints found for x"}}, "model_not_available", **NO_MODEL),
)  # fmt: skip


async def test_each_answer_of_a_chat_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> ChatImagesProvider:
        return ChatImagesProvider(session, name="openai", api_key="the-secret-key", base_url=f"{url}/v1", timeout_s=30)

    await play(CHAT, create, answering(chat(content=URI)), make_call, "google/gemini-2.5-flash-image")


# --- SiliconFlow ---


def silicon(code: int | str, message: str) -> dict[str, object]:
    return {"code": code, "message": message, "data": None}


SILICONFLOW = with_odd_answers(
    row_of("images", 200, {"images": [{"url": IMAGE}], "timings": {"inference": 1.2}, "seed": 1}, 1),
    row_of("images in data", 200, {"data": [{"url": IMAGE}]}, 1),
    row_of("no image", 200, {"images": []}, 0),
    row_of("entry without a link", 200, {"images": [{"url": None}]}, 0),
    row_of("400 of a model", 400, silicon(20012, "Model does not exist. Please check it carefully."), "model_not_available", **NO_MODEL),
    row_of("400 with the code as text", 400, silicon("20012", "Model does not exist."), "model_not_available", **NO_MODEL),
    row_of("400 of a field", 400, silicon(20015, "The parameter is invalid. Please check again."), "upstream_invalid_request"),
    row_of("401", 401, '"Invalid token"', "upstream_auth", **OUT),
    row_of("403 without balance", 403, silicon(30001, "Sorry, your account balance is insufficient"), "upstream_billing", **OUT),
    row_of("403 without a real name", 403, silicon(30011, "The model requires real-name authentication. Please complete it first."), "upstream_auth", **OUT),
    row_of("403 of a model", 403, silicon(30003, "Model disabled."), "model_not_available", **NO_MODEL),
    row_of("404", 404, "404 page not found", "upstream_invalid_request", elsewhere=True),
    row_of("429 of a minute", 429, silicon(50603, "Request was rejected due to rate limiting. Details: IPM limit reached."), "upstream_rate_limited", **COOLS),
    row_of("429 of a day", 429, silicon(50604, "Request was rejected due to rate limiting. Details: IPD limit reached."), "upstream_rate_limited", **COOLS),
    row_of("451", 451, silicon(60300, "The prompt contains sensitive content."), "content_policy"),
    row_of("500", 500, silicon(50500, "Unknown error, please contact us with the trace id."), "upstream_error", **AGAIN),
    row_of("503", 503, silicon(50505, "Model service overloaded. Please try again later."), "upstream_overloaded", **AGAIN),
    row_of("504", 504, "Gateway Timeout", "upstream_error", **UNSURE),
)  # fmt: skip


async def test_each_answer_of_siliconflow_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> SiliconFlowProvider:
        return SiliconFlowProvider(session, api_key="the-secret-key", base_url=url, timeout_s=30)

    await play(SILICONFLOW, create, answering({"images": [{"url": IMAGE}]}), make_call, "Kwai-Kolors/Kolors")


# --- OpenAI and Together ---


def fault(
    message: str, kind: str | None = None, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


QUOTA = "You exceeded your current quota, please check your plan and billing details."
RATE = "Rate limit reached for gpt-image-2 on images per min. Please try again in 12s. You can increase your rate limit by adding a payment method."
KONTEXT_LIMIT = "You have reached the rate limit specific to this model black-forest-labs/FLUX.1-kontext-pro. The maximum rate limit for this model is 9.0 queries per minute."

OPENAI = with_odd_answers(
    row_of("base64", 200, {"created": 1, "data": [{"b64_json": B64}], "usage": {"output_tokens": 9}}, 1),
    row_of("moderated", 400, fault("Your request was rejected by the safety system.", "image_generation_user_error", "moderation_blocked"), "content_policy"),
    row_of("policy", 400, fault("no", "invalid_request_error", "content_policy_violation"), "content_policy"),
    row_of("bad field", 400, fault("Invalid value: '1x1'.", "invalid_request_error", "invalid_value", "size"), "upstream_invalid_request"),
    row_of("401", 401, fault("Incorrect API key provided: sk-***.", "invalid_request_error", "invalid_api_key"), "upstream_auth", **OUT),
    row_of("403 of the organization", 403, fault("Your organization must be verified to use the model.", "invalid_request_error"), "upstream_auth", **OUT),
    row_of("404", 404, fault("The model 'x' does not exist", "invalid_request_error", "model_not_found"), "model_not_available", **NO_MODEL),
    row_of("429 of the rate", 429, fault(RATE, "requests", "rate_limit_exceeded"), "upstream_rate_limited", **COOLS, wait_s=12.0),
    row_of("429 of the quota", 429, fault(QUOTA, "insufficient_quota", "insufficient_quota"), "upstream_billing", **OUT),
    row_of("400 of the hard limit", 400, fault("Billing hard limit has been reached", "invalid_request_error", "billing_hard_limit_reached"), "upstream_billing", **OUT),
    row_of("500", 500, fault("The server had an error", "server_error"), "upstream_error", **AGAIN),
    row_of("503", 503, fault("The engine is overloaded", "server_error"), "upstream_overloaded", **AGAIN),
    row_of("a chat with a Markdown image", 200, chat(content=f"Here: ![cat]({IMAGE})"), 1),
    row_of("a chat with a link to a file", 200, chat(content=f"Your image: {IMAGE} (PNG)"), 1),
    row_of("a chat with an embedded image", 200, chat(content=URI), 1),
    row_of("a chat that refuses", 200, chat(content="I'm sorry, I can't create that image."), "content_policy", paid="yes", detail="I can't create"),
    row_of("a chat that was filtered", 200, chat("content_filter"), "content_policy"),
    row_of("a relay's words", 200, {"code": 500, "msg": "system busy", "data": None}, "upstream_error", **AGAIN, detail="system busy"),
    row_of("a relay's words about credit", 200, {"code": 500, "msg": "余额不足", "data": None}, "upstream_billing", **OUT),
)  # fmt: skip


async def test_each_answer_of_openai_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> OpenAICompatibleProvider:
        return OpenAICompatibleProvider(session, api_key="the-secret-key", base_url=f"{url}/v1", timeout_s=30)

    await play(OPENAI, create, answering({"data": [{"b64_json": B64}]}), make_call, "gpt-image-2")


TOGETHER = with_odd_answers(
    row_of("link", 200, {"id": "o", "object": "list", "model": "m", "data": [{"index": 0, "url": IMAGE, "timings": {}}]}, 1),
    row_of("400 of a field", 400, fault("height must be a multiple of 16", "invalid_request_error"), "upstream_invalid_request"),
    row_of("400 of a model", 400, fault("Unable to access non-serverless model X. Please visit https://api.together.ai/models/X", "invalid_request_error", "model_not_available"), "model_not_available", **NO_MODEL),
    row_of("401", 401, fault("Invalid API key provided.", "invalid_request_error", "invalid_api_key"), "upstream_auth", **OUT),
    row_of("402", 402, fault("Credit limit exceeded, please add credits", "credit_limit"), "upstream_billing", **OUT),
    row_of("404", 404, fault("Unable to access model X.", "invalid_request_error", "model_not_available"), "model_not_available", **NO_MODEL),
    row_of("422", 422, fault("image may contain NSFW content"), "content_policy"),
    row_of("429 of a model", 429, fault(KONTEXT_LIMIT, "model_rate_limit"), "upstream_rate_limited", **COOLS),
    row_of("429 with the type of a 402", 429, fault("You have been rate limited. Your rate limit is 60 queries per minute.", "credit_limit"), "upstream_rate_limited", **COOLS, wait_s=1.0),
    row_of("429 with the reset", 429, fault("slow down", "dynamic_request_limited"), "upstream_rate_limited", {"x-ratelimit-reset": "4"}, **COOLS, wait_s=4.0),
    row_of("500", 500, fault("Internal server error", "server_error"), "upstream_error", **AGAIN),
    row_of("503", 503, fault("overloaded"), "upstream_overloaded", **AGAIN),
)  # fmt: skip


async def test_each_answer_of_together_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> TogetherProvider:
        return TogetherProvider(session, api_key="the-secret-key", base_url=url, timeout_s=30)

    await play(TOGETHER, create, answering({"data": [{"index": 0, "url": IMAGE}]}), make_call, "m")


# --- relays with jobs ---

ACCEPTED = {"code": 200, "data": [{"status": "submitted", "task_id": "task_1"}]}
POLLED = {"code": 200, "data": {"status": "completed", "cost": 0.04, "result": {"images": [{"url": [IMAGE]}]}}}
SUB2API = {"id": "imgtask_1", "task_id": "imgtask_1", "object": "image.generation.task", "status": "processing"}


def polled(body: object, status: int = 200) -> dict[str, Any]:
    return {"poll": (status, body)}


RELAY = with_odd_answers(
    Row("accepted in a list", {}, 1),
    row_of("accepted in an object", 200, {"data": {"status": "submitted", "task_id": "task_1"}}, 1),
    row_of("accepted with a 202", 202, SUB2API | {"poll_url": "{BASE}/v1/images/tasks/imgtask_1"}, 1),
    row_of("address abroad", 202, SUB2API | {"poll_url": FOREIGN}, 1, {"Location": FOREIGN}),
    row_of("no id", 202, {"status": "processing"}, **EMPTY),
    row_of("images at once", 200, {"created": 1, "data": [{"url": IMAGE}]}, 1),
    row_of("envelope of a 401", 200, {"code": 401, "message": "invalid token", "data": None}, "upstream_auth", **OUT),
    row_of("envelope of a 402", 200, {"code": "402", "message": "no credits left", "data": []}, "upstream_billing", **OUT),
    row_of("envelope of a 429", 200, {"code": 429, "message": "slow down"}, "upstream_rate_limited", **COOLS),
    row_of("envelope of a 500", 200, {"code": 500, "message": "It failed", "data": None}, "upstream_error", **AGAIN),
    row_of("402", 402, {"error": {"code": 402, "message": "Insufficient balance", "type": "insufficient_quota"}}, "upstream_billing", **OUT),
    row_of("403 of a quota", 403, fault("用户额度不足, 剩余额度: 0", "new_api_error", "insufficient_user_quota"), "upstream_billing", **OUT),
    row_of("503 without a channel", 503, fault("No available channel for model x", "new_api_error"), "upstream_overloaded", **AGAIN),
    row_of("failed at once, limited", 200, {"code": 200, "data": [{"status": "failed", "task_id": "t", "error": "Rate limit exceeded, try again in 3s"}]}, "upstream_rate_limited", **COOLS, wait_s=3.0),
    row_of("failed at once for its content", 200, {"task_id": "t", "task_status": "FAILED", "errors": {"message": "content policy violation"}}, "content_policy"),
    row_of("failed at once for credit", 200, {"code": "success", "data": {"task_id": "t", "status": "FAILURE", "fail_reason": "余额不足"}}, "upstream_billing", **OUT),
    row_of("failed at once", 202, {"id": "t", "status": "failed"}, "upstream_error", **AGAIN),
    row_of("failed at once, with its image", 200, {"status": "failed", "data": [{"url": IMAGE}]}, 1),
    Row("job: failed", polled({"code": 200, "data": {"status": "failed", "error": {"code": 500, "message": "It failed", "type": "server_error"}}}), "upstream_error", retry=True),
    Row("job: failed for its content", polled({"code": 200, "data": {"status": "failed", "error": "content policy violation"}}), "content_policy"),
    Row("job: failed with a status", polled(SUB2API | {"status": "failed", "http_status": 400, "error": {"message": "bad prompt", "code": "invalid_request"}}), "upstream_invalid_request"),
    Row("job: failed for credit", polled({"data": {"status": "FAILURE", "fail_reason": "insufficient balance"}}), "upstream_billing", **OUT),
    Row("job: failed for its model", polled({"data": {"status": "failed", "http_status": 404, "error": {"message": "The model does not exist", "code": "model_not_found"}}}), "model_not_available", **NO_MODEL),
    Row("job: failed for its account", polled({"data": {"status": "failed", "error": "Your organization must be verified to use the model"}}), "upstream_auth", **OUT),
    Row("job: failed, vendor's 500", polled({"data": {"status": "failed", "http_status": 500, "error": {"message": "It failed"}}}), "upstream_error", retry=True),
    *(Row(f"job: limited by its vendor, {name}", polled({"data": {"status": "failed"} | words}), "upstream_rate_limited", retry=True, key="cooling", wait_s=wait_s)
      for name, words, wait_s in (
          ("403", {"http_status": 403, "error": {"message": "Rate limit exceeded, try again in 3s"}}, 3.0),
          ("400", {"http_status": 400, "error": {"message": "Too many requests", "code": "rate_limit_exceeded"}}, None),
          ("429", {"error": {"message": "slow down", "code": 429}}, None),
          ("without a status", {"error": {"message": "Rate limit exceeded, try again in 3s", "code": "rate_limit_exceeded"}}, 3.0),
          ("as a text", {"fail_reason": "upstream error: 429 Too Many Requests"}, None),
          ("in Chinese", {"fail_reason": "请求过于频繁，请稍后再试"}, None),
      )),
    Row("job: a status in the words of a client", polled({"data": {"status": "failed", "http_status": 400, "error": "Invalid value 429 for seed"}}), "upstream_invalid_request"),
    Row("job: completed without an image", polled({"data": {"status": "completed", "result": {"images": []}}}), 0),
    Row("job: unknown", polled({"data": {"status": "unknown"}}), "upstream_error", **UNSURE),
    Row("job: page on each address", polled(GATEWAY_PAGE), "upstream_bad_response", paid="unsure"),
    Row("job: envelope of a 404", polled({"code": 404, "message": "task not found"}), "upstream_error", **UNSURE),
    Row("job: limited, then there", {"poll": [(429, {"error": {"message": "slow"}}), (503, ""), (200, POLLED)]}, 1),
)  # fmt: skip


async def test_each_answer_of_a_relay_has_its_code_its_cost_and_its_next_call(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    def create(url: str) -> OpenAICompatibleProvider:
        return OpenAICompatibleProvider(session, api_key="the-secret-key", base_url=f"{url}/v1", timeout_s=30)

    await play(RELAY, create, answering(ACCEPTED), make_call, "m")
