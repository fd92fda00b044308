"""Tests of the file that holds the admin token."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagegen.accounts.admin_token import FILE_NAME, load_admin_token
from tests.support import logged


@pytest.fixture
def log() -> Iterator[list[str]]:
    with logged() as lines:
        yield lines


def token_in(folder: Path, setting: str | None = None) -> str:
    """Return the token, and log its place as the start does."""
    token = load_admin_token(setting, folder)
    token.log_place("http://127.0.0.1:3000", is_local=False)
    assert token.secret not in repr(token)
    return token.secret


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_of_the_setting_is_used_and_no_file_is_made(tmp_path: Path, log: list[str]) -> None:
    assert token_in(tmp_path, "a-token-of-some-length") == "a-token-of-some-length"
    assert list(tmp_path.iterdir()) == []
    assert log == [
        "INFO The admin token is in ADMIN_TOKEN\n",
        "INFO The board is at http://127.0.0.1:3000/board\n",
    ]


def test_the_boards_link_has_the_token_of_the_file_on_loopback_alone(tmp_path: Path, log: list[str]) -> None:
    made, given = load_admin_token(None, tmp_path), load_admin_token("a-token-of-some-length", tmp_path)
    for token in (made, given):
        token.log_place("http://127.0.0.1:3000", is_local=True)
    links = [line.split("board is at ")[1].strip() for line in log if "board is at" in line]
    assert links == [f"http://127.0.0.1:3000/board#token={made.secret}", "http://127.0.0.1:3000/board"]


def test_a_token_is_made_once_and_read_again_at_the_next_start(tmp_path: Path, log: list[str]) -> None:
    folder = tmp_path / "data"
    token = token_in(folder)
    assert len(token) >= 43
    assert token_in(folder) == token
    assert token_in(tmp_path / "other") != token
    path = folder / FILE_NAME
    assert (path.read_text(), mode_of(path)) == (f"{token}\n", 0o600)
    assert log[0] == f"INFO The admin token is in {path}\n"
    assert token not in "".join(log)


def test_instances_that_start_at_once_share_one_token(tmp_path: Path) -> None:
    program = "from imagegen.accounts.admin_token import *; print(load_admin_token(None, Path('.')).secret)"
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(4)
    ]
    tokens = {start.communicate(timeout=30)[0].strip() for start in starts}
    assert tokens == {(tmp_path / FILE_NAME).read_text().strip()}


def test_a_file_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text("written-by-the-operator\n")
    path.chmod(0o644)
    assert token_in(tmp_path) == "written-by-the-operator"
    assert mode_of(path) == 0o600


def test_a_file_that_a_crash_left_empty_is_filled(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    token = token_in(tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == f"{token}\n"


@pytest.mark.parametrize("text", ["short", "a token with spaces", "a-token-with-é-in-it-of-some-length"])
def test_a_file_with_something_else_is_kept_and_closes_the_admin_routes(
    tmp_path: Path, log: list[str], text: str
) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert token_in(tmp_path) not in {text, token_in(tmp_path)}
    assert (tmp_path / FILE_NAME).read_text() == text
    assert "WARNING The admin routes are closed" in log[0]
    assert "delete it" in log[0]
    assert text not in log[0]


def test_a_folder_in_the_place_of_the_file_closes_the_admin_routes(tmp_path: Path, log: list[str]) -> None:
    (tmp_path / FILE_NAME).mkdir()
    token = token_in(tmp_path)
    assert len(log) == 2
    assert f"{tmp_path / FILE_NAME} can't be used (Is a directory): set ADMIN_TOKEN" in log[0]
    assert token not in "".join(log)


def test_a_full_disk_leaves_an_empty_file_for_the_next_start(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda number, data, _offset: os.write(number, data[:5]))
        token_in(tmp_path)
    assert "No space left on device" in log[0]
    assert (tmp_path / FILE_NAME).read_text() == ""
    assert token_in(tmp_path) == (tmp_path / FILE_NAME).read_text().strip()
