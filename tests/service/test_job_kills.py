"""Kills of one of two instances while they use a provider with jobs: nothing is lost, and money is counted exactly."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import KEY, Service, calls_about, eventually, redis_server

DYING = Path(__file__).with_name("dying.py")
PRICES = {"fal": 0.003, "replicate": 0.003, "bfl": 0.014, "dashscope": 0.025}
"""Of one image of 512 x 512 pixels by the default model, as our table has it."""

KEY_SETTINGS = {
    "fal": "FAL_KEY",
    "replicate": "REPLICATE_API_TOKEN",
    "bfl": "BFL_API_KEY",
    "dashscope": "DASHSCOPE_API_KEY",
}
LISTING = ("replicate", "dashscope")
MOMENTS = ("sent", "accepted", "polled 1", "polled 2")
QUICK = 3
LEASE_S = 4.0
"""A live instance keeps its claims through a pause of up to two thirds of it."""

_starting = threading.Lock()


@dataclass
class Pair:
    """Two instances of one provider. kill_file: of both; figures: what happened."""

    name: str
    upstream: EmulatorProcess
    services: list[Service]
    kill_file: Path
    rng: random.Random
    figures: Counter[str] = field(default_factory=Counter)
    charged_usd: float = 0.0

    def kill_at(self, moment: str, number: int) -> None:
        """Make one task; the instance that runs it dies at that moment, and another attempt ends it."""
        text = f"{self.name} {number} killed when {moment}"
        self.kill_file.write_text(moment)
        switch = f"job times=1 pending=0 job_s={self.rng.uniform(0.2, 2.5):.2f}"
        if moment == "sent":
            switch += " answer_s=1"
        if moment == "polled 2":
            switch += " poll_fault=500 polls=1"  # the first poll does not find the end
        service = self.rng.choice(self.services)
        task_id = service.accepted(prompt=f"{text} {{{{fault:{switch}}}}}", seed=number)
        (victim,) = eventually(self.dead, 40)
        assert victim.wait() == -9
        with _starting:
            victim.start()
        self.check(self.rng.choice(self.services).finished(task_id, 60), moment, text)

    def dead(self) -> list[Service]:
        return [service for service in self.services if service.process and service.process.poll() is not None]

    def check(self, task: dict[str, Any], moment: str, text: str) -> None:
        more = len([call for call in calls_about(self.upstream, text) if call["job"]]) - 1
        self.figures["kills"] += 1
        self.figures[f"killed when {moment.partition(' ')[0]}"] += 1
        self.figures["lost"] += task["status"] != "completed"
        self.figures["more submits"] += more
        self.figures["recorded"] += task.get("possiblyBilledTwice", 0)
        self.charged_usd += task["cost"]["charged"] or 0.0
        lost_answer = moment in ("sent", "accepted") and self.name not in LISTING
        assert (task["status"], more) == ("completed", int(lost_answer)), task
        assert task.get("possiblyBilledTwice", 0) == more, task
        assert all(self.services[0].get(image["url"]).status == 200 for image in task["data"])


@contextmanager
def pair(name: str, folder: Path, seed: int) -> Iterator[Pair]:
    folder.mkdir()
    with ExitStack() as stack:
        with _starting:
            arguments = (name, "--price", str(PRICES[name]), "--seed", str(seed))
            upstream = stack.enter_context(EmulatorProcess(*arguments, module="imagegen.emulator.job_command"))
            stack.enter_context(redis_server(folder, port := free_port()))
        settings = {
            "PROVIDER": name,
            KEY_SETTINGS[name]: KEY,
            f"{name.upper()}_API_URL": upstream.url,
            "REDIS_URL": f"redis://127.0.0.1:{port}",
            "DATA_DIR": str(folder / "data"),
            "LEASE_SECONDS": str(LEASE_S),
            "KILL_FILE": str(folder / "kill"),
        }
        services = []
        for number in range(2):
            services.append(Service(folder / f"instance{number}", settings, program=DYING))
            with _starting:
                services[-1].start()
            stack.callback(services[-1].end)
        yield Pair(name, upstream, services, folder / "kill", random.Random(f"{name} {seed}"))


def run(name: str, folder: Path, kills: int, seed: int) -> Pair:
    """Kill `kills` times, a quarter of them at each moment, and compare the two ledgers."""
    with pair(name, folder / name, seed) as instances:
        moments = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
        instances.rng.shuffle(moments)
        for number, moment in enumerate(moments):
            instances.kill_at(moment, number)
        ledger = instances.upstream.ledger()
        instances.figures["submitted"], instances.figures["charged"] = ledger["submitted"], ledger["charged"]
        assert round(instances.charged_usd, 6) == ledger["cost_usd"], (instances.charged_usd, ledger["cost_usd"])
        return instances


def run_all(folder: Path, kills: int, seed: int) -> list[Pair]:
    with ThreadPoolExecutor(len(PRICES)) as pool:
        running = [pool.submit(run, name, folder, kills, seed) for name in PRICES]
        return [each.result() for each in running]


@pytest.mark.timeout(120)
def test_a_kill_at_any_moment_loses_no_task_and_no_cent(tmp_path: Path) -> None:
    for instances in run_all(tmp_path, QUICK, 1):
        assert instances.figures["kills"] == QUICK


def test_an_idle_instance_collects_an_ended_job_soon_after_the_lease(tmp_path: Path) -> None:
    with pair("fal", tmp_path / "fal", 2) as instances:
        instances.kill_file.write_text("polled 1")
        task_id = instances.services[0].accepted(prompt="ended meanwhile {{fault:job job_s=0.3}}")
        (victim,) = eventually(instances.dead, 40)
        died_at = time.monotonic()
        (idle,) = [service for service in instances.services if service is not victim]
        task = idle.completed(task_id)
        assert time.monotonic() - died_at <= LEASE_S + 5
        assert idle.get(task["data"][0]["url"]).status == 200
        assert instances.upstream.ledger()["submitted"] == 1


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_many_kills_lose_no_task_and_no_cent(tmp_path: Path) -> None:
    kills, seed = int(os.environ.get("KILLS", "20")), int(os.environ.get("SEED", "17"))
    for instances in run_all(tmp_path, kills, seed):
        print(instances.name, dict(instances.figures), f"{instances.charged_usd:.3f} USD")
