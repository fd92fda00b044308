"""Tests of the names of image files, and that none is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagegen.generate_progress import dollars, printable
from imagegen.output_files import MAX_NAME_BYTES, check_folder, extension, file_stem, write_image
from tests.support import over_rows


@over_rows(
    ("prompt", "stem"),
    [
        ("A red fox, in the snow!", "a-red-fox-in-the-snow"),
        ("雪中的红狐", "雪中的红狐"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf \x1b[2J\u202e.png\0", "rf-2j-png"),
        ("🦊", "image"),
        ("NUL", "image-nul"),
        ("狐" * 100, "狐" * (MAX_NAME_BYTES // 3)),
    ],
)
def test_a_file_is_named_by_the_words_of_its_prompt(prompt: str, stem: str) -> None:
    assert file_stem(prompt) == stem


def test_the_extension_is_that_of_the_content() -> None:
    assert extension("image/jpeg", b"") == "jpg"
    assert extension(None, b"RIFF....WEBP") == "webp"
    assert extension("text/html", b"<") == "img"


def test_equal_bytes_are_one_file_and_others_get_a_number(tmp_path: Path) -> None:
    names = [write_image(tmp_path, "fox", 0, "png", data).name for data in (b"a", b"b", b"a", b"b", b"c")]
    assert names == ["fox-0.png", "fox-0-2.png", "fox-0.png", "fox-0-2.png", "fox-0-3.png"]


def test_a_folder_is_made_and_checked(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_folder(tmp_path / "file")


def test_amounts_and_texts_for_a_terminal() -> None:
    assert [dollars(value) for value in (0, 0.0027, 0.000001, 12.5)] == ["$0.00", "$0.0027", "$0.000001", "$12.50"]
    assert printable("a\x1b[31m\nb") == "a [31m b"
