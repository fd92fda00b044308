"""Redis behind Sentinel: discovery of the master by name, also after a failover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import Service, eventually, run_to_its_end
from tests.service.topology import kill, sentinels


def test_after_a_failover_the_new_master_is_found_and_every_task_completes(
    start_service: Callable[..., Service], upstream: EmulatorProcess, tmp_path: Path
) -> None:
    password = "s3cret/word"
    with sentinels(tmp_path / "redis", password=password) as redis:
        options = "?db=0&sentinel_password=s3cret%2Fword-of-sentinels"
        url = redis.url(options, login=":s3cret%2Fword@")
        service = start_service(upstream.url, REDIS_URL=url, LEASE_SECONDS="3")
        ids = [service.accepted(prompt=f"before the failover {number}") for number in range(10)]
        eventually(lambda: redis.master.execute_command("WAIT", 1, 100) == 1)
        kill(redis.master)
        eventually(lambda: service.submit(prompt="after the failover").status in (200, 202), within_s=60)
        ids.append(service.accepted(prompt="after the failover"))
        assert {service.finished(task_id)["status"] for task_id in ids} == {"completed"}
        service.check_outages()
        assert "s3cret" not in service.log
        service.end()


def test_an_unknown_sentinel_service_is_named_at_the_start(tmp_path: Path) -> None:
    with sentinels(tmp_path / "redis") as redis:
        ended = run_to_its_end(tmp_path / "run", REDIS_URL=redis.url().replace("/images", "/pictures"))
        assert ended.returncode == 2
        assert "pictures" in ended.stderr
        assert "images" in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.faults
def test_a_demoted_master_is_left_for_the_new_one(
    start_service: Callable[..., Service], upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with sentinels(tmp_path / "redis") as redis:
        service = start_service(upstream.url, REDIS_URL=redis.url(), LEASE_SECONDS="3")
        service.made(prompt="before the switch")
        with Redis(port=redis.ports[0], decode_responses=True) as sentinel:
            eventually(lambda: _failover(sentinel))
        eventually(lambda: redis.replica.info("replication")["role"] == "master", within_s=15)
        eventually(lambda: service.submit(prompt="after the switch").status in (200, 202), within_s=15)
        assert service.made(prompt="after the switch")["status"] == "completed"
        key = "{imagegen}:task:" + service.accepted(prompt="after the switch")
        eventually(lambda: redis.master.info("replication")["role"] == "slave", within_s=25)
        eventually(lambda: redis.replica.exists(key))  # also where the old master took it in its last moments
        service.end()


def _failover(sentinel: Redis) -> bool:
    try:
        sentinel.execute_command("SENTINEL", "FAILOVER", "images")
    except ResponseError:
        return False
    return True
