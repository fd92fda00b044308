"""Tests of the parameters in the metadata of image files: read by Pillow, with the same pixels."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from imagegen.byte_budget import ByteBudget
from imagegen.images.exif import parameters_block
from imagegen.images.metadata import spliced, splices
from imagegen.images.sniff import sniff
from imagegen.images.spool import SMALL_BYTES, Spool
from imagegen.images.store import VerifiedImage
from tests.image_bytes import decoded
from tests.images.backings import spool_in
from tests.support import eventually, over_rows

TEXT = "a fox, red\nNegative prompt: blur\nSteps: 4, Seed: 7, Size: 64x48, Model: m, Version: imagegen 1"
CHINESE = f"狐狸 🦊\n{TEXT}"
TITLE = "a fox, red"
USER_COMMENT, EXIF_POINTER, DESCRIPTION = 0x9286, 0x8769, 0x010E


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    noise = Image.effect_noise(size, 90)
    image = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]).convert(mode)
    if mode == "RGBA":
        image.putalpha(noise)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_text(data: bytes, text: str = TEXT, title: str = TITLE) -> bytes:
    """Return the file with the text; check that it is a whole image of the same size."""
    before = sniff(data)
    changes = splices(before.content_type, lambda offset, length: data[offset : offset + length], text, title)
    assert all(first.offset + first.removed <= second.offset for first, second in pairwise(changes))
    changed = b"".join(spliced(lambda offset, length: data[offset : offset + length], len(data), changes))
    after = sniff(changed)
    assert (after.size_bytes, after.content_type) == (len(changed), before.content_type)
    assert (after.width, after.height) == (before.width, before.height)
    return changed


def pixels(data: bytes) -> list[bytes]:
    image, frames = Image.open(io.BytesIO(data)), []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        frames.append(image.tobytes())
    return frames


def comment(data: bytes) -> str:
    """Return the EXIF comment, decoded as piexif does for the web UI."""
    value = decoded(data).getexif().get_ifd(EXIF_POINTER)[USER_COMMENT]
    kind, text = value[:8], value[8:]
    return bytes(text).decode({b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}[kind])


@over_rows("text", [TEXT, CHINESE, "x" * 32_000 + "\nSteps: 1, Seed: 2, Size: 1x1"])
def test_a_png_has_the_text_as_its_parameters(text: str) -> None:
    data = picture("PNG")
    changed = with_text(data, text)
    assert decoded(changed).info["parameters"] == text
    assert pixels(changed) == pixels(data)


@over_rows(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"icc_profile": b"\0" * 70_000, "comment": b"hello"}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"icc_profile": b"\0" * 101}),
        ("WEBP", "RGB", {"xmp": b"<x:xmpmeta/>"}),
    ],
)
@over_rows("text", [TEXT, CHINESE])
def test_a_jpeg_and_a_webp_have_the_text_as_exif(kind: str, mode: str, options: dict[str, Any], text: str) -> None:
    data = picture(kind, mode, **options)
    changed = with_text(data, text)
    assert comment(changed) == text
    assert decoded(changed).getexif()[DESCRIPTION] == TITLE
    assert pixels(changed) == pixels(data)
    assert decoded(changed).mode == decoded(data).mode
    assert {name: decoded(changed).info.get(name) for name in ("icc_profile", "xmp", "comment")} == {
        name: decoded(data).info.get(name) for name in ("icc_profile", "xmp", "comment")
    }


@over_rows(("kind", "options"), [("WEBP", {"duration": 40}), ("PNG", {"default_image": False})])
def test_an_animation_keeps_all_its_frames(kind: str, options: dict[str, Any]) -> None:
    frames = [decoded(picture("PNG")).rotate(90 * turn) for turn in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    changed = with_text(file.getvalue())
    assert len(pixels(changed)) == 3
    assert pixels(changed) == pixels(file.getvalue())


@over_rows("kind", ["JPEG", "WEBP"])
@over_rows("endian", ["<", ">"])
def test_other_exif_of_a_file_stays(kind: str, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif.update({0x010F: "Black Forest Labs", 0x0131: "AI generated;txt2img", 0x0112: 6})
    exif.get_ifd(EXIF_POINTER)[0x9003] = "2026:01:02 03:04:05"
    data = picture(kind, exif=exif)
    changed = with_text(data)
    read = decoded(changed).getexif()
    assert comment(changed) == TEXT
    assert (read[0x010F], read[0x0131], read[0x0112]) == ("Black Forest Labs", "AI generated;txt2img", 6)
    assert read.get_ifd(EXIF_POINTER)[0x9003] == "2026:01:02 03:04:05"
    assert pixels(changed) == pixels(data)


@over_rows("kind", ["JPEG", "WEBP"])
def test_a_title_of_a_file_stays(kind: str) -> None:
    exif = Image.Exif()
    exif[DESCRIPTION] = "the provider's own"
    changed = with_text(picture(kind, exif=exif))
    assert (decoded(changed).getexif()[DESCRIPTION], comment(changed)) == ("the provider's own", TEXT)


@over_rows("kind", ["JPEG", "WEBP", "PNG"])
def test_a_file_that_has_parameters_is_left_as_it_is(kind: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "first")
    info.add_text("parameters", "those of the web UI itself")
    exif = Image.Exif()
    exif.get_ifd(EXIF_POINTER)[USER_COMMENT] = b"UNICODE\0" + "its own".encode("utf-16-be")
    data = picture(kind, **({"pnginfo": info} if kind == "PNG" else {"exif": exif}))
    assert with_text(data) == data


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:.*Tag:UserWarning")  # of the reader
@over_rows("kind", ["JPEG", "WEBP"])
@over_rows("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_a_file_with_broken_exif_is_left_as_it_is_and_served(kind: str, exif: bytes) -> None:
    data = picture(kind, exif=exif if kind == "JPEG" else exif[6:] or b"junk")
    changed = with_text(data)
    assert changed == data or comment(changed) == TEXT
    assert pixels(changed) == pixels(data)


def test_a_prompt_over_the_limit_of_a_jpeg_is_cut_and_its_parameters_stay() -> None:
    data = picture("JPEG")
    ascii_text = "a" * 40_000 + "\nSteps: 1, Seed: 2, Size: 1x1"
    assert comment(with_text(data, ascii_text, "t")) == ascii_text
    for prompt in ("狐" * 40_000, "🦊" * 20_000, "a" * 70_000):
        read = comment(with_text(data, prompt + "\nSteps: 1, Seed: 2, Size: 1x1", prompt))
        shown, _, parameters = read.partition("\n")
        assert parameters == "Steps: 1, Seed: 2, Size: 1x1"
        assert prompt.startswith(shown)
        assert len(shown.encode("utf-16-be")) > 64_000
        assert decoded(with_text(data, prompt, prompt)).size == (64, 48)


def test_a_block_never_exceeds_its_limit() -> None:
    for limit in range(0, 6_000, 37):
        block = parameters_block(b"", "p" * 1_500 + "\nSteps: 1", "a title", limit)
        assert block is None or len(block) <= limit


def test_a_webp_without_the_padding_of_its_last_chunk_is_padded() -> None:
    data = picture("WEBP")
    unpadded = data + b"ABCD" + struct.pack("<I", 3) + b"abc"
    unpadded = unpadded[:4] + struct.pack("<I", len(unpadded) - 8) + unpadded[8:]
    changed = with_text(unpadded)
    assert comment(changed) == TEXT
    assert pixels(changed) == pixels(data)


def test_text_behind_the_pixels_of_a_png_is_not_looked_for() -> None:
    data = picture("PNG")
    late = b"tEXt" + b"parameters\0later"
    chunk = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    assert decoded(with_text(data[:-12] + chunk + data[-12:])).info["parameters"] == "later"


def spooled(spool: Spool, data: bytes) -> VerifiedImage:
    return spool.sink(must_hold=True).finish([data])


@cache
def square(kind: str, side: int) -> bytes:
    return picture(kind, size=(side, side), quality=95)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("where", ["in a file", "in memory"])
@pytest.mark.parametrize("side", [64, 640])
async def test_a_described_image_is_hashed_as_it_is_stored(kind: str, where: str, side: int, tmp_path: Path) -> None:
    memory = ByteBudget()
    spool = spool_in(tmp_path if where == "in a file" else None, memory)
    data = square(kind, side)
    assert (len(data) > SMALL_BYTES) == (side > 64)
    image = sniff(data) if len(data) <= SMALL_BYTES else spooled(spool, data)
    described = spool.embed(image, TEXT, TITLE)
    stored = described.path.read_bytes() if described.path else described.data
    assert stored is not None
    assert stored == with_text(data)
    assert (described.size_bytes, described.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
    assert (described.width, described.height) == (side, side)
    spool.discard(described)
    spool.discard(image)
    assert memory.held == 0
    await eventually(lambda: list(tmp_path.iterdir()) == [])


def test_an_image_is_stored_as_it_is_if_its_file_is_gone(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    image = spooled(spool, picture("PNG", size=(512, 512)))
    assert image.path is not None
    image.path.unlink()
    assert spool.embed(image, TEXT, TITLE) is image
