"""Redis Cluster of three real nodes: any of them in REDIS_URL, a slot that moves under load, a node that dies."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import Service, eventually
from tests.service.topology import Cluster, bundled, cluster, debian, kill, url_of
from tests.support import eventually as until
from tests.support import submission

StartService = Callable[..., Service]


@pytest.fixture(scope="module", params=["Valkey 9", "Redis 7.0"])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    program = bundled() if request.param == "Valkey 9" else debian()
    with cluster(tmp_path_factory.mktemp("cluster"), program=program) as nodes:
        yield nodes


def submit_all(services: list[Service], prompts: list[str]) -> tuple[list[str], Counter[int]]:
    """Submit each prompt until it is accepted, from eight clients; return the ids and the count of each status."""
    statuses: Counter[int] = Counter()

    def submit(number: int) -> str:
        while True:
            answer = services[number % len(services)].submit(prompt=prompts[number])
            statuses[answer.status] += 1
            if answer.status in (200, 202):
                return str(answer.json["taskId"])
            assert answer.error == (503, "queue_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
            time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(submit, range(len(prompts)))), statuses


@pytest.mark.parametrize("tasks", [120, pytest.param(1000, marks=pytest.mark.faults)])
def test_slot_migrations_under_load_lose_no_task_and_pay_nothing_twice(
    start_service: StartService, upstream: EmulatorProcess, nodes: Cluster, tasks: int
) -> None:
    services = [
        start_service(upstream.url, REDIS_URL=url_of(node), WORKER_CONCURRENCY="20", LEASE_SECONDS="10")
        for node in (nodes.others[0], nodes.owner)
    ]
    prompts = [f"moved {tasks} {nodes.nodes[0]!r} {number}" for number in range(tasks)]
    calls_before = len(upstream.ledger()["calls"])
    accepted, moved = threading.Event(), [0]

    def migrate() -> None:
        while not accepted.wait(0.2) or not sum(moved):  # all may be accepted within the first wait
            moved.append(nodes.migrate(nodes.others[len(moved) % 2], pause_s=0.002))
            eventually(nodes.agree)

    mover = threading.Thread(target=migrate)
    mover.start()
    try:
        ids, _ = submit_all(services, prompts)
    finally:
        accepted.set()
        mover.join()
    assert sum(moved) > 0
    finished = [services[number % 2].finished(task_id)["status"] for number, task_id in enumerate(ids)]
    assert Counter(finished) == {"completed": tasks}
    assert len(upstream.ledger()["calls"]) - calls_before == tasks
    for service in services:
        service.end()


def test_a_waiter_on_another_instance_wakes_after_a_slot_move(
    start_service: StartService, upstream: EmulatorProcess, nodes: Cluster
) -> None:
    one, two = (start_service(upstream.url, REDIS_URL=url_of(node)) for node in nodes.nodes[:2])
    nodes.migrate(nodes.others[0])
    task_id = one.accepted(prompt=f"waited for elsewhere {nodes.owner!r} {{{{fault:ok delay_s=0.5}}}}")
    assert two.get(f"/api/images/{task_id}?wait=10").json["status"] == "completed"
    one.end()
    two.end()


def test_a_slow_slot_migration_is_an_outage_with_one_line(
    start_service: StartService, upstream: EmulatorProcess, nodes: Cluster
) -> None:
    service = start_service(upstream.url, REDIS_URL=url_of(nodes.others[0]), WORKER_CONCURRENCY="20")
    others = [f"{{imagegen}}:of another program {number}" for number in range(400)]
    nodes.owner.mset(dict.fromkeys(others, "x"))
    mover = threading.Thread(target=nodes.migrate, args=(nodes.others[0],), kwargs={"pause_s": 0.1})
    mover.start()
    ids, statuses = submit_all([service], [f"during a slow move {nodes.owner!r} {number}" for number in range(40)])
    mover.join()
    assert statuses[503] > 0
    assert {service.finished(task_id)["status"] for task_id in ids} == {"completed"}
    service.check_outages()
    nodes.owner.delete(*others)
    service.end()


def test_a_cluster_that_is_down_is_an_outage_with_one_line(
    start_service: StartService, upstream: EmulatorProcess, nodes: Cluster
) -> None:
    service = start_service(upstream.url, REDIS_URL=url_of(nodes.others[0]))
    silent, numbers = nodes.others[1], itertools.count()
    process = int(silent.info("server")["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        eventually(lambda: service.submit(prompt=f"in an outage {next(numbers)}").status == 503)
        eventually(lambda: service.get("/readyz").status == 503)
    finally:
        os.kill(process, signal.SIGCONT)
    eventually(lambda: service.get("/readyz").status == 200)
    assert service.made(prompt="after an outage")["status"] == "completed"
    service.check_outages()
    service.end()


def test_a_dead_node_is_replaced_and_its_tasks_continue(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with cluster(tmp_path / "cluster", replicas=1) as nodes:
        service = start_service(upstream.url, REDIS_URL=url_of(nodes.others[0]), LEASE_SECONDS="3")
        ids = [service.accepted(prompt=f"through a failover {number}") for number in range(10)]
        kill(nodes.owner)
        ids += submit_all([service], [f"after a failover {number}" for number in range(10)])[0]
        assert {service.finished(task_id)["status"] for task_id in ids} == {"completed"}
        service.check_outages()
        service.end()


@pytest.fixture
def prefix() -> str:
    """Return the prefix of the service, whose slot has a replica."""
    return "imagegen"


async def test_an_instance_that_starts_after_a_failover_of_a_node_waits_for_one_that_may_have_to_write_back(
    make_instance: MakeInstance, tmp_path: Path
) -> None:
    with cluster(tmp_path / "cluster", replicas=1) as nodes:
        url, owner = url_of(nodes.others[0]), nodes.owner
        one = make_instance(url=url)
        await until(lambda: owner.exists(one.keys.server))
        await one.client_queue.submit(submission("before"))
        await one.claim()
        await one.crash()
        assert owner.execute_command("WAIT", 1, 5000) == 1
        kill(owner)
        two = make_instance(url=url)
        await until(lambda: two.parts.recovery.unsettled and not two.connection.recovered.is_set(), within_s=30)
