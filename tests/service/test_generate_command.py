"""Tests of `imagegen generate` as a process: with the service in the process, and against a running one."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests import forked
from tests.emulator_fixtures import EmulatorProcess
from tests.forked import ForkedProcess, PipedProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import KEY, RUN, Service, calls_about, environment, eventually

PNG = b"\x89PNG\r\n\x1a\n"


def run(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return forked.run([str(RUN), "generate", *arguments], cwd=folder, env=environment(folder, settings))


@pytest.fixture(scope="module")
def service(start_for_module: StartService) -> Service:
    return start_for_module(SANDBOX_DELAY="0.05")


def test_images_are_made_in_this_process_and_only_their_paths_are_printed(tmp_path: Path) -> None:
    ended = run(tmp_path, "A red fox, in the snow!", "-n", "2", "--size", "128x64", "--out", "made")
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == [f"made/a-red-fox-in-the-snow-{index}.png" for index in (0, 1)]
    assert all((tmp_path / path).read_bytes().startswith(PNG) for path in ended.stdout.splitlines())
    assert "sandbox" in ended.stderr
    assert "completed, cost $0.00" in ended.stderr
    again = run(tmp_path, "A red fox, in the snow!", "-n", "2", "--size", "128x64", "--out", "made")
    assert "generated before, costs nothing" in again.stderr
    assert sorted(again.stdout.splitlines()) == sorted(ended.stdout.splitlines())
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_a_running_service_makes_them_too_with_input_images(service: Service, tmp_path: Path) -> None:
    first = run(tmp_path, "einen Käfer", "--url", service.url, "--seed", "7")
    assert first.returncode == 0, first.stderr
    (path,) = first.stdout.split()
    assert path == "einen-käfer-0.png"
    edited = run(tmp_path, "--url", service.url, "--json", "--image", path, path, "blau")
    assert edited.returncode == 0, edited.stderr
    view = json.loads(edited.stdout)
    assert (view["success"], view["status"], view["cached"]) == (True, "completed", False)
    assert [image["path"] for image in view["images"]] == ["blau-0.png"]
    assert view["cost"]["charged"] == 0


def test_an_image_with_other_bytes_is_not_overwritten(service: Service, tmp_path: Path) -> None:
    (tmp_path / "owl-0.png").write_bytes(b"mine")
    assert run(tmp_path, "owl", "--url", service.url).stdout == "owl-0-2.png\n"
    assert (tmp_path / "owl-0.png").read_bytes() == b"mine"


def test_images_are_saved_although_the_reader_of_their_paths_is_gone(service: Service, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(RUN), "generate", "unread", "-n", "2", "--url", service.url]
    with TemporaryFile("w+") as stderr:
        process = ForkedProcess(command, cwd=tmp_path, env=environment(tmp_path, {}), stdout=writing, stderr=stderr)
        os.close(writing)
        assert process.wait(60) == 0
        stderr.seek(0)
        assert "Broken pipe" not in stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unread-0.png", "unread-1.png"]


def test_keys_and_rate_limits_of_a_service_are_told(start_service: StartService, tmp_path: Path) -> None:
    limits = {"IMAGE_RATE_LIMIT_MAX": "1", "RATE_LIMIT_WINDOW": "8000"}
    service = start_service(API_KEYS="web:a-key-of-32-characters-for-tests", **limits)
    ended = run(tmp_path, "mine", "--url", service.url)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "give one with --key" in ended.stderr
    by_key = "--url", service.url, "--key", "a-key-of-32-characters-for-tests"
    numbers = itertools.count()

    def has_waited() -> bool:
        """Return whether a command came within the window of another submit, which may have ended before."""
        number = next(numbers)
        service.request("POST", "/api/images/generate", {"prompt": "first"}, headers={"X-API-Key": by_key[-1]})
        ended = run(tmp_path, f"second {number}", *by_key)
        assert (ended.returncode, ended.stdout) == (0, f"second-{number}-0.png\n")
        return bool(re.search("waiting [0-9]+ s: rate limited", ended.stderr))

    eventually(has_waited, within_s=60)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "PROMPT is required"),
        (("a", "--size", "big"), "no size in pixels"),
        (("a", "--image", "absent.png"), "absent.png is no file"),
        (("a", "--key", "k"), "--key is of no use without --url"),
        (("a", "--url", "service"), "base_url must be"),
        (("a", "--out", "file/below"), "--out: file/below can't be written to"),
    ],
)
def test_wrong_options_are_usage_errors_before_anything_is_paid(
    tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    (tmp_path / "file").touch()
    ended = run(tmp_path, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert text in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_field_that_the_service_refuses_is_a_usage_error_and_a_failed_task_is_none(
    service: Service, tmp_path: Path
) -> None:
    ended = run(tmp_path, "a", "--size", "100x99", "--url", service.url)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "height" in ended.stderr
    failed = run(tmp_path, "a [fail:content_policy]", "--url", service.url, "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["error"]["code"] == "content_policy"
    assert "Traceback" not in failed.stderr


def test_wrong_settings_and_a_service_that_is_away_have_their_exit_codes(tmp_path: Path) -> None:
    wrong = run(tmp_path, "a", PORT="many")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("PORT: ")
    away = run(tmp_path, "a", "--url", f"http://127.0.0.1:{free_port()}")
    assert (away.returncode, away.stdout) == (1, "")
    assert "no response of the service" in away.stderr


@contextmanager
def interrupted(folder: Path, *arguments: str, **settings: str) -> Iterator[list[str]]:
    """Run until the task is submitted, let the caller act, then press Ctrl-C; check the exit code."""
    reading, writing = os.pipe()
    environ, command = environment(folder, settings), [str(RUN), "generate", *arguments]
    with TemporaryFile("w+") as stdout, os.fdopen(reading) as stderr:
        process = ForkedProcess(command, cwd=folder, env=environ, stdout=stdout, stderr=writing)
        os.close(writing)
        lines: list[str] = []
        try:
            for line in stderr:
                lines.append(line)
                if re.match("[0-9a-f]{32}: ", line):
                    break
            yield lines
            process.send_signal(signal.SIGINT)
            rest = stderr.read()
            lines += rest.splitlines()
            assert process.wait(60) == 130
            stdout.seek(0)
            assert stdout.read() == ""
            assert "Traceback" not in rest
        finally:
            process.kill()


def test_ctrl_c_cancels_the_task(service: Service, tmp_path: Path) -> None:
    with interrupted(tmp_path, "stop [slow:60]", "--url", service.url) as lines:
        task_id = lines[-1].partition(":")[0]
    assert service.task(task_id)["status"] == "cancelled"
    assert any(line.endswith("is cancelled") for line in lines)
    with interrupted(tmp_path, "stop here [slow:60]") as lines:
        pass
    assert any(line.endswith("is cancelled") for line in lines)


def test_ctrl_c_leaves_the_task_of_another_client(service: Service, tmp_path: Path) -> None:
    task_id = service.accepted(prompt="theirs [slow:60]")
    with interrupted(tmp_path, "theirs [slow:60]", "--url", service.url) as lines:
        pass
    assert any("goes on: another client submitted it" in line for line in lines)
    eventually(lambda: service.task(task_id)["status"] == "processing")
    service.request("DELETE", f"/api/images/{task_id}")


def test_the_provider_of_the_settings_is_paid_once_for_the_same_command(
    upstream: EmulatorProcess, tmp_path: Path
) -> None:
    keyed = {"TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream.url}
    for _ in range(2):
        ended = run(tmp_path, "paid owl", "--size", "256x256", **keyed)
        assert (ended.returncode, ended.stdout) == (0, "paid-owl-0.png\n"), ended.stderr
        assert "sandbox" not in ended.stderr
        assert KEY not in ended.stderr
    assert len(calls_about(upstream, "paid owl")) == 1


def test_no_command_takes_the_tasks_of_a_running_service_with_another_provider(
    upstream: EmulatorProcess, start_service: StartService, tmp_path: Path
) -> None:
    upstream.script({"fault": "hang", "match": "theirs", "for_s": 60})
    service = start_service(upstream.url, WORKER_CONCURRENCY="1")
    shared = service.settings["DATA_DIR"]
    task_ids = [service.accepted(prompt=f"theirs {number}") for number in range(3)]
    drawn = run(tmp_path, "mine", DATA_DIR=shared)
    assert drawn.returncode == 0, drawn.stderr
    assert {service.task(task_id)["status"] for task_id in task_ids} <= {"pending", "processing"}
    keyed = {"TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream.url}
    refused = run(tmp_path, "mine", DATA_DIR=shared, **keyed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "give the address of the service with --url" in refused.stderr
    for task_id in task_ids:
        service.request("DELETE", f"/api/images/{task_id}")


def test_with_a_bar_on_the_terminal_stdout_has_the_paths_alone(service: Service, tmp_path: Path) -> None:
    terminal, inner = pty.openpty()
    environ = environment(tmp_path, {"TERM": "xterm"})
    command = [str(RUN), "generate", "bar [slow:0.5]", "--url", service.url]
    shown = b""
    with PipedProcess(command, cwd=tmp_path, env=environ, stderr=inner) as process:
        os.close(inner)
        with suppress(OSError):  # the end of a terminal is an error on Linux
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        assert (process.wait(60), process.stdout.read()) == (0, "bar-slow-0-5-0.png\n")
    assert b"%" in shown
    assert b"completed, cost $0.00" in shown
    assert b"bar-slow" not in shown
