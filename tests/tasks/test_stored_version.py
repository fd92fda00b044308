"""Tests of the schema version that a stored request needs."""

from __future__ import annotations

from typing import Any

from imagegen.queue.codec import FIRST_VERSION, INPUTS_VERSION, request_version
from imagegen.tasks.request import GenerationRequest, Lora
from tests.support import over_rows

FIELDS: dict[str, Any] = {"prompt": "a cat", "model": "m", "width": 512, "height": 512, "n": 1}
FIRST: list[dict[str, Any]] = [
    {},
    {"n": 8},
    {"steps": 4, "seed": 7, "negative_prompt": "dog", "guidance_scale": 3.5, "output_format": "png"},
    {"image_url": "https://example.org/a.png", "reference_images": ("https://example.org/upload:",)},
    {"prompt": '","mask":"x'},
]
INPUTS: list[dict[str, Any]] = [
    {"n": 9},
    {"image_url": "upload:" + "0" * 64},
    {"reference_images": ("https://example.org/a.png", "upload:" + "0" * 64)},
    {"mask": "https://example.org/a.png"},
    {"aspect_ratio": "1:1"},
    {"variant": 1},
    {"output_compression": 0},
    {"quality": "high"},
    {"disable_safety_checker": False},
    {"image_loras": (Lora("path", 1.0),)},
    {"extra": {"x_style": 1}},
]


@over_rows("fields", FIRST)
def test_a_request_of_the_first_version_is_still_stored_as_one(fields: dict[str, Any]) -> None:
    assert request_version(GenerationRequest(**FIELDS | fields).to_json()) == FIRST_VERSION


@over_rows("fields", INPUTS)
def test_a_request_that_the_first_version_would_run_wrongly_is_of_a_later_one(fields: dict[str, Any]) -> None:
    assert request_version(GenerationRequest(**FIELDS | fields).to_json()) == INPUTS_VERSION
