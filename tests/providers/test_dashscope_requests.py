"""Tests of requests to DashScope: three shapes, and the fields that each model takes."""

from __future__ import annotations

from typing import Any

from imagegen.providers.dashscope_requests import (
    IMAGE_TO_IMAGE,
    MESSAGES,
    MESSAGES_AT_ONCE,
    TEXT_TO_IMAGE,
    edits_of,
    fields_of,
    sent_request,
    shape_of,
    warnings_of,
)
from imagegen.providers.protocol import Call
from tests.providers.conftest import MakeCall
from tests.providers.dashscope_calls import MESSAGE, OLD, SYNC
from tests.support import over_rows


def sent_fields(call: Call) -> dict[str, Any]:
    return fields_of(call)


@over_rows(
    ("model", "path"),
    [
        ("wanx2.1-t2i-turbo", TEXT_TO_IMAGE),
        ("wan2.2-t2i-flash", TEXT_TO_IMAGE),
        ("wan2.5-t2i-preview", TEXT_TO_IMAGE),
        ("qwen-image", TEXT_TO_IMAGE),
        ("qwen-image-plus", TEXT_TO_IMAGE),
        ("flux-schnell", TEXT_TO_IMAGE),
        ("a-new-model", TEXT_TO_IMAGE),
        ("wanx2.1-imageedit", IMAGE_TO_IMAGE),
        ("wan2.5-i2i-preview", IMAGE_TO_IMAGE),
        ("wan2.6-t2i", MESSAGES),
        ("wan2.7-image-pro", MESSAGES),
        ("wan2.6-image", MESSAGES),
        ("qwen-image-2.0", MESSAGES_AT_ONCE),
        ("qwen-image-2.0-pro", MESSAGES_AT_ONCE),
        ("qwen-image-3.0", MESSAGES_AT_ONCE),
        ("qwen-image-max", MESSAGES_AT_ONCE),
        ("qwen-image-edit-plus", MESSAGES_AT_ONCE),
        ("z-image-turbo", MESSAGES_AT_ONCE),
    ],
)
def test_the_model_decides_the_shape(model: str, path: str) -> None:
    assert shape_of(model).path == path


def test_the_older_shape_has_the_prompts_in_its_input(make_call: MakeCall) -> None:
    call = make_call(model=OLD, n=2, count=2, seed=7, negativePrompt="dog", width=1024, height=768)
    assert fields_of(call) == {
        "model": OLD,
        "input": {"prompt": "a cat", "negative_prompt": "dog"},
        "parameters": {"size": "1024*768", "n": 2, "seed": 7},
    }


@over_rows("model", [MESSAGE, SYNC])
def test_a_message_has_the_prompt_and_all_else_is_a_parameter(make_call: MakeCall, model: str) -> None:
    call = make_call(model=model, negativePrompt="dog", promptUpsampling=False, extra={"watermark": True})
    assert fields_of(call) == {
        "model": model,
        "input": {"messages": [{"role": "user", "content": [{"text": "a cat"}]}]},
        "parameters": {
            "size": "512*512",
            "n": 1,
            "negative_prompt": "dog",
            "prompt_extend": False,
            "watermark": True,
        },
    }


def test_the_number_of_images_is_always_sent_to_models_that_take_it(make_call: MakeCall) -> None:
    assert sent_fields(make_call(model=MESSAGE))["parameters"]["n"] == 1
    assert "n" not in sent_fields(make_call(model="z-image-turbo"))["parameters"]


def test_fields_of_extra_that_belong_to_the_input_are_there(make_call: MakeCall) -> None:
    fields = sent_fields(make_call(model=OLD, extra={"ref_img": "https://a.example/r.png", "ref_strength": 0.5}))
    assert fields["input"] == {"prompt": "a cat", "ref_img": "https://a.example/r.png"}
    assert fields["parameters"]["ref_strength"] == 0.5


def test_input_images_are_where_the_model_expects_them(make_call: MakeCall) -> None:
    first, second = "https://a.example/1.png", "https://a.example/2.png"
    both = {"imageUrl": first, "referenceImages": [second]}
    message = sent_fields(make_call(model="qwen-image-edit", **both))["input"]["messages"][0]["content"]
    assert message == [{"image": first}, {"image": second}, {"text": "a cat"}]
    assert sent_fields(make_call(model="wan2.5-i2i-preview", **both))["input"]["images"] == [first, second]
    edit = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first))["input"]
    assert (edit["base_image_url"], edit["function"]) == (first, "description_edit")
    masked = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first, mask=second))["input"]
    assert (masked["mask_image_url"], masked["function"]) == (second, "description_edit_with_mask")
    own = sent_fields(make_call(model="wanx2.1-imageedit", imageUrl=first, extra={"function": "expand"}))["input"]
    assert own["function"] == "expand"


def test_only_models_for_edits_take_input_images() -> None:
    assert edits_of(OLD) is None
    assert edits_of(MESSAGE) is None
    assert edits_of("z-image-turbo") is None
    several, masked = edits_of("qwen-image-3.0"), edits_of("wanx2.1-imageedit")
    assert several is not None
    assert several.max_images == 3
    assert masked is not None
    assert masked.mask


def test_what_a_model_does_not_take_is_left_out_with_a_warning(make_call: MakeCall) -> None:
    call = make_call(model=OLD, steps=20, guidanceScale=3, outputFormat="png", quality="high")
    assert sent_fields(call)["parameters"] == {"size": "512*512", "n": 1}
    names = [warning.split()[0] for warning in warnings_of(call)]
    assert names == ["guidance_scale", "output_format", "quality", "steps"]
    sent = sent_request(call.request)
    assert (sent.steps, sent.quality) == (None, None)
    flux = sent_fields(make_call(model="flux-dev", steps=20, guidanceScale=3))["parameters"]
    assert (flux["steps"], flux["guidance"]) == (20, 3)
