"""Tests of secrets in files, as Docker and Kubernetes mount them."""

from __future__ import annotations

from pathlib import Path

from imagegen.start_checks import warnings
from tests.loaded_settings import faults, load
from tests.support import over_rows


def test_a_secret_is_read_from_the_file_that_its_setting_names(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("\ufeff sk-123 \r\n", encoding="utf-8")
    settings = load(TOGETHER_API_KEY_FILE=str(file))
    assert (settings.together_api_key, settings.provider, settings.misspelled) == ("sk-123", "together", ())


def test_keys_of_clients_and_the_address_of_redis_may_be_in_files(tmp_path: Path) -> None:
    keys, redis = tmp_path / "keys", tmp_path / "redis"
    keys.write_text("web:secret-of-web,shop:secret-of-shop\n")
    redis.write_text("redis://:pw@redis:6379\n")
    settings = load(API_KEYS_FILE=f'"{keys}"', REDIS_URL_FILE=str(redis))
    assert (list(settings.api_keys), settings.redis_url) == (["web", "shop"], "redis://:pw@redis:6379")


def test_a_channel_uses_a_key_that_is_in_a_file(tmp_path: Path) -> None:
    channels, key = tmp_path / "channels.toml", tmp_path / "key"
    channels.write_text('[[channels]]\nname = "a"\nprovider = "together"\nkeys = ["env:TOGETHER_API_KEY"]\n')
    key.write_text("sk-123")
    settings = load(CHANNELS_FILE=str(channels), TOGETHER_API_KEY_FILE=str(key))
    assert settings.file_channels[0].keys[0].secret == "sk-123"


@over_rows("path", ["/run/secrets/of-another-program", "${SECRET}", "'"])
def test_a_file_beside_its_setting_has_no_effect_but_a_warning(path: str) -> None:
    settings = load(ADMIN_TOKEN="0123456789abcdef", ADMIN_TOKEN_FILE=path)
    assert settings.admin_token == "0123456789abcdef"
    (warning,) = warnings(settings)
    assert warning == "ADMIN_TOKEN_FILE has no effect, since ADMIN_TOKEN is set too: set one of them"


def test_a_key_of_a_channel_may_be_in_a_file_under_any_name(tmp_path: Path) -> None:
    channels, first, second = tmp_path / "channels.toml", tmp_path / "first", tmp_path / "second"
    keys = 'keys = ["env:TOGETHER_API_KEY_2", "env:OTHER"]'
    channels.write_text(f'[[channels]]\nname = "a"\nprovider = "together"\n{keys}\n')
    first.write_text("sk-123\n")
    second.write_text("sk-456\n")
    named = {"CHANNELS_FILE": str(channels), "TOGETHER_API_KEY_2_FILE": str(first)}
    settings = load(**named, OTHER_FILE=str(second))
    assert [key.secret for key in settings.file_channels[0].keys] == ["sk-123", "sk-456"]
    assert settings.misspelled == ()
    assert load(**named, OTHER="sk-789", OTHER_FILE=str(second)).file_channels[0].keys[1].secret == "sk-789"
    assert "OTHER_FILE: " in faults(**named, OTHER_FILE="hunter2")["CHANNELS_FILE"]
    assert "hunter2" not in str(faults(**named, OTHER_FILE="hunter2"))


def test_an_empty_name_of_a_file_is_not_set() -> None:
    assert load(ADMIN_TOKEN="0123456789abcdef", ADMIN_TOKEN_FILE=" ").admin_token == "0123456789abcdef"


@over_rows(
    ("raw", "rule"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8"), (b"a" * 70_000, "is over")],
)
def test_a_file_without_a_usable_secret_is_a_fault_that_names_it(tmp_path: Path, raw: bytes, rule: str) -> None:
    (tmp_path / "key").write_bytes(raw)
    assert rule in faults(ADMIN_TOKEN_FILE=str(tmp_path / "key"))["ADMIN_TOKEN_FILE"]


@over_rows("path", ["absent", ".", "a" * 5000])
def test_a_file_that_can_not_be_read_is_a_fault_that_names_it(tmp_path: Path, path: str) -> None:
    assert "can't be read" in faults(ADMIN_TOKEN_FILE=f"{tmp_path}/{path}")["ADMIN_TOKEN_FILE"]


@over_rows("text", ["hunter2", "redis://:hunter2@redis:6379", "hunter2/hunter2"])
def test_a_secret_in_place_of_its_file_is_not_shown(text: str) -> None:
    found = faults(REDIS_URL_FILE=text)
    assert list(found) == ["REDIS_URL_FILE"]
    assert "hunter2" not in str(found)


def test_a_bad_secret_in_a_file_is_a_fault_that_does_not_show_it(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hunter2\nhunter2")
    found = faults(ADMIN_TOKEN_FILE=str(tmp_path / "key"))
    assert list(found) == ["ADMIN_TOKEN"]
    assert "hunter2" not in str(found)
