from __future__ import annotations

import hashlib
import re
import tracemalloc

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from imagegen.errors import InvalidRequest
from imagegen.tasks.field_faults import VISIBLE_TEXT
from imagegen.tasks.request import GenerationRequest, fingerprint
from imagegen.tasks.validation import GenerationParams, parse
from tests.support import over_rows

TEXTS = some.text(some.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=20)
TEXTS = TEXTS.filter(lambda text: re.match(VISIBLE_TEXT, text) is not None)
BODIES = some.fixed_dictionaries(
    {"prompt": TEXTS},
    optional={
        "model": TEXTS,
        "width": some.integers(8, 560).map(lambda eighths: eighths * 8),
        "height": some.integers(8, 560).map(lambda eighths: eighths * 8),
        "n": some.integers(1, 16),
        "steps": some.integers(1, 100),
        "seed": some.integers(0, 2**63 - 1),
        "negative_prompt": TEXTS,
        "guidance_scale": some.floats(0, 100) | some.integers(0, 100),
        "output_format": some.sampled_from(["jpeg", "png", "webp"]),
        "image_url": TEXTS.map("https://host/{}".format),
        "reference_images": some.lists(TEXTS.map("data:image/png,{}".format), min_size=1, max_size=3),
    },
)

DEFAULTS: dict[str, object] = {"model": "m", "width": 512, "height": 512, "n": 1}


def requested(**fields: object) -> GenerationRequest:
    return parse({"prompt": "a cat"} | fields, default_model="m", aliases={})


def test_the_stored_form_takes_hardly_more_memory_than_its_bytes() -> None:
    requests = [requested(prompt=f"a cat {number}") for number in range(200)]
    tracemalloc.start()
    stored = [request.to_json() for request in requests]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < sum(map(len, stored)) * 3


@settings(deadline=None)
@given(BODIES, some.none() | TEXTS)
def test_the_canonical_form_is_json_with_sorted_keys(body: dict[str, object], scope: str | None) -> None:
    expected = DEFAULTS | body | {"provider": "p"} | ({} if scope is None else {"scope": scope})
    scale = body.get("guidance_scale")
    if isinstance(scale, float) and scale.is_integer():
        expected["guidance_scale"] = int(scale)
    assert requested(**body).canonical("p", scope) == orjson.dumps(expected, option=orjson.OPT_SORT_KEYS)


@settings(deadline=None)
@given(BODIES)
def test_a_stored_request_survives_a_round_trip(body: dict[str, object]) -> None:
    request = requested(**body)
    assert GenerationRequest.from_json(request.to_json()) == request
    assert orjson.loads(request.to_json()) == DEFAULTS | body


@over_rows("name", GenerationParams.model_fields)
def test_each_field_makes_another_task(name: str) -> None:
    values: dict[str, list[object]] = {
        "output_format": ["png", "jpeg"],
        "image_url": ["https://host/a", "https://host/b"],
        "reference_images": [["https://host/a"], ["https://host/b"]],
        "mask": ["https://host/a", "https://host/b"],
        "aspect_ratio": ["1:1", "2:1"],
        "resolution": ["1K", "2K"],
        "disable_safety_checker": [True, False],
        "prompt_upsampling": [True, False],
        "image_loras": [[{"path": "a", "scale": 1}], [{"path": "a", "scale": 2}]],
        "extra": [{"x_style": 1}, {"x_style": 2}],
    }
    values |= {side: [64, 128] for side in ("width", "height")}
    numbers = ("n", "steps", "seed", "guidance_scale", "variant", "output_compression")
    values |= {number: [1, 2] for number in numbers}
    first, second = [requested(**{name: value}) for value in values.get(name, ["a", "b"])]
    assert first.canonical("p", None) != second.canonical("p", None)
    assert first.to_json() != second.to_json()


def test_defaulted_fields_are_always_stored() -> None:
    assert requested().to_json() == b'{"prompt":"a cat","model":"m","width":512,"height":512,"n":1}'


@over_rows(
    "stored",
    [
        b"",
        b"[]",
        b"{",
        b'{"prompt":"a cat"}',
        b'{"prompt":1,"model":"m","width":512,"height":512,"n":1}',
        b'{"prompt":"a cat","model":"m","width":512,"height":512,"n":1,"odd":1}',
        b'{"prompt":"a cat","model":"m","width":512,"height":512,"n":0}',
        b'{"prompt":"a cat","model":"m","width":512,"height":512,"n":17}',
        b'{"prompt":"\xff","model":"m","width":512,"height":512,"n":1}',
        b"[" * 100_000,
    ],
)
def test_an_invalid_stored_request_is_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match="no stored request"):
        GenerationRequest.from_json(stored)


@over_rows("name", ["prompt", "model", "negative_prompt", "image_url"])
def test_a_control_character_is_named_as_the_fault(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        requested(**{name: "https://host/a\x00b"})
    assert [fault.message for fault in caught.value.details] == [
        "must not contain control characters except tab and newline"
    ]


@over_rows("name", ["image_url", "reference_images", "mask"])
@over_rows(
    "address",
    [
        "http://",
        "https:///a.png",
        "https://?x",
        "https://[",
        "https://[::1",
        "https://h:99999/a",
        "https://h:x/a",
        "https://ho st/a",
        "https://h\\@other/a",
        "https://.",
        "https://ho\tst/a",
        "https://@/a",
        "HTTP://",
        "https://h:0/",
    ],
)
def test_an_address_of_an_image_without_a_valid_host_is_refused(name: str, address: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        requested(**{name: [address] if name == "reference_images" else address})
    assert [fault.message for fault in caught.value.details] == ["must be an address with a valid host and port"]


@over_rows(
    "address",
    [
        "https://host",
        "HTTPS://Host.example:8443/a b.png?x=1#y",
        "https://[2001:db8::1]:8443/a",
        "https://user:pw@h/a",
        "https://例子.example/图.png",
        "http://xn--fsqu00a.example/a?b=/c",
        "https://h?x",
        "https://1.2.3.4/a",
        "https://a_b.example.",
    ],
)
def test_an_address_of_an_image_is_kept_as_it_is_written(address: str) -> None:
    assert requested(image_url=address).image_url == address


@over_rows("name", ["width", "steps", "seed", "guidance_scale"])
@over_rows("digits", ["٦٤", "６４", "6_4"])
def test_digits_of_other_scripts_are_refused(name: str, digits: str) -> None:
    with pytest.raises(InvalidRequest):
        requested(**{name: digits})


@over_rows(
    ("body", "faults"),
    [
        (
            {"reference_images": ["x"]},
            {"referenceImages[0]": "must be an http(s) address, a data:image/ URI, or upload: and 64 hex digits"},
        ),
        ({"reference_images": [None, 5]}, {f"referenceImages[{place}]": "must be a string" for place in (0, 1)}),
        ({"image_loras": ["x"]}, {"imageLoras[0]": "must be an object"}),
        ({"prompt": " "}, {"prompt": "must not be empty"}),
        ({"prompt": "\u200b \u2060\ufeff\u202e"}, {"prompt": "must contain a visible character"}),
        ({"prompt": "\u3164\u2800"}, {"prompt": "must contain a visible character"}),
        ({"negative_prompt": "\u00ad\ufe0f"}, {"negativePrompt": "must contain a visible character"}),
        (
            {"quality": 5, "prompt_upsampling": 1},
            {"quality": "must be a string", "promptUpsampling": "must be a boolean"},
        ),
        ({"aspect_ratio": "wide"}, {"aspectRatio": "must be two whole numbers, such as 16:9"}),
    ],
)
def test_a_fault_is_told_once_and_in_the_words_of_the_api(body: dict[str, object], faults: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        requested(**body)
    assert {fault.field: fault.message for fault in refused.value.details} == faults


def test_the_address_of_an_input_image_has_at_most_8192_characters() -> None:
    address, text = "https://images.example/".ljust(8_192, "a"), "must be an address of at most 8192 characters"
    assert requested(image_url=address, mask=address).image_url == address
    longer = address.replace("https", "HTTPS") + "a"
    with pytest.raises(InvalidRequest) as refused:
        requested(image_url=longer, reference_images=[address, longer], mask=longer)
    faults = {fault.field: fault.message for fault in refused.value.details}
    assert faults == {"imageUrl": text, "referenceImages[1]": text, "mask": text}
    assert requested(image_url=f"data:image/png;base64,{'A' * 8_192}").image_url


@over_rows("seed", [-1, -1.0])
def test_a_seed_of_minus_one_is_absent(seed: float) -> None:
    assert requested(seed=seed) == requested()
    with pytest.raises(InvalidRequest):
        requested(seed=-2)


def test_the_fingerprint_of_a_request_never_changes() -> None:
    request = requested(seed=3, guidanceScale=7.0, negativePrompt="fog", referenceImages=["https://host/a"])
    canonical = request.canonical("sandbox", "shop")
    assert canonical == (
        b'{"guidance_scale":7,"height":512,"model":"m","n":1,"negative_prompt":"fog","prompt":"a cat",'
        b'"provider":"sandbox","reference_images":["https://host/a"],"scope":"shop","seed":3,"width":512}'
    )
    assert fingerprint(canonical, None) == hashlib.md5(canonical, usedforsecurity=False).hexdigest()


def test_a_ratio_that_gives_too_long_a_side_is_refused() -> None:
    assert requested(aspectRatio="8:1", resolution="2K").width == 5792
    with pytest.raises(InvalidRequest) as caught:
        requested(aspectRatio="8:1", resolution="4K")
    assert [fault.field for fault in caught.value.details] == ["aspectRatio"]


@over_rows(
    "name",
    [
        "n",
        "num_images",
        "numImages",
        "N",
        "n_iter",
        "samples",
        "Width",
        "image_size",
        "imageSize",
        "num_inference_steps",
        "numInferenceSteps",
        "responseFormat",
        "my_webhook",
        "call-back_url",
    ],
)
def test_a_reserved_field_in_extra_is_refused_in_each_spelling(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        requested(extra={name: 2})
    assert caught.value.details[0].field == "extra"


@over_rows(
    ("name", "hint"),
    [
        ("num_inference_steps", "did you mean steps?"),
        ("size", "did you mean width and height?"),
        ("output_quality", "did you mean outputCompression?"),
        ("go_fast", "a field of the provider's own API goes into extra"),
        ("numberOfImages", "did you mean n?"),
        ("num_outputs", "did you mean n?"),
        ("quantity", "did you mean n?"),
        ("sampling_steps", "did you mean steps?"),
        ("CFGScale", "did you mean guidanceScale?"),
        ("image_base64", "did you mean imageUrl?"),
        ("input_image_2", "did you mean referenceImages, after imageUrl?"),
        ("ref_img", "did you mean referenceImages?"),
        ("mask_image_url", "did you mean mask?"),
        ("imageFormat", "did you mean outputFormat?"),
        ("enable_safety_checker", "did you mean disableSafetyChecker?"),
        ("prompt_extend", "did you mean promptUpsampling?"),
        ("style_preset", "did you mean style?"),
        ("sd_model_checkpoint", "did you mean model?"),
        ("engine_id", "did you mean model?"),
        ("transparent_bg", "did you mean background?"),
        ("random_seed", "did you mean seed?"),
        ("w", "did you mean width?"),
        ("input", "send the fields in it without it, next to the prompt"),
        ("text_prompts", "send one text as prompt"),
        ("prompts", "POST /api/images/batch takes several requests"),
        ("api_key", "send the header Authorization"),
        ("idempotencyKey", "send the header Idempotency-Key"),
        ("sync_mode", "add ?wait=N to the address to wait N seconds"),
        ("stream", "follow the eventsUrl of the answer"),
        ("safety_identifier", "leave it out"),
    ],
)
def test_a_field_of_another_api_has_a_hint(name: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        requested(**{name: 1})
    assert caught.value.details[0].message.endswith(hint)


def test_every_field_of_another_api_has_its_hint_in_one_answer() -> None:
    others = ("size", "num_images", "num_inference_steps", "guidance", "image", "mask_url")
    with pytest.raises(InvalidRequest) as caught:
        requested(**dict.fromkeys(others, 1))
    assert all(fault.message.endswith("?") for fault in caught.value.details)
