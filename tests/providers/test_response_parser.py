"""Tests of parsing image services' responses: captured bodies and broken ones."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from multidict import CIMultiDict

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.providers.response_parser import error_from_response, parse_models, parse_reply, sanitize_detail
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.support import over_rows

PIXELS = b"\x89PNG\r\n\x1a\n and so on"
B64 = base64.b64encode(PIXELS).decode()
LINK = "https://api.together.ai/shrt/jfS1HMmumnnmPemB"

CAPTURED = b"""{
  "id": "oN9FZUv-2kFHot-9a9cfc755df0b2f7-PDX",
  "model": "black-forest-labs/FLUX.1-schnell-Free",
  "object": "list",
  "data": [
    {
      "index": 0,
      "url": "https://api.together.ai/shrt/jfS1HMmumnnmPemB",
      "timings": { "inference": 0.9888201747089624 }
    }
  ]
}"""


def error(message: object, kind: object = None, code: object = None, **more: Any) -> bytes:
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}} | more
    return json.dumps(body).encode()


def refused(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, **more: Any) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        parse_reply(status, CIMultiDict(headers or {}), body, **more)
    return caught.value


UNSUPPORTED = b"""{"id":"oMZbc7k-2kFHot-9a78aa608b7f797c-PDX","error":{"message":"Unsupported use of 'image_url' \
parameter. This parameter is not supported for the selected model.","type":"invalid_request_error","param":null,\
"code":null}}"""
NOT_SERVERLESS = error(
    "Unable to access non-serverless model X. Please visit https://api.together.ai/models/X to create and start a new "
    "dedicated endpoint for the model.",
    "invalid_request_error",
    "model_not_available",
)
BAD_KEY = error(
    "Invalid API key provided. You can find your API key at https://api.together.xyz/settings/api-keys.",
    "invalid_request_error",
    "invalid_api_key",
)
NO_CREDIT = error(
    "Credit limit exceeded, please [add credits](https://api.together.ai/settings/billing). If you've already made a "
    "payment, please wait up to 5 minutes for balances to update and try again.",
    "credit_limit",
)
NO_ACCESS = error(
    "Unable to access model X. Please visit https://api.together.ai/models to view the list of supported models.",
    "invalid_request_error",
    "model_not_available",
)
MODEL_LIMIT = error(
    "You have reached the rate limit specific to this model black-forest-labs/FLUX.1-kontext-pro. The maximum rate "
    "limit for this model is 9.0 queries per minute. This limit differs from the general rate limits published at "
    "Together AI rate limits documentation (https://docs.together.ai/docs/rate-limits). For inquiries about increasing "
    "your model-specific rate limit, please contact our sales team (https://www.together.ai/forms/contact-sales)",
    "model_rate_limit",
)
TIER_LIMIT = error(
    "You have been rate limited. Your rate limit is 60 queries per minute. Please navigate to "
    "https://api.together.xyz/settings/billing to upgrade to a paid plan.",
    "credit_limit",
)
CLOUDFLARE = b"<!DOCTYPE html><html><head><title>524: A timeout occurred</title></head></html>"


@over_rows(
    ("status", "body", "code"),
    [
        (400, UNSUPPORTED, "upstream_invalid_request"),
        (400, error("height must be a multiple of 16", "invalid_request_error"), "upstream_invalid_request"),
        (400, error("width must be between 64 and 1792", "invalid_request_error"), "upstream_invalid_request"),
        (400, error("steps must be between 1 and 4", "invalid_request_error"), "upstream_invalid_request"),
        (400, error("Model is not supported for image generation"), "model_not_available"),
        (400, NOT_SERVERLESS, "model_not_available"),
        (400, error("blocked", "image_generation_user_error", "moderation_blocked"), "content_policy"),
        (400, error("refused by content_policy_violation"), "content_policy"),
        (401, BAD_KEY, "upstream_auth"),
        (402, NO_CREDIT, "upstream_billing"),
        (403, b"error code: 1010", "upstream_auth"),
        (404, NO_ACCESS, "model_not_available"),
        (404, error("The model 'x' does not exist", code="model_not_found"), "model_not_available"),
        (404, b'{"detail":"Model not found"}', "model_not_available"),
        (404, b'{"detail":"Not Found"}', "upstream_invalid_request"),
        (404, error("Invalid URL (POST /v1/v1/images/generations)"), "upstream_invalid_request"),
        (404, b"404 page not found", "upstream_invalid_request"),
        (413, error("Request entity too large", "invalid_request_error"), "upstream_invalid_request"),
        (413, b"<html>413</html>", "upstream_invalid_request"),
        (415, b"", "upstream_invalid_request"),
        (422, error("image may contain NSFW content"), "content_policy"),
        (422, error("no wording that we know"), "upstream_invalid_request"),
        (429, MODEL_LIMIT, "upstream_rate_limited"),
        (429, TIER_LIMIT, "upstream_rate_limited"),
        (429, error("slow down", "dynamic_request_limited"), "upstream_rate_limited"),
        (500, error("Internal server error", "server_error"), "upstream_error"),
        (500, error("Internal Server Error"), "upstream_error"),
        (503, error("overloaded"), "upstream_overloaded"),
        (529, b"", "upstream_overloaded"),
        (302, b"", "upstream_bad_response"),
        (405, b"", "upstream_invalid_request"),
        (409, b'{"detail":"Conflict"}', "upstream_error"),
        (410, b'{"detail":"This model is no longer served"}', "model_not_available"),
        (410, b"<html>Gone</html>", "upstream_invalid_request"),
        (418, b"", "upstream_invalid_request"),
        (600, b"", "upstream_bad_response"),
    ]
    + [(status, CLOUDFLARE, "upstream_error") for status in (408, 425, 500, 502, 504, 520, 521, 522, 523, 524)],
)
def test_every_refusal_has_its_code(status: int, body: bytes, code: str) -> None:
    found = refused(status, body)
    assert (found.code, found.status) == (code, status)
    assert found.retryable == (code in {"upstream_rate_limited", "upstream_overloaded", "upstream_error"})


@over_rows("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_json_is_read_in_each_of_its_encodings(encoding: str) -> None:
    body = json.dumps({"data": [{"url": LINK}]}).encode(encoding)
    assert parse_reply(200, CIMultiDict(), body).images == (ImageLink(LINK),)
    assert parse_reply(200, CIMultiDict(), bytearray(body)).images == (ImageLink(LINK),)


def test_base64_of_the_url_safe_alphabet_is_read() -> None:
    pixels = PIXELS + b"\xfb\xef\xbe\xff"
    text = base64.urlsafe_b64encode(pixels).decode()
    assert "-" in text and "_" in text  # noqa: PT018
    assert parse_reply(200, CIMultiDict(), json.dumps({"data": [{"b64_json": text}]}).encode()).images == (
        ImageBytes(pixels),
    )


NEARLY_JSON = {
    "number that is none": b'{"data": [{"url": "%b"}], "cost": NaN, "left": -Infinity}',
    "too large a number": b'{"data": [{"url": "%b"}], "cost": 1e999, "id": ' + b"9" * 5000 + b"}",
    "half of a character": b'{"data": [{"url": "%b", "revised_prompt": "\\ud83d"}]}',
    "another encoding": b'{"data": [{"url": "%b", "revised_prompt": "\xe9t\xe9"}]}',
    "control character": b'{"data": [{"url": "%b", "revised_prompt": "a\tb\x00"}]}',
    "more behind it": b'{"data": [{"url": "%b"}]}\n{"done": true}',
    "no list": b'{"data": {"url": "%b"}}',
    "a link alone": b'{"data": "%b"}',
    "images alone": b'{"data": null, "images": {"url": "%b"}}',
}


@over_rows("body", [pytest.param(body, id=name) for name, body in NEARLY_JSON.items()])
def test_a_paid_image_is_found_in_what_is_nearly_json(body: bytes) -> None:
    reply = parse_reply(200, CIMultiDict(), body.replace(b"%b", LINK.encode()))
    assert reply.images == (ImageLink(LINK),)
    orjson.dumps(str(reply))  # raises for what Redis can't store


@over_rows(
    "text",
    [
        f" {B64}\n",
        f"{B64[:8]}\r{B64[8:]}",
        f"{B64[:8]}\t{B64[8:]}",
        f"data:image/png;base64, {B64}",
        f"{B64}====",
        B64.replace("=", "%3D").replace("+", "%2B").replace("/", "%2F"),
    ],
)
def test_base64_in_unusual_forms_is_read(text: str) -> None:
    assert parse_reply(200, {}, json.dumps({"data": [{"b64_json": text}]}).encode()).images == (ImageBytes(PIXELS),)


def test_base64_in_the_place_of_a_link_is_read() -> None:
    pixels = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    for url in (base64.b64encode(pixels).decode(), base64.urlsafe_b64encode(pixels).decode()):
        assert parse_reply(200, {}, json.dumps({"data": [{"url": url}]}).encode()).images == (ImageBytes(pixels),)


def test_spaces_around_a_link_are_not_part_of_it() -> None:
    assert parse_reply(200, {}, json.dumps({"data": [{"url": f" {LINK}\n"}]}).encode()).images == (ImageLink(LINK),)


@over_rows(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "7"}, MODEL_LIMIT, 7),
        ({"retry-after": "0"}, MODEL_LIMIT, 0),
        ({"Retry-After": "1.5", "x-ratelimit-reset": "9"}, b"", 1.5),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"", 30),
        ({"Retry-After": "Wed, 21 Oct 2026 07:27:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"", 0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, b"", 50),
        ({"Retry-After": "soon", "X-RateLimit-Reset": "2"}, b"", 2),
        ({"Retry-After": "-3", "X-RateLimit-Reset": "inf"}, b"", None),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, b"", None),
        ({"Retry-After": "Fri, 31 Dec 99999999999999999999 23:59:59 GMT"}, b"", None),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT", "Date": "Fri, 31 Dec 99999999999999 23:59:59 GMT"}, b"", 50),
        ({"x-ratelimit-reset": "1792567710"}, b"", None),
        ({"Retry-After": "٣", "X-RateLimit-Reset": "1_0"}, b"", None),
        ({"x-ratelimit-reset": "3600000010"}, b"", None),
        ({}, error("Please try again in 12s. You can increase your limit."), 12),
        ({}, error("Please try again in 350ms."), 0.35),
        ({}, error("Retry after 2 minutes"), 120),
        ({}, error("Limit 5, Used 5, Requested 1. Please try again in 1m12.5s. Visit …"), 72.5),
        ({}, error("Please try again in 1h2m."), 3_720),
        ({}, error("Please try again in 7 models."), None),
        ({"retry-after-ms": "1500"}, b"", 1.5),
        ({"retry-after": "2", "retry-after-ms": "1500"}, b"", 2),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}, b"", 62),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, b"", None),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1m2s"}, b"", None),
        ({}, error("Your limit is ٦ queries per minute"), None),
        ({}, MODEL_LIMIT, 60 / 9),
        ({}, TIER_LIMIT, 1),
        ({}, error("Your limit is 0 queries per minute"), None),
        ({}, b"", None),
    ],
)
def test_a_429_has_its_retry_delay(headers: dict[str, Any], body: bytes, seconds: float | None) -> None:
    assert refused(429, body, headers, now_s=10.0).retry_after_s == (
        seconds if seconds is None else pytest.approx(seconds)
    )


@over_rows("status", [400, 408, 429, 500, 502, 503, 524])
def test_images_under_the_status_of_an_error_are_used(status: int) -> None:
    assert parse_reply(status, {}, b'{"images":["https://h/1.png"]}').images == (ImageLink("https://h/1.png"),)
    large = base64.b64encode(b"\x89PNG\r\n\x1a\n" * 40_000).decode()
    assert len(parse_reply(status, {}, orjson.dumps({"data": [{"b64_json": large}]})).images) == 1


@over_rows("field", ['"error":{"message":"no"}', '"detail":"no"', '"code":503', '"data":[]', '"data":[{"url":"/1"}]'])
def test_an_error_that_is_named_counts_whatever_else_is_in_its_response(field: str) -> None:
    images = "" if "data" in field else ',"data":[{"url":"https://h/1.png"}]'
    assert refused(503, f"{{{field}{images}}}".encode()).code == "upstream_overloaded"


def test_the_end_of_a_window_may_be_a_unix_time() -> None:
    found = refused(429, b"", {"x-ratelimit-reset": "1792567710"}, now_s=1_792_567_700.0)
    assert found.retry_after_s == pytest.approx(10)


def test_a_503_has_its_retry_delay() -> None:
    assert refused(503, b"", {"Retry-After": "4", "x-ratelimit-reset": "9"}).retry_after_s == 4
    assert refused(503, b"", {"x-ratelimit-reset": "9"}).retry_after_s is None
    assert refused(400, UNSUPPORTED, {"Retry-After": "4"}).retry_after_s is None


@over_rows(
    "body",
    [
        b"",
        b"  \n",
        b"ok",
        CLOUDFLARE,
        b'{"data": [',
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        b'{"data": null}',
        b'{"data": "fail"}',
        b'{"data": {"status": "fail"}}',
        b'{"data": {"url": "no list"}}',
        b'{"id":"x","object":"list"}',
        b'{"data": NaN}',
        b"[" * 100_000,
    ],
)
def test_a_200_without_a_usable_object_is_a_bad_response(body: bytes) -> None:
    found = refused(200, body)
    assert (found.code, found.retryable, found.status) == ("upstream_bad_response", False, 200)


@over_rows(
    ("body", "code"),
    [
        (error("something broke"), "upstream_bad_response"),
        (error("Internal server error", "server_error"), "upstream_error"),
        (error("slow down", code="429"), "upstream_rate_limited"),
        (error("image may contain NSFW content"), "content_policy"),
        (NO_ACCESS, "model_not_available"),
        (UNSUPPORTED, "upstream_invalid_request"),
        (b'{"error":"no"}', "upstream_bad_response"),
        (error("nothing for you", data=[]), "upstream_bad_response"),
    ],
)
def test_a_200_with_an_error_object_is_an_error(body: bytes, code: str) -> None:
    assert refused(200, body).code == code


def test_an_empty_error_next_to_images_is_ignored() -> None:
    assert parse_reply(200, {}, b'{"error":null,"data":[{"url":"https://x/y.png"}]}').images == (
        ImageLink("https://x/y.png"),
    )


def test_the_captured_response_contains_its_link() -> None:
    assert parse_reply(200, {}, CAPTURED).images == (ImageLink(LINK),)


def test_the_documented_base64_response_contains_its_bytes() -> None:
    body = {"id": "oNM6X9q", "data": [{"b64_json": B64, "index": 0, "type": None, "timings": {"inference": 0.79}}]}
    assert parse_reply(201, {}, json.dumps(body).encode()).images == (ImageBytes(PIXELS),)


@pytest.mark.parametrize(
    ("item", "image"),
    [
        ({"url": LINK, "b64_json": None}, ImageLink(LINK)),
        ({"url": LINK, "b64_json": B64}, ImageBytes(PIXELS)),
        ({"url": f"data:image/png;base64,{B64}"}, ImageBytes(PIXELS)),
        ({"b64_json": f"data:image/png;base64,{B64}"}, ImageBytes(PIXELS)),
        ({"b64_json": B64.rstrip("=")}, ImageBytes(PIXELS)),
        ({"b64_json": B64[:8] + "\n" + B64[8:] + "\n"}, ImageBytes(PIXELS)),
        ({"image": B64}, ImageBytes(PIXELS)),
        (B64, ImageBytes(PIXELS)),
        (LINK, ImageLink(LINK)),
        ({"url": None}, None),
        ({"url": ""}, None),
        ({"url": 7}, None),
        ({"url": "javascript:alert(1)"}, ImageLink("javascript:alert(1)")),
        ({"url": "/relative.png"}, ImageLink("/relative.png")),
        ({"url": "x" * 20_000}, None),
        ("/relative.png", None),
        ({"url": "https://"}, ImageLink("https://")),
        ({"url": "http://[::1"}, ImageLink("http://[::1")),
        ({"url": "data:image/svg+xml,<svg/>"}, ImageBytes(b"<svg/>")),
        ({"url": f"data:image/png,{quote(PIXELS)}"}, ImageBytes(PIXELS)),
        ({"url": f"data:image/png;base64;charset=utf-8,{B64}"}, ImageBytes(PIXELS)),
        ({"b64_json": f"data:image/png; base64,{B64}"}, ImageBytes(PIXELS)),
        ({"url": "data:text/plain,hello"}, None),
        ({"b64_json": "%%% not base64 %%%"}, None),
        ({"b64_json": "漢字"}, None),
        ({"b64_json": ""}, None),
        ({"b64_json": "%%%", "url": LINK}, ImageLink(LINK)),
        ({}, None),
        (None, None),
        (7, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("name", ["data", "images"])
def test_each_entry_is_an_image_or_skipped(name: str, item: Any, image: ImageLink | ImageBytes | None) -> None:
    body = json.dumps({name: [item, {"url": LINK}]}).encode()
    assert parse_reply(200, {}, body).images == ((image,) if image else ()) + (ImageLink(LINK),)


@over_rows("body", [b'{"data":[]}', b'{"images":[]}', b'{"data":[{"url":null}]}'])
def test_a_response_with_no_image_is_a_reply_without_images(body: bytes) -> None:
    assert parse_reply(200, {}, body).images == ()


def test_an_empty_data_list_does_not_hide_the_images_list() -> None:
    assert parse_reply(200, {}, json.dumps({"data": [], "images": [LINK]}).encode()).images == (ImageLink(LINK),)


@over_rows(
    ("headers", "limits"),
    [
        ({}, UpstreamLimits()),
        (
            {"X-RateLimit-Limit": "1.5", "X-ratelimit-remaining": "0", "x-ratelimit-reset": "0.7"},
            UpstreamLimits(0, 0.7),
        ),
        ({"x-ratelimit-remaining-dynamic": "3"}, UpstreamLimits(remaining=3)),
        ({"x-ratelimit-remaining": "nan", "x-ratelimit-reset": "-1"}, UpstreamLimits()),
    ],
)
def test_the_rate_limit_headers_are_read(headers: dict[str, Any], limits: UpstreamLimits) -> None:
    assert parse_reply(200, CIMultiDict(headers), CAPTURED).limits == limits


@over_rows(
    ("status", "body", "detail"),
    [
        (200, b"", "HTTP 200, empty body"),
        (524, CLOUDFLARE, "HTTP 524, not JSON"),
        (302, b"<html>moved</html>", "HTTP 302, a redirect, which is not followed"),
        (500, b"{}", "HTTP 500, nothing usable in it"),
        (500, error("<html><body>secret host names</body></html>"), "HTTP 500, nothing usable in it"),
        (
            400,
            error("height must be\n a multiple\x00\x1b[31m of\u2028 16\u202e"),
            "height must be a multiple [31m of 16",
        ),
        (400, b'{"message":"plain"}', "plain"),
        (400, b'{"error":"only a string"}', "only a string"),
        (500, b'{"error":"OutOfMemoryError","detail":"","errors":"CUDA out of memory"}', "CUDA out of memory"),
        (422, b'{"detail":[{"loc":["body","n"],"msg":"too many","input":"a secret prompt"}]}', "n: too many"),
        (422, b'{"detail":[{"msg":"bad"},7]}', "bad"),
    ],
)
def test_the_detail_is_short_plain_text(status: int, body: bytes, detail: str) -> None:
    assert refused(status, body).detail == detail


def test_a_ten_megabyte_message_is_cut_to_300_characters() -> None:
    found = refused(400, error("a" * 10_000_000))
    assert len(found.detail) == 300
    assert found.detail.endswith("aa…")


def test_no_detail_shows_our_key_or_a_masked_one() -> None:
    key = "tgp_v1_0123456789"
    found = refused(401, error(f"Incorrect API key provided: {key} (sk-proj-****abcd)"), secret=key)
    assert found.upstream_detail == "Incorrect API key provided: [key] [key]"
    assert "key provided" not in found.detail
    assert refused(400, error(f"height of {key}"), secret=key).detail == "height of [key]"
    assert sanitize_detail("x" * 290 + key, key) == "x" * 290 + "[key]"


@over_rows("wrap", [lambda entries: entries, lambda entries: {"object": "list", "data": entries}])
def test_both_shapes_of_a_model_list_are_filtered_to_image_models(wrap: Callable[[list[object]], object]) -> None:
    entries: list[object] = [
        {"id": "flux", "type": "image"},
        {"id": "llama", "type": "chat"},
        {"id": "untyped"},
        {"type": "image"},
        7,
    ]
    assert [model["id"] for model in parse_models(wrap(entries))] == ["flux", "untyped"]


@over_rows("listing", [None, 7, {}, {"data": None}, "x"])
def test_a_model_list_of_unknown_shape_is_empty(listing: int | dict[str, Any] | str | None) -> None:
    assert parse_models(listing) == ()


def test_a_refusal_can_be_returned_instead_of_raised() -> None:
    assert error_from_response(402, {}, NO_CREDIT).code == "upstream_billing"
