"""Tests of the settings file and of its example."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from imagegen import settings as module
from imagegen.errors import SettingsError
from imagegen.settings import Settings, setting_names
from imagegen.start_checks import warnings
from tests.support import over_rows

EXAMPLE = Path(__file__).resolve().parent.parent / ".env.example"


def test_the_environment_overrides_the_file_even_when_empty(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "PORT=4000\nexport HOST='::1'\nTOGETHER_API_KEY=paid # a comment\nLOG_LEVEL\n", encoding="utf-8-sig"
    )
    settings = Settings.load({"PORT": "5000", "TOGETHER_API_KEY": ""}, dotenv=file)
    assert (settings.port, settings.hosts, settings.provider) == (5000, ("::1",), "sandbox")
    assert Settings.load({}, dotenv=file).together_api_key == "paid"


def test_a_dollar_in_the_file_is_only_a_dollar(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ADMIN_TOKEN=0123456789a${HOME}b\n")
    assert Settings.load({}, dotenv=file).admin_token == "0123456789a${HOME}b"


def test_a_missing_file_is_accepted(tmp_path: Path) -> None:
    assert Settings.load({}, dotenv=tmp_path / ".env") == Settings()


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=4000\nADMIN TOKEN=hunter2\n")
    with pytest.raises(SettingsError, match=r"\.env, line 2: is not of the form NAME=value") as caught:
        Settings.load({}, dotenv=file)
    assert "hunter2" not in str(caught.value)
    file.write_bytes(b"PORT=\xff\n")
    with pytest.raises(SettingsError, match=r"\.env: can't be read: it is not UTF-8"):
        Settings.load({}, dotenv=file)


@over_rows("line", ['{"PORT":"4000"}', "[", '["PORT"]', "{", '"PORT":', "- PORT"])
def test_a_line_of_another_format_is_a_fault_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / ".env"
    file.write_text(f"LOG_LEVEL=INFO\n{line}\n")
    with pytest.raises(SettingsError, match=r"\.env, line 2: "):
        Settings.load({}, dotenv=file)


def test_a_header_in_the_file_is_warned_of_and_the_settings_below_it_count(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("[imagegen]\nPORT=4000\n")
    settings = Settings.load({}, dotenv=file)
    assert settings.port == 4000
    (warning,) = warnings(settings)
    assert ".env, line 1, is a header" in warning


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "no regular file"),
        (lambda file: file.write_bytes(b"PORT=4000\0"), "no text"),
        (lambda file: file.write_bytes(b"#" * (2**20 + 1)), "over 1048576 bytes"),
        (lambda file: file.symlink_to(file), "can't be read"),
    ],
)
def test_a_settings_path_that_is_not_a_file_is_a_fault(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / ".env")
    with pytest.raises(SettingsError, match=r"\.env: ") as caught:
        Settings.load({}, dotenv=tmp_path / ".env")
    assert message in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.touch(mode=0)
    with pytest.raises(SettingsError, match=r"\.env: can't be read: Permission denied"):
        Settings.load({}, dotenv=file)


def test_the_example_names_every_setting_once_and_changes_none() -> None:
    names = re.findall(r"^# ([A-Z][A-Z0-9_]+)=", EXAMPLE.read_text(), re.MULTILINE)
    assert sorted(names) == sorted(setting_names())
    assert Settings.load({}, dotenv=EXAMPLE) == Settings()


def test_the_values_in_the_example_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^# ([A-Z][A-Z0-9_]+=)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert Settings.load({}, dotenv=file) == Settings()
    blank = {name for name in setting_names() if re.search(rf"^{name}=$", file.read_text(), re.MULTILINE)}
    without_default = {
        rule.name for rule in module._rules().values() if not rule.default and rule.default not in (0, False)
    }
    depends = {"PROVIDER", "IMAGE_STORE_MAX_BYTES"}
    assert blank - depends == without_default
