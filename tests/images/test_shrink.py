"""Tests of thumbnails made from images of every kind, and from hostile ones."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from imagegen.decoding_limits import MAX_SCANS
from imagegen.images.shrink import NoThumbnail, shrink
from tests.image_bytes import black_webp, decoded, deflated_zeros, encoded, png_file, with_scans
from tests.support import over_rows

KINDS = ["PNG", "JPEG", "WEBP"]


def gradient(size: tuple[int, int] = (1000, 600)) -> Image.Image:
    """Return an image that is dark at its left and bright at its right."""
    row = Image.linear_gradient("L").rotate(90).resize((size[0], 1)).convert("RGB")
    return row.resize(size, Image.Resampling.NEAREST)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file, which is made quickly and is larger than it could be."""
    return encoded(image, kind, **{"PNG": {"compress_level": 1}, "WEBP": {"method": 0}}.get(kind, {}), **options)


def thumbnail(data: bytes, size: int = 256) -> Image.Image:
    made = shrink(data, size)
    image = decoded(made.data)
    assert (image.format, image.size) == ("WEBP", (made.width, made.height))
    assert max(image.size) <= size
    assert getattr(image, "n_frames", 1) == 1
    return image


def is_brighter_right(image: Image.Image) -> bool:
    grey = image.convert("L")
    row = grey.height // 2
    pixels = grey.tobytes()[row * grey.width : (row + 1) * grey.width]
    return pixels[2] < 40 and pixels[-3] > 215


def png(width: int, height: int, pixels: bytes) -> bytes:
    """Return a PNG of one grey byte per pixel."""
    return png_file(width, height, zlib.compress(pixels), colour_type=0)


def black_png(width: int, height: int, colour_type: int) -> bytes:
    """Return a black PNG of one (type 0) or three (type 2) bytes per pixel, whose height is a multiple of 8."""
    row_bytes = 1 + width * (colour_type + 1)
    return png_file(width, height, deflated_zeros(row_bytes * 8, height // 8), colour_type=colour_type)


@over_rows("kind", KINDS)
@over_rows("size", [64, 128, 256, 512])
def test_a_thumbnail_has_the_size_on_its_longer_side_and_the_same_picture(kind: str, size: int) -> None:
    image = thumbnail(file_of(gradient(), kind), size)
    assert image.size == (size, round(size * 0.6))
    assert is_brighter_right(image)


@over_rows("size", [(2048, 2048), (3500, 1500), (1500, 3500), (16384, 64), (511, 8000)])
def test_a_large_image_keeps_its_shape_and_its_picture(size: tuple[int, int]) -> None:
    image = thumbnail(file_of(gradient(size)))
    assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.02, abs=0.05) or 1 in image.size
    if min(image.size) > 20:
        assert is_brighter_right(image)


@over_rows("kind", KINDS)
@over_rows("size", [(1, 1), (20, 10), (64, 64), (255, 256)])
def test_a_small_image_is_not_enlarged(kind: str, size: tuple[int, int]) -> None:
    assert thumbnail(file_of(gradient(size), kind)).size == size


@over_rows("kind", KINDS)
@over_rows(("orientation", "turned"), [(1, False), (2, False), (3, False), (6, True), (8, True), (99, False)])
def test_the_exif_orientation_is_honoured(kind: str, orientation: int, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = thumbnail(file_of(gradient(), kind, exif=exif))
    assert image.size == ((154, 256) if turned else (256, 154))
    assert is_brighter_right(image) is (orientation in (1, 99))
    assert not image.getexif()


def test_the_colours_of_a_cmyk_jpeg_are_kept() -> None:
    image = thumbnail(file_of(Image.new("RGB", (600, 400), (200, 30, 40)).convert("CMYK"), "JPEG"))
    assert image.mode == "RGB"
    assert image.getpixel((50, 50)) == pytest.approx((200, 30, 40), abs=12)


@over_rows("size", [(1000, 600), (2000, 1200)])
def test_sixteen_bits_are_scaled_and_not_cut(size: tuple[int, int]) -> None:
    row = struct.pack(f"<{size[0]}H", *(number * 65_535 // size[0] for number in range(size[0])))
    image = Image.frombytes("I;16", size, row * size[1])
    assert is_brighter_right(thumbnail(file_of(image)))


@over_rows("size", [(1000, 600), (2000, 1200)])
@over_rows("mode", ["RGBA", "LA", "P", "palette with one transparent colour"])
def test_transparency_is_kept(mode: str, size: tuple[int, int]) -> None:
    image = gradient(size)
    alpha = Image.linear_gradient("L").resize(size)
    options: dict[str, Any] = {}
    if mode in ("RGBA", "LA"):
        image = image.convert("RGB" if mode == "RGBA" else "L")
        image.putalpha(alpha)
    else:
        image = image.convert("L").point([value // 8 for value in range(256)])
        image.putpalette(bytes(value * 8 for value in range(32) for _ in "rgb"))
        darkest = image.getpixel((0, 0))
        options["transparency"] = darkest if mode != "P" else bytes([0 if n == darkest else 255 for n in range(32)])
    made = thumbnail(file_of(image, **options))
    assert made.mode == "RGBA"
    low, high = min(alphas := made.getchannel("A").tobytes()), max(alphas)
    assert low < 20
    assert high > 235


@over_rows("kind", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_shown(kind: str) -> None:
    first = gradient()
    data = file_of(first, kind, save_all=True, append_images=[first.rotate(180), first.rotate(90)], duration=40)
    assert is_brighter_right(thumbnail(data))


def test_a_progressive_jpeg_and_a_broken_profile_are_no_obstacle() -> None:
    for profile in (b"junk", b"x" * 100_000):
        assert is_brighter_right(thumbnail(file_of(gradient(), "JPEG", progressive=True, icc_profile=profile)))


def test_noise_gets_a_lower_quality_until_its_file_is_small() -> None:
    noise = Image.merge("RGB", [Image.effect_noise((800, 800), 120) for _ in range(3)])
    assert len(shrink(file_of(noise, "JPEG"), 256).data) < 20_000


def test_a_truncated_jpeg_is_shown_in_part_and_a_truncated_png_refused() -> None:
    data = file_of(Image.effect_noise((1000, 800), 90).convert("RGB"), "JPEG")
    assert thumbnail(data[: len(data) // 2] + b"\xff\xd9").size == (256, 205)
    data = file_of(Image.effect_noise((500, 500), 90))
    with pytest.raises(NoThumbnail):
        shrink(data[: len(data) // 2], 256)


@over_rows("kind", [{}, {"progressive": True}, {"claims_more": True}])
def test_a_jpeg_that_is_decoded_very_many_times_is_refused(kind: dict[str, bool]) -> None:
    assert thumbnail(with_scans(MAX_SCANS // 2, **kind)).size == (64, 64)
    with pytest.raises(NoThumbnail, match="scans"):
        shrink(with_scans(10_000, **kind), 256)


def test_a_jpeg_that_is_held_as_a_whole_is_refused_beyond_the_limit_of_memory() -> None:
    size = 6_000
    assert thumbnail(file_of(Image.new("RGB", (size, size)), "JPEG")).size == (256, 256)
    with pytest.raises(NoThumbnail, match="too many to be decoded"):
        shrink(with_scans(3, size), 256)


@over_rows("data", [b"", b"GIF89a", b"<svg/>", b"\xff\xd8\xff\xd9", b"RIFF\x04\0\0\0WEBP", png(8, 8, b"x")])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(NoThumbnail):
        shrink(data, 256)


def test_a_format_that_the_store_does_not_take_is_not_decoded() -> None:
    with pytest.raises(NoThumbnail):
        shrink(file_of(gradient(), "GIF"), 256)


def peak_kib(data: bytes) -> tuple[str, int]:
    """Return what a process of its own prints for a thumbnail of a file, and how much memory it took for it."""
    code = """
import re, sys
from imagegen.images.shrink import NoThumbnail, shrink

def peak():
    return int(re.search("VmHWM: *(.*) kB", open("/proc/self/status").read())[1])

shrink(bytes.fromhex(sys.argv[1]), 256)
before = peak()
try:
    print(shrink(sys.stdin.buffer.read(), 256).width)
except NoThumbnail:
    print("refused")
print(peak() - before)
"""
    command = [sys.executable, "-c", code, png(8, 8, bytes(72)).hex()]
    done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=50)
    assert done.stderr == b""
    shown, kib = done.stdout.split()
    return shown.decode(), int(kib)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
@over_rows(
    ("make", "shown", "most_mib"),
    [
        pytest.param(lambda: black_png(16_384, 16_384, 0), "refused", 2, id="png bomb"),
        pytest.param(lambda: black_webp(16_383, 1_100), "refused", 140, id="large webp"),
        pytest.param(lambda: black_png(8_000, 6_200, 2), "256", 220, id="large png"),
        pytest.param(lambda: file_of(Image.new("RGB", (4_000, 3_100)), "JPEG"), "256", 16, id="large jpeg"),
    ],
)
def test_memory_is_bounded_by_the_header_of_a_file(make: Callable[[], bytes], shown: str, most_mib: int) -> None:
    data = make()
    assert len(data) < 2_000_000
    answer, peak = peak_kib(data)
    assert answer == shown
    assert abs(peak) <= most_mib * 1024


def test_pillow_is_not_imported_before_the_first_thumbnail() -> None:
    code = "import sys, imagegen.app, imagegen.images.shrink; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
