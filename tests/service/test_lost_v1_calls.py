"""Calls on `/v1` that are lost with their instance: another instance recognizes the repeat, though it has no mark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import Answer, Service, calls_about, eventually, in_flight, redis_server

Start = Callable[..., Service]
KILLABLE = Path(__file__).resolve().parents[1] / "faults" / "instance.py"
"""Program of an instance that kills itself at the step in `KILL_FILE`."""


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    (folder := tmp_path / "redis").mkdir()
    with redis_server(folder, port := free_port()):
        yield f"redis://127.0.0.1:{port}"


def call(service: Service, prompt: str) -> Answer:
    return service.request("POST", "/v1/images/generations", {"prompt": prompt, "size": "512x512"})


def knows_peers(service: Service, count: int) -> bool:
    return bool(service.get_as_admin("/api/stats").json["instance"]["instances"] == count + 1)


@pytest.mark.parametrize("others", [1, 2])
def test_a_repeat_without_a_mark_joins_the_task_of_a_call_that_was_lost_with_its_instance(
    start_service: Start, upstream: EmulatorProcess, redis_url: str, others: int
) -> None:
    text = f"lost beside {others}"
    prompt = f"{text} {{{{fault:ok held=1 times=1}}}}"
    victim = start_service(upstream.url, REDIS_URL=redis_url)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(call, victim, prompt)
        eventually(lambda: in_flight(upstream, text))
        alive = [start_service(upstream.url, REDIS_URL=redis_url) for _ in range(others)]
        eventually(lambda: all(knows_peers(service, others) for service in alive))
        victim.kill()
        assert isinstance(lost.exception(), OSError)
    repeated = call(alive[0], prompt)
    assert (repeated.status, len(calls_about(upstream, text))) == (200, 2)
    (task,) = alive[0].get_as_admin("/api/images").json["tasks"]
    assert alive[0].task(task["taskId"])["possiblyBilledTwice"] == 1


@pytest.mark.parametrize("others", [0, 1])
def test_a_repeat_without_a_mark_gets_the_image_of_an_instance_that_died_before_it_answered(
    start_service: Start, upstream: EmulatorProcess, redis_url: str, tmp_path: Path, others: int
) -> None:
    text, settings = f"died with its image beside {others}", {"REDIS_URL": redis_url}
    prompt = f"{text} {{{{fault:ok held=1 times=1}}}}"
    (kill_file := tmp_path / "kill").write_text("finish.after")
    victim = start_service(upstream.url, program=KILLABLE, KILL_FILE=str(kill_file), **settings)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(call, victim, prompt)
        eventually(lambda: in_flight(upstream, text))
        alive = [start_service(upstream.url, **settings) for _ in range(others)]
        eventually(lambda: all(knows_peers(service, others) for service in alive))
        upstream.release()
        assert isinstance(lost.exception(), OSError)
    (repeated,) = alive or [start_service(upstream.url, **settings)]
    first = call(repeated, prompt)
    assert (first.status, len(calls_about(upstream, text))) == (200, 1)
    (task,) = repeated.get_as_admin("/api/images").json["tasks"]
    assert repeated.task(task["taskId"]).get("possiblyBilledTwice") is None
    second = call(repeated, prompt)
    assert (second.status, len(calls_about(upstream, text))) == (200, 2)
    assert second.json["data"] != first.json["data"]


def test_a_call_after_an_answered_one_is_another_image_though_its_instance_was_stopped(
    start_service: Start, upstream: EmulatorProcess, redis_url: str
) -> None:
    first = start_service(upstream.url, REDIS_URL=redis_url)
    assert call(first, "answered before the stop").status == 200
    first.end()
    second = start_service(upstream.url, REDIS_URL=redis_url)
    assert call(second, "answered before the stop").status == 200
    assert len(calls_about(upstream, "answered before the stop")) == 2


def test_a_call_after_an_answered_one_is_another_image_though_another_instance_was_killed(
    start_service: Start, upstream: EmulatorProcess, redis_url: str
) -> None:
    services = [start_service(upstream.url, REDIS_URL=redis_url) for _ in range(3)]
    eventually(lambda: all(knows_peers(service, 2) for service in services))
    assert call(services[0], "answered beside a killed one").status == 200
    services[2].kill()
    assert call(services[1], "answered beside a killed one").status == 200
    assert len(calls_about(upstream, "answered beside a killed one")) == 2
