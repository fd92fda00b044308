"""Tests of each service's refusals, in the texts and shapes that users and documentation quote."""
# ruff: noqa: E501 - each response on one line, as the service sends it

from __future__ import annotations

import json
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.gateway_statuses import GAVE_UP_WAITING, NEVER_REACHED
from imagegen.providers.refusal_codes import highest_count
from imagegen.providers.response_parser import error_from_response, parse_reply
from imagegen.tasks.retry import was_never_sent
from tests.played_upstream import elsewhere, paid
from tests.support import over_rows

GATEWAY_PAGE = b"<html><head><title>Bad gateway</title></head></html>"


def openai(message: str, code: str | None = None, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def read(status: int, body: object) -> UpstreamError:
    return error_from_response(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode())


OPENAI_QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, "
    "read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
)
OPENAI_RATE = (
    "Rate limit reached for gpt-image-1 in organization org-x on input-images per min (IPM): Limit 5, Used 5. Please "
    "try again in 12s. You can increase your rate limit by adding a payment method to your account at "
    "https://platform.openai.com/account/billing."
)
GOOGLE_MINUTE = (
    "You exceeded your current quota, please check your plan and billing details. Quota exceeded for metric: "
    "generate_requests_per_model, limit: 10. Please retry in 25.3s."
)

BILLING = {
    "OpenAI quota": (429, openai(OPENAI_QUOTA, "insufficient_quota", "insufficient_quota")),
    "OpenAI quota, only its sentence": (429, openai(OPENAI_QUOTA)),
    "OpenAI hard limit": (
        400, openai("Billing hard limit has been reached", "billing_hard_limit_reached", "invalid_request_error")
    ),
    "OpenAI not active": (429, openai("Your account is not active, please check your billing details.", "billing_not_active")),
    "Together": (402, openai("Credit limit exceeded, please add credits", None, "credit_limit")),
    "fal": (403, {"detail": "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}),
    "BFL": (402, {"detail": "Insufficient credits"}),
    "BFL by another status": (400, {"error": "insufficient_credits", "message": "Add credits"}),
    "DashScope": (
        400,
        {"code": "Arrearage", "message": "Access denied, please make sure your account is in good standing.", "request_id": "x"},
    ),
    "DashScope free tier": (
        403, {"code": "AllocationQuota.FreeTierOnly", "message": "The free tier of the model has been exhausted."}
    ),
    "Replicate": (402, {"title": "Insufficient credit", "detail": "You have insufficient credit to run this model."}),
    "Replicate by another status": (422, {"detail": "You have insufficient credit to run this model."}),
    "SiliconFlow": (403, {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None}),
    "Google": (403, {"error": {"code": 403, "message": "This API method requires billing to be enabled.", "status": "PERMISSION_DENIED"}}),
    "Google prepaid": (429, [{"error": {"code": 429, "message": "Your prepayment credits are depleted.", "status": "RESOURCE_EXHAUSTED"}}]),
    "Google Imagen": (400, {"error": {"code": 400, "message": "Imagen API is only accessible to billed users at this time."}}),
    "xAI": (
        429,
        {"code": "The caller has run out of something", "error": "Your team x has either used all available credits or reached its monthly spending limit."},
    ),
    "Zhipu": (429, {"error": {"code": "1113", "message": "您的账户已欠费，请充值后重试"}}),
    "Moonshot": (429, openai("Your account is suspended, please check your plan", None, "exceeded_current_quota_error")),
    "Volcengine": (403, openai("The request failed because your account has an overdue balance.", "AccountOverdueError")),
    "Fireworks": (
        412, openai("Account x is suspended, possibly due to reaching the monthly spending limit or failure to pay past invoices.")
    ),
    "new-api": (403, openai("用户额度不足, 剩余额度: 0", "insufficient_user_quota", "new_api_error")),
    "a relay's 503": (503, openai("no", "insufficient_quota")),
    "MiniMax": (200, {"id": "x", "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
}  # fmt: skip

AUTH = {
    "OpenAI": (401, openai("Incorrect API key provided: sk-***.", "invalid_api_key")),
    "OpenAI by another status": (400, openai("Incorrect API key provided: sk-***.", "invalid_api_key")),
    "Google": (
        400,
        {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT",
                   "details": [{"reason": "API_KEY_INVALID"}]}},
    ),
    "Google expired": (400, [{"error": {"code": 400, "message": "API key expired. Please renew the API key."}}]),
    "DashScope": (429, {"code": "InvalidApiKey", "message": "Invalid API-key provided."}),
    "Azure blocked": (
        403,
        {"error": {"code": "Forbidden", "message": "Your resource has been temporarily blocked because we detected behavior that may violate our content policy."}},
    ),
    "MiniMax": (200, {"base_resp": {"status_code": 1004, "status_msg": "login fail"}}),
    "any 403": (403, b"error code: 1010"),
}  # fmt: skip

CONTENT: dict[str, tuple[int, object]] = {
    "Azure": (
        400,
        openai("The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please modify your prompt and retry.", "content_filter", param="prompt"),
    ),
    "Azure, only its wording": (400, openai("… triggering Microsoft's content management policy.")),
    "Azure images": (
        400,
        {"error": {"code": "BadRequest", "inner_error": {"code": "ResponsibleAIPolicyViolation"}, "message": "no"}},
    ),
    "Azure contentFilter": (400, {"error": {"code": "contentFilter", "message": "Your task failed."}}),
    "OpenAI": (400, openai("Your request was rejected as a result of our safety system.", "moderation_blocked")),
    "fal": (
        422,
        {"detail": [{"loc": ["body", "prompt"], "msg": "The content could not be processed because it contained material flagged by a content checker.", "type": "content_policy_violation"}]},
    ),
    "BFL": (400, {"error": "Request Moderated"}),
    "DashScope": (400, {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."}),
    "Volcengine": (
        400, openai("The request failed because the input text may contain sensitive information.", "InputTextSensitiveContentDetected.PolicyViolation")
    ),
    "Volcengine, in place of an image": (
        200, {"data": [{"error": {"code": "OutputImageSensitiveContentDetected", "message": "no"}}]}
    ),
    "Zhipu": (400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}}),
    "MiniMax": (200, {"base_resp": {"status_code": 1026, "status_msg": "new_sensitive"}}),
    "xAI": (403, {"code": "The caller does not have permission", "error": "Content violates usage guidelines. Team: x"}),
    "Stability": (403, {"id": "x", "name": "content_moderation", "errors": ["Your request was flagged"]}),
    "Google": (400, {"error": {"code": 400, "message": "Image generation failed: the prompt violates Google's Responsible AI practices"}}),
    "ModelScope": (400, {"errors": {"message": "prompt contains prohibited content", "code": "x"}}),
    "451": (451, {"code": 60300, "message": "The prompt is not allowed."}),
}  # fmt: skip


@over_rows("case", BILLING)
def test_missing_credit_is_recognized_for_every_service(case: str) -> None:
    found = read(*BILLING[case])
    assert (found.code, found.retryable, found.retry_after_s) == ("upstream_billing", False, None)


@over_rows("case", AUTH)
def test_a_rejected_key_is_recognized_for_every_service(case: str) -> None:
    found = read(*AUTH[case])
    assert (found.code, found.retryable) == ("upstream_auth", False)


@over_rows("case", CONTENT)
def test_a_policy_refusal_is_recognized_for_every_service(case: str) -> None:
    status, body = CONTENT[case]
    with pytest.raises(UpstreamError) as caught:
        parse_reply(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (caught.value.code, caught.value.retryable) == ("content_policy", False)


@over_rows(
    ("status", "body", "code"),
    [
        (429, openai(OPENAI_RATE, "rate_limit_exceeded", "requests"), "upstream_rate_limited"),
        (429, [openai(GOOGLE_MINUTE)], "upstream_rate_limited"),
        (429, {"code": "Throttling.AllocationQuota", "message": "Allocated quota exceeded"}, "upstream_rate_limited"),
        (429, openai("slow down, our safety system is busy"), "upstream_rate_limited"),
        (503, openai("The moderation system is overloaded"), "upstream_overloaded"),
        (400, openai("moderation must be one of auto, low", "invalid_value", param="moderation"), "upstream_invalid_request"),
        (400, openai("Unknown parameter: 'moderation'."), "upstream_invalid_request"),
        (412, b"{}", "upstream_invalid_request"),
        (200, openai("Your request was rejected by our safety system", kind="api_error"), "content_policy"),
        (200, openai("No such model", "model_not_found", "api_error"), "model_not_available"),
    ],
)  # fmt: skip
def test_transient_and_request_errors_are_not_misclassified(status: int, body: object, code: str) -> None:
    assert read(status, body).code == code


@over_rows(
    ("kind", "code"),
    [
        ("overloaded_error", "upstream_overloaded"),
        ("engine_overloaded_error", "upstream_overloaded"),
        ("service_unavailable", "upstream_overloaded"),
        ("api_error", "upstream_error"),
        ("internal_server_error", "upstream_error"),
        ("permission_error", "upstream_auth"),
    ],
)
def test_an_error_under_a_200_counts_as_under_its_own_status_and_costs_nothing(kind: str, code: str) -> None:
    for body in (openai("not now", kind=kind), openai("not now", kind), {"error": kind, "message": "not now"}):
        with pytest.raises(UpstreamError) as caught:
            parse_reply(200, {}, json.dumps(body).encode())
        assert (caught.value.code, caught.value.ambiguous) == (code, False)


GOOGLE_LIMIT = {
    "error": {"code": 403, "message": "User Rate Limit Exceeded", "errors": [{"reason": "userRateLimitExceeded"}]}
}


@over_rows(
    ("status", "body"),
    [
        (403, openai("Rate limit exceeded, try again in 3s", "rate_limit_exceeded")),
        (403, GOOGLE_LIMIT),
        (403, openai("Rate limit exceeded, try again in 3s")),
        (400, openai("Too many requests. Please slow down", "429")),
        (400, {"code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"}),
        (400, {"message": "Too many requests, please wait before trying again."}),
        (420, b"Enhance your calm"),
        (500, openai("Rate limit exceeded", "rate_limit_exceeded")),
        (502, openai("upstream error: 429 Too Many Requests", kind="new_api_error")),
        (503, openai("Too many requests")),
        (200, openai("Slow down", "rate_limit_exceeded", "rate_limit_error")),
        (200, {"success": False, "message": "Too many requests"}),
    ],
)  # fmt: skip
def test_a_rate_limit_under_another_status_is_waited_out_and_costs_nothing(status: int, body: object) -> None:
    with pytest.raises(UpstreamError) as caught:
        parse_reply(status, {"retry-after": "3"}, body if isinstance(body, bytes) else json.dumps(body).encode())
    error = caught.value
    assert (error.code, error.retryable, error.ambiguous, error.retry_after_s) == (
        "upstream_rate_limited",
        True,
        False,
        3.0,
    )


@over_rows(
    ("status", "body", "code"),
    [
        (403, openai("You exceeded the rate limit of your plan", "insufficient_user_quota"), "upstream_billing"),
        (403, openai("This key has no access to rate limit exceeded routes"), "upstream_auth"),
        (400, openai("The prompt 'too many requests' is too short"), "upstream_invalid_request"),
        (400, openai("Too many images requested: at most 2"), "upstream_invalid_request"),
    ],
)
def test_a_refusal_that_only_mentions_a_rate_limit_is_not_waited_out(status: int, body: object, code: str) -> None:
    assert read(status, body).code == code


@over_rows("status", sorted(GAVE_UP_WAITING))
@over_rows("body", [b"", GATEWAY_PAGE, openai("timed out"), {"title": "x", "cloudflare_error": True}])
def test_a_gateway_timeout_is_ambiguous(status: int, body: object) -> None:
    found = read(status, body)
    assert (found.code, found.retryable, found.ambiguous, was_never_sent(found)) == (
        "upstream_error",
        True,
        True,
        False,
    )


@over_rows("status", sorted(NEVER_REACHED))
def test_a_gateway_without_origin_means_nothing_was_paid(status: int) -> None:
    found = read(status, GATEWAY_PAGE)
    assert (found.code, found.retryable, found.ambiguous, was_never_sent(found)) == (
        "upstream_error",
        True,
        False,
        True,
    )


@over_rows(
    ("status", "body", "ambiguous"),
    [
        (502, b"", True),
        (502, GATEWAY_PAGE, True),
        (502, {"message": "Internal server error"}, True),
        (502, {"title": "Error 502", "detail": "The origin …", "cloudflare_error": True}, True),
        (502, openai("the channel failed"), False),
        (502, {"detail": "worker failed"}, False),
        (503, b"upstream connect error or disconnect/reset before headers. reset reason: connection termination", True),
        (503, b"upstream connect error or disconnect/reset before headers. reset reason: connection failure", False),
        (503, b"upstream connect error or disconnect/reset before headers. reset reason: overflow", False),
        (503, GATEWAY_PAGE, False),
        (503, openai("overloaded"), False),
        (529, b"", False),
        (500, openai("Internal server error"), False),
        (500, GATEWAY_PAGE, False),
        (425, b"", False),
    ],
)
def test_only_errors_in_place_of_the_service_are_ambiguous(status: int, body: object, ambiguous: bool) -> None:
    found = read(status, body)
    assert (found.retryable, found.ambiguous, was_never_sent(found)) == (True, ambiguous, False)


@over_rows("status", sorted({401, 402, 403, 429}))
def test_a_refusal_is_never_ambiguous(status: int) -> None:
    assert not read(status, b"").ambiguous


@over_rows(
    ("param", "message", "count"),
    [
        (None, "You must provide n=1 for this model.", 1),
        ("n", "Invalid 'n': integer above maximum value. Expected a value <= 1, but got 3 instead.", 1),
        ("n", "not supported", 1),
        (None, "n must be between 1 and 4", 4),
        (None, "Only n=1 is supported for this model", 1),
        (None, "Unknown parameter: 'tools[0].n'.", 1),
        (None, "num_images must be at most 2", 2),
        (None, "The number of images must be less than or equal to 6", 6),
        (None, "This model only supports one image per request", 1),
        (None, "Unsupported use of 'n' parameter. This parameter is not supported for the selected model.", 1),
        (None, "Batch size must be 1", 1),
        (None, "n > 1 is not supported", 1),
        (None, "Too many images requested: at most 2", 2),
        (None, "height must be a multiple of 16", None),
        (None, "steps must be between 1 and 4", None),
        ("size", "Invalid value: '1x1'", None),
    ],
)  # fmt: skip
def test_a_rejected_image_count_names_the_limit_per_call(param: str | None, message: str, count: int | None) -> None:
    assert highest_count(param or "", message) == count
    found = read(400, openai(message, param=param))
    assert found.max_count == count
    assert found.code == "upstream_invalid_request"


def test_a_rejected_key_is_explained_to_client_and_operator() -> None:
    found = read(
        401, openai("Invalid API key provided. You can find your API key at https://api.together.xyz/settings.")
    )
    assert "operator" in found.detail
    assert "find your API key" not in found.detail
    assert found.upstream_detail.startswith("Invalid API key provided.")


def test_missing_credit_is_explained_to_the_client_without_advice() -> None:
    found = read(402, openai("Credit limit exceeded, please [add credits](https://api.together.ai/settings/billing)."))
    assert "operator" in found.detail
    assert found.detail.endswith("(Credit limit exceeded)")


def test_a_rate_limit_under_a_200_is_waited_out() -> None:
    error = read(200, {"id": "x", "base_resp": {"status_code": 1002, "status_msg": "rate limit"}})
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_rate_limited", True, False)


VERIFIED = (
    "Your organization must be verified to use the model `gpt-image-2`. Please go to: https://platform.openai.com/x"
)
REGION = "User location is not supported for the API use. (request id: 2026)"
NGINX = b"<html>\n<head><title>404 Not Found</title></head><body>nginx</body></html>"

OF_THE_ACCOUNT = {
    "OpenAI, not verified": (403, openai(VERIFIED, kind="invalid_request_error")),
    "a relay, not verified": (400, openai(VERIFIED, kind="upstream_error")),
    "OpenAI, country": (403, openai("Country, region, or territory not supported", "unsupported_country_region_territory")),
    "a relay, country": (451, openai("This service is not available in your country.")),
    "a relay, Google's region": (400, openai(REGION, kind="upstream_error")),
    "plan": (400, openai("Your current plan does not support image generation. Please upgrade your plan.")),
    "terms": (400, openai("You must accept the terms of this model first")),
    "Volcengine Ark": (404, openai("Your account 21 has not activated the model doubao-seedream-4-0.", "ModelNotOpen")),
    "DashScope": (400, {"code": "Model.AccessDenied", "message": "Model access denied."}),
    "Google Vertex": (400, {"error": {"code": 400, "message": "Project is not allowed to use Publisher Model imagen-4"}}),
    "Bedrock": (400, {"message": "You don't have access to the model with the specified model ID."}),
    "SiliconFlow": (400, {"code": 30011, "message": "The model requires real-name authentication."}),
    "one-api, group": (400, openai("无权访问 vip 分组", kind="new_api_error")),
    "one-api, expired key": (400, openai("该令牌已过期", kind="new_api_error")),
    "new-api, address": (400, openai("您的IP不在令牌允许访问的列表中", kind="new_api_error")),
    "Stability": (400, {"id": "x", "name": "unauthorized", "errors": ["missing authorization header"]}),
}  # fmt: skip

OF_THE_MODEL = {
    "deprecated": (400, openai("The model 'black-forest-labs/FLUX.1-pro' has been deprecated and is no longer available")),
    "OpenAI's code": (400, openai("The model `dall-e-3` has been deprecated, learn more here: https://x", "model_not_found")),
    "OpenAI's field": (400, openai("Invalid value: 'gpt-image-9'. Supported values are: 'gpt-image-2'.", "invalid_value", param="model")),
    "not enabled": (400, openai("The model is not enabled for your account")),
    "not supported": (400, openai("Model gpt-image-2 is not supported")),
    "unsupported": (400, openai("unsupported model: flux")),
    "not found": (400, openai("Model not found")),
    "quoted": (400, openai("Model 'flux-1.1-pro' not found", kind="invalid_request_error")),
    "invalid": (400, openai("invalid model ID", kind="invalid_request_error")),
    "Azure": (400, openai("Unknown model: gpt-image-9", "unknown_model")),
    "Azure, a model of texts": (400, openai("The imageGenerations operation does not work with the specified model, gpt-5.", "OperationNotSupported")),
    "DashScope": (400, {"code": "InvalidParameter", "message": "Model not exist."}),
    "Bedrock": (400, {"message": "The provided model identifier is invalid."}),
    "Google Vertex": (404, {"error": {"code": 404, "message": "Publisher Model `x` was not found or your project does not have access to it."}}),
    "one-api, no channel": (400, openai("当前分组 default 下对于模型 gpt-image-2 无可用渠道 (request id: 2026)", kind="new_api_error")),
    "new-api, no channel": (400, openai("No available channel for model gpt-image-2 under group default (distributor)")),
    "new-api, no price": (400, openai("模型 gpt-image-2 倍率或价格未配置，请联系管理员设置", kind="new_api_error")),
    "an error under a 200": (200, {"error": {"message": "model not found"}}),
    "FastAPI": (422, {"detail": [{"loc": ["body", "model"], "msg": "Input should be 'a' or 'b'", "type": "enum"}]}),
}  # fmt: skip

OF_THE_ADDRESS: dict[str, tuple[int, object]] = {
    "page": (404, NGINX),
    "text": (404, b"404 page not found"),
    "nothing": (404, b""),
    "FastAPI's route": (404, {"detail": "Not Found"}),
    "OpenAI's route": (404, openai("Invalid URL (POST /v1/images/generations)", kind="invalid_request_error")),
    "gone": (410, NGINX),
    "method": (405, {"detail": "Method Not Allowed"}),
    "proxy": (407, b"Proxy Authentication Required"),
    "other host": (421, NGINX),
    "locked": (423, openai("Locked")),
    "upgrade": (426, b"Upgrade Required"),
    "law": (451, b""),
    "law, page": (451, NGINX),
    "law, text": (451, openai("Unavailable For Legal Reasons")),
    "plain HTTP": (400, b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>"),
    "body over a gateway's limit": (413, NGINX),
}

OF_THE_REQUEST = {
    "size": (400, openai("Invalid value: '1x1'.", "invalid_value", param="size")),
    "length": (400, openai("The prompt is too long")),
    "body": (413, openai("The image is too large")),
    "the client's own words": (400, openai("Invalid prompt: 'the model does not exist in the picture'")),
    "quoted words of an account": (400, openai('The text "your plan does not support this" is too short')),
    "size of a model": (400, openai("The size 64x64 for model gpt-image-2 is not supported")),
    "a field of a model": (400, openai("The model gpt-image-2 does not support a transparent background")),
    "values together": (400, openai("The model gpt-image-2 is not supported with such a size")),
    "a field that is not known": (400, openai("Unknown parameter: 'model'.", "unknown_parameter", param="model")),
}  # fmt: skip


@over_rows(
    ("case", "code"),
    [
        *((case, "upstream_auth") for case in OF_THE_ACCOUNT.items()),
        *((case, "model_not_available") for case in OF_THE_MODEL.items()),
        *((case, "upstream_invalid_request") for case in OF_THE_ADDRESS.items()),
        (("quota", (400, openai("Quota exceeded for this account"))), "upstream_billing"),
        (("not active", (400, openai("Your account is not active, please check your billing details."))), "upstream_billing"),
    ],
)  # fmt: skip
def test_a_refusal_of_an_account_or_an_address_is_free_and_goes_to_the_next_channel(case: Any, code: str) -> None:
    found = read(*case[1])
    assert (found.code, found.retryable, paid(found)) == (code, False, "no")
    assert elsewhere(found, has_job=False)


@over_rows("case", OF_THE_REQUEST)
def test_a_refusal_of_the_request_itself_goes_to_no_other_channel(case: str) -> None:
    found = read(*OF_THE_REQUEST[case])
    assert (found.code, found.retryable) == ("upstream_invalid_request", False)
    assert not elsewhere(found, has_job=False)


def test_a_quota_of_a_minute_under_another_status_is_waited_out() -> None:
    for status in (400, 403):
        found = read(status, openai("Quota exceeded for quota metric 'requests' and limit 'requests per minute'"))
        assert (found.code, found.retryable) == ("upstream_rate_limited", True)
