"""Tests of `imagegen doctor`: what it finds, with an injected date, and the remedy in each finding."""

from __future__ import annotations

import asyncio
import re
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from imagegen import doctor
from imagegen.accounts.api_keys import ApiKey
from imagegen.accounts.key_store import KeyRing, KeyStore
from imagegen.doctor import Finding, check_all, check_models, check_table, embedded_server
from imagegen.doctor_probes import Probed
from imagegen.providers.model_rules import ModelRow, ModelTable
from imagegen.providers.model_table import MAX_AGE, load_table
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.settings import Settings
from tests.support import over_rows

CHECKED = date(2026, 11, 28)


@pytest.fixture(autouse=True)
def _no_call_to_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> Probed:
        return Probed()

    monkeypatch.setattr(doctor, "probe_provider", nothing)


OLD = ModelRow("old", "together", ends=date(2026, 12, 1), successor="new")


def table(*rows: ModelRow) -> ModelTable:
    return ModelTable(rows, "together", CHECKED)


def model_findings(today: date, **settings: Any) -> list[Finding]:
    return list(check_models(Settings(**settings), table(OLD), today))


def test_a_table_is_old_after_120_days() -> None:
    assert list(check_table(table(), CHECKED + MAX_AGE)) == []
    (finding,) = check_table(table(), CHECKED + MAX_AGE + timedelta(days=1))
    assert "checked on 2026-11-28, 121 days ago" in finding.text
    assert "install a newer version" in finding.text


def test_a_model_that_ended_since_the_check_is_found() -> None:
    before = ModelRow("before", "openai", ends=date(2026, 10, 23))
    assert list(check_table(table(before, OLD), date(2026, 11, 30))) == []
    (finding,) = check_table(table(before, OLD), date(2026, 12, 1))
    assert finding.text.startswith("old (together) ended on 2026-12-01")
    assert "its successor is new" in finding.text


def test_the_packaged_table_needs_no_work_on_the_day_of_its_check() -> None:
    packaged = load_table("together")
    assert list(check_table(packaged, packaged.checked)) == []


@over_rows(
    ("settings", "name", "fatal"),
    [
        ({"default_model": "old"}, "DEFAULT_MODEL", True),
        ({"default_model": "a", "model_aliases": {"a": "old"}}, "DEFAULT_MODEL", True),
        ({"model_aliases": {"a": "old"}}, "MODEL_ALIASES (a)", True),
        ({"fallback_models": ("old",)}, "FALLBACK_MODELS", False),
    ],
)
def test_an_ended_model_of_a_setting_is_found_with_its_remedy(
    settings: dict[str, Any], name: str, *, fatal: bool
) -> None:
    assert model_findings(date(2026, 10, 31), **settings) == []
    soon = model_findings(date(2026, 11, 30), **settings)
    assert soon[0] == Finding(f"{name}: old ends on 2026-12-01; its successor is new; set it to new")
    gone = model_findings(date(2026, 12, 1), **settings)
    assert gone[0] == Finding(f"{name}: old ended on 2026-12-01; its successor is new; set it to new", fatal)


def test_a_model_without_an_end_is_no_finding() -> None:
    assert model_findings(date(2099, 1, 1), default_model="other", fallback_models=("another",)) == []


def test_good_settings_have_no_findings(tmp_path: Path, redis_url: str) -> None:
    assert list(check_all(Settings(data_dir=tmp_path, redis_url=redis_url), CHECKED)) == []


def test_an_ended_model_that_no_setting_names_is_no_finding_for_an_operator(tmp_path: Path, redis_url: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text('checked = 2026-11-28\nmodels = [{ id = "old", provider = "openai", ends = 2026-12-01 }]')
    settings = Settings(data_dir=tmp_path, redis_url=redis_url, models_file=file)
    assert list(check_all(settings, date(2026, 12, 1))) == []


def test_redis_that_is_away_is_a_fault(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1")
    (finding,) = check_all(settings, CHECKED)
    assert finding.fatal
    assert finding.text.startswith("REDIS_URL: Redis does not answer")
    assert "start it, or check the address" in finding.text


def test_bad_files_and_folders_are_faults(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "models.toml").write_text("models = 5")
    settings = Settings(data_dir=tmp_path / "file", models_file=tmp_path / "models.toml")
    findings = list(check_all(settings, CHECKED))
    assert [finding.text.partition(":")[0] for finding in findings] == ["DATA_DIR", "MODELS_FILE"]
    assert all(finding.fatal for finding in findings)


def test_a_public_service_without_a_key_is_a_fault(tmp_path: Path, redis_url: str, prefix: str) -> None:
    public: dict[str, Any] = {"hosts": ("0.0.0.0",), "provider": "together", "together_api_key": "k"}
    settings = Settings(data_dir=tmp_path, redis_url=redis_url, redis_prefix=prefix, **public)
    (finding,) = check_all(settings, CHECKED)
    assert finding.fatal
    assert finding.text.startswith("HOST: 0.0.0.0 is not loopback")
    asyncio.run(make_key(redis_url, prefix))
    assert list(check_all(settings, CHECKED)) == []


async def make_key(redis_url: str, prefix: str) -> None:
    connection = Connection(redis_url, prefix=prefix)
    await KeyStore(connection, Keys(prefix), KeyRing()).create(ApiKey("web"))
    await connection.close()


def test_a_public_service_on_the_embedded_redis_is_a_finding(tmp_path: Path) -> None:
    public: dict[str, Any] = {"hosts": ("0.0.0.0",), "provider": "together", "together_api_key": "k"}
    (finding,) = check_all(Settings(data_dir=tmp_path, **public), CHECKED)
    assert not finding.fatal
    assert "imagegen keys list" in finding.text


def test_a_missing_program_of_the_embedded_server_is_a_fault(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, redis_server=str(tmp_path / "nothing"))
    (finding,) = check_all(settings, CHECKED)
    assert finding.fatal
    assert finding.text.startswith("REDIS_SERVER: ")
    assert embedded_server(settings) is None


def test_the_embedded_server_is_named_with_its_version(tmp_path: Path) -> None:
    assert re.match(r"(valkey|redis) \d+\.\d+\.\d+ \(/", embedded_server(Settings(data_dir=tmp_path)) or "")
    assert embedded_server(Settings(data_dir=tmp_path, redis_url="redis://h")) is None
