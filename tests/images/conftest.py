"""Pictures for the tests of the image room."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image

from imagegen.images.sniff import sniff
from imagegen.images.store import CheckedImage

MakePicture = Callable[..., CheckedImage]


@pytest.fixture
def make_picture() -> MakePicture:
    """`make_picture("teal", kind="WEBP", pad_bytes=1_000)`: a small checked picture, each colour another one."""

    def make(colour: str = "teal", *, kind: str = "PNG", pad_bytes: int = 0) -> CheckedImage:
        file = io.BytesIO()
        options = {"exif": b"Exif\0\0" + bytes(pad_bytes)} if pad_bytes else {}
        Image.new("RGB", (24, 16), colour).save(file, kind, **options)
        return sniff(file.getvalue())

    return make
