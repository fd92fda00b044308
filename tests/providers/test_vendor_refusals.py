"""Table of refusals in the words of vendors and relays, from their documentation and their users' reports."""
# ruff: noqa: E501 - each response on one line, as the service sends it

from __future__ import annotations

import json
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.response_parser import parse_reply
from tests.support import over_rows

POLICY, INVALID, AUTH, BILLING = "content_policy", "upstream_invalid_request", "upstream_auth", "upstream_billing"
MODEL, LIMIT, BUSY, ERROR = "model_not_available", "upstream_rate_limited", "upstream_overloaded", "upstream_error"

Refusal = tuple[str, int, Any]
"""Task error code, status, and body: a text is the message of an error object as OpenAI sends it."""


def of(message: str, code: Any = None, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI, Together and relays send it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def google(status: int, message: str, name: str, reason: str = "") -> dict[str, Any]:
    return {
        "error": {"code": status, "message": message, "status": name, "details": [{"reason": reason}] if reason else []}
    }


def fal(kind: str, message: str, field: str = "prompt") -> dict[str, Any]:
    return {
        "detail": [{"loc": ["body", field], "msg": message, "type": kind, "url": f"https://docs.fal.ai/errors#{kind}"}]
    }


def ali(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "request_id": "7574ee8f-38a3-4b1e-9280-11c33ab46e51"}


QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, "
)

OPENAI: list[Refusal] = [
    (POLICY, 400, of("Your request was rejected as a result of our safety system. Your request may contain content that is not allowed by our safety system.", "moderation_blocked", "image_generation_user_error")),
    (POLICY, 400, of("Your request was rejected as a result of our safety system. Image descriptions generated from your prompt may contain text that is not allowed by our safety system. If you believe this was done in error, your request may succeed if retried, or by adjusting your prompt.", "content_policy_violation", "invalid_request_error")),
    (POLICY, 400, "Your request was rejected by the safety system. If you believe this is an error, contact us at help.openai.com and include the request ID req_0a. safety_violations=[sexual]."),
    (POLICY, 400, of("This request has been blocked by our content filters.", "content_policy_violation")),
    (INVALID, 400, of("Invalid value: '512x512'. Supported values are: '1024x1024', '1024x1536', '1536x1024', and 'auto'.", "invalid_value", "image_generation_user_error", "size")),
    (INVALID, 400, of("Unknown parameter: 'response_format'.", "unknown_parameter", "invalid_request_error", "response_format")),
    (INVALID, 400, of("Invalid 'prompt': string too long. Expected a string with maximum length 32000, but got a string with length 40000 instead.", "string_above_max_length", "invalid_request_error", "prompt")),
    (INVALID, 400, of("Transparent background is not supported for this model.", "invalid_value", "image_generation_user_error", "background")),
    (INVALID, 400, of("Invalid image file or mode for image 1, please check your image file.", "invalid_image_file", "image_generation_user_error")),
    (INVALID, 400, "Uploaded image must be a PNG and less than 4 MB."),
    (INVALID, 400, of("Invalid input image - format must be in ['RGBA', 'LA', 'L'], got RGB.", None, "invalid_request_error")),
    (INVALID, 400, of("Invalid size. The size must be one of 256x256, 512x512, or 1024x1024.", None, "invalid_request_error")),
    (INVALID, 400, of("The image edit request requires at least one image.", "missing_required_parameter", "invalid_request_error", "image")),
    (INVALID, 400, of("Invalid 'n': integer above maximum value. Expected a value <= 1, but got 2 instead.", "integer_above_max_value", "invalid_request_error", "n")),
    (INVALID, 400, of("The model `gpt-image-1.5` does not support the 'input_fidelity' parameter.", "invalid_value", "invalid_request_error", "input_fidelity")),
    (AUTH, 403, of("Your organization must be verified to use the model `gpt-image-1`. Please go to: https://platform.openai.com/settings/organization/general and click on Verify Organization. If you just verified, it can take up to 15 minutes for access to propagate.", None, "invalid_request_error")),
    (AUTH, 401, of("Incorrect API key provided: sk-proj-********abcd. You can find your API key at https://platform.openai.com/account/api-keys.", "invalid_api_key", "invalid_request_error")),
    (AUTH, 401, "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."),
    (AUTH, 401, "You have insufficient permissions for this operation. Missing scopes: api.model.images.request. Check that you have the correct role in your organization (Reader, Writer, Owner) and project (Member, Owner), and if you're using a restricted API key, that it has the necessary scopes."),
    (AUTH, 401, of("The OpenAI account associated with this API key has been deactivated. Please check your email for more information. If you feel this is an error, contact us through our help center at help.openai.com.", "account_deactivated", "invalid_request_error")),
    (AUTH, 401, "You must be a member of an organization to use the API. Please contact us through our help center at help.openai.com."),
    (AUTH, 403, of("Country, region, or territory not supported", "unsupported_country_region_territory", "request_forbidden")),
    (AUTH, 403, of("You are not allowed to sample from this model", None, "invalid_request_error")),
    (MODEL, 403, of("Project `proj_x` does not have access to model `gpt-image-1`", "model_not_found", "invalid_request_error")),
    (MODEL, 404, of("The model `gpt-image-3` does not exist or you do not have access to it.", "model_not_found", "invalid_request_error")),
    (MODEL, 400, of("Invalid value: 'gpt-4o'. Supported values are: 'gpt-image-1', 'gpt-image-1-mini', 'dall-e-2', and 'dall-e-3'.", "invalid_value", "invalid_request_error", "model")),
    (MODEL, 404, "The model: `dall-e-2` has been deprecated, learn more here: https://platform.openai.com/docs/deprecations"),
    (LIMIT, 429, of("Rate limit reached for gpt-image-1 in organization org-x on input-images per min (IPM): Limit 5, Used 5, Requested 1. Please try again in 12s. Visit https://platform.openai.com/account/rate-limits to learn more.", "rate_limit_exceeded", "input-images")),
    (LIMIT, 429, "Rate limit exceeded for images per minute in organization org-x. Limit: 5/1min. Current: 7/1min. Please visit https://platform.openai.com/docs/guides/rate-limits to learn how to increase your rate limit."),
    (INVALID, 429, of("Request too large for gpt-image-1 in organization org-x on input-images per min (IPM): Limit 5, Requested 6. Visit https://platform.openai.com/account/rate-limits to learn more.", "rate_limit_exceeded", "input-images")),
    (BILLING, 429, of(QUOTA + "read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.", "insufficient_quota", "insufficient_quota")),
    (BILLING, 429, of("Your account is not active, please check your billing details on our website.", "billing_not_active", "billing_not_active")),
    (BILLING, 400, of("Billing hard limit has been reached", "billing_hard_limit_reached", "invalid_request_error")),
    (ERROR, 500, of("The server had an error while processing your request. Sorry about that! You can retry your request, or contact us through our help center at help.openai.com if the error persists.", None, "server_error")),
    (BUSY, 503, "The engine is currently overloaded, please try again later"),
]  # fmt: skip

AZURE: list[Refusal] = [
    (POLICY, 400, {"error": {"code": "contentFilter", "message": "Your task failed as a result of our safety system."}}),
    (POLICY, 400, {"error": {"code": "content_policy_violation", "inner_error": {"code": "ResponsibleAIPolicyViolation"}, "message": "Your request was rejected as a result of our safety system. Your prompt may contain text that is not allowed by our safety system."}}),
    (POLICY, 400, of("The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please modify your prompt and retry. To learn more about our content filtering policies please read our documentation: https://go.microsoft.com/fwlink/?linkid=2198766", "content_filter", None, "prompt")),
    (AUTH, 401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid key for an active subscription and use a correct regional API endpoint for your resource."}}),
    (AUTH, 403, {"error": {"code": "403", "message": "Access denied due to Virtual Network/Firewall rules."}}),
    (AUTH, 403, {"error": {"code": "Forbidden", "message": "Your resource has been temporarily blocked because we detected behavior that may violate our content policy. For more details on Azure OpenAI service content policy, please visit https://aka.ms/aoaicodeofconduct"}}),
    (MODEL, 404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource does not exist. If you created the deployment within the last 5 minutes, please wait a moment and try again."}}),
    (LIMIT, 429, {"error": {"code": "429", "message": "Requests to the ImageGenerations_Create Operation under Azure OpenAI API version 2024-02-01 have exceeded call rate limit of your current OpenAI S0 pricing tier. Please retry after 26 seconds. Please go here: https://aka.ms/oai/quotaincrease if you would like to further increase the default rate limit."}}),
]  # fmt: skip

TOGETHER: list[Refusal] = [
    (INVALID, 400, of("Unsupported use of 'image_url' parameter. This parameter is not supported for the selected model.", None, "invalid_request_error")),
    (INVALID, 400, of("Unsupported use of 'steps' parameter. This parameter is not supported for the selected model.", None, "invalid_request_error")),
    (INVALID, 400, of("height must be a multiple of 16", None, "invalid_request_error")),
    (INVALID, 400, of("width must be between 64 and 1792", None, "invalid_request_error")),
    (INVALID, 400, of("steps must be between 1 and 4", None, "invalid_request_error")),
    (INVALID, 413, of("Request entity too large", None, "invalid_request_error")),
    (MODEL, 400, of("Model is not supported for image generation", None, "invalid_request_error")),
    (MODEL, 400, of("Unable to access non-serverless model black-forest-labs/FLUX.1-dev. Please visit https://api.together.ai/models/black-forest-labs/FLUX.1-dev to create and start a new dedicated endpoint for the model.", "model_not_available", "invalid_request_error")),
    (MODEL, 404, of("Unable to access model black-forest-labs/FLUX.1-x. Please visit https://api.together.ai/models to view the list of supported models.", "model_not_available", "invalid_request_error")),
    (AUTH, 401, of("Invalid API key provided. You can find your API key at https://api.together.xyz/settings/api-keys.", "invalid_api_key", "invalid_request_error")),
    (AUTH, 403, b"error code: 1010"),
    (BILLING, 402, of("Credit limit exceeded, please [add credits](https://api.together.ai/settings/billing). If you've already made a payment, please wait up to 5 minutes for balances to update and try again.", None, "credit_limit")),
    (POLICY, 422, of("image may contain NSFW content", None, "invalid_request_error")),
    (POLICY, 400, of("Request Moderated", "content_policy_violation", "invalid_request_error")),
    (LIMIT, 429, of("You have reached the rate limit specific to this model black-forest-labs/FLUX.1-kontext-pro. The maximum rate limit for this model is 9.0 queries per minute. This limit differs from the general rate limits published at Together AI rate limits documentation (https://docs.together.ai/docs/rate-limits). For inquiries about increasing your model-specific rate limit, please contact our sales team (https://www.together.ai/forms/contact-sales)", None, "model_rate_limit")),
    (LIMIT, 429, of("You have been rate limited. Your rate limit is 60 queries per minute. Please navigate to https://api.together.xyz/settings/billing to upgrade to a paid plan.", None, "credit_limit")),
    (LIMIT, 429, of("Request rate exceeded", None, "dynamic_request_limited")),
    (ERROR, 500, of("Internal server error", None, "server_error")),
    (BUSY, 503, of("The server is overloaded or not ready yet.", None, "service_unavailable")),
]  # fmt: skip

FAL: list[Refusal] = [
    (POLICY, 422, fal("content_policy_violation", "The content could not be processed because it contained material flagged by a content checker.")),
    (POLICY, 422, fal("content_policy_violation", "The content was flagged by a content checker.", "image_url")),
    (INVALID, 422, fal("image_too_large", "Image is too large. Maximum dimensions are 4096x4096 pixels.", "image_url")),
    (INVALID, 422, fal("image_too_small", "Image dimensions are too small. Minimum dimensions are 256x256 pixels.", "image_url")),
    (INVALID, 422, fal("image_load_error", "Failed to load the image. Please ensure the image file is not corrupted and is in a supported format.", "image_url")),
    (INVALID, 422, fal("file_download_error", "Failed to download the file. Please check if the URL is accessible and try again.", "image_url")),
    (INVALID, 422, fal("greater_than_equal", "Input should be greater than or equal to 1", "num_inference_steps")),
    (INVALID, 422, fal("feature_not_supported", "The requested feature is not supported with the given parameters combination.")),
    (INVALID, 422, fal("missing", "Field required", "image_urls")),
    (AUTH, 401, {"detail": "Cannot access application 'fal-ai/flux'. Authentication is required to access this application."}),
    (AUTH, 401, {"detail": "No user found for Key ID and Secret"}),
    (BILLING, 403, {"detail": "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."}),
    (MODEL, 404, {"detail": "Application 'fluxx' not found"}),
    (LIMIT, 429, {"detail": "Reached concurrent requests limit"}),
    (ERROR, 500, fal("internal_server_error", "Internal server error")),
    (ERROR, 500, fal("downstream_service_error", "Downstream service error")),
    (BUSY, 503, fal("downstream_service_unavailable", "Downstream service unavailable")),
]  # fmt: skip

REPLICATE: list[Refusal] = [
    (AUTH, 401, {"title": "Unauthenticated", "detail": "You did not pass a valid authentication token", "status": 401}),
    (AUTH, 403, {"detail": "You do not have permission to perform this action.", "status": 403}),
    (BILLING, 402, {"title": "Insufficient credit", "detail": "You have insufficient credit to run this model. Go to https://replicate.com/account/billing#billing to purchase credit. Once you purchase credit, please wait a few minutes before trying again.", "status": 402}),
    (BILLING, 402, {"title": "Monthly spend limit reached", "detail": "You've reached your monthly spend limit. Please wait until the next month.", "status": 402}),
    (INVALID, 422, {"title": "Input validation failed", "detail": "- input: prompt is required\n", "status": 422, "invalid_fields": [{"type": "required", "field": "input", "description": "prompt is required"}]}),
    (INVALID, 422, {"title": "Input validation failed", "detail": '- input.aspect_ratio: input.aspect_ratio must be one of the following: "1:1", "16:9"\n', "status": 422}),
    (MODEL, 404, {"detail": "The requested resource could not be found.", "status": 404}),
    (LIMIT, 429, {"detail": "Request was throttled. Your rate limit resets in ~30s.", "status": 429}),
    (LIMIT, 429, {"title": "Too many requests", "detail": "Request was throttled. Your rate limit for creating predictions is reduced to 6 requests per minute with a burst of 1 requests while you have less than $5.0 in credit. Your rate limit resets in ~9s.", "status": 429}),
    (POLICY, 422, {"detail": "NSFW content detected. Try running it again, or try a different prompt."}),
]  # fmt: skip

BFL: list[Refusal] = [
    (AUTH, 403, {"detail": "Not authenticated - Invalid Authentication"}),
    (BILLING, 402, {"detail": "Insufficient credits. Please add credits to your account."}),
    (INVALID, 422, {"detail": [{"loc": ["body", "width"], "msg": "Input should be greater than or equal to 256", "type": "greater_than_equal"}]}),
    (INVALID, 422, {"detail": [{"loc": ["body", "width"], "msg": "Value error, width must be a multiple of 32", "type": "value_error"}]}),
    (POLICY, 400, {"detail": "Request Moderated"}),
    (LIMIT, 429, {"error": "rate_limit_exceeded", "message": "Too many requests", "retry_after": 30}),
]  # fmt: skip

DASHSCOPE: list[Refusal] = [
    (POLICY, 400, ali("DataInspectionFailed", "Input data may contain inappropriate content.")),
    (POLICY, 400, ali("DataInspectionFailed", "Output data may contain inappropriate content.")),
    (POLICY, 400, ali("data_inspection_failed", "Input or output data may contain inappropriate content. For details, see: https://help.aliyun.com/zh/model-studio/error-code#inappropriate-content")),
    (POLICY, 400, ali("IPInfringementSuspect", "Input data is suspected of being involved in IP infringement.")),
    (INVALID, 400, ali("InvalidParameter", "url error, please check url！")),
    (INVALID, 400, ali("InvalidParameter", "the size does not match the allowed size 1280*720,720*1280,1024*1024")),
    (INVALID, 400, ali("InvalidParameter", "Range of seed should be [0, 2147483647]")),
    (INVALID, 400, ali("InvalidParameter.DataInspection", "Unable to download the media resource during the data inspection process.")),
    (INVALID, 400, ali("InvalidURL", "Required URL is missing or invalid, please check the request URL.")),
    (MODEL, 400, ali("InvalidParameter", "Model not exist.")),
    (MODEL, 404, ali("ModelNotFound", "Model can not be found.")),
    (MODEL, 404, ali("model_not_found", "The model `wanx9` does not exist or you do not have access to it.")),
    (MODEL, 403, ali("AccessDenied", "current user api does not support asynchronous calls.")),
    (MODEL, 403, ali("AccessDenied", "current user api does not support synchronous calls.")),
    (AUTH, 401, ali("InvalidApiKey", "Invalid API-key provided.")),
    (AUTH, 403, ali("AccessDenied.Unpurchased", "Access to model denied. Please make sure you are eligible for using the model.")),
    (AUTH, 403, ali("Model.AccessDenied", "Model access denied.")),
    (AUTH, 403, ali("Workspace.AccessDenied", "Workspace access denied.")),
    (BILLING, 400, ali("Arrearage", "Access denied, please make sure your account is in good standing.")),
    (BILLING, 403, ali("AllocationQuota.FreeTierOnly", 'The free tier of the model has been exhausted. If you wish to continue access the model on a paid basis, please disable the "use free tier only" mode in the management console.')),
    (BILLING, 429, ali("PrepaidBillOverdue", "The prepaid bill is overdue.")),
    (BILLING, 429, ali("CommodityNotPurchased", "Commodity has not purchased yet.")),
    (BILLING, 429, ali("Throttling.AllocationQuota", "Free allocated quota exceeded.")),
    (LIMIT, 429, ali("Throttling", "Requests throttling triggered.")),
    (LIMIT, 429, ali("Throttling.RateQuota", "Requests rate limit exceeded, please try again later.")),
    (LIMIT, 429, ali("Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit.")),
    (ERROR, 500, ali("InternalError.Algo", "inference internal error")),
    (BUSY, 503, ali("ModelUnavailable", "Model is unavailable, please try again later.")),
]  # fmt: skip

GOOGLE: list[Refusal] = [
    (AUTH, 400, google(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT", "API_KEY_INVALID")),
    (AUTH, 400, google(400, "API key expired. Please renew the API key.", "INVALID_ARGUMENT", "API_KEY_INVALID")),
    (AUTH, 400, google(400, "User location is not supported for the API use.", "FAILED_PRECONDITION")),
    (AUTH, 403, google(403, "Permission denied: Consumer 'api_key:AIza' has been suspended.", "PERMISSION_DENIED", "CONSUMER_SUSPENDED")),
    (AUTH, 403, google(403, "Your API key was reported as leaked. Please use another API key.", "PERMISSION_DENIED")),
    (AUTH, 403, google(403, "Generative Language API has not been used in project 1234 before or it is disabled. Enable it by visiting https://console.developers.google.com/apis/api/generativelanguage.googleapis.com/overview?project=1234 then retry.", "PERMISSION_DENIED", "SERVICE_DISABLED")),
    (AUTH, 403, google(403, "Requests to this API generativelanguage.googleapis.com method google.ai.generativelanguage.v1beta.GenerativeService.GenerateContent are blocked.", "PERMISSION_DENIED", "API_KEY_SERVICE_BLOCKED")),
    (BILLING, 400, google(400, "Imagen API is only accessible to billed users at this time.", "INVALID_ARGUMENT")),
    (BILLING, 403, google(403, "This API method requires billing to be enabled. Please enable billing on project #1234.", "PERMISSION_DENIED", "BILLING_DISABLED")),
    (BILLING, 429, google(429, "Your prepayment credits are depleted. Please go to AI Studio at https://ai.studio/projects to manage your project and billing.", "RESOURCE_EXHAUSTED")),
    (BILLING, 429, google(429, QUOTA + "head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n* Quota exceeded for metric: generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: 0, model: gemini-2.5-flash-preview-image\nPlease retry in 45.3s.", "RESOURCE_EXHAUSTED")),
    (LIMIT, 429, google(429, QUOTA + "head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n* Quota exceeded for metric: generativelanguage.googleapis.com/generate_requests_per_model, limit: 10\nPlease retry in 25.3s.", "RESOURCE_EXHAUSTED")),
    (LIMIT, 429, google(429, "Resource exhausted. Please try again later. Please refer to https://cloud.google.com/vertex-ai/generative-ai/docs/error-code-429 for more details.", "RESOURCE_EXHAUSTED")),
    (MODEL, 404, google(404, "models/gemini-9-image is not found for API version v1beta, or is not supported for generateContent. Call ListModels to see the list of available models and their supported methods.", "NOT_FOUND")),
    (MODEL, 404, google(404, "Publisher Model `projects/x/locations/us-central1/publishers/google/models/imagen-9` was not found or your project does not have access to it. Please ensure you are using a valid model version.", "NOT_FOUND")),
    (INVALID, 400, google(400, "Image generation is not supported with the requested response modalities.", "INVALID_ARGUMENT")),
    (INVALID, 400, google(400, 'Invalid JSON payload received. Unknown name "imageSize" at \'generation_config.image_config\': Cannot find field.', "INVALID_ARGUMENT")),
    (INVALID, 400, google(400, "Unable to process input image. Please retry or report in https://developers.generativeai.google/guide/troubleshooting", "INVALID_ARGUMENT")),
    (INVALID, 400, google(400, "aspectRatio must be one of 1:1, 2:3, 3:2, 3:4, 4:3, 4:5, 5:4, 9:16, 16:9, 21:9", "INVALID_ARGUMENT")),
    (POLICY, 400, google(400, "Image generation failed with the following error: The response is blocked, as it may violate our policies. If you believe this is an error, please send feedback to your account team. Error Code: 58061214", "INVALID_ARGUMENT")),
    (POLICY, 400, google(400, "Image generation failed with the following error: The prompt could not be submitted. This prompt contains sensitive words that violate Google's Responsible AI practices. Try rephrasing the prompt. If you think this was an error, send feedback.", "INVALID_ARGUMENT")),
    (POLICY, 400, google(400, "Request contains an invalid argument.", "INVALID_ARGUMENT", "PUBLIC_ERROR_UNSAFE_GENERATION")),
    (ERROR, 500, google(500, "An internal error has occurred. Please retry or report in https://developers.generativeai.google/guide/troubleshooting", "INTERNAL")),
    (BUSY, 503, google(503, "The model is overloaded. Please try again later.", "UNAVAILABLE")),
]  # fmt: skip

XAI: list[Refusal] = [
    (POLICY, 400, {"code": "Client specified an invalid argument", "error": "Generated image rejected by content moderation."}),
    (POLICY, 403, {"code": "The caller does not have permission to execute the specified operation", "error": "Content violates usage guidelines. Team: x, API key ID: x, Model: grok-2-image, Failed check: SAFETY_CHECK_TYPE_CSAM"}),
    (AUTH, 400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: xa***ab. You can obtain an API key from https://console.x.ai."}),
    (AUTH, 403, {"code": "The caller does not have permission to execute the specified operation", "error": "Your team x does not have permission to use the model grok-imagine-image."}),
    (BILLING, 403, {"code": "The caller does not have permission to execute the specified operation", "error": "Your newly created team doesn't have any credits or licenses yet. You can purchase those on https://console.x.ai/team/x."}),
    (BILLING, 429, {"code": "Some resource has been exhausted", "error": "Your team x has either used all available credits or reached its monthly spending limit. To continue making API requests, please purchase more credits or raise your spending limit."}),
    (MODEL, 404, {"code": "Some requested entity was not found", "error": "The model grok-3-image does not exist or your team x does not have access to it. Please ensure you're using the correct API key. If you believe this is a mistake, please reach out to support and quote your team ID."}),
    (INVALID, 400, {"code": "Client specified an invalid argument", "error": "Argument not supported: size"}),
    (INVALID, 400, {"code": "Client specified an invalid argument", "error": "This model's maximum prompt length is 1024 but the request contains 2000 tokens."}),
    (LIMIT, 429, {"code": "Some resource has been exhausted", "error": "Too many requests for team x and model grok-2-image. Your team's rate limit is: requests per second (actual/limit): 6/5."}),
]  # fmt: skip

CHINESE_CLOUDS: list[Refusal] = [
    (POLICY, 400, of("The request failed because the input text may contain sensitive information. Request id: 02", "InputTextSensitiveContentDetected", "BadRequest")),
    (POLICY, 400, of("The request failed because the output image may contain sensitive information. Request id: 02", "OutputImageSensitiveContentDetected", "BadRequest")),
    (POLICY, 400, of("The request failed because the input image may contain real person.", "InputImageSensitiveContentDetected.PrivacyInformation", "BadRequest")),
    (INVALID, 400, of("The parameter `size` specified in the request is not valid: image size must be at least 3686400 pixels. Request id: 02", "InvalidParameter", "BadRequest", "size")),
    (INVALID, 400, of("The parameter `image` specified in the request is not valid: invalid url specified.", "InvalidParameter", "BadRequest", "image")),
    (MODEL, 404, of("The model or endpoint doubao-seedream-9 does not exist or you do not have access to it. Request id: 02", "InvalidEndpointOrModel.NotFound", "NotFound")),
    (AUTH, 404, of("Your account 2100 has not activated the model doubao-seedream-4-0. Please activate the model service in the Ark Console.", "ModelNotOpen", "NotFound")),
    (AUTH, 401, of("The API key in the request is missing or invalid.", "AuthenticationError", "Unauthorized")),
    (AUTH, 403, of("The request failed because you do not have access to the requested resource.", "AccessDenied", "Forbidden")),
    (BILLING, 403, of("The request failed because your account has an overdue balance.", "AccountOverdueError", "Forbidden")),
    (BILLING, 429, of("Your account 2100 has reached the set inference limit for the doubao-seedream-4-0 model, and the model service has been paused. To continue using this model, please visit the Model Activation page to adjust or close the Safe Experience Mode.", "SetLimitExceeded", "TooManyRequests")),
    (LIMIT, 429, of("The request failed because it exceeded the account rate limit.", "AccountRateLimitExceeded", "TooManyRequests")),
    (LIMIT, 429, of("The service is currently unable to handle additional requests due to server overload.", "ServerOverloaded", "TooManyRequests")),
    (POLICY, 400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容，请您避免输入易产生敏感内容的提示语，感谢您的配合。"}, "contentFilter": [{"level": 1, "role": "user"}]}),
    (MODEL, 400, {"error": {"code": "1211", "message": "模型不存在，请检查模型代码。"}}),
    (AUTH, 401, {"error": {"code": "1000", "message": "身份验证失败。"}}),
    (BILLING, 429, {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}),
    (LIMIT, 429, {"error": {"code": "1302", "message": "您当前使用该API的并发数过高，请降低并发，或联系客服增加限额。"}}),
    (LIMIT, 429, {"error": {"code": "1305", "message": "当前API请求过多，请稍后重试。"}}),
    (INVALID, 400, {"error": {"code": "1214", "message": "size 参数非法。请检查文档。"}}),
    (BILLING, 403, {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None}),
    (AUTH, 403, {"code": 30011, "message": "Only paid or verified users may use this model", "data": None}),
    (MODEL, 400, {"code": 20012, "message": "Model does not exist. Please check it carefully.", "data": None}),
    (MODEL, 403, {"code": 30003, "message": "Model disabled.", "data": None}),
    (INVALID, 400, {"code": 20015, "message": "image_size is not in the allowed list", "data": None}),
    (POLICY, 451, {"code": 60300, "message": "The prompt is not allowed.", "data": None}),
    (LIMIT, 429, {"message": "Request was rejected due to rate limiting. If you want more, please contact contact@siliconflow.com", "data": None}),
    (BUSY, 503, {"code": 50505, "message": "Model service overloaded. Please try again later.", "data": None}),
    (AUTH, 200, {"base_resp": {"status_code": 1004, "status_msg": "login fail: Please carry the API secret key in the 'Authorization' field of the request header"}}),
    (BILLING, 200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    (POLICY, 200, {"base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}),
    (LIMIT, 200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit exceeded(RPM)"}}),
]  # fmt: skip

OTHERS: list[Refusal] = [
    (POLICY, 403, {"id": "x", "name": "content_moderation", "errors": ["Your request was flagged by our content moderation system, as a result your request was denied and you were not charged."]}),
    (INVALID, 400, {"id": "x", "name": "bad_request", "errors": ["prompt: must be at most 10000 characters"]}),
    (BILLING, 402, {"id": "x", "name": "payment_required", "errors": ["You lack sufficient credits to make this request. Please purchase more credits at https://platform.stability.ai/account/credits and try again."]}),
    (AUTH, 401, {"id": "x", "name": "unauthorized", "errors": ["authorization: invalid or missing header value"]}),
    (LIMIT, 429, {"id": "x", "name": "rate_limit_exceeded", "errors": ["You have exceeded the rate limit of 150 requests within a 10 second period, and have been timed out for 60 seconds."]}),
    (BILLING, 402, {"error": {"message": "Insufficient credits. Add more using https://openrouter.ai/settings/credits", "code": 402}}),
    (BILLING, 402, {"error": {"message": "Insufficient credits. This account never purchased credits. Make sure your key is on the correct account or org, and if so, purchase more at https://openrouter.ai/settings/credits", "code": 402}}),
    (AUTH, 401, {"error": {"message": "No auth credentials found", "code": 401}}),
    (AUTH, 401, {"error": {"message": "User not found.", "code": 401}}),
    (BILLING, 403, {"error": {"message": "Key limit exceeded (total limit). Manage it using https://openrouter.ai/settings/keys", "code": 403}}),
    (MODEL, 404, {"error": {"message": "No endpoints found that support image output", "code": 404}}),
    (MODEL, 404, {"error": {"message": "No allowed providers are available for the selected model.", "code": 404}}),
    (MODEL, 400, {"error": {"message": "flux-9 is not a valid model ID", "code": 400}}),
    (POLICY, 403, {"error": {"message": "Your chosen model requires moderation and your input was flagged", "code": 403, "metadata": {"reasons": ["sexual"], "flagged_input": "…", "provider_name": "OpenAI"}}}),
    (LIMIT, 429, {"error": {"message": "Rate limit exceeded: free-models-per-min.", "code": 429}}),
    (BUSY, 503, {"error": {"message": "No instances available", "code": 503}}),
    (BILLING, 402, {"error": "You have exceeded your monthly included credits for Inference Providers. Subscribe to PRO to get 20x more monthly included credits."}),
    (MODEL, 400, {"error": {"message": "The requested model 'x/y' is not supported by any provider you have enabled.", "type": "invalid_request_error", "param": "model", "code": "model_not_supported"}}),
    (AUTH, 403, {"error": "This authentication method does not have sufficient permissions to call Inference Providers on behalf of user x"}),
    (MODEL, 404, {"detail": {"error": "Model not found, inaccessible, and/or not deployed"}}),
]  # fmt: skip

RELAYS: list[Refusal] = [
    (AUTH, 401, of("无效的令牌 (request id: 2026)", "", "new_api_error")),
    (AUTH, 401, of("该令牌状态不可用 (request id: 2026)", "", "new_api_error")),
    (AUTH, 401, of("Invalid token (request id: 2026)", "", "new_api_error")),
    (AUTH, 403, of("您的 IP 不在令牌允许访问的列表中", "", "new_api_error")),
    (AUTH, 403, of("该令牌无权访问模型 gpt-image-1 (request id: 2026)", "", "new_api_error")),
    (AUTH, 403, of("无权访问 vip 分组 (request id: 2026)", "", "new_api_error")),
    (AUTH, 403, of("用户已被封禁", "", "one_api_error")),
    (BILLING, 403, of("用户额度不足, 剩余额度: ＄0.000000 (request id: 2026)", "insufficient_user_quota", "new_api_error")),
    (BILLING, 403, of("预扣费额度失败, 用户剩余额度: ＄0.012, 需要预扣费额度: ＄0.080 (request id: 2026)", "insufficient_user_quota", "new_api_error")),
    (BILLING, 403, of("该令牌额度已用尽 TokenStatusExhausted[sk-abc***xyz]", "pre_consume_token_quota_failed", "new_api_error")),
    (BILLING, 401, of("该令牌额度已用尽 (request id: 2026)", "", "new_api_error")),
    (BILLING, 403, of("user quota is not enough", "insufficient_user_quota", "one_api_error")),
    (BILLING, 403, of("token quota is not enough, token remain quota: 100, need quota: 4000", "pre_consume_token_quota_failed", "new_api_error")),
    (BUSY, 503, of("分组 default 下模型 gpt-image-9 无可用渠道（distributor） (request id: 2026)", "model_not_found", "new_api_error")),
    (BUSY, 503, of("No available channel for model gpt-image-9 under group default (distributor) (request id: 2026)", "model_not_found", "new_api_error")),
    (BUSY, 503, of("当前分组 default 下对于模型 gpt-image-1 无可用渠道 (request id: 2026)", "", "one_api_error")),
    (MODEL, 400, of("模型 gpt-image-1 倍率或价格未配置，请联系管理员设置或开始自用模式", "model_price_error", "new_api_error")),
    (MODEL, 404, of("model not found: flux-9", "model_not_found", "invalid_request_error")),
    (LIMIT, 429, of("当前分组上游负载已饱和，请稍后再试 (request id: 2026)", "rate_limit_exceeded", "requests")),
    (LIMIT, 429, of("当前分组上游负载已饱和，请稍后再试 (request id: 2026)", "bad_response_status_code", "upstream_error", "404")),
    (LIMIT, 429, of("当前分组上游负载已饱和，请稍后再试", "insufficient_quota", "insufficient_quota")),
    (LIMIT, 429, of("您已达到请求数限制：1分钟内最多请求10次", "", "new_api_error")),
    (POLICY, 400, of("input contains sensitive words: [test] (request id: 2026)", "sensitive_words_detected", "new_api_error")),
    (POLICY, 400, of("user sensitive words detected", "sensitive_words_detected", "new_api_error")),
    (POLICY, 400, of("Gemini image generation blocked [IMAGE_SAFETY]: The generated image was blocked due to safety policy violation, please modify your prompt and try again (request id: 2026)", "channel:image_generation_failed", "channel_error")),
    (POLICY, 500, of("Your request was rejected as a result of our safety system.", "moderation_blocked", "upstream_error")),
    (POLICY, 400, {"error": {"message": "This content may violate our content policy.", "type": "upstream_error", "code": "content_policy_violation"}}),
    (INVALID, 400, of("size must be one of 256x256, 512x512, or 1024x1024 for dall-e-2", "invalid_request", "new_api_error")),
    (INVALID, 400, of("field prompt is required", "invalid_request", "new_api_error")),
    (INVALID, 422, {"detail": "invalid image edit request"}),
    (ERROR, 500, of('do request failed: Post "https://api.openai.com/v1/images/generations": EOF', "do_request_failed", "new_api_error")),
    (ERROR, 500, of("bad response status code 500", "bad_response_status_code", "upstream_error")),
    (POLICY, 400, {"success": False, "error": {"message": "Your request was rejected by content moderation. The prompt, input, or generated content was flagged as disallowed — adjust your input and try again.", "code": "content_policy_violation"}}),
    (ERROR, 500, {"error": "Internal Server Error", "message": "No active flux servers available"}),
]  # fmt: skip

TABLE = [*OPENAI, *AZURE, *TOGETHER, *FAL, *REPLICATE, *BFL, *DASHSCOPE, *GOOGLE, *XAI, *CHINESE_CLOUDS, *OTHERS, *RELAYS]  # fmt: skip


def read(status: int, body: Any) -> UpstreamError:
    if isinstance(body, str):
        body = of(body)
    with pytest.raises(UpstreamError) as caught:
        parse_reply(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@over_rows(("code", "status", "body"), TABLE)
def test_a_refusal_of_a_vendor_has_the_class_that_its_words_mean(code: str, status: int, body: Any) -> None:
    assert read(status, body).code == code
