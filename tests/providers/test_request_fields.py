"""Tests of a request in the providers' words: sizes, fields that only the provider knows, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from yarl import URL

from imagegen.providers import a1111, together
from imagegen.providers.openai import Dialect, dialect_of, fields_of
from imagegen.providers.protocol import Call
from imagegen.providers.request_fields import left_out_warnings, nearest_ratio
from tests.providers.conftest import MakeCall
from tests.support import over_rows

KONTEXT = "black-forest-labs/FLUX.1-kontext-pro"
OPTIONS = {
    "quality": "high",
    "background": "opaque",
    "moderation": "low",
    "style": "vivid",
    "input_fidelity": "low",
    "output_compression": 80,
    "disable_safety_checker": True,
    "prompt_upsampling": False,
    "image_loras": [{"path": "a", "scale": 1.0}],
}
XAI, OPENAI, SILICONFLOW = (
    dialect_of(URL(f"https://{host}/v1")) for host in ("api.x.ai", "api.openai.com", "api.siliconflow.cn")
)
UNKNOWN = dialect_of(URL("https://relay.example/v1"))


@over_rows(
    ("width", "height", "ratio"),
    [(512, 512, "1:1"), (1344, 768, "16:9"), (768, 1024, "3:4"), (2048, 64, "2:1"), (64, 2048, "1:2")],
)
def test_a_size_becomes_the_nearest_aspect_ratio(width: int, height: int, ratio: str) -> None:
    assert nearest_ratio(width, height) == ratio


@over_rows(
    ("given", "size"),
    [
        ({"aspect_ratio": "16:9"}, {"width": 1360, "height": 768}),
        ({"resolution": "2K"}, {"width": 2048, "height": 2048}),
        ({"model": KONTEXT, "aspect_ratio": "16:9"}, {"aspect_ratio": "16:9"}),
        ({"model": KONTEXT, "aspect_ratio": "16:9", "resolution": "2K"}, {"aspect_ratio": "16:9", "resolution": "2K"}),
        ({"model": "google/flash-image-2.5", "aspect_ratio": "3:4"}, {"aspect_ratio": "3:4"}),
        ({"model": KONTEXT, "width": 768, "height": 512}, {"width": 768, "height": 512}),
        ({"model": KONTEXT, "aspect_ratio": "1:1", "without": ["aspect_ratio"]}, {"width": 1024, "height": 1024}),
    ],
)
def test_together_gets_a_ratio_only_for_models_that_are_sized_by_one(
    make_call: MakeCall, given: dict[str, Any], size: dict[str, Any]
) -> None:
    fields = together.fields_of(make_call(**given), "url")
    shape = {"width", "height", "aspect_ratio", "resolution"}
    assert {name: value for name, value in fields.items() if name in shape} == size


@over_rows(
    ("given", "shape", "warned"),
    [
        ({"aspect_ratio": "16:9"}, ("16:9", "1k"), False),
        ({"aspect_ratio": "9:16", "resolution": "2K"}, ("9:16", "2k"), False),
        ({"resolution": "1K"}, ("1:1", "1k"), True),
        ({"aspect_ratio": "16:9", "resolution": "4K"}, ("16:9", "2k"), True),
        ({"aspect_ratio": "7:4"}, ("16:9", "1k"), True),
        ({"width": 1536, "height": 1024}, ("3:2", "2k"), True),
    ],
)
def test_a_service_by_ratio_gets_the_given_ratio_or_the_nearest(
    make_call: MakeCall, given: dict[str, Any], shape: tuple[str, str], warned: bool
) -> None:
    call = make_call(**given)
    fields = fields_of(call, XAI)
    assert (fields["aspect_ratio"], fields["resolution"]) == shape
    assert not {"width", "height", "size"} & fields.keys()
    assert bool(left_out_warnings(call, XAI.vocabulary)) is warned


@over_rows("dialect", [UNKNOWN, SILICONFLOW])
def test_every_option_is_sent_to_a_service_that_may_take_it(make_call: MakeCall, dialect: Dialect) -> None:
    call = make_call(**OPTIONS)
    assert (
        fields_of(call, dialect).items() >= (OPTIONS | {"image_loras": fields_of(call, dialect)["image_loras"]}).items()
    )
    assert together.fields_of(call, "url").keys() >= OPTIONS.keys()
    assert left_out_warnings(call, dialect.vocabulary) == left_out_warnings(call, together.VOCABULARY) == ()


def test_gpt_image_gets_its_options_and_no_response_format(make_call: MakeCall) -> None:
    call = make_call(**OPTIONS | {"model": "openai/gpt-image-2", "steps": 4})
    fields = fields_of(call, UNKNOWN.for_model("openai/gpt-image-2"))
    assert fields.items() >= {"quality": "high", "background": "opaque", "output_compression": 80}.items()
    assert not {"response_format", "steps", "image_loras", "disable_safety_checker"} & fields.keys()


@over_rows(
    "build",
    [
        lambda call: together.fields_of(call, "url"),
        lambda call: a1111.fields_of(call, "m"),
        *(lambda call, dialect=dialect: fields_of(call, dialect) for dialect in (UNKNOWN, XAI, OPENAI, SILICONFLOW)),
    ],
)
def test_fields_of_the_provider_alone_are_sent_unchanged(
    make_call: MakeCall, build: Callable[[Call], dict[str, object]]
) -> None:
    extra = {"x_style": 1, "nested": {"a": [None, True]}, "override_settings": {"CLIP_stop_at_last_layers": 2}}
    sent = build(make_call(extra=extra))
    assert sent.items() >= extra.items()
    assert "extra" not in sent
    assert "x_style" not in build(make_call(extra=extra, without=["x_style"]))


def test_a_web_ui_keeps_the_clients_settings_beside_the_checkpoint(make_call: MakeCall) -> None:
    fields = a1111.fields_of(make_call(model="sdxl", extra={"override_settings": {"eta": 1}}), "m")
    assert fields["override_settings"] == {"eta": 1, "sd_model_checkpoint": "sdxl"}


def test_a_field_in_the_providers_own_word_takes_precedence(make_call: MakeCall) -> None:
    call = make_call(guidance_scale=7, extra={"cfg_scale": 3})
    assert a1111.fields_of(call, "m")["cfg_scale"] == 3
    assert left_out_warnings(call, a1111.VOCABULARY) == ("guidance_scale was left out: extra has cfg_scale",)


@over_rows(
    ("dialect", "left_out"),
    [
        (OPENAI, {"disable_safety_checker", "prompt_upsampling", "image_loras"}),
        (dialect_of(URL("http://127.0.0.1:1234")), OPTIONS.keys() - {"output_compression"}),
    ],
)
def test_options_without_a_place_are_left_out_with_a_warning_each(
    make_call: MakeCall, dialect: Dialect, left_out: set[str]
) -> None:
    call = make_call(**OPTIONS)
    assert not fields_of(call, dialect).keys() & left_out
    assert {warning.split()[0] for warning in left_out_warnings(call, dialect.vocabulary)} == left_out


def test_the_variant_is_never_sent(make_call: MakeCall) -> None:
    call = make_call(variant=3)
    for fields in (together.fields_of(call, "url"), fields_of(call, UNKNOWN), a1111.fields_of(call, "m")):
        assert "variant" not in fields
