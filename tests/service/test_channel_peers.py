"""Instances with different channels on one Redis: tasks go to the one that serves them, at a bounded cost."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.service.running import Service, eventually, redis_server
from tests.service.scripted_channels import GOOD, SCHNELL, Start, Upstream, channel, serving, write

COUNT = 40
MODELS = ("mine", "theirs")

StartPair = Callable[..., tuple[Upstream, Service, Service]]


@pytest.fixture
def shared_redis(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder, port):
        yield f"redis://127.0.0.1:{port}"


def serving_only(
    start_service: Start, redis_url: str, folder: Path, upstream: Upstream, model: str, lease_s: float
) -> Service:
    """Start an instance whose only channel serves one model."""
    file = write(folder / f"{model}.toml", channel(model, upstream.url, GOOD, models=[f"{model}={SCHNELL}"]))
    settings = {"REDIS_URL": redis_url, "DATA_DIR": str(folder / "data"), "LEASE_SECONDS": f"{lease_s:g}"}
    return start_service(CHANNELS_FILE=file, **settings)


@pytest.fixture
def start_pair(start_service: Start, shared_redis: str, tmp_path: Path) -> Iterator[StartPair]:
    """Start an upstream and two instances on one Redis: `mine` and `theirs` are the only models that they serve."""
    with ExitStack() as stack:

        def start(delay_s: float = 0.0, lease_s: float = 10.0) -> tuple[Upstream, Service, Service]:
            stack.enter_context(serving(upstream := Upstream(delay_s=delay_s)))
            one, other = (
                serving_only(start_service, shared_redis, tmp_path, upstream, model, lease_s) for model in MODELS
            )
            for service in (one, other):  # before the upstream, of which one would await an answer
                stack.callback(service.end)
            return upstream, one, other

        yield start


def commands(service: Service, purpose: str) -> int:
    text = service.get_as_admin("/metrics").body.decode()
    (count,) = re.findall(rf'imagegen_redis_commands_total{{purpose="{purpose}"}} ([0-9.]+)', text)
    return int(float(count))


def knows(service: Service, model: str) -> bool:
    """Return whether an instance has heard of another one that serves a model."""
    return service.submit(prompt="a question", model=model).status in (200, 202)


def test_a_sandbox_and_a_paid_instance_on_one_redis_each_run_their_own_tasks(
    start_service: Start, shared_redis: str
) -> None:
    upstream = Upstream()
    with serving(upstream):
        shared = {"REDIS_URL": shared_redis, "LEASE_SECONDS": "10"}
        sandbox = start_service(**shared)
        paid = start_service(**shared, TOGETHER_API_KEY=GOOD, TOGETHER_API_URL=upstream.url)
        drawn = [sandbox.accepted(prompt=f"drawn {number}") for number in range(10)]
        bought = [paid.accepted(prompt=f"bought {number}") for number in range(10)]
        assert {paid.completed(task_id)["channel"] for task_id in bought} == {"together"}
        assert {sandbox.completed(task_id)["channel"] for task_id in drawn} == {"sandbox"}
        assert len(upstream.calls) == 10


def test_many_tasks_of_another_instance_are_handed_to_it_once(start_pair: StartPair) -> None:
    upstream, one, other = start_pair(delay_s=0.05)
    eventually(lambda: knows(one, "theirs"))
    ids = [one.accepted(prompt=f"left {number}", model="theirs") for number in range(COUNT)]
    tasks = [other.completed(task_id, 60) for task_id in ids]
    assert {(task["channel"], task["attempts"]) for task in tasks} == {("theirs", 1)}
    assert len(upstream.calls) == COUNT + 1
    assert commands(one, "release") == 0
    moves = sum(commands(service, name) for service in (one, other) for name in ("control", "takeover"))
    assert moves <= 8 * COUNT


def test_an_instance_that_just_started_takes_tasks_for_models_of_the_others(start_pair: StartPair) -> None:
    _, one, other = start_pair()
    one.signal(signal.SIGTERM)
    one.wait()
    other.signal(signal.SIGSTOP)  # so that it answers no greeting
    try:
        one.start(ready=False)
        task_id = one.accepted(prompt="for another", model="theirs")
    finally:
        other.signal(signal.SIGCONT)
    assert other.completed(task_id)["channel"] == "theirs"
    eventually(lambda: one.answers("/readyz"))
    assert one.submit(prompt="a", model="none").error == (400, "invalid_request")


def test_a_model_that_no_instance_serves_is_refused_although_there_are_others(start_pair: StartPair) -> None:
    _, one, other = start_pair()
    eventually(lambda: knows(one, "theirs") and knows(other, "mine"))
    for service in (one, other):
        refused = service.submit(prompt="a", model="none")
        assert refused.error == (400, "invalid_request")
        assert refused.json["details"][0]["field"] == "model"


def test_tasks_for_an_instance_that_was_killed_wait_for_the_next_one(start_pair: StartPair) -> None:
    _, one, other = start_pair(delay_s=0.3, lease_s=1.0)
    eventually(lambda: knows(one, "theirs"))
    ids = [one.accepted(prompt=f"left {number}", model="theirs") for number in range(10)]
    other.kill()
    other.wait()
    other.start()
    assert {one.completed(task_id, 90)["status"] for task_id in ids} == {"completed"}
    assert one.made(prompt="its own", model="mine")["channel"] == "mine"


def test_equal_bytes_are_refused_once_no_instance_serves_their_model(start_pair: StartPair) -> None:
    _, one, other = start_pair()
    eventually(lambda: knows(one, "theirs"))
    assert knows(one, "theirs")
    other.signal(signal.SIGTERM)
    other.wait()
    eventually(lambda: one.submit(prompt="another question", model="theirs").status == 400)
    assert one.submit(prompt="a question", model="theirs").error == (400, "invalid_request")


def test_an_instance_that_can_not_reach_the_upstream_gives_its_tasks_to_one_that_can(
    start_service: Start, shared_redis: str
) -> None:
    upstream = Upstream(delay_s=0.1)
    with serving(upstream):
        shared = {"REDIS_URL": shared_redis, "TOGETHER_API_KEY": GOOD, "IMAGE_STORE": "redis"}
        cut_off = start_service(**shared, TOGETHER_API_URL=f"http://127.0.0.1:{free_port()}")
        healthy = start_service(**shared, TOGETHER_API_URL=upstream.url)
        tasks = [cut_off.accepted(prompt=f"one {number}") for number in range(COUNT)]
        assert {healthy.completed(task_id)["status"] for task_id in tasks} == {"completed"}
        assert len(upstream.calls) == COUNT
