"""Texts and shapes of Together's responses, as users captured them.

https://docs.together.ai/docs/error-codes; bodies verbatim from HeyPuter/puter#2084, xtekky/gpt4free#3032 and others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    from .jobs import Job

JSON: Final = "application/json; charset=utf-8"
TEXT: Final = "text/plain; charset=utf-8"
HTML: Final = "text/html; charset=UTF-8"

Entry = dict[str, object]


@dataclass(frozen=True, slots=True)
class Response:
    """Response to the client. `delivery`: `plain`, or one of the ways in delivery.py with its `options`.

    job: the job that it accepts. held: whether it waits for a release.
    """

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    delivery: str = "plain"
    options: Mapping[str, object] = field(default_factory=dict)
    delay_s: float = 0.0
    held: bool = False
    job: Job | None = None

    @property
    def outcome(self) -> int | str:
        """Outcome for the ledger: the status, or what happened in place of a whole response."""
        return self.status if self.delivery == "plain" else self.delivery

    def with_headers(self, headers: Mapping[str, str]) -> Response:
        return replace(self, headers={**self.headers, **headers})


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One kind of error. `message` has `{}` fields, `filling` their captured values; key errors have no top `id`."""

    status: int
    message: str
    type: str | None = "invalid_request_error"
    code: str | None = None
    has_id: bool = True
    filling: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextRow:
    """An error that is not JSON."""

    status: int
    text: str
    content_type: str = TEXT


def _cloudflare(status: int, title: str) -> TextRow:
    page = (
        '<!DOCTYPE html>\n<html lang="en-US">\n<head><title>api.together.ai | {status}: {title}</title></head>\n'
        "<body><h1>{title} <span>Error code {status}</span></h1><p>Cloudflare Ray ID: 9a9cfc755df0b2f7</p></body>\n"
        "</html>\n"
    )
    return TextRow(status, page.format(status=status, title=title), HTML)


_POLICY = "content_policy_violation"
_RATE_DOCS = "https://docs.together.ai/docs/rate-limits"

ERRORS: Final[Mapping[str, ErrorRow | TextRow]] = {
    "400_unsupported": ErrorRow(
        400,
        "Unsupported use of '{parameter}' parameter. This parameter is not supported for the selected model.",
        filling={"parameter": "image_url"},
    ),
    "400_multiple": ErrorRow(
        400, "{parameter} must be a multiple of {multiple}", filling={"parameter": "height", "multiple": 16}
    ),
    "400_size": ErrorRow(
        400, "{parameter} must be between {low} and {high}", filling={"parameter": "width", "low": 64, "high": 1792}
    ),
    "400_steps": ErrorRow(400, "steps must be between {low} and {high}", filling={"low": 1, "high": 4}),
    "400_not_image": ErrorRow(400, "Model is not supported for image generation"),
    "400_non_serverless": ErrorRow(
        400,
        "Unable to access non-serverless model {model}. Please visit https://api.together.ai/models/{model} "
        "to create and start a new dedicated endpoint for the model.",
        code="model_not_available",
    ),
    "400_policy": ErrorRow(400, _POLICY, type=_POLICY, code=_POLICY),
    "400_azure_policy": ErrorRow(
        400,
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please "
        "modify your prompt and retry.",
        type=None,
        code="content_filter",
        has_id=False,
    ),
    "400_billing": ErrorRow(400, "Billing hard limit has been reached", code="billing_hard_limit_reached"),
    "400_n": ErrorRow(400, "You must provide n=1 for this model.", has_id=False),
    "401": ErrorRow(
        401,
        "Invalid API key provided. You can find your API key at https://api.together.xyz/settings/api-keys.",
        code="invalid_api_key",
        has_id=False,
    ),
    "402": ErrorRow(
        402,
        "Credit limit exceeded, please [add credits](https://api.together.ai/settings/billing). If you've already "
        "made a payment, please wait up to 5 minutes for balances to update and try again.",
        type="credit_limit",
    ),
    "403": TextRow(403, "error code: 1010"),
    "404_model": ErrorRow(
        404,
        "Unable to access model {model}. Please visit https://api.together.ai/models to view the list of "
        "supported models.",
        code="model_not_available",
    ),
    "404_path": TextRow(404, "404 page not found"),
    "413": ErrorRow(413, "Request entity too large"),
    "413_text": TextRow(413, "Request Entity Too Large"),
    "422_nsfw": ErrorRow(422, "image may contain NSFW content"),
    "422_policy": ErrorRow(422, _POLICY, type=_POLICY, code=_POLICY),
    "429_model": ErrorRow(
        429,
        "You have reached the rate limit specific to this model {model}. The maximum rate limit for this model is "
        "{rate:.1f} queries per minute. This limit differs from the general rate limits published at Together AI rate "
        f"limits documentation ({_RATE_DOCS}). For inquiries about increasing your model-specific rate limit, please "
        "contact our sales team (https://www.together.ai/forms/contact-sales)",
        type="model_rate_limit",
        filling={"rate": 9.0},
    ),
    "429_credit": ErrorRow(
        429,
        "You have been rate limited. Your rate limit is {rate:.0f} queries per minute. Please navigate to "
        "https://api.together.xyz/settings/billing to upgrade to a paid plan.",
        type="credit_limit",
        filling={"rate": 60.0},
    ),
    "429_quota": ErrorRow(
        429,
        "You exceeded your current quota, please check your plan and billing details.",
        type="insufficient_quota",
        code="insufficient_quota",
        has_id=False,
    ),
    "429_dynamic": ErrorRow(429, "You have exceeded your dynamic rate limit.", type="dynamic_request_limited"),
    "500": ErrorRow(500, "Internal server error", type="server_error"),
    "500_null": ErrorRow(500, "Internal Server Error", type=None),
    "502": _cloudflare(502, "Bad gateway"),
    "503": ErrorRow(503, "The server is overloaded: failures at or below your dynamic rate.", type="server_error"),
    "504": ErrorRow(504, "The server is overloaded and did not answer in time.", type="server_error"),
    "520": _cloudflare(520, "Web server is returning an unknown error"),
    "522": _cloudflare(522, "Connection timed out"),
    "523": _cloudflare(523, "Origin is unreachable"),
    "524": _cloudflare(524, "A timeout occurred"),
    "529": ErrorRow(529, "Unknown error", type="server_error"),
}


def error_body(message: str, kind: str | None, code: str | None, request_id: str | None) -> bytes:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return orjson.dumps({"error": error} if request_id is None else {"id": request_id, "error": error})


def error(name: str, request_id: str, **values: object) -> Response:
    """Return the row `name` of ERRORS. values: fill its message."""
    row = ERRORS[name]
    if isinstance(row, TextRow):
        return Response(row.status, row.text.encode(), row.content_type)
    message = row.message.format(**{**row.filling, **values})
    return Response(row.status, error_body(message, row.type, row.code, request_id if row.has_id else None))


def invalid(message: str, request_id: str) -> Response:
    """Return a 400 with a text of our own: no real response of these faults was captured."""
    return Response(400, error_body(message, "invalid_request_error", None, request_id))


def refused_field(shape: str, name: str, request_id: str, message: str = "") -> Response:
    """Return the refusal of a field by its name, in the shape of `openai`, `together` or `fastapi`."""
    if shape == "fastapi":
        fault = {
            "type": "extra_forbidden",
            "loc": ["body", name],
            "msg": "Extra inputs are not permitted",
            "input": "?",
        }
        return Response(422, orjson.dumps({"detail": [fault]}))
    if shape == "together":
        return error("400_unsupported", request_id, parameter=name)
    fields = {
        "message": message or f"Unknown parameter: '{name}'.",
        "type": "invalid_request_error",
        "param": name,
        "code": "invalid_value" if message else "unknown_parameter",
    }
    return Response(400, orjson.dumps({"error": fields}))


def image_response(request_id: str, model: str, entries: Sequence[Entry]) -> Response:
    """Return the 200: links as the captures show them (indented, no `type`), base64 as the docs' sample (compact)."""
    if any("b64_json" in entry for entry in entries):
        body = {"id": request_id, "data": entries, "model": model, "object": "list"}
        return Response(200, orjson.dumps(body))
    body = {"id": request_id, "model": model, "object": "list", "data": entries}
    return Response(200, orjson.dumps(body, option=orjson.OPT_INDENT_2))


def as_webui(answer: Response) -> Response:
    """Return a 200 in the shape of a Stable Diffusion web UI, any other answer unchanged."""
    if answer.status != 200 or answer.delivery != "plain":
        return answer
    images = [entry["b64_json"] for entry in orjson.loads(answer.body)["data"]]
    return replace(answer, body=orjson.dumps({"images": images, "parameters": {}, "info": "{}"}))


def link_entry(index: int, url: object, inference_s: float) -> Entry:
    return {"index": index, "url": url, "timings": {"inference": inference_s}}


def base64_entry(index: int, encoded: object, inference_s: float) -> Entry:
    return {"b64_json": encoded, "index": index, "type": None, "timings": {"inference": inference_s}}
