"""Tests of the unmodified OpenAI and Together packages, both majors, and of litellm against the service."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.emulator_fixtures import EmulatedUpstream
from tests.support import over_rows
from tests.web.openai.conftest import Serve, Service
from tests.web.openai.sdks import Call, Packages, Sdk

MODES = ("sync", "async")
OPENAI = [Sdk("openai", version, mode) for version in ("3.54.0", "2.54.0") for mode in MODES]
TOGETHER = [Sdk("together", version, mode) for version in ("3.1.1", "2.42.0") for mode in MODES]
LITELLM = [Sdk("litellm", "1.106.2", mode) for mode in MODES]

STRICT = {"_strict_response_validation": True, "max_retries": 0}
ONCE = {"max_retries": 0}
IMPATIENT = {"timeout": 0.7, "max_retries": 20}
"""Options of a client that times out and repeats, however slow the service is."""


pytestmark = pytest.mark.timeout(400)  # the first run may have to install a package


@pytest.fixture(scope="module")
def packages() -> Iterator[Packages]:
    packages = Packages()
    yield packages
    packages.close()


every_client = pytest.mark.parametrize("sdk", [*OPENAI, *TOGETHER], ids=str)


async def linked(service: Service, entry: dict[str, Any]) -> str:
    return hashlib.sha256(await service.fetch_image(entry["url"])).hexdigest()


@over_rows("sdk", [*OPENAI, *TOGETHER])
async def test_a_client_gets_links_and_bytes_from_both_base_urls(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    fields: dict[str, Any] = {"model": "some/model", "prompt": f"a cat of {sdk}", "n": 2, "extra_body": {"seed": 1}}
    size = {"size": "512x256"} if sdk.name == "openai" else {"width": 512, "height": 256}
    encoded = {"response_format": "b64_json" if sdk.name == "openai" else "base64"}
    bases = (service.url, f"{service.url}/v1", f"{service.url}/v1/")
    by_link = [Call(base, fields | size | {"response_format": "url"}, options=STRICT) for base in bases]
    by_bytes = [Call(base, fields | size | encoded, options=STRICT) for base in bases]
    answers = [result["answer"] for result in await packages.run(sdk, [*by_link, *by_bytes])]
    first = answers[0]
    assert (first["object"], first["model"], len(first["id"])) == ("list", "some/model", 32)
    assert first["created"] > 1_700_000_000
    digests = [await linked(service, entry) for entry in first["data"]]
    assert len(set(digests)) == 2
    for answer in answers[:3]:
        assert [(entry["index"], entry["type"], entry["url"]) for entry in answer["data"]] == [
            (index, "url", entry["url"]) for index, entry in enumerate(first["data"])
        ]
    for answer in answers[3:]:
        assert [entry["b64_json"] for entry in answer["data"]] == digests
    assert len(upstream.ledger.matching(f"a cat of {sdk}")) == 1


@over_rows("sdk", [*OPENAI, *TOGETHER])
async def test_fields_of_the_other_api_are_sent_in_the_extra_body(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    extra = {"steps": 3, "seed": 7, "width": 256, "height": 128, "negative_prompt": "a dog", "quality": None}
    call = Call(f"{service.url}/v1", {"model": "m", "prompt": f"a cat of {sdk}", "extra_body": extra}, options=STRICT)
    (result,) = await packages.run(sdk, [call])
    assert result["answer"]["data"][0]["url"]
    (call_upstream,) = upstream.ledger.matching(f"a cat of {sdk}")
    sent = call_upstream.body
    assert {name: sent.get(name) for name in extra} == extra


@pytest.mark.parametrize("sdk", [OPENAI[0], OPENAI[3], TOGETHER[0], TOGETHER[3]], ids=str)
async def test_the_limit_of_a_call_is_sent_in_the_extra_body_and_held(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    limits = (0.0001, 1.0)
    fields = {"model": "black-forest-labs/FLUX.1-schnell", "prompt": "a cat"}
    calls = [Call(f"{service.url}/v1", fields | {"extra_body": {"maxCostUsd": limit}}) for limit in limits]
    refused, made = await packages.run(sdk, calls)
    assert (refused["error"], refused["status_code"]) == ("APIStatusError", 402)
    assert made["answer"]["data"][0]["url"]
    (sent,) = upstream.ledger.calls
    assert "maxCostUsd" not in sent.body


ERRORS = [
    ("a cat", {"n": 99}, "BadRequestError", 400, "invalid_request", "n"),
    ("{{fault:422_nsfw}}", {}, "BadRequestError", 400, "content_policy_violation", "prompt"),
    ("{{fault:404_model}}", {}, "NotFoundError", 404, "model_not_available", "model"),
    ("{{fault:401}}", {}, "InternalServerError", 502, "upstream_auth", None),
    ("{{fault:hang}}", {}, "InternalServerError", 504, "upstream_timeout", None),
]


@every_client
async def test_errors_have_the_right_class_and_final_ones_are_not_retried(
    sdk: Sdk, packages: Packages, serve: Serve, upstream: EmulatedUpstream
) -> None:
    service = await serve(upstream_timeout_s=2.5, max_attempts=1)
    calls = [Call(f"{service.url}/v1", {"model": "m", "prompt": prompt} | more) for prompt, more, *_ in ERRORS]
    results = await packages.run(sdk, [*calls, Call(f"{service.url}/v1/nowhere", {"model": "m", "prompt": "a cat"})])
    for result, (_, _, kind, status, code, param) in zip(results, ERRORS, strict=False):
        error = result["body"].get("error", result["body"])
        assert (result["error"], result["status_code"]) == (kind, status)
        assert (error["code"], error["param"]) == (code, param)
        if sdk.name == "openai":
            assert (result["code"], result.get("param"), result["type"]) == (code, param, error["type"])
            assert result["request_id"]
    assert (results[-1]["error"], results[-1]["status_code"]) == ("NotFoundError", 404)
    assert upstream.ledger.total == len(ERRORS) - 1  # `n` is refused here


@every_client
async def test_a_client_sends_its_key_and_its_links_need_none(
    sdk: Sdk, packages: Packages, serve: Serve, upstream: EmulatedUpstream
) -> None:
    service = await serve(api_keys={"sdk": hashlib.sha256(b"key-of-the-sdk").hexdigest()})
    fields = {"model": "m", "prompt": "a cat", "response_format": "url"}
    calls = [Call(service.url, fields, options=ONCE | {"api_key": key}) for key in ("wrong-key", "key-of-the-sdk")]
    refused, answered = await packages.run(sdk, calls)
    assert (refused["error"], refused["status_code"]) == ("AuthenticationError", 401)
    assert refused["body"].get("error", refused["body"])["code"] == "unauthorized"
    assert await service.fetch_image(answered["answer"]["data"][0]["url"])
    assert upstream.ledger.total == 1


@every_client
async def test_the_limit_is_a_rate_limit_error(sdk: Sdk, packages: Packages, serve: Serve) -> None:
    service = await serve(image_rate_limit_max=1)
    calls = [Call(f"{service.url}/v1", {"model": "m", "prompt": "a cat"}, options=ONCE)] * 2
    good, limited = await packages.run(sdk, calls)
    assert good["answer"]["data"]
    assert (limited["error"], limited["status_code"]) == ("RateLimitError", 429)


@every_client
async def test_a_client_that_times_out_pays_once_and_retries_to_the_image(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "delay_s": 1.4})
    call = Call(f"{service.url}/v1", {"model": "m", "prompt": "a cat"}, options=IMPATIENT)
    (result,) = await packages.run(sdk, [call])
    assert await linked(service, result["answer"]["data"][0])
    assert upstream.ledger.total == 1


@pytest.mark.parametrize("sdk", [sdk for sdk in (*OPENAI, *TOGETHER) if sdk.mode == "async"], ids=str)
async def test_equal_calls_at_once_are_different_images_although_they_time_out(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "delay_s": 1.0, "times": 4})
    calls = [Call(f"{service.url}/v1", {"model": "m", "prompt": "a cat"}, options=IMPATIENT)] * 4
    results = await packages.run(sdk, calls, at_once=True)
    assert len({result["answer"]["id"] for result in results}) == 4
    assert upstream.ledger.paid_total == 4


@every_client
async def test_a_failing_upstream_gets_no_more_calls_than_one_task_has_attempts(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "500", "times": 20})
    (result,) = await packages.run(sdk, [Call(f"{service.url}/v1", {"model": "m", "prompt": "a cat"})])
    assert (result["error"], result["status_code"]) == ("InternalServerError", 502)
    assert upstream.ledger.total == 2


@pytest.mark.parametrize("sdk", LITELLM, ids=str)
@pytest.mark.parametrize("route", ["openai", "litellm_proxy"])
async def test_the_retries_of_litellm_start_no_attempts(
    sdk: Sdk, packages: Packages, route: str, service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "500", "times": 20})
    fields = {"model": f"{route}/m", "prompt": "a cat", "num_retries": 2}
    (result,) = await packages.run(sdk, [Call(f"{service.url}/v1", fields)])
    assert result["status_code"] == 502
    assert upstream.ledger.total == 2


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
async def test_openai_streams(sdk: Sdk, packages: Packages, service: Service) -> None:
    fields: dict[str, Any] = {"model": "m", "prompt": "a cat", "extra_body": {"seed": 1}}
    streamed = Call(f"{service.url}/v1", fields | {"stream": True, "partial_images": 2}, options=STRICT)
    refused = Call(f"{service.url}/v1", {"model": "m", "prompt": "{{fault:422_nsfw}}", "stream": True}, options=ONCE)
    plain = Call(f"{service.url}/v1", fields | {"response_format": "b64_json"})
    stream, error, answer = await packages.run(sdk, [streamed, refused, plain])
    (event,) = stream["events"]
    assert (event["type"], event["size"]) == ("image_generation.completed", "1024x1024")
    assert event["b64_json"] == answer["answer"]["data"][0]["b64_json"]
    assert (error["error"], error["code"]) == ("BadRequestError", "content_policy_violation")


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
async def test_an_interrupted_stream_raises_its_error(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script("ok", {"fault": "422_nsfw", "delay_s": 0.3})
    fields = {"model": "m", "prompt": "a cat", "n": 8, "stream": True}
    (result,) = await packages.run(sdk, [Call(f"{service.url}/v1", fields, options=ONCE)])
    assert (result["error"], result["code"]) == ("APIError", "content_policy_violation")


@over_rows("sdk", [*OPENAI, *(sdk for sdk in TOGETHER if sdk.major == 2)])
async def test_models_are_listed(sdk: Sdk, packages: Packages, service: Service) -> None:
    calls = [Call(f"{service.url}{base}", method="models.list", options=STRICT) for base in ("/v1", "")]
    for result in await packages.run(sdk, calls):
        answer = result["answer"]
        models = answer["data"] if isinstance(answer, dict) else answer
        assert "black-forest-labs/FLUX.1-schnell" in {model["id"] for model in models}


@over_rows("sdk", LITELLM)
@over_rows("route", ["openai", "together_ai", "litellm_proxy"])
async def test_litellm_generates_with_each_of_its_modes(
    sdk: Sdk, packages: Packages, route: str, service: Service, upstream: EmulatedUpstream
) -> None:
    prompt = f"a cat of {sdk} by {route}"
    fields = {"model": f"{route}/some-model", "prompt": prompt, "n": 2, "size": "512x256"}
    extra = {"steps": 3, "seed": 7}
    bodies = (extra, extra | {"response_format": "b64_json"})
    calls = [Call(f"{service.url}/v1", fields | {"extra_body": body}) for body in bodies]
    by_link, by_bytes = await packages.run(sdk, calls)
    digests = [await linked(service, entry) for entry in by_link["answer"]["data"]]
    assert [entry["b64_json"] for entry in by_bytes["answer"]["data"]] == digests
    (sent,) = upstream.ledger.matching(prompt)
    assert (sent.body["steps"], sent.model) == (3, "some-model")


@pytest.mark.parametrize("sdk", LITELLM, ids=str)
async def test_litellm_raises_its_own_classes(sdk: Sdk, packages: Packages, serve: Serve) -> None:
    """litellm checks the type before the status: each `invalid_request_error` is a BadRequestError with its status."""
    service = await serve(max_attempts=1, retry_base_s=0.01)
    expected = [
        ("{{fault:422_nsfw}}", "ContentPolicyViolationError", 400),
        ("{{fault:404_model}}", "BadRequestError", 404),
        ("{{fault:401}}", "BadGatewayError", 502),
    ]
    fields = {"model": "openai/m", "max_retries": 0}
    calls = [Call(f"{service.url}/v1", fields | {"prompt": prompt}) for prompt, *_ in expected]
    results = await packages.run(sdk, calls)
    found = [(result["error"], result["status_code"]) for result in results]
    assert found == [(kind, status) for _, kind, status in expected]


def encoded(colour: str | tuple[int, ...], mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, (24, 16), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


FILES = [encoded(colour) for colour in ("red", "green", "blue")]
MASK = encoded((0, 0, 0, 0), "RGBA")
HASHES = [hashlib.sha256(base64.b64decode(file)).hexdigest() for file in (*FILES, MASK)]


@pytest.fixture
async def editing(serve: Serve, upstream: EmulatedUpstream) -> Service:
    """Start a service in front of an upstream that takes edits as OpenAI does."""
    return await serve(provider="openai", openai_api_url=f"{upstream.url}/v1", openai_api_key="any")


@over_rows("sdk", [*OPENAI, *LITELLM])
async def test_a_client_edits_one_image_and_three_with_a_mask(
    sdk: Sdk, packages: Packages, editing: Service, upstream: EmulatedUpstream
) -> None:
    prompt = f"a cat of {sdk}"
    name = "openai/an-edit-model" if sdk.name == "litellm" else "an-edit-model"
    options = STRICT if sdk.name == "openai" else {}
    fields: dict[str, Any] = {"model": name, "prompt": prompt, "size": "512x256", "n": 1, "quality": "high"}
    results = await packages.run(
        sdk,
        [
            Call(f"{editing.url}/v1", fields, "images.edit", options, {"image": FILES[0]}),
            Call(f"{editing.url}/v1", fields, "images.edit", options, {"image": FILES, "mask": MASK}),
        ],
    )
    for result in results:
        (entry,) = result["answer"]["data"]
        assert await linked(editing, entry)
    one, three = upstream.ledger.matching(prompt)
    assert [file.sha256 for file in one.inputs] == HASHES[:1]
    assert [(file.field, file.sha256) for file in three.inputs] == list(
        zip(["image[]"] * 3 + ["mask"], HASHES, strict=True)
    )
    assert (one.prompt, one.body["quality"], one.body["size"]) == (prompt, "high", "512x256")


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
async def test_a_client_streams_an_edit_and_repeats_it_without_a_second_payment(
    sdk: Sdk, packages: Packages, editing: Service, upstream: EmulatedUpstream
) -> None:
    fields = {"model": "an-edit-model", "prompt": "a cat", "size": "1024x1024", "stream": True}
    call = Call(f"{editing.url}/v1", fields, "images.edit", STRICT, {"image": FILES[0]})
    (streamed,) = await packages.run(sdk, [call])
    assert [event["type"] for event in streamed["events"]] == ["image_edit.completed"]
    upstream.script({"fault": "ok", "delay_s": 1.4})
    slow = Call(
        f"{editing.url}/v1",
        {"model": "an-edit-model", "prompt": "slow"},
        "images.edit",
        IMPATIENT,
        {"image": FILES[0]},
    )
    (result,) = await packages.run(sdk, [slow])
    assert await linked(editing, result["answer"]["data"][0])
    assert len(upstream.ledger.matching("slow")) == 1


@over_rows("sdk", TOGETHER)
async def test_togethers_client_sends_an_image_to_start_from(
    sdk: Sdk, packages: Packages, service: Service, upstream: EmulatedUpstream
) -> None:
    link = "https://images.example/a.png"
    uri = f"data:image/png;base64,{FILES[0]}"
    fields = {"model": "black-forest-labs/FLUX.1-kontext-pro", "prompt": f"a cat of {sdk}"}
    calls = [Call(f"{service.url}/v1", fields | {"image_url": image}, options=STRICT) for image in (link, uri)]
    for result in await packages.run(sdk, calls):
        assert result["answer"]["data"][0]["url"]
    linked_call, with_bytes = upstream.ledger.matching(f"a cat of {sdk}")
    assert linked_call.body["image_url"] == link
    assert [file.sha256 for file in with_bytes.inputs] == HASHES[:1]
