"""Tests that the emulator's responses equal those captured by users of Together, key by key."""

from __future__ import annotations

import base64
import json
import re

import aiohttp
import pytest

from imagegen.emulator import together_responses
from tests.emulator.conftest import MODEL, Ask
from tests.emulator_fixtures import EmulatedUpstream

ID = re.compile(r"o[A-Za-z0-9]{6}-2kFHot-[0-9a-f]{16}-PDX")
RATE_TEXT = (
    "You have reached the rate limit specific to this model black-forest-labs/FLUX.1-schnell. The maximum rate limit "
    "for this model is 9.0 queries per minute. This limit differs from the general rate limits published at Together "
    "AI rate limits documentation (https://docs.together.ai/docs/rate-limits). For inquiries about increasing your "
    "model-specific rate limit, please contact our sales team (https://www.together.ai/forms/contact-sales)"
)
KEY_TEXT = "Invalid API key provided. You can find your API key at https://api.together.xyz/settings/api-keys."
CREDIT_TEXT = (
    "Credit limit exceeded, please [add credits](https://api.together.ai/settings/billing). If you've already made a "
    "payment, please wait up to 5 minutes for balances to update and try again."
)
TIER_TEXT = (
    "You have been rate limited. Your rate limit is 60 queries per minute. Please navigate to "
    "https://api.together.xyz/settings/billing to upgrade to a paid plan."
)
GONE_TEXT = (
    f"Unable to access model {MODEL}. Please visit https://api.together.ai/models to view the list of supported models."
)
DEDICATED_TEXT = (
    f"Unable to access non-serverless model {MODEL}. Please visit https://api.together.ai/models/{MODEL} to create and "
    "start a new dedicated endpoint for the model."
)
UNSUPPORTED_TEXT = "Unsupported use of 'image_url' parameter. This parameter is not supported for the selected model."


async def test_a_link_answer_is_the_captured_body_indented_by_two(ask: Ask, upstream: EmulatedUpstream) -> None:
    text = await (await ask()).text()
    body = json.loads(text)
    pattern = (
        r'{\n  "id": "ID",\n  "model": "MODEL",\n  "object": "list",\n  "data": \[\n    {\n      "index": 0,\n'
        r'      "url": "HOST/shrt/[A-Za-z0-9]{16}",\n      "timings": {\n        "inference": [01]\.\d+\n'
        r"      }\n    }\n  \]\n}"
    )
    pattern = pattern.replace("ID", ID.pattern).replace("MODEL", re.escape(MODEL))
    assert re.fullmatch(pattern.replace("HOST", re.escape(upstream.url)), text)
    assert list(body) == ["id", "model", "object", "data"]


async def test_a_base64_answer_is_the_docs_sample(ask: Ask) -> None:
    for spelling in ("base64", "b64_json"):
        body = await (await ask(response_format=spelling)).json()
        assert list(body) == ["id", "data", "model", "object"]
        assert list(body["data"][0]) == ["b64_json", "index", "type", "timings"]
        assert body["data"][0]["type"] is None
        assert body["data"][0]["b64_json"].startswith("/9j/")
        assert base64.b64decode(body["data"][0]["b64_json"], validate=True)


async def test_both_paths_answer_and_another_is_a_plain_text_404(ask: Ask) -> None:
    assert (await ask(path="/images/generations")).status == 200
    missing = await ask(path="/v1/v1/images/generations")
    assert (missing.status, missing.content_type, await missing.text()) == (404, "text/plain", "404 page not found")


async def test_headers_carry_limits_and_ids(ask: Ask) -> None:
    response = await ask()
    assert float(response.headers["x-ratelimit-remaining"]) > 0
    assert {"x-ratelimit-limit", "x-ratelimit-reset", "x-request-id"} <= {name.lower() for name in response.headers}
    assert (await response.json())["id"].endswith(response.headers["CF-RAY"])


@pytest.mark.parametrize(
    ("fault", "status", "message", "kind", "code"),
    [
        ("400_unsupported", 400, UNSUPPORTED_TEXT, "invalid_request_error", None),
        ("400_multiple", 400, "height must be a multiple of 16", "invalid_request_error", None),
        ("400_size", 400, "width must be between 64 and 1792", "invalid_request_error", None),
        ("400_steps", 400, "steps must be between 1 and 4", "invalid_request_error", None),
        ("400_not_image", 400, "Model is not supported for image generation", "invalid_request_error", None),
        ("400_non_serverless", 400, DEDICATED_TEXT, "invalid_request_error", "model_not_available"),
        ("400_policy", 400, "content_policy_violation", "content_policy_violation", "content_policy_violation"),
        ("402", 402, CREDIT_TEXT, "credit_limit", None),
        ("404_model", 404, GONE_TEXT, "invalid_request_error", "model_not_available"),
        ("413", 413, "Request entity too large", "invalid_request_error", None),
        ("422_nsfw", 422, "image may contain NSFW content", "invalid_request_error", None),
        ("429_model", 429, RATE_TEXT, "model_rate_limit", None),
        ("429_credit", 429, TIER_TEXT, "credit_limit", None),
        ("429_dynamic", 429, "You have exceeded your dynamic rate limit.", "dynamic_request_limited", None),
        ("500", 500, "Internal server error", "server_error", None),
        ("500_null", 500, "Internal Server Error", None, None),
    ],
)
async def test_an_error_row_is_verbatim(
    ask: Ask, *, fault: str, status: int, message: str, kind: str | None, code: str | None
) -> None:
    response = await ask(f"{{{{fault:{fault}}}}}")
    body = await response.json()
    assert response.status == status
    assert ID.fullmatch(body.pop("id"))
    assert body == {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def test_an_option_fills_in_the_message(ask: Ask) -> None:
    body = await (await ask("{{fault:400_unsupported parameter=steps}}")).json()
    assert body["error"]["message"].startswith("Unsupported use of 'steps' parameter.")


@pytest.mark.parametrize("name", sorted(together_responses.ERRORS))
async def test_every_row_answers_with_the_status_of_its_name(ask: Ask, name: str) -> None:
    assert (await ask(f"{{{{fault:{name}}}}}")).status == int(name[:3])


async def test_cloudflare_and_cdn_errors_are_not_json(ask: Ask) -> None:
    timeout = await ask("{{fault:524}}")
    assert timeout.content_type == "text/html"
    assert "Error code 524" in await timeout.text()
    assert await (await ask("{{fault:403}}")).text() == "error code: 1010"


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer "}, {"Authorization": "Basic any"}])
async def test_a_missing_key_is_the_captured_401_without_an_id(ask: Ask, header: dict[str, str]) -> None:
    response = await ask(headers=header)
    error = {"message": KEY_TEXT, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert (response.status, await response.json()) == (401, {"error": error})


async def test_only_the_configured_key_is_accepted(session: aiohttp.ClientSession) -> None:
    async with EmulatedUpstream(key="right") as upstream:
        for key, status in (("right", 200), ("wrong", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            async with session.get(upstream.url + "/v1/models", headers=headers) as response:
                assert response.status == status


async def test_the_models_are_a_bare_array(upstream: EmulatedUpstream, session: aiohttp.ClientSession) -> None:
    async with session.get(upstream.url + "/v1/models", headers={"Authorization": "Bearer any"}) as response:
        listed = await response.json()
    assert {"id": MODEL, "object": "model", "created": 0, "type": "image"} in listed
    assert "black-forest-labs/FLUX.1-dev" not in {model["id"] for model in listed}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 13}, "steps must be between 1 and 12"),
        ({"height": 1269}, "height must be a multiple of 16"),
        ({"width": 48}, "width must be between 64 and 1792"),
        ({"height": 1808}, "height must be between 64 and 1792"),
        ({"n": 5}, "n must be between 1 and 4"),
        ({"n": True}, "n must be an integer"),
        ({"prompt": ""}, "prompt is required and must be a string"),
        ({"output_format": "gif"}, "output_format must be jpeg, png or webp"),
        ({"image_url": "https://x.invalid/a.png"}, UNSUPPORTED_TEXT),
        ({"model": "Qwen/Qwen-Image-2.0", "steps": 4}, UNSUPPORTED_TEXT.replace("image_url", "steps")),
        ({"model": "black-forest-labs/FLUX.1.1-pro", "width": 1504}, "width must be between 256 and 1440"),
        ({"model": "meta-llama/Llama-3.3-70B-Instruct-Turbo"}, "Model is not supported for image generation"),
        ({"model": "black-forest-labs/FLUX.1-dev"}, DEDICATED_TEXT.replace(MODEL, "black-forest-labs/FLUX.1-dev")),
    ],
)
async def test_the_limits_of_a_model_are_enforced(ask: Ask, fields: dict[str, object], message: str) -> None:
    response = await ask(**{"prompt": "a cat", **fields})
    assert (response.status, (await response.json())["error"]["message"]) == (400, message)


async def test_a_removed_model_is_missing_until_revived(ask: Ask, session: aiohttp.ClientSession) -> None:
    name = "black-forest-labs/FLUX.1-schnell-Free"
    body = await (await ask(model=name)).json()
    assert body["error"]["code"] == "model_not_available"
    async with EmulatedUpstream(revived=(name,)) as upstream:
        request = {"model": name, "prompt": "a cat", "steps": 5}
        headers = {"Authorization": "Bearer any"}
        async with session.post(upstream.url + "/images/generations", json=request, headers=headers) as response:
            assert (await response.json())["error"]["message"] == "steps must be between 1 and 4"


async def test_null_is_absent_and_unknown_models_accept_everything(ask: Ask) -> None:
    assert (await ask(steps=None, seed=None, n=None)).status == 200
    assert (await ask(model="m", steps=50, guidance_scale=3.5, negative_prompt="x", image_url="y")).status == 200


async def test_a_body_other_than_a_json_object_is_a_400(
    upstream: EmulatedUpstream, session: aiohttp.ClientSession
) -> None:
    for body in (b"{", b"[]", b""):
        url, headers = upstream.url + "/v1/images/generations", {"Authorization": "Bearer any"}
        async with session.post(url, data=body, headers=headers) as response:
            assert response.status == 400
    assert [call.outcome for call in upstream.ledger.calls] == [400, 400, 400]
    assert upstream.ledger.paid == []
