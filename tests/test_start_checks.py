"""Tests of the check that a service which others can reach does not spend its owner's money for everybody."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from imagegen.channels_file import Channel
from imagegen.errors import SettingsError
from imagegen.settings import Settings
from imagegen.start_checks import check_alert_webhook, check_exposure, overview, warnings
from tests.support import over_rows

PUBLIC: dict[str, Any] = {"hosts": ("0.0.0.0",), "provider": "together", "together_api_key": "k"}
BOUNDED: dict[str, Any] = {"open_to_all": True, "budget_daily_micro_usd": 5_000_000}


@over_rows(
    "settings",
    [
        *[{"hosts": hosts} for hosts in (("127.0.0.1",), ("127.0.0.2",), ("::1",), ("localhost",), ("LocalHost",))],
        {"hosts": ("127.0.0.1", "::1")},
        {"provider": "sandbox"},
        BOUNDED,
        BOUNDED | {"budget_daily_micro_usd": 0},
        {"on_render": True} | BOUNDED,
        {"on_render": True, "provider": "sandbox"},
    ],
)
def test_a_private_a_bounded_and_a_free_service_start_without_a_key(settings: dict[str, Any]) -> None:
    check_exposure(Settings(**PUBLIC | settings), has_keys=False)


@over_rows(
    ("settings", "fault"),
    [
        ({}, "HOST: 0.0.0.0 is not loopback"),
        ({"hosts": ("::",)}, "HOST: :: is not loopback"),
        ({"hosts": ("127.0.0.1", "::")}, "HOST: 127.0.0.1,:: is not loopback"),
        ({"hosts": ("images.example",)}, "HOST: images.example is not loopback"),
        ({"provider": "openai", "openai_api_url": "http://h"}, "HOST: "),
        ({"provider": "a1111", "a1111_url": "http://h"}, "HOST: "),
        ({"open_to_all": True}, "HOST: "),
        ({"budget_daily_micro_usd": 5_000_000}, "HOST: "),
        ({"on_render": True}, "HOST: "),
        ({"on_render": True, "hosts": ("127.0.0.1",)}, "RENDER: is set"),
    ],
)
def test_a_public_service_that_spends_money_needs_a_key(settings: dict[str, Any], fault: str) -> None:
    check_exposure(Settings(**PUBLIC | settings), has_keys=True)
    with pytest.raises(SettingsError) as refused:
        check_exposure(Settings(**PUBLIC | settings), has_keys=False)
    text = str(refused.value)
    assert text.startswith(fault)
    for remedy in ("API_KEYS=", "OPEN_TO_ALL=true together with BUDGET_DAILY_USD", "imagegen keys create"):
        assert remedy in text
    assert ("HOST=127.0.0.1" in text) is not settings.get("on_render", False)


@over_rows(
    ("address", "fault"),
    [
        ("http://hooks.example/x", "must be an https address"),
        ("https://127.0.0.1/x", "is refused"),
        ("https://[::1]:8443/x", "is refused"),
        ("https://10.1.2.3/x", "is refused"),
    ],
)
def test_alerts_go_only_where_webhooks_may(address: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=f"^ALERT_WEBHOOK: {fault}"):
        check_alert_webhook(Settings(alert_webhook=address))
    check_alert_webhook(Settings(alert_webhook=address, webhook_allow_private=True))
    check_alert_webhook(Settings(alert_webhook="https://hooks.example/x?token=1"))


def test_a_token_that_the_next_deploy_on_render_replaces_is_warned_of() -> None:
    (line,) = warnings(Settings(on_render=True))
    assert line.startswith("ADMIN_TOKEN is not set")
    assert list(warnings(Settings(on_render=True, admin_token="a-token-of-some-length"))) == []
    assert list(warnings(Settings())) == []


def test_a_store_that_holds_next_to_nothing_is_warned_of() -> None:
    (line,) = warnings(Settings(image_store_max_bytes=5))
    assert line.startswith("IMAGE_STORE_MAX_BYTES ")
    assert list(warnings(Settings(image_store_max_bytes=5, image_store="upstream"))) == []
    assert list(warnings(Settings(image_store_max_bytes=10_000_000))) == []


def test_tasks_that_a_change_to_another_redis_leaves_behind_are_warned_of(tmp_path: Path) -> None:
    (folder := tmp_path / "valkey-9" / "appendonlydir").mkdir(parents=True)
    (file := folder / "appendonly.aof.1.incr.aof").write_bytes(b"$6\r\nSELECT\r\n$1\r\n0\r\n")
    settings = Settings(data_dir=tmp_path, redis_url="redis://127.0.0.1")
    assert not list(warnings(settings))
    file.write_bytes(b"$3\r\nSET\r\n$48\r\n{imagegen}:task:0123456789abcdef0123456789abcdef\r\n")
    (warning,) = warnings(settings)
    assert f"the embedded Redis has in {tmp_path / 'valkey-9'} are not read" in warning
    assert not list(warnings(replace(settings, redis_url=None)))
    expired_s = time.time() - settings.result_ttl_s - settings.task_deadline_s - 60
    os.utime(file, (expired_s, expired_s))
    assert not list(warnings(settings))


def test_a_time_limit_that_cuts_off_paid_calls_of_openai_is_warned_of() -> None:
    openai = Settings(provider="openai", openai_api_url="https://api.openai.com/v1", openai_api_key="sk-x")
    (line,) = warnings(openai)
    assert line.startswith("UPSTREAM_TIMEOUT is 120 s")
    channel = Channel("main", "openai", base_url="https://api.openai.com/v1")
    assert len(list(warnings(Settings(file_channels=(channel,))))) == 1
    assert list(warnings(replace(openai, upstream_timeout_s=300.0))) == []
    assert list(warnings(replace(openai, openai_api_url="http://127.0.0.1:8000"))) == []


def test_the_sandbox_is_named_only_where_no_call_is_paid() -> None:
    drawn, paid = Channel("drawn", "sandbox"), Channel("paid", "together", base_url="https://api.together.xyz/v1")
    for channels, is_named in (((), True), ((drawn,), True), ((drawn, paid), False)):
        lines = overview(Settings(provider="sandbox", file_channels=channels), "http://localhost:3000", 5)
        assert any(line.startswith("The sandbox draws") for line in lines) is is_named


def test_a_setting_of_a_provider_that_the_file_of_channels_replaces_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "channels.toml"
    file.write_text('[[channels]]\nname = "a"\nprovider = "together"\nkeys = ["env:TOGETHER_API_KEY"]\n')
    used = {"CHANNELS_FILE": str(file), "TOGETHER_API_KEY": "k", "DATA_DIR": str(tmp_path)}
    assert list(warnings(Settings.load(used, dotenv=None))) == []
    lost = {"PROVIDER": "openai", "OPENAI_API_URL": "https://relay.example", "FAL_KEY": "k"}
    lines = list(warnings(Settings.load(used | lost, dotenv=None)))
    assert sorted(line.split()[0] for line in lines) == sorted(lost)
    assert all("CHANNELS_FILE" in line for line in lines)


ADMIN = "0123456789abcdef"


@over_rows(
    ("settings", "name", "other"),
    [
        ({"s3_bucket": "b"}, "S3_BUCKET", "IMAGE_STORE=s3"),
        ({"redis_url": "redis://h", "redis_server": "valkey-server"}, "REDIS_SERVER", "REDIS_URL"),
        ({"redis_url": "redis://h", "embedded_redis": "force"}, "EMBEDDED_REDIS=force", "REDIS_URL"),
        ({"webhook_sign_hosts": ("h",)}, "WEBHOOK_SIGN_HOSTS", "WEBHOOK_SECRET"),
        ({"open_to_all": True, "api_keys": {"web": "0" * 64}}, "OPEN_TO_ALL", "API_KEYS"),
        ({"admin_token": ADMIN, "api_keys": {"web": sha256(ADMIN.encode()).hexdigest()}}, "ADMIN_TOKEN", "API_KEYS"),
        ({"rate_limit_window_s": 0.06}, "RATE_LIMIT_WINDOW", "60 milliseconds"),
        ({"sandbox_delay_s": 120.0}, "SANDBOX_DELAY", "UPSTREAM_TIMEOUT"),
        (
            {"task_deadline_s": 60.0, "provider": "together", "together_api_key": "k"},
            "TASK_DEADLINE",
            "UPSTREAM_TIMEOUT",
        ),
    ],
)
def test_a_setting_that_another_one_makes_useless_is_a_warning(
    tmp_path: Path, settings: dict[str, Any], name: str, other: str
) -> None:
    (line,) = warnings(Settings(**{"data_dir": tmp_path} | settings))
    assert line.startswith(name)
    assert other in line
