"""Tasks over the end of a service process, for each signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.forked import ForkedProcess, run
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import (
    RUN,
    START_S,
    STREAMLESS,
    Service,
    at_once,
    calls_about,
    environment,
    eventually,
    in_flight,
    listens,
)

SIGNALLED_AT_ITS_IMPORT = """
import importlib.abc, os, sys
from imagegen.cli import main

class Signals(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "imagegen.process":
            os.kill(os.getpid(), number)

number = int(sys.argv.pop())
sys.meta_path.insert(0, Signals())
sys.exit(main())
"""


@pytest.fixture(scope="module")
def one_slot(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, WORKER_CONCURRENCY="1")


@pytest.fixture
def service(one_slot: Service) -> Service:
    """Return the service of this module, which a test may leave ended."""
    return one_slot if one_slot.is_running else one_slot.start()


def test_a_task_killed_during_its_call_completes_after_a_restart(service: Service, upstream: EmulatorProcess) -> None:
    prompt = "killed {{fault:hang times=1}}"
    done = service.made(prompt="done before")
    task_id = service.accepted(prompt=prompt)
    waiting = service.accepted(prompt="also there")
    eventually(lambda: in_flight(upstream, prompt))
    before = service.until(task_id, "processing")
    service.kill()
    began = time.monotonic()
    service.start()
    task = service.completed(task_id, within_s=30)
    print(f"taken over and done {time.monotonic() - began:.1f} s after the kill, lease 1 s")
    assert (task["attempts"], task["possiblyBilledTwice"]) == (2, 1)
    assert task["sequence"] > before["sequence"]
    assert service.get(task["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, prompt)) == 2
    assert service.completed(waiting)["status"] == "completed"
    assert service.submit(prompt="done before").json["cached"] is True
    assert service.get(f"/api/images/{done['taskId']}/0").status == 200


def test_no_answer_about_a_task_falls_behind_those_of_an_instance_that_was_killed(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, LEASE_SECONDS="30")
    prompt = "shown before the kill {{fault:hang times=1}}"
    task_id = service.accepted(prompt=prompt)
    eventually(lambda: in_flight(upstream, prompt))
    before = service.until(task_id, "processing")
    assert before["progress"] == 10
    service.kill()
    service.start()
    after = service.task(task_id)
    assert after["sequence"] > before["sequence"]
    assert (after["status"], after["reason"], after["attempts"]) == ("pending", "retrying", 1)
    listed = {state: service.get_as_admin(f"/api/images?status={state}").json for state in ("pending", "processing")}
    assert [task["taskId"] for task in listed["pending"]["tasks"]] == [task_id]
    assert listed["processing"]["tasks"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_running_task_is_finished_before_the_exit(
    service: Service, upstream: EmulatorProcess, number: signal.Signals
) -> None:
    prompt = f"at the end {number.name} {{{{fault:ok held=1}}}}"
    running = service.accepted(prompt=prompt)
    waiting = service.accepted(prompt=f"behind it {number.name}")
    eventually(lambda: in_flight(upstream, prompt))
    service.signal(number)
    eventually(lambda: service.get("/readyz").status == 503)
    refused = service.submit(prompt=f"too late {number.name}")
    assert refused.error == (503, "draining")
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.headers["Connection"].lower() == "close"
    assert service.get("/healthz").status == 200
    assert service.task(running)["status"] == "processing"
    upstream.release()
    assert service.wait() == 0
    service.check_log()
    service.start()
    assert service.task(running)["status"] == "completed"
    assert service.completed(waiting)["attempts"] == 1
    assert len(calls_about(upstream, prompt)) == len(calls_about(upstream, f"behind it {number.name}")) == 1
    assert service.get(f"/api/images/{running}/0").status == 200


def test_an_idle_service_ends_at_once(service: Service) -> None:
    began = time.monotonic()
    service.signal(signal.SIGTERM)
    assert service.wait() == 0
    took_s = time.monotonic() - began
    print(f"idle exit: {took_s:.2f} s")
    assert took_s < 15


def test_an_unfinished_task_is_released_and_completes_after_a_restart(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, DRAIN_SECONDS="0.3", LEASE_SECONDS="30")
    prompt = "too long for the drain {{fault:hang times=1}}"
    task_id = service.accepted(prompt=prompt)
    eventually(lambda: in_flight(upstream, prompt))
    service.signal(signal.SIGTERM)
    assert service.wait(15) == 0
    service.start()
    task = service.completed(task_id, within_s=20)
    assert task["possiblyBilledTwice"] == 1
    assert len(calls_about(upstream, prompt)) == 2


def test_repeated_signals_do_not_change_the_exit_code(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, str(RUN)], cwd=tmp_path, env=environment(tmp_path, {"PORT": str(port)}))
    try:
        eventually(lambda: listens(port), START_S)
        while process.poll() is None:
            process.terminate()
            time.sleep(0.001)  # so that the process gets on
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_begin_of_the_start_ends_it_without_a_word(tmp_path: Path, number: signal.Signals) -> None:
    begin = [sys.executable, "-c", SIGNALLED_AT_ITS_IMPORT, str(int(number))]
    environ = environment(tmp_path, {}) | {"PYTHONPATH": str(RUN.parent)}
    ended = subprocess.run(begin, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_signal_without_a_meaning_changes_nothing(service: Service) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        service.signal(number)
    eventually(lambda: "SIGUSR2 has no meaning" in service.log)
    assert service.made(prompt="after the signals")["attempts"] == 1


@pytest.mark.parametrize("closed", ["01", "2", "12"])
def test_closed_standard_streams_do_not_change_the_exit_code(tmp_path: Path, closed: str) -> None:
    environ = environment(tmp_path, {"PORT": "none"})
    assert run([str(STREAMLESS), closed], cwd=tmp_path, env=environ).returncode == 2


def test_a_full_disk_of_the_log_does_not_change_the_exit_code(tmp_path: Path) -> None:
    port = free_port()
    with Path("/dev/full").open("w") as full:
        environ = environment(tmp_path, {"PORT": str(port)})
        process = ForkedProcess([str(RUN)], cwd=tmp_path, env=environ, stdout=full, stderr=full)
    try:
        eventually(lambda: listens(port), START_S)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_the_service_at_once(service: Service, upstream: EmulatorProcess) -> None:
    prompt = "no patience {{fault:hang times=1}}"
    service.accepted(prompt=prompt)
    eventually(lambda: in_flight(upstream, prompt))
    service.signal(signal.SIGTERM)
    eventually(lambda: service.get("/readyz").status == 503)
    service.signal(signal.SIGTERM)
    assert service.wait(15) == 0


def test_a_task_that_two_stops_broke_off_shows_the_attempts_that_were_made(
    service: Service, upstream: EmulatorProcess
) -> None:
    prompt = "broken off twice {{fault:hang times=2}}"
    task_id = service.accepted(prompt=prompt)

    def runs(calls: int) -> bool:
        return len(calls_about(upstream, prompt)) == calls and in_flight(upstream, prompt)

    for calls in (1, 2):
        eventually(partial(runs, calls))
        service.signal(signal.SIGTERM)
        eventually(lambda: service.get("/readyz").status == 503)
        service.signal(signal.SIGTERM)
        assert service.wait(15) == 0
        service.start()
    eventually(lambda: service.task(task_id)["status"] == "failed")
    task = service.task(task_id)
    assert (task["error"]["code"], task["attempts"], task["possiblyBilledTwice"]) == ("interrupted", 2, 2)
    assert len(calls_about(upstream, prompt)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_hang_up_does_not_hasten_the_end(service: Service, upstream: EmulatorProcess, number: signal.Signals) -> None:
    prompt = f"closed terminal after {number.name} {{{{fault:ok held=1}}}}"
    running = service.accepted(prompt=prompt)
    eventually(lambda: in_flight(upstream, prompt))
    service.signal(number)
    eventually(lambda: service.get("/readyz").status == 503)
    service.signal(signal.SIGHUP)
    assert service.get("/healthz").status == 200
    upstream.release()
    assert service.wait(60) == 0
    service.start()
    assert service.task(running)["status"] == "completed"
    assert len(calls_about(upstream, prompt)) == 1


def test_two_instances_on_one_folder_are_one_service(start_service: StartService, upstream: EmulatorProcess) -> None:
    first: Service = start_service(upstream.url, LEASE_SECONDS="10")
    second: Service = start_service(upstream.url, LEASE_SECONDS="10")
    assert (len(first.children()), second.children()) == (1, [])
    order = {"prompt": "fifty over two {{fault:ok delay_s=0.3}}"}
    answers = at_once([partial((first, second)[number % 2].submit, **order) for number in range(50)])
    (task_id,) = {answer.json["taskId"] for answer in answers}
    assert [answer.headers["X-Cache"] for answer in answers].count("MISS") == 1
    for service in (first, second):
        task = service.completed(task_id)
        assert service.get(task["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, "fifty over two")) == 1


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_another_instance_restarts_the_redis_of_a_stopped_owner(
    start_service: StartService, upstream: EmulatorProcess, way: signal.Signals
) -> None:
    first: Service = start_service(upstream.url)
    second: Service = start_service(upstream.url)
    prompt = f"whose owner left {way} {{{{fault:ok held=1 times=1}}}}"
    task_id = first.accepted(prompt=prompt)
    eventually(lambda: in_flight(upstream, prompt))
    first.signal(way)
    upstream.release()
    first.wait()
    began = time.monotonic()
    eventually(lambda: len(second.children()) == 1, within_s=20)
    eventually(lambda: second.submit(prompt=f"left alone {way}").status in (200, 202), within_s=20)
    print(f"taken on {time.monotonic() - began:.2f} s after the exit")
    assert second.made(prompt=f"left alone {way}")["status"] == "completed"
    task = second.completed(task_id)
    assert len(calls_about(upstream, prompt)) == 1 + task.get("possiblyBilledTwice", 0)
