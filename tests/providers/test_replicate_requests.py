"""Tests of requests to Replicate: the route and the words of each model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.replicate_requests import body_of, sent_request, target_of, warnings_of
from tests.providers.conftest import MakeCall
from tests.support import over_rows

MODEL = "black-forest-labs/flux-schnell"
HASH = "a1" * 32
LINK = "https://a.example/1.png"
LINKS = [f"https://a.example/{number}.png" for number in range(3)]


@over_rows(
    ("model", "path", "version"),
    [
        (MODEL, f"models/{MODEL}/predictions", ""),
        (f"stability-ai/sdxl:{HASH}", "predictions", HASH),
        (HASH, "predictions", HASH),
        ("deployments/me/mine", "deployments/me/mine/predictions", ""),
    ],
)
def test_each_kind_of_model_has_its_route(model: str, path: str, version: str) -> None:
    target = target_of(model)
    assert (target.path, target.version) == (path, version)


@over_rows("model", ["flux", "a/b/c", "../a", "a/..", "a/b:latest", "a/b?x=1", "a/b:" + "g" * 64, "a//b"])
def test_a_name_that_is_no_model_is_not_sent(model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        target_of(model)
    assert (caught.value.code, caught.value.retryable) == ("model_not_available", False)


@over_rows(
    ("model", "given", "sent"),
    [
        (MODEL, {}, {"aspect_ratio": "1:1", "megapixels": "0.25"}),
        (MODEL, {"width": 1344, "height": 768}, {"aspect_ratio": "16:9", "megapixels": None}),
        (MODEL, {"aspectRatio": "21:9"}, {"aspect_ratio": "21:9"}),
        (MODEL, {"steps": 4, "guidanceScale": 3.5}, {"num_inference_steps": 4, "guidance": 3.5}),
        (MODEL, {"outputFormat": "jpeg", "outputCompression": 80}, {"output_format": "jpg", "output_quality": 80}),
        (MODEL, {"outputFormat": "webp"}, {"output_format": "webp"}),
        (MODEL, {"disableSafetyChecker": True}, {"disable_safety_checker": True}),
        (MODEL, {"extra": {"go_fast": True}}, {"go_fast": True}),
        (MODEL, {"extra": {"megapixels": "1"}}, {"megapixels": "1"}),
        ("black-forest-labs/flux-1.1-pro", {"imageUrl": LINK}, {"image_prompt": LINK}),
        ("black-forest-labs/flux-kontext-pro", {"imageUrl": LINK}, {"input_image": LINK}),
        (
            "black-forest-labs/flux-2-pro",
            {"referenceImages": LINKS},
            {"input_image": LINKS[0], "input_image_2": LINKS[1], "input_image_3": LINKS[2]},
        ),
        ("google/nano-banana", {"referenceImages": LINKS[:2]}, {"image_input": LINKS[:2], "aspect_ratio": "1:1"}),
        ("google/nano-banana-pro", {"width": 2048, "height": 2048}, {"resolution": "2K"}),
        (
            "openai/gpt-image-1.5",
            {"quality": "high", "outputFormat": "jpeg"},
            {"quality": "high", "output_format": "jpeg"},
        ),
        (f"stability-ai/sdxl:{HASH}", {"width": 1024, "height": 768}, {"width": 1024, "height": 768}),
        (f"a/b:{HASH}", {"imageUrl": LINK, "mask": LINKS[2]}, {"image": LINK, "mask": LINKS[2]}),
    ],
)
def test_a_field_is_sent_in_the_words_of_the_model(
    make_call: MakeCall, model: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    fields = json.loads(json.dumps(body_of(make_call(model=model, **given))))["input"]
    assert {name: fields.get(name) for name in sent} == sent
    assert not {"model", "n", "steps", "guidance_scale"} & fields.keys()
    assert ("width" in fields) is (HASH in model)


def test_a_version_is_named_in_the_body(make_call: MakeCall) -> None:
    assert body_of(make_call(model=f"a/b:{HASH}"))["version"] == HASH
    assert body_of(make_call(model=MODEL)).keys() == {"input"}


def test_a_call_for_several_images_with_a_seed(make_call: MakeCall) -> None:
    fields: Any = body_of(make_call(model=MODEL, count=3, seed=7, n=3))["input"]
    assert (fields["num_outputs"], fields["seed"]) == (3, 7)


@over_rows("model", ["black-forest-labs/flux-1.1-pro", "google/nano-banana", f"a/b:{HASH}"])
def test_a_model_of_one_image_a_call_is_not_called_for_more(make_call: MakeCall, model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        body_of(make_call(model=model, count=2, n=2))
    assert (caught.value.max_count, caught.value.ambiguous) == (1, False)


def test_what_is_not_sent_as_given_has_a_warning(make_call: MakeCall) -> None:
    assert len(warnings_of(make_call(model=MODEL, width=1000, height=1000, quality="high"))) == 2
    assert warnings_of(make_call(model=f"stability-ai/sdxl:{HASH}")) == ()
    assert warnings_of(make_call(model="google/nano-banana-pro", aspectRatio="16:9", resolution="2K")) == ()


def test_requests_that_send_the_same_have_one_fingerprint(make_call: MakeCall) -> None:
    by_pixels = make_call(model=MODEL, width=1024, height=1024).request
    assert sent_request(by_pixels) == sent_request(make_call(model=MODEL, aspectRatio="1:1").request)
    assert sent_request(by_pixels) != sent_request(make_call(model=MODEL, width=512, height=512).request)
