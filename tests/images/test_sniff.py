"""Tests of image checks: real files of many kinds pass; cut, broken or foreign bytes do not."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from imagegen.images.sniff import MAX_PARTS, MAX_SIDE, ImageChecker, NotAnImage, sniff
from imagegen.images.store import VerifiedImage
from tests.images.backings import in_memory
from tests.support import examples, over_rows

WIDTH, HEIGHT = 96, 56


def draw_image(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 1) -> Image.Image:
    """Return noise over a gradient; it compresses badly, so every file has some length."""
    noise = Image.frombytes("L", size, random.Random(seed).randbytes(size[0] * size[1]))
    return Image.blend(Image.linear_gradient("L").resize(size), noise, 0.3).convert("RGB").convert(mode)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> bytes:
    file = io.BytesIO()
    source = draw_image("L", size).point(lambda v: v * 257, "I") if mode.startswith("I") else draw_image(mode, size)
    source.convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif() -> Image.Exif:
    """Return EXIF data with a thumbnail-like blob that contains JPEG markers."""
    tags = Image.Exif()
    tags[0x010E] = "a picture " + "\xff\xd8\xff\xd9" * 20
    tags[0x0112] = 6
    return tags


def png_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a cat " * 50)
    info.add_text("zipped", "IEND" * 50, zip=True)
    return info


FRAMES = [draw_image(seed=seed) for seed in (2, 3)]

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

REAL: dict[str, tuple[str, Callable[[], bytes]]] = {
    "jpeg baseline": ("image/jpeg", lambda: encoded("JPEG")),
    "jpeg progressive": ("image/jpeg", lambda: encoded("JPEG", progressive=True, quality=95)),
    "jpeg grey": ("image/jpeg", lambda: encoded("JPEG", "L")),
    "jpeg cmyk": ("image/jpeg", lambda: encoded("JPEG", "CMYK")),
    "jpeg exif, icc and comment": (
        "image/jpeg",
        lambda: encoded("JPEG", exif=exif(), icc_profile=b"\xff\xd9" * 40_000, comment=b"\xff\xd9"),
    ),
    "jpeg with restart markers": ("image/jpeg", lambda: encoded("JPEG", restart_marker_blocks=2)),
    "jpeg 4:4:4, optimised": ("image/jpeg", lambda: encoded("JPEG", subsampling=0, optimize=True)),
    **{f"png {mode}": ("image/png", partial(encoded, "PNG", mode)) for mode in PNG_MODES},
    "png with text and exif": ("image/png", lambda: encoded("PNG", pnginfo=png_text(), exif=exif())),
    "png animated": ("image/png", lambda: encoded("PNG", save_all=True, append_images=FRAMES)),
    "webp lossy": ("image/webp", lambda: encoded("WEBP", quality=80)),
    "webp lossless": ("image/webp", lambda: encoded("WEBP", lossless=True)),
    "webp alpha": ("image/webp", lambda: encoded("WEBP", "RGBA", quality=80)),
    "webp lossless with exif": ("image/webp", lambda: encoded("WEBP", lossless=True, exif=exif())),
    "webp animated": ("image/webp", lambda: encoded("WEBP", save_all=True, append_images=FRAMES, duration=50)),
}

FILES = {name: (kind, make()) for name, (kind, make) in REAL.items()}


@over_rows("name", FILES)
def test_a_real_image_passes_with_its_type_size_and_digest(name: str) -> None:
    kind, data = FILES[name]
    image = sniff(data)
    assert (image.content_type, image.width, image.height) == (kind, WIDTH, HEIGHT)
    assert image.data == data
    assert image.sha256 == hashlib.sha256(data).hexdigest()


@over_rows("name", FILES)
def test_an_image_cut_anywhere_is_rejected(name: str) -> None:
    _, data = FILES[name]
    cuts = {len(data) * part // 50 for part in range(50)} | set(range(40)) | set(range(len(data) - 40, len(data)))
    for cut in sorted(cuts):
        with pytest.raises(NotAnImage):
            sniff(data[:cut])


@over_rows("name", FILES)
def test_an_image_is_checked_the_same_in_pieces_of_any_size(name: str) -> None:
    kind, data = FILES[name]
    for piece_bytes in (1, 2, 3, 7, 1000):
        checker = ImageChecker()
        pieces = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
        assert sum(map(checker.feed, pieces)) == len(data)
        assert checker.finish(data) == sniff(data)
        assert checker.content_type == kind


@over_rows("name", FILES)
def test_bytes_after_the_image_are_cut(name: str) -> None:
    kind, data = FILES[name]
    for junk in (b"\0", b"\r\n", b"<script>alert(1)</script>", data, b"\xff\xd9" * 5, b"PK\x03\x04"):
        image = sniff(data + junk)
        assert image.data == data
        assert image.content_type == kind
        assert image.sha256 == hashlib.sha256(data).hexdigest()


QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=examples(30))


@pytest.mark.parametrize("name", FILES)
@QUICK
@given(data=st.data())
def test_flipped_bits_never_crash(name: str, data: st.DataObject) -> None:
    broken = bytearray(FILES[name][1])
    anywhere = st.integers(0, len(broken) * 8 - 1)
    near_the_start = st.integers(0, min(len(broken), 400) * 8 - 1)
    for place in data.draw(st.lists(near_the_start | anywhere, max_size=4)):
        broken[place // 8] ^= 1 << place % 8
    image = sniffed(bytes(broken))
    assert image is None or (bytes(broken).startswith(in_memory(image)) and 0 < image.width <= MAX_SIDE)


MAGICS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x20\0\0\0WEBP", b"RIFF\x20\0\0\0WEBPVP8X"]


@QUICK
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=300))
def test_random_bytes_after_a_magic_number_are_rejected(magic: bytes, rest: bytes) -> None:
    assert sniffed(magic + rest) is None


def sniffed(data: bytes) -> VerifiedImage | None:
    try:
        return sniff(data)
    except NotAnImage:
        return None


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@over_rows(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sorry</body></html>", "HTML"),
        (b"\xef\xbb\xbf\n <html>", "HTML"),
        (b"<Error><Code>AccessDenied</Code></Error>", "XML"),
        (SVG, "SVG"),
        (b'<?xml version="1.0"?>\n<!-- x -->' + SVG, "SVG"),
        (b'{"error":"gone"}', "JSON"),
        (encoded("GIF", "P"), "GIF"),
        (encoded("BMP"), "not a PNG"),
        (encoded("TIFF"), "not a PNG"),
        (b"%PDF-1.7", "not a PNG"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not a PNG"),
        (b"\0" * 5_000, "not a PNG"),
        (b" " + FILES["jpeg baseline"][1], "not a PNG"),
        (b"\xff\xd8\xff\xd9", "no image"),
        (b"\x89PNG\r\n\x1a\n", "cut off"),
    ],
)
def test_other_bytes_are_rejected_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(NotAnImage, match=reason):
        sniff(data)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int = 8, height: int = 8, depth: int = 8, colour: int = 2, *, parts: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = chunk(b"IDAT", zlib.compress(bytes(8 * 25))) if parts is None else parts
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IEND")


def test_the_hand_made_png_is_good() -> None:
    assert sniff(png()).width == 8


@over_rows(
    "data",
    [
        png(width=0),
        png(height=MAX_SIDE + 1),
        png(width=2**31),
        png(depth=3),
        png(colour=5),
        png(colour=3),
        png(parts=b""),
        png(parts=chunk(b"IDAT")),
        png(parts=chunk(b"XXXX") + chunk(b"IDAT", b"x")),
        png(parts=chunk(b"IHDR", bytes(13)) + chunk(b"IDAT", b"x")),
        png().replace(b"IDAT", b"IDAU"),
        png()[:8] + png()[33:],
        png(parts=chunk(b"teXt") * (MAX_PARTS + 1)),
    ],
)
def test_a_broken_or_empty_png_is_rejected(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        sniff(data)


def frame(marker: int = 0xC0, height: int = 8, width: int = 8, components: int = 1) -> bytes:
    body = struct.pack(">BHHB", 8, height, width, components) + b"\1\x11\0" * components
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


SCAN = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + b"\x12\xff\0\x34\xff\xd0\x56"
SOI, EOI = b"\xff\xd8", b"\xff\xd9"


def test_the_hand_made_jpeg_is_good_with_fill_bytes_too() -> None:
    assert sniff(SOI + frame() + SCAN + EOI).width == 8
    assert sniff(SOI + b"\xff\xff" + frame() + SCAN + b"\xff\xff" + EOI).height == 8


@over_rows(
    "data",
    [
        SOI + frame() + EOI,
        SOI + SCAN + EOI,
        SOI + frame(height=0) + SCAN + EOI,
        SOI + frame(width=MAX_SIDE + 1) + SCAN + EOI,
        SOI + frame(components=9) + SCAN + EOI,
        SOI + frame() + frame() + SCAN + EOI,
        SOI + frame(marker=0xC8) + SCAN + EOI,
        SOI + frame() + SCAN[:10] + EOI,
        SOI + frame() + SOI + SCAN + EOI,
        SOI + frame() + b"junk" + SCAN + EOI,
        SOI + frame() + b"\xff\xe0\0\1" + SCAN + EOI,
        SOI + frame() + SCAN,
        SOI + b"\xff\xfe\0\2" * (MAX_PARTS + 1) + frame() + SCAN + EOI,
    ],
)
def test_a_broken_or_empty_jpeg_is_rejected(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        sniff(data)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def vp8x(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", struct.pack("<I", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


VP8L = (b"VP8L", b"\x2f" + struct.pack("<I", 7 | 7 << 14) + b"pixels!")


def test_the_hand_made_webp_is_good() -> None:
    assert sniff(webp(VP8L)).width == 8
    assert sniff(webp(vp8x(8, 8), (b"ICCP", b"odd"), VP8L)).height == 8


@over_rows(
    "data",
    [
        webp(),
        webp((b"EXIF", b"none")),
        webp(vp8x(8, 8)),
        webp(vp8x(9, 8), VP8L),
        webp(vp8x(8, 8, flags=2), VP8L),
        webp(vp8x(8, 8), (b"ANMF", bytes(40))),
        webp(vp8x(MAX_SIDE + 1, 8, flags=2), (b"ANMF", bytes(40))),
        webp((b"VP8L", b"\x2f\0")),
        webp((b"VP8L", b"\x2e" + VP8L[1][1:])),
        webp((b"VP8 ", b"\0\0\0\x9d\x01\x2b" + bytes(9))),
        webp((b"VP8 ", b"\1\0\0\x9d\x01\x2a\x08\0\x08\0" + bytes(9))),
    ],
)
def test_a_broken_or_empty_webp_is_rejected(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        sniff(data)


def test_a_chunk_longer_than_the_file_is_rejected() -> None:
    lying = bytearray(webp(VP8L))
    lying[16] = 200
    with pytest.raises(NotAnImage, match="broken"):
        sniff(bytes(lying))


@over_rows(("kind", "options"), [("JPEG", {"quality": 98}), ("PNG", {"compress_level": 0})])
def test_an_image_of_megabytes_is_checked_without_a_loop_over_its_bytes(kind: str, options: dict[str, int]) -> None:
    file = io.BytesIO()
    noise = random.Random(5).randbytes(3 * 1024 * 1024)
    Image.frombytes("RGB", (1024, 1024), noise).save(file, kind, **options)
    assert len(file.getvalue()) > 1_500_000
    began_s = time.thread_time()
    sniff(file.getvalue())
    assert time.thread_time() - began_s < 0.08  # of CPU: a loop over its bytes takes at least 0.1 s, the check 4 ms


@over_rows(
    "header",
    [
        png(width=8_000, height=8_000),
        png(width=16_384, height=16_384),
        SOI + frame(width=8_000, height=8_000),
        webp(vp8x(8_000, 8_000)),
    ],
)
def test_more_than_50_megapixels_are_rejected_by_the_header(header: bytes) -> None:
    with pytest.raises(NotAnImage, match="50 million") as caught:
        ImageChecker().feed(header[:40])
    assert caught.value.lasting


@over_rows(("data", "lasting"), [(b"GIF89a", True), (SVG, True), (png()[:-1], False), (b"", False)])
def test_a_wrong_kind_differs_from_damage(data: bytes, lasting: bool) -> None:
    with pytest.raises(NotAnImage) as caught:
        sniff(data)
    assert caught.value.lasting is lasting
