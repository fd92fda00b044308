"""Tests of the command `imagegen` as a process: help, version, usage errors, and the doctor."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from imagegen import __version__
from tests.service.running import RUN, environment, run, run_to_its_end

STARTS = ([sys.executable, str(RUN)], [sys.executable, "-m", "imagegen"])


@pytest.mark.parametrize("start", STARTS, ids=["run.py", "module"])
def test_version_and_help_start_no_service(tmp_path: Path, start: list[str]) -> None:
    version = run(tmp_path, "--version", start=start)
    assert (version.returncode, version.stdout) == (0, f"imagegen {__version__}\n")
    helped = run(tmp_path, "--help", start=start)
    assert helped.returncode == 0
    assert {"serve", "doctor"} <= set(helped.stdout.split())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("generate", "--help"), ("serve", "--help")])
def test_help_imports_nothing_but_the_parser_so_that_it_starts_at_once(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ended = run(tmp_path, *arguments, start=[sys.executable, "-X", "importtime", str(RUN)])
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.returncode == 0
    assert {name for name in imported if name.partition(".")[0] == "imagegen"} == {"imagegen", "imagegen.cli"}
    assert not imported & {"aiohttp", "asyncio", "httpx", "loguru", "msgspec", "orjson", "redis", "rich"}


def test_a_missing_package_is_named_with_the_command_that_installs_it_for_this_python(tmp_path: Path) -> None:
    without = "import sys; sys.modules['httpx'] = None; from imagegen.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = run(tmp_path, "generate", "a fox", start=[sys.executable, "-c", without])
    assert ended.returncode == 1
    assert ended.stderr == f"imagegen generate needs httpx: {sys.executable} -m pip install httpx\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "4000"), "--port is no option: set PORT in the environment or in .env"),
        (("--host=0.0.0.0",), "--host is no option: set HOST in the environment or in .env"),
        (("serve", "--redis-url=redis://127.0.0.1"), "set REDIS_URL in the environment"),
        (("generate", "a", "--data-dir", "d"), "set DATA_DIR in the environment"),
        (("--workers", "4"), "unrecognized arguments: --workers"),
        (("doctor", "-x"), "unrecognized arguments: -x"),
        (("serv",), "invalid choice: 'serv'"),
    ],
)
def test_unknown_options_and_commands_are_usage_errors_and_start_nothing(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = run(tmp_path, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert not (tmp_path / "data").exists()


def test_the_doctor_passes_with_good_settings(tmp_path: Path) -> None:
    ended = run(tmp_path, "doctor")
    assert ended.returncode == 0, ended.stdout
    assert "FAULT" not in ended.stdout
    assert ended.stderr == ""


def test_a_bad_models_file_stops_the_start_with_one_message(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('models = [{ id = "mine", max_n = 0 }]')
    ended = run_to_its_end(tmp_path, MODELS_FILE=str(path))
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [f"MODELS_FILE: {path}: row 1 (mine): max_n must be at least 1"]


@pytest.mark.parametrize("command", ["doctor", "keys list", "keys create name", "usage"])
def test_ctrl_c_ends_a_command_that_waits_for_redis_without_a_traceback(
    tmp_path: Path, command: str, interruptible: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"REDIS_URL": f"redis://127.0.0.1:{silent.getsockname()[1]}"}
        process = subprocess.Popen(
            [sys.executable, str(RUN), *command.split()],
            cwd=tmp_path,
            env=environment(tmp_path, settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert "Traceback" not in output


@pytest.mark.parametrize(("arguments", "code"), [((), 0), (("serve",), 0), (("doctor",), 130)])
def test_ctrl_c_within_the_first_imports_has_no_traceback(
    tmp_path: Path, arguments: tuple[str, ...], code: int, interruptible: None
) -> None:
    interrupting = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "loguru":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from imagegen.cli import main
sys.exit(main(sys.argv[1:]))
"""
    ended = run(tmp_path, *arguments, start=[sys.executable, "-c", interrupting])
    assert (ended.returncode, ended.stderr) == (code, "")
