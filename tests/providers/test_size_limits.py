"""Tests of size limits: which sizes they allow, and which allowed one is nearest."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest

from imagegen.providers.model_table import load_table
from imagegen.providers.size_limits import SizeLimits, parse_size
from tests.support import over_rows

FLUX = SizeLimits(multiple=16, min=64, max=1792)
GPT_IMAGE_2 = SizeLimits(multiple=16, max=3840, min_pixels=655_360, max_pixels=8_294_400, ratio=Decimal(3))
LISTED = SizeLimits(list=("1024x1024", "1536x1024", "1024x1536"))

LIMITS = list(dict.fromkeys(row.sizes for row in load_table("").all_rows if row.sizes is not None))
BOUNDS = (16, 64, 250, 256, 512, 768, 1024, 1280, 1440, 1536, 1792, 2048, 2880, 3840, 4096, 8191)
SIDES = [bound + by for bound in BOUNDS for by in (-1, 0, 1)]


@over_rows(
    ("limits", "size", "nearest"),
    [
        (FLUX, (1024, 1024), (1024, 1024)),
        (FLUX, (1024, 1269), (1024, 1264)),
        (FLUX, (1024, 2000), (1024, 1792)),
        (FLUX, (8, 1024), (64, 1024)),
        (FLUX, (4000, 8), (1792, 64)),
        (SizeLimits(multiple=32, min=250, max=1450), (1, 9999), (256, 1440)),
        (GPT_IMAGE_2, (3840, 2160), (3840, 2160)),
        (GPT_IMAGE_2, (512, 512), (816, 816)),
        (GPT_IMAGE_2, (4096, 1024), (3072, 1024)),
        (GPT_IMAGE_2, (4096, 4096), (2880, 2880)),
        (GPT_IMAGE_2, (2048, 256), (2048, 688)),
        (LISTED, (512, 512), (1024, 1024)),
        (LISTED, (1920, 1080), (1536, 1024)),
        (SizeLimits(), (1001, 77), (1001, 77)),
    ],
)
def test_the_nearest_size_is_found(limits: SizeLimits, size: tuple[int, int], nearest: tuple[int, int]) -> None:
    assert limits.nearest(*size) == nearest
    assert limits.allows(*size) == (size == nearest)


@over_rows("limits", LIMITS)
def test_the_nearest_size_of_each_model_is_allowed(limits: SizeLimits) -> None:
    for width, height in itertools.product(SIDES, SIDES):
        near = limits.nearest(width, height)
        assert limits.allows(*near), (width, height)
        assert limits.nearest(*near) == near, (width, height)
        if limits.allows(width, height):
            assert near == (width, height)


def test_the_largest_area_follows_from_the_limits() -> None:
    assert FLUX.most_pixels == 1792**2
    assert GPT_IMAGE_2.most_pixels == 8_294_400
    assert LISTED.most_pixels == 1536 * 1024
    assert SizeLimits(multiple=8).most_pixels is None


def test_the_limits_that_a_size_exceeds_are_shown_in_words() -> None:
    assert FLUX.broken_rules(1024, 1808) == "sides are 64 to 1792 pixels"
    assert FLUX.broken_rules(1000, 2000) == "sides are 64 to 1792 pixels, sides are multiples of 16"
    assert SizeLimits(min=64).broken_rules(8, 64) == "sides are at least 64 pixels"
    assert LISTED.broken_rules(8, 8) == "the sizes are 1024x1024, 1536x1024, 1024x1536"
    assert GPT_IMAGE_2.broken_rules(4096, 1024) == (
        "sides are 1 to 3840 pixels, the long side is at most 3 times the short one"
    )
    assert GPT_IMAGE_2.broken_rules(512, 512) == "the area is at least 655360 pixels"
    assert GPT_IMAGE_2.broken_rules(3840, 3840) == "the area is at most 8294400 pixels"


@over_rows("text", ["1024", "1024x", "x768", "1024*768", "0x768", "-1x5", "١x٢", "1 024x768"])
def test_a_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)
