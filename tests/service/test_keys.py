"""Tests of `imagegen keys` as a process, with and without a running service."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests.forked import ForkedProcess
from tests.ports import free_port
from tests.service.running import RUN, STREAMLESS, Service, environment, eventually, redis_server, run, run_to_its_end

StartService = Callable[..., Service]

SECRET = re.compile(r"ig_[A-Za-z0-9_-]{43}\n")


def keys(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run the command; return its exit code and both outputs."""
    ended = run(folder, "keys", *arguments, **settings)
    return ended.returncode, ended.stdout, ended.stderr


def status(service: Service, secret: str) -> int:
    headers = {"Authorization": f"Bearer {secret.strip()}"}
    return service.request("GET", "/api/models", headers=headers).status


def test_keys_are_made_before_the_start_and_changed_while_the_service_runs(
    start_service: StartService, tmp_path: Path
) -> None:
    settings = {"DATA_DIR": str(tmp_path / "data"), "RATE_LIMIT_MAX": "0"}
    code, secret, note = keys(
        tmp_path, "create", "web", "--rate", "60", "--models", "flux*, x", "--expires", "90d", **settings
    )
    assert code == 0
    assert SECRET.fullmatch(secret)
    assert secret.strip() not in note
    code, listed, _ = keys(tmp_path, "list", **settings)
    assert (code, listed.split("  ")[:3]) == (0, ["web", "rate=60", "models=flux*,x"])
    assert "ig_" not in listed

    service = start_service(**settings)
    assert service.get("/api/models").status == 401
    assert status(service, secret) == 200
    _, rotated, _ = keys(tmp_path, "rotate", "web", "--grace", "1h", **settings)
    assert SECRET.fullmatch(rotated)
    eventually(lambda: status(service, rotated) == 200, 10.0)
    assert status(service, secret) == 200
    assert keys(tmp_path, "revoke", "web", **settings)[0] == 0
    eventually(lambda: status(service, rotated) == 200, 10.0)  # without any key, loopback is open to all
    assert service.get("/api/models").status == 200
    assert secret.strip() not in service.log
    assert rotated.strip() not in service.log


def test_a_wrong_use_and_a_failure_have_their_own_exit_codes(tmp_path: Path) -> None:
    settings = {"DATA_DIR": str(tmp_path / "data"), "API_KEYS": "fixed:12345678"}
    assert keys(tmp_path, "create", "fixed", **settings)[0] == 1
    assert keys(tmp_path, "revoke", "none", **settings)[0] == 1
    code, output, note = keys(tmp_path, "create", "a b", "--rate", "0", "--expires", "soon", **settings)
    assert (code, output) == (2, "")
    assert [line.partition(":")[0] for line in note.splitlines()] == ["NAME", "--rate", "--expires"]
    assert keys(tmp_path, "burn", "a", **settings)[0] == 2
    assert keys(tmp_path, "list", REDIS_URL="redis://127.0.0.1:1")[0] == 1


def test_a_public_service_starts_only_once_there_is_a_key(start_service: StartService, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        port = str(free.getsockname()[1])
    settings = {"DATA_DIR": str(tmp_path / "data"), "HOST": "0.0.0.0", "TOGETHER_API_KEY": "k", "PORT": port}
    ended = run_to_its_end(tmp_path / "refused", **settings)
    assert ended.returncode == 2
    assert "API_KEYS" in ended.stderr
    assert "imagegen keys create" in ended.stderr
    _, secret, _ = keys(tmp_path, "create", "web", **settings)
    service = start_service(**settings)
    assert service.get("/api/models").status == 401
    assert service.request("GET", "/api/images/x", headers={"X-API-Key": secret.strip()}).status == 404


def without_stdout(folder: Path, program: Sequence[str], *arguments: str, **settings: str) -> tuple[int, str]:
    """Run a command with a stdout that takes nothing; return its exit code and its errors."""
    command, environ = [*program, *arguments], environment(folder, settings)
    with Path("/dev/full").open("w") as full, TemporaryFile("w+") as stderr:
        code = ForkedProcess(command, cwd=folder, env=environ, stdout=full, stderr=stderr).wait(90)
        stderr.seek(0)
        return code, stderr.read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("program", [[str(RUN)], [str(STREAMLESS), "1"]], ids=["full", "closed"])
def test_a_secret_that_cannot_be_printed_is_an_error_with_the_way_to_another_one(
    tmp_path: Path, program: list[str]
) -> None:
    settings = {"DATA_DIR": str(tmp_path / "data")}
    code, errors = without_stdout(tmp_path, program, "keys", "create", "web", **settings)
    assert (code, errors.count("\n")) == (1, 2)
    assert "stdout can't be written" in errors
    remedy = errors.partition("`imagegen keys ")[2].partition("`")[0].split()
    assert remedy[:2] == ["rotate", "web"]
    code, secret, _ = keys(tmp_path, *remedy, **settings)
    assert (code, bool(SECRET.fullmatch(secret))) == (0, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["keys list", "usage --json", "doctor --models"])
def test_a_command_that_cannot_print_its_result_fails_with_one_line(tmp_path: Path, command: str) -> None:
    settings = {"DATA_DIR": str(tmp_path / "data"), "API_KEYS": "fixed:12345678", "PYTHONUNBUFFERED": "1"}
    ended = without_stdout(tmp_path, [str(RUN)], *command.split(), **settings)
    assert ended == (1, "stdout can't be written (No space left on device)\n")


def test_a_redis_that_refuses_a_command_is_not_called_silent(tmp_path: Path) -> None:
    port = free_port()
    with redis_server(tmp_path, port, "--maxmemory", "1"):
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}"}
        code, _, errors = keys(tmp_path, "create", "web", **settings)
        assert (code, errors.count("\n")) == (1, 1)
        assert errors.startswith("Redis refuses the command now (OutOfMemoryError")
        report = run(tmp_path, "doctor", **settings)
        assert report.returncode == 1
        assert "FAULT: REDIS_URL: Redis refuses commands now" in report.stdout
