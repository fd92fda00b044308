"""Tests of the body that accepts both clients' fields: spellings, ignored fields, and the field named by a fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagegen.errors import InvalidRequest
from imagegen.web.openai.fields import OpenAIRequest, parse
from tests.support import over_rows


def parsed(**body: object) -> OpenAIRequest:
    return parse({"prompt": "a cat"} | body, default_model="the-default", aliases={"old": "new"})


def faults_of(**body: object) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**body)
    return {fault.field: fault.message for fault in caught.value.details}


def test_only_a_prompt_is_needed() -> None:
    wanted = parsed()
    assert wanted.request.to_dict() == {
        "prompt": "a cat",
        "model": "the-default",
        "width": 1024,
        "height": 1024,
        "n": 1,
    }
    assert (wanted.as_base64, wanted.streamed) == (None, False)


def test_every_field_of_ours_is_passed_on() -> None:
    given = {
        "model": "m",
        "width": 512,
        "height": 256,
        "n": 2,
        "steps": 4,
        "seed": 7,
        "negative_prompt": "a dog",
        "guidance_scale": 3.5,
        "output_format": "png",
        "image_url": "https://example.org/a.png",
        "reference_images": ["https://example.org/b.png"],
    }
    assert parsed(**given).request.to_dict() == given | {
        "prompt": "a cat",
        "reference_images": ("https://example.org/b.png",),
    }


@over_rows(
    ("body", "field", "value"),
    [
        ({"guidance": 2}, "guidance_scale", 2),
        ({"guidance": 2, "guidance_scale": 2}, "guidance_scale", 2),
        ({"num_inference_steps": 9}, "steps", 9),
        ({"negativePrompt": "a dog"}, "negative_prompt", "a dog"),
        ({"output_format": "jpg"}, "output_format", "jpeg"),
        ({"model": "old"}, "model", "new"),
        ({"n": "2"}, "n", 2),
    ],
)
def test_other_spellings_mean_the_same(body: dict[str, object], field: str, value: object) -> None:
    assert getattr(parsed(**body).request, field) == value


@over_rows(
    ("body", "size"),
    [
        ({"size": "512x768"}, (512, 768)),
        ({"size": " 512 X 768 "}, (512, 768)),
        ({"size": "auto"}, (1024, 1024)),
        ({"size": None, "width": None}, (1024, 1024)),
        ({"size": ""}, (1024, 1024)),
        ({"width": 256}, (256, 1024)),
        ({"size": "512x768", "height": 768}, (512, 768)),
        ({"size": "512x768", "width": 512, "height": 768}, (512, 768)),
        ({"image_size": "512x768"}, (512, 768)),
        ({"image_size": "512x768", "size": "512x768"}, (512, 768)),
        ({"resolution": "2K"}, (2048, 2048)),
        ({"aspect_ratio": "16:9", "resolution": "2K"}, (2736, 1536)),
        ({"aspect_ratio": "16:9"}, (1360, 768)),
        ({"aspect_ratio": "9:16"}, (768, 1360)),
        ({"aspect_ratio": "1:1"}, (1024, 1024)),
        ({"aspect_ratio": "4:1"}, (2048, 512)),
        ({"aspect_ratio": "auto"}, (1024, 1024)),
        ({"aspect_ratio": "16:9", "size": "auto"}, (1360, 768)),
    ],
)
def test_a_size_is_read_in_each_way(body: dict[str, object], size: tuple[int, int]) -> None:
    request = parsed(**body).request
    assert (request.width, request.height) == size


@over_rows(("name", "as_base64"), [("url", False), ("b64_json", True), ("base64", True), (None, None), ("", None)])
def test_bytes_have_two_names(name: str | None, as_base64: bool | None) -> None:
    assert parsed(response_format=name).as_base64 is as_base64


def test_only_fields_that_do_not_change_the_image_are_left_out() -> None:
    left_out = {"user": "u", "safety_identifier": "s", "metadata": {"a": 1}, "store": True, "partial_images": 2}
    assert parsed(**left_out).request == parsed(stream=True, response_format="b64_json").request == parsed().request


def test_fields_of_openai_and_together_are_ours() -> None:
    given = {
        "quality": "high",
        "background": "transparent",
        "moderation": "low",
        "style": "vivid",
        "input_fidelity": "high",
        "output_compression": 90,
        "disable_safety_checker": True,
        "prompt_upsampling": False,
        "mask": "https://example.org/m.png",
    }
    assert parsed(**given).request.to_dict() == parsed().request.to_dict() | given
    loras = [{"path": "https://example.org/l", "scale": 0.5}]
    assert parsed(image_loras=loras).request.to_dict()["image_loras"] == tuple(loras)


def test_every_unknown_field_is_sent_to_the_provider() -> None:
    unknown = {"x_style": 1, "svg": {}, "frame_images": [{"a": [None]}], "image_base64": "x", "raw": False}
    assert parsed(**unknown).request.extra == unknown
    assert parsed(**unknown, extra={"more": 2}).request.extra == unknown | {"more": 2}
    assert parsed(x_style=1).request != parsed(x_style=2).request


@over_rows(
    ("name", "advice"),
    [
        ("num_images", "use n"),
        ("batch_size", "use n"),
        ("n_iter", "use n"),
        ("numImages", "use n"),
        ("image_size", "use width and height"),
        ("Stream", "leave it out"),
        ("webhook_url", "use webhook"),
        ("my_callback", "use webhook"),
    ],
)
def test_a_reserved_field_is_refused_with_ours(name: str, advice: str) -> None:
    assert advice in faults_of(**{name: 2})[name]


def test_the_largest_unknown_field_is_named_if_all_are_too_large() -> None:
    assert faults_of(x_style=1, x_text="A" * 9_000) == {"x_text": "must be at most 8192 bytes of JSON"}


@over_rows("place", [str, lambda uri: [uri], lambda uri: [{"image_url": {"url": uri}}]])
def test_an_image_in_an_unknown_field_is_refused_with_the_fields_for_images(place: Callable[[str], object]) -> None:
    faults = faults_of(x_style=1, image=place("data:image/png;base64," + "A" * 9_000))
    assert list(faults) == ["image"]
    assert "image_url, reference_images and mask" in faults["image"]


def test_faults_of_reserved_and_of_known_fields_are_reported_together() -> None:
    assert set(faults_of(num_images=2, n=99)) == {"num_images", "n"}


def test_a_field_that_is_sent_twice_is_refused() -> None:
    assert faults_of(guidance=2, guidance_scale=3) == {
        "guidance_scale": "is the same field as guidance: send one of them"
    }
    assert faults_of(x_style=1, extra={"x_style": 1}) == {"x_style": "is in extra too: send one of them"}


@over_rows("other", [{"aspect_ratio": "16:9"}, {"resolution": "2K"}, {"width": 256}, {"height": 256}])
def test_two_sizes_that_contradict_each_other_are_refused(other: dict[str, object]) -> None:
    assert faults_of(size="512x768", **other) == {next(iter(other)): "must not be sent together with size"}


def test_an_image_size_that_is_another_one_than_size_is_refused() -> None:
    assert list(faults_of(size="512x768", image_size="512x512")) == ["image_size"]


def test_null_and_empty_are_absent() -> None:
    nothing = dict.fromkeys(("model", "n", "steps", "seed", "size", "stream", "response_format", "image_loras"))
    empty = {"negative_prompt": "", "image_url": "", "reference_images": [], "frame_images": []}
    assert parsed(**nothing, **empty) == parsed()


@over_rows(
    ("body", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": ""}, "model"),
        ({"size": "large"}, "size"),
        ({"size": 512}, "size"),
        ({"size": "10x1024"}, "size"),
        ({"size": "513x1024"}, "size"),
        ({"width": 10}, "width"),
        ({"aspect_ratio": "9:1"}, "aspect_ratio"),
        ({"aspect_ratio": "0:0"}, "aspect_ratio"),
        ({"response_format": "png"}, "response_format"),
        ({"response_format": ["url"]}, "response_format"),
        ({"stream": "yes"}, "stream"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"num_inference_steps": 1000}, "num_inference_steps"),
        ({"guidance": "much"}, "guidance"),
        ({"negative_prompt": 1}, "negative_prompt"),
        ({"output_format": "svg"}, "output_format"),
        ({"reference_images": ["ftp://x"]}, "reference_images[0]"),
        ({"image_loras": [{"path": "a", "scale": "much"}]}, "image_loras[0].scale"),
        ({"mask": "y"}, "mask"),
        ({"extra": [1]}, "extra"),
        ({"extra": [1], "x_style": 1}, "extra"),
    ],
)
def test_a_fault_is_of_the_field_as_the_client_spelled_it(body: dict[str, object], field: str) -> None:
    assert next(iter(faults_of(**body))) == field


def test_a_fault_in_size_names_the_side() -> None:
    assert faults_of(size="1024x9999") == {"size": "height must be less than or equal to 8192"}


def test_all_faults_are_reported_together() -> None:
    assert set(faults_of(n=0, steps=0, stream=1, response_format="x", mask="y")) == {
        "n",
        "steps",
        "stream",
        "response_format",
        "mask",
    }
