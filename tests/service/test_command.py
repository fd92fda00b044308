"""Tests of the command `imagegen` as a process: help, version, usage errors, and the doctor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from service.running import RUN, environment

from imagegen import __version__

STARTS = ([sys.executable, str(RUN)], [sys.executable, "-m", "imagegen"])


def run(
    folder: Path, *arguments: str, start: list[str] = STARTS[0], **settings: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    environ = environment(folder, settings) | {"PYTHONPATH": str(RUN.parent)}
    command = [*start, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("start", STARTS, ids=["run.py", "module"])
def test_version_and_help_start_no_service(tmp_path: Path, start: list[str]) -> None:
    version = run(tmp_path, "--version", start=start)
    assert (version.returncode, version.stdout) == (0, f"imagegen {__version__}\n")
    helped = run(tmp_path, "--help", start=start)
    assert helped.returncode == 0
    assert {"serve", "doctor"} <= set(helped.stdout.split())
    assert not (tmp_path / "data").exists()


def test_an_unknown_option_is_a_usage_error_that_names_the_setting(tmp_path: Path) -> None:
    ended = run(tmp_path, "--port", "4000")
    assert ended.returncode == 2
    assert "--port is no option: set PORT in the environment or in .env" in ended.stderr
    ended = run(tmp_path, "serve", "--redis-url=redis://127.0.0.1")
    assert ended.returncode == 2
    assert "set REDIS_URL in the environment" in ended.stderr
    assert run(tmp_path, "serv").returncode == 2
    assert not (tmp_path / "data").exists()


def test_the_doctor_passes_with_good_settings(tmp_path: Path) -> None:
    ended = run(tmp_path, "doctor")
    assert ended.returncode == 0, ended.stdout
    assert "FAULT" not in ended.stdout
    assert ended.stderr == ""


def test_the_doctor_names_each_fault_and_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('checked = 2020-01-31\nmodels = [{ id = "gone", ends = 2020-03-31, successor = "here" }]')
    ended = run(tmp_path, "doctor", MODELS_FILE=str(path), DEFAULT_MODEL="gone", REDIS_URL="redis://127.0.0.1:1")
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert any(line.startswith("warning: the model table was checked on 2020-01-31") for line in lines)
    assert any(line.startswith("FAULT: DEFAULT_MODEL: gone ended") and "set it to here" in line for line in lines)
    assert any(line.startswith("FAULT: REDIS_URL: Redis does not answer") for line in lines)
    assert lines[-1].startswith("2 faults")
    assert run(tmp_path, "doctor", "--models", MODELS_FILE=str(path)).returncode == 1


def test_the_doctor_names_every_wrong_setting(tmp_path: Path) -> None:
    ended = run(tmp_path, "doctor", PORT="many", LOG_FORMAT="xml")
    assert ended.returncode == 1
    assert "FAULT: PORT: " in ended.stdout
    assert "FAULT: LOG_FORMAT: " in ended.stdout


def test_a_bad_models_file_stops_the_start_with_one_message(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('models = [{ id = "mine", max_n = 0 }]')
    ended = run(tmp_path, MODELS_FILE=str(path))
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [f"MODELS_FILE: {path}: row 1 (mine): max_n must be at least 1"]
