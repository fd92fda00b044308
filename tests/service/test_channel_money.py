"""Money of channels through the running service: prices, budgets, kills, and keys that leave the file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imagegen.worker.call_routes import MAX_SUBSTITUTES
from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import KEY, Service, calls_about, eventually, redis_server
from tests.service.scripted_channels import SCHNELL, Start, Upstream, channel, error, serving, write

DYING = Path(__file__).with_name("dying.py")
KONTEXT = "black-forest-labs/FLUX.1-kontext-pro"
PRICE_USD = 0.003
"""Of one image of 512 x 512 pixels by the default models of fal and Replicate."""

MODELS = {
    "fal": "fal-ai/flux/schnell",
    "replicate": "black-forest-labs/flux-schnell",
    "dashscope": "wan2.2-t2i-flash",
}
BUDGET = {"BUDGET_DAILY_USD": "10"}
LEFT, NEW_KEYS = "left-key-0123456789", ("first-key-0123456789", "second-key-0123456789")
KILLS = (
    ("sent", "replicate"),
    ("accepted", "fal"),
    ("polled 1", "replicate"),
    ("sent", "drawn"),
    ("accepted", "drawn"),
)
"""Moment of each kill, and the model: `drawn` is served by both channels."""


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    (folder := tmp_path / "redis").mkdir()
    with redis_server(folder, port := free_port()):
        yield f"redis://127.0.0.1:{port}"


def emulator(name: str, *options: str) -> EmulatorProcess:
    options = ("--price", str(PRICE_USD), "--seed", "5", *options)
    return EmulatorProcess(name, *options, module="imagegen.emulator.job_command")


def job_channel(name: str, url: str, *keys: str) -> dict[str, object]:
    return {
        "name": name,
        "provider": name,
        "base_url": url,
        "keys": keys,
        "models": [f"drawn={MODELS[name]}", f"{name}={MODELS[name]}"],
    }


def collected_by_other_keys(
    start_service: Start, redis_url: str, folder: Path, upstream: EmulatorProcess, *channels: dict[str, object]
) -> tuple[dict[str, Any], str]:
    """Begin a job with a key, and end the service; return the task and the log of one with these channels."""
    name = str(channels[0]["name"])
    (folder / "kill").write_text("polled 1")
    first = start_service(
        REDIS_URL=redis_url,
        CHANNELS_FILE=write(folder / "1.toml", job_channel(name, upstream.url, LEFT)),
        KILL_FILE=str(folder / "kill"),
        program=DYING,
        **BUDGET,
    )
    task_id = first.accepted(prompt="an orphan {{fault:job times=1 job_s=0.5}}", model="drawn")
    assert first.wait() == -9
    second = start_service(REDIS_URL=redis_url, CHANNELS_FILE=write(folder / "2.toml", *channels), **BUDGET)
    task = second.completed(task_id, 60)
    assert "left-key" not in second.log
    return task, second.log


def test_a_job_of_a_key_that_left_the_pool_counts_as_lost_and_is_made_once_more(
    start_service: Start, redis_url: str, tmp_path: Path
) -> None:
    with emulator("fal") as upstream:
        pool = job_channel("fal", upstream.url, *NEW_KEYS)
        task, log = collected_by_other_keys(start_service, redis_url, tmp_path, upstream, pool)
        ledger = upstream.ledger()
        assert (ledger["submitted"], task["possiblyBilledTwice"]) == (2, 1)
        assert task["cost"]["charged"] == pytest.approx(ledger["cost_usd"]) == 2 * PRICE_USD
        assert log.count("belongs to a key that is not in CHANNELS_FILE any more") == 1


@pytest.mark.parametrize("name", ["dashscope", "fal", "replicate"])
def test_another_key_of_the_account_collects_the_job_of_a_removed_key(
    start_service: Start, redis_url: str, tmp_path: Path, name: str
) -> None:
    with emulator(name, "--one-account") as upstream:
        pool = job_channel(name, upstream.url, *NEW_KEYS)
        task, log = collected_by_other_keys(start_service, redis_url, tmp_path, upstream, pool)
        assert (upstream.ledger()["submitted"], task.get("possiblyBilledTwice", 0)) == (1, 0)
        assert log.count("the other keys of the channel collect it") == (name != "dashscope")


def test_another_key_of_a_relay_collects_the_job_of_a_removed_key(
    start_service: Start, redis_url: str, tmp_path: Path
) -> None:
    with EmulatorProcess("--dialect", "newapi", "--image", "tiny") as upstream:

        def keyed(*keys: str) -> dict[str, object]:
            return {"name": "relay", "provider": "openai", "base_url": upstream.url, "keys": keys, "models": ["drawn"]}

        file = write(tmp_path / "1.toml", keyed(LEFT))
        first = start_service(CHANNELS_FILE=file, REDIS_URL=redis_url, DRAIN_SECONDS="0")
        task_id = first.accepted(prompt="an orphan {{fault:job times=1 job_s=3 keys=all}}", model="drawn")
        eventually(lambda: any(call["job"]["polls"] for call in upstream.ledger()["calls"] if call["job"]))
        first.end()
        second = start_service(CHANNELS_FILE=write(tmp_path / "2.toml", keyed(*NEW_KEYS)), REDIS_URL=redis_url)
        task = second.completed(task_id, 60)
        assert (len(upstream.ledger()["calls"]), task.get("possiblyBilledTwice", 0)) == (1, 0)


@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
def test_a_job_of_a_relay_is_collected_by_its_own_key_among_many(
    start_service: Start, redis_url: str, tmp_path: Path, path: str
) -> None:
    with EmulatorProcess("--dialect", "newapi", "--image", "tiny") as upstream:

        def keyed(*keys: str) -> dict[str, object]:
            address = f"{upstream.url}{path}"
            return {"name": "relay", "provider": "openai", "base_url": address, "keys": keys, "models": ["drawn"]}

        file = write(tmp_path / "1.toml", keyed(LEFT))
        first = start_service(CHANNELS_FILE=file, REDIS_URL=redis_url, DRAIN_SECONDS="0")
        task_id = first.accepted(prompt="one of many {{fault:job times=1 job_s=3}}", model="drawn")
        eventually(lambda: any(call["job"]["polls"] for call in upstream.ledger()["calls"] if call["job"]))
        first.end()
        others = [f"other-key-{number:010d}" for number in range(MAX_SUBSTITUTES + 1)]
        file = write(tmp_path / "2.toml", keyed(*others, LEFT))
        second = start_service(CHANNELS_FILE=file, REDIS_URL=redis_url)
        task = second.completed(task_id, 60)
        assert (len(upstream.ledger()["calls"]), task.get("possiblyBilledTwice", 0)) == (1, 0)
        assert "belongs to a key" not in second.log


def test_a_retired_key_in_its_own_channel_only_collects_its_jobs(
    start_service: Start, redis_url: str, tmp_path: Path
) -> None:
    with emulator("fal") as upstream:
        pool = job_channel("fal", upstream.url, *NEW_KEYS)
        retired = job_channel("fal", upstream.url, LEFT) | {"name": "retired", "models": ["retired/*"]}
        task, log = collected_by_other_keys(start_service, redis_url, tmp_path, upstream, pool, retired)
        assert (upstream.ledger()["submitted"], task.get("possiblyBilledTwice", 0)) == (1, 0)
        assert "belongs to a key" not in log


def test_a_channel_of_an_unknown_price_gets_no_call_of_a_task_under_a_budget(
    start_service: Start, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    unpriced = Upstream()
    file = write(
        tmp_path / "c.toml",
        channel("priced", upstream.url, KEY, models=[f"drawn={SCHNELL}"], priority=5),
        channel("unpriced", unpriced.url, KEY, models=["drawn=nobody/knows", "other=nobody/knows"]),
    )
    with serving(unpriced):
        service = start_service(CHANNELS_FILE=file, **BUDGET)
        task = service.made(prompt="fails once {{fault:500 times=1}}", model="drawn")
        assert (task["channel"], task["attempts"], unpriced.calls) == ("priced", 2, [])
        free = start_service(CHANNELS_FILE=file, DATA_DIR=str(tmp_path / "free"))
        task = free.made(prompt="fails once more {{fault:500 times=1}}", model="drawn")
        assert (task["channel"], task["attempts"], len(unpriced.calls)) == ("unpriced", 1, 1)


def test_a_fallback_model_skips_its_channel_of_an_unknown_price(start_service: Start, tmp_path: Path) -> None:
    gone, unpriced, priced = Upstream({KEY: error(404, "Unable to access model")}), Upstream(), Upstream()
    file = write(
        tmp_path / "c.toml",
        channel("gone", gone.url, KEY, models=[f"drawn={SCHNELL}"]),
        channel("unpriced", unpriced.url, KEY, models=["other=nobody/knows"], priority=5),
        channel("priced", priced.url, KEY, models=[f"other={SCHNELL}"]),
    )
    with serving(gone, unpriced, priced):
        service = start_service(CHANNELS_FILE=file, FALLBACK_MODELS="other", **BUDGET)
        task = service.made(prompt="by the other model", model="drawn")
        assert (task["channel"], len(unpriced.calls), len(priced.calls)) == ("priced", 0, 1)


def test_a_task_is_charged_the_price_of_the_channel_that_drew_it(start_service: Start, tmp_path: Path) -> None:
    cheap, dear, broken = Upstream(), Upstream(), Upstream({KEY: error(500)})
    prices = {"cheap": 0.000708, "dear": 0.010486}
    file = write(
        tmp_path / "c.toml",
        channel("cheap", cheap.url, KEY, models=[f"drawn={SCHNELL}"]),
        channel("dear", dear.url, KEY, models=[f"drawn={KONTEXT}", f"moved={KONTEXT}"]),
        channel("broken", broken.url, KEY, models=[f"moved={SCHNELL}"], priority=5),
    )
    with serving(cheap, dear, broken):
        service = start_service(CHANNELS_FILE=file, **BUDGET)
        tasks = [service.made(prompt=f"image {number}", model="drawn") for number in range(4)]
        moved = service.made(prompt="to a dearer channel", model="moved")
        assert sorted(task["channel"] for task in tasks) == ["cheap", "cheap", "dear", "dear"]
        assert [task["cost"]["charged"] for task in tasks] == [prices[task["channel"]] for task in tasks]
        assert (moved["channel"], moved["cost"]["charged"]) == ("dear", prices["dear"])
        assert moved["cost"]["estimated"] == prices["cheap"]
        spent = {
            each["name"]: each["keys"][0]["spentUsd"] for each in service.get_as_admin("/api/channels").json["channels"]
        }
        assert spent == pytest.approx({"cheap": 2 * 0.000708, "dear": 3 * 0.010486, "broken": 0})


def two_prices(cheap: EmulatorProcess, dear: Upstream, folder: Path, preferred: str) -> str:
    """Write a file of two channels for one model, at 0.000708 and at 0.010486 US dollars an image."""
    return write(
        folder / "c.toml",
        channel("cheap", cheap.url, KEY, models=[f"drawn={SCHNELL}"], priority=int(preferred == "cheap")),
        channel("dear", dear.url, KEY, models=[f"drawn={KONTEXT}"], priority=int(preferred == "dear")),
    )


def test_the_limit_of_a_submit_leaves_out_the_channels_that_are_dearer(
    start_service: Start, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with serving(dear := Upstream()):
        service = start_service(CHANNELS_FILE=two_prices(upstream, dear, tmp_path, "dear"))
        free = service.made(prompt="without a limit", model="drawn")
        limited = service.made(prompt="within a limit", model="drawn", maxCostUsd=0.005)
        several = service.made(prompt="for all images", model="drawn", n=3, maxCostUsd=0.03)
        wide = service.made(prompt="within a wide one", model="drawn", maxCostUsd=0.010486)
        assert [task["channel"] for task in (free, limited, several, wide)] == ["dear", "cheap", "cheap", "dear"]
        assert [task["cost"]["estimated"] for task in (free, limited)] == [0.010486, 0.000708]
        assert limited["cost"]["charged"] == 0.000708
        refused = service.submit(prompt="for less", model="drawn", maxCostUsd=0.0007)
        assert refused.error == (402, "max_cost_exceeded")
        assert "at least 0.000708" in refused.json["details"][0]["message"]


def test_a_channel_beyond_the_limit_gets_no_call_when_the_cheap_one_fails(
    start_service: Start, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with serving(dear := Upstream()):
        service = start_service(CHANNELS_FILE=two_prices(upstream, dear, tmp_path, "cheap"))
        free = service.made(prompt="goes on {{fault:500 times=1}}", model="drawn")
        limited = service.made(prompt="is repeated {{fault:500 times=1}}", model="drawn", maxCostUsd=0.005)
        assert [(task["channel"], task["attempts"]) for task in (free, limited)] == [("dear", 1), ("cheap", 2)]


def test_a_task_does_not_wait_for_a_channel_beyond_its_limit_if_the_cheap_one_lacks_the_model(
    start_service: Start, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with serving(dear := Upstream()):
        service = start_service(CHANNELS_FILE=two_prices(upstream, dear, tmp_path, "cheap"))
        task = service.finished(service.accepted(prompt="{{fault:404}}", model="drawn", maxCostUsd=0.005))
        assert (task["error"]["code"], task["attempts"], dear.calls) == ("model_not_available", 1, [])


def test_a_task_stays_at_its_channel_if_the_budget_is_below_a_dearer_one(
    start_service: Start, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    with serving(dear := Upstream()):
        file = two_prices(upstream, dear, tmp_path, "cheap")
        service = start_service(CHANNELS_FILE=file, BUDGET_DAILY_USD="0.005")
        task = service.made(prompt="is repeated {{fault:500 times=2}}", model="drawn")
        assert (task["channel"], task["attempts"], dear.calls) == ("cheap", 2, [])
        assert task["cost"]["charged"] == 0.000708


class Cluster:
    """Two instances with the same two providers of jobs. charged: US dollars of all tasks."""

    def __init__(self, services: list[Service], upstreams: dict[str, EmulatorProcess]) -> None:
        self.services, self.upstreams = services, upstreams
        self.rng, self.charged = random.Random("channels"), 0.0

    def kill_at(self, moment: str, model: str, number: int) -> str:
        """Make a task; the instance that runs it dies at that moment. Return the task's channel."""
        Path(self.services[0].settings["KILL_FILE"]).write_text(moment)
        text = f"{number} of {model} killed when {moment}"
        switch = "job times=1 job_s=0.5" + (" answer_s=1" if moment == "sent" else "")
        task_id = self.rng.choice(self.services).accepted(prompt=f"{text} {{{{fault:{switch}}}}}", model=model)
        (victim,) = eventually(self._dead, 40)
        assert victim.wait() == -9
        victim.start()
        self._check(self.rng.choice(self.services).completed(task_id, 60), moment, text)
        return str(self.services[0].task(task_id)["channel"])

    def _dead(self) -> list[Service]:
        return [service for service in self.services if service.process and service.process.poll() is not None]

    def _check(self, task: dict[str, Any], moment: str, text: str) -> None:
        jobs = {
            name: len([call for call in calls_about(each, text) if call["job"]])
            for name, each in self.upstreams.items()
        }
        is_lost = moment in ("sent", "accepted") and task["channel"] == "fal"  # Replicate lists its jobs
        assert {name: count for name, count in jobs.items() if count} == {task["channel"]: 1 + is_lost}
        assert task.get("possiblyBilledTwice", 0) == is_lost
        assert self.services[0].get(task["data"][0]["url"]).status == 200
        self.charged += task["cost"]["charged"]


@pytest.mark.timeout(120)
def test_kills_with_two_channels_of_jobs_lose_no_task_and_no_cent(redis_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(emulator(name)) for name in ("fal", "replicate")}
        file = write(tmp_path / "c.toml", *(job_channel(name, each.url, KEY) for name, each in upstreams.items()))
        services = []
        for number in range(2):
            own = {"KILL_FILE": str(tmp_path / "kill"), "DATA_DIR": str(tmp_path / "data"), "LEASE_SECONDS": "4"}
            own |= {"REDIS_URL": redis_url, "CHANNELS_FILE": file}
            services.append(Service(tmp_path / f"instance{number}", own, program=DYING).start())
            stack.callback(services[-1].end)
        cluster = Cluster(services, upstreams)
        drawn_by = {cluster.kill_at(*kill, number) for number, kill in enumerate(KILLS)}
        paid = sum(each.ledger()["cost_usd"] for each in upstreams.values())
        assert drawn_by == set(upstreams)
        assert cluster.charged == pytest.approx(paid)
