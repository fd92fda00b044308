"""Provider jobs of a relay through the running service: one submit for each task, whatever happens meanwhile."""

from __future__ import annotations

import base64
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import KEY, Service, calls_about, eventually, redis_server
from tests.service.scripted_channels import write
from tests.service.topology import url_of

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def relay() -> Iterator[EmulatorProcess]:
    with EmulatorProcess("--image", "png") as relay:
        yield relay


def settings(url: str, **more: str) -> dict[str, str]:
    return {"PROVIDER": "openai", "OPENAI_API_URL": url, "OPENAI_API_KEY": KEY, **more}


@pytest.fixture(scope="module")
def service(start_for_module: Start, relay: EmulatorProcess) -> Service:
    return start_for_module(**settings(f"{relay.url}/v1", WORKER_CONCURRENCY="30"))


def jobs_of(relay: EmulatorProcess, text: str) -> list[dict[str, Any]]:
    return [call["job"] for call in calls_about(relay, text) if call["job"]]


@pytest.mark.parametrize("dialect", ["apimart", "sub2api", "bifrost", "modelscope", "newapi"])
def test_an_accepted_job_is_polled_until_its_image_comes(
    service: Service, relay: EmulatorProcess, dialect: str
) -> None:
    task = service.made(prompt=f"a job of {dialect} {{{{fault:job dialect={dialect}}}}}")
    assert service.get(task["data"][0]["url"]).body.startswith(b"\x89PNG")
    (job,) = jobs_of(relay, f"a job of {dialect}")
    assert (job["charged"], job["collected"]) == (True, True)
    assert (task["attempts"], task.get("possiblyBilledTwice")) == (1, None)


@pytest.mark.parametrize("path", ["/v1/images/generations/async", "/v1/async/images/generations"])
def test_the_address_of_an_asynchronous_route_may_be_the_base(
    start_service: Start, relay: EmulatorProcess, path: str
) -> None:
    service = start_service(**settings(relay.url + path))
    service.made(prompt=f"by {path}")
    (job,) = jobs_of(relay, f"by {path}")
    assert job["collected"] is True


def test_an_edit_is_a_job_of_the_asynchronous_route(start_service: Start, relay: EmulatorProcess) -> None:
    service = start_service(**settings(f"{relay.url}/v1/images/generations/async"))
    source = service.get(service.made(prompt="to be edited")["data"][0]["url"]).body
    link = "data:image/png;base64," + base64.b64encode(source).decode()
    service.made(prompt="edited by a job", imageUrl=link)
    (call,) = calls_about(relay, "edited by a job")
    assert call["path"] == "/v1/images/edits/async"
    assert (call["job"]["collected"], len(call["inputs"])) == (True, 1)


LIMITED = "end=failed error='Rate limit exceeded, try again in 0.1s'"


@pytest.mark.parametrize("dialect", ["apimart", "sub2api", "newapi"])
def test_a_job_that_failed_by_a_rate_limit_is_made_again_and_counted_and_only_the_image_is_charged(
    start_service: Start, relay: EmulatorProcess, dialect: str
) -> None:
    service = start_service(**settings(f"{relay.url}/v1"), UNKNOWN_PRICE_USD="0.04", BUDGET_DAILY_USD="0.04")
    text = f"limited jobs of {dialect}"
    prompt = f"{text} {{{{fault:job times=2 dialect={dialect} job_s=0 {LIMITED}}}}}"
    task = service.completed(service.accepted(prompt=prompt, model="m"))
    calls = calls_about(relay, text)
    assert (len(calls), [call["job"]["charged"] for call in calls if call["job"]]) == (3, [False] * 2)
    assert (task["attempts"], task["possiblyBilledTwice"], task["cost"]["charged"]) == (3, 2, 0.04)


@pytest.mark.parametrize("keys", [1, 2])
def test_a_job_that_fails_by_a_rate_limit_each_time_is_made_max_attempts_times(
    start_service: Start, relay: EmulatorProcess, tmp_path: Path, keys: int
) -> None:
    channel = {"name": "relay", "provider": "openai", "keys": [f"{KEY}{number}" for number in range(keys)]}
    file = write(tmp_path / "c.toml", {**channel, "base_url": f"{relay.url}/v1"})
    service = start_service(CHANNELS_FILE=file, MAX_ATTEMPTS="3", UNKNOWN_PRICE_USD="0.04", BUDGET_DAILY_USD="0.04")
    text = f"always limited jobs, {keys}"
    task = service.finished(service.accepted(prompt=f"{text} {{{{fault:job job_s=0 {LIMITED}}}}}", model="m"))
    assert len(calls_about(relay, text)) == 3
    assert (task["status"], task["error"]["code"]) == ("failed", "upstream_rate_limited")
    assert (task["possiblyBilledTwice"], task["cost"]["charged"]) == (2, 0.0)


def test_a_submit_that_a_relay_refuses_by_its_rate_limit_is_waited_out_and_is_no_attempt(
    start_service: Start, relay: EmulatorProcess
) -> None:
    service = start_service(**settings(f"{relay.url}/v1"), MAX_ATTEMPTS="1")
    relay.script(*[{"fault": "429", "retry_after": 0.1, "match": "refused submits"} for _ in range(2)])
    task = service.made(prompt="refused submits")
    assert len(calls_about(relay, "refused submits")) == 3
    assert (task["attempts"], task.get("possiblyBilledTwice")) == (1, None)


@pytest.mark.parametrize(
    "error", ["Your organization must be verified to use the model", "The model does not exist", "insufficient balance"]
)
def test_a_job_that_failed_since_a_relay_has_no_right_to_the_model_is_made_by_the_next_channel(
    start_service: Start, relay: EmulatorProcess, tmp_path: Path, error: str
) -> None:
    with EmulatorProcess() as second:
        fields = {"provider": "openai", "keys": [KEY], "models": ["drawn"]}
        channels = (
            {"name": "relay", "base_url": relay.url, "priority": 5, **fields},
            {"name": "second", "base_url": second.url, **fields},
        )
        file = write(tmp_path / "c.toml", *channels)
        service = start_service(CHANNELS_FILE=file, UNKNOWN_PRICE_USD="0.04", BUDGET_DAILY_USD="0.04")
        text = f"refused: {error}"
        relay.script({"fault": "job", "job_s": 0, "end": "failed", "error": error, "match": text})
        task = service.made(prompt=text, model="drawn")
        assert (len(jobs_of(relay, text)), len(calls_about(second, text))) == (1, 1)
        assert (task["channel"], task["attempts"], task.get("possiblyBilledTwice")) == ("second", 1, None)
        assert task["cost"]["charged"] == 0.04


def test_a_job_that_is_not_found_at_first_is_not_submitted_again(service: Service, relay: EmulatorProcess) -> None:
    task = service.made(prompt="unknown at first {{fault:job unknown_s=3}}")
    assert (len(jobs_of(relay, "unknown at first")), task["attempts"]) == (1, 1)


def test_polls_that_fail_do_not_end_a_job(service: Service, relay: EmulatorProcess) -> None:
    task = service.made(prompt="bad polls {{fault:job poll_fault=500 polls=2}}")
    (job,) = jobs_of(relay, "bad polls")
    assert job["polls"] >= 3
    assert (task["attempts"], task.get("possiblyBilledTwice")) == (1, None)


def test_each_image_of_a_task_is_a_job_of_its_own(service: Service, relay: EmulatorProcess) -> None:
    task = service.made(prompt="three jobs {{fault:job}}", n=3)
    assert len({image["sha256"] for image in task["data"]}) == 3
    assert len(jobs_of(relay, "three jobs")) == 3


@pytest.mark.parametrize(
    ("end", "code", "submits"),
    [("policy", "content_policy", 1), ("failed", "upstream_error", 3), ("empty", "upstream_bad_response", 2)],
)
def test_a_failed_job_fails_its_task_as_a_failed_call_does(
    service: Service, relay: EmulatorProcess, end: str, code: str, submits: int
) -> None:
    task_id = service.accepted(prompt=f"it ends {end} {{{{fault:job end={end}}}}}", model=f"m/{end}")
    task = service.finished(task_id, within_s=90)  # an empty job is polled on for a while
    assert (task["status"], task["error"]["code"]) == ("failed", code)
    assert len(jobs_of(relay, f"it ends {end}")) == submits


def test_a_lost_answer_to_a_submit_is_an_ambiguous_call(service: Service, relay: EmulatorProcess) -> None:
    task = service.made(prompt="lost answer {{fault:job answer=lost times=1}}")
    assert task["possiblyBilledTwice"] == 1
    assert len(calls_about(relay, "lost answer")) == 2


def polled(relay: EmulatorProcess, text: str) -> bool:
    return any(job["polls"] for job in jobs_of(relay, text))


def collected(relay: EmulatorProcess, text: str) -> bool:
    return any(job["collected"] for job in jobs_of(relay, text))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Redis]:
    (folder := tmp_path / "redis").mkdir()
    with redis_server(folder, port := free_port()), Redis(port=port) as client:
        yield client


def test_a_job_is_charged_at_the_price_of_its_submit_though_an_instance_with_another_price_collects_it(
    start_service: Start, relay: EmulatorProcess, own_redis: Redis
) -> None:
    shared = settings(f"{relay.url}/v1", REDIS_URL=url_of(own_redis), BUDGET_DAILY_USD="0.04")
    service = start_service(**shared, UNKNOWN_PRICE_USD="0.04")
    task_id = service.accepted(prompt="priced {{fault:job dialect=newapi job_s=2}}", model="m")
    eventually(lambda: polled(relay, "priced"))
    service.kill()
    dearer = start_service(**shared, UNKNOWN_PRICE_USD="0.5")
    task = dearer.completed(task_id)
    assert (len(jobs_of(relay, "priced")), task["cost"]["charged"]) == (1, 0.04)


def test_a_kill_after_the_checkpoint_with_the_job_submits_it_once(
    start_service: Start, relay: EmulatorProcess, own_redis: Redis
) -> None:
    service = start_service(**settings(f"{relay.url}/v1", REDIS_URL=url_of(own_redis)))
    task_id = service.accepted(prompt="recorded {{fault:job dialect=sub2api job_s=1.5}}")
    (job,) = eventually(lambda: jobs_of(relay, "recorded"))
    eventually(lambda: job["id"].encode() in (own_redis.get(f"{{imagegen}}:run:{task_id}") or b""))
    service.kill()
    task = service.start().completed(task_id)
    assert (len(jobs_of(relay, "recorded")), task.get("possiblyBilledTwice")) == (1, None)
    assert service.get(task["data"][0]["url"]).status == 200
    service.end()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (polled, signal.SIGKILL),
        (collected, signal.SIGKILL),
        (polled, signal.SIGTERM),
    ],
)
def test_a_restart_resumes_the_job_and_never_submits_it_again(
    start_service: Start, relay: EmulatorProcess, moment: Callable[..., bool], number: signal.Signals
) -> None:
    service = start_service(**settings(f"{relay.url}/v1", DRAIN_SECONDS="0.1"))
    text = f"resumed {moment.__name__} {number.name}"
    task_id = service.accepted(prompt=f"{text} {{{{fault:job dialect=sub2api job_s=1.5}}}}")
    eventually(lambda: moment(relay, text))
    service.signal(number)
    service.wait()
    service.start()
    task = service.completed(task_id)
    assert (len(jobs_of(relay, text)), task.get("possiblyBilledTwice")) == (1, None)
    assert service.get(task["data"][0]["url"]).status == 200


def test_another_instance_takes_over_the_job(start_service: Start, relay: EmulatorProcess) -> None:
    first = start_service(**settings(f"{relay.url}/v1"))
    task_id = first.accepted(prompt="moved {{fault:job job_s=3}}")
    eventually(lambda: polled(relay, "moved"))
    second = start_service(**settings(f"{relay.url}/v1"))
    first.signal(signal.SIGSTOP)
    try:
        eventually(lambda: second.task(task_id)["status"] == "completed", 40)
    finally:
        first.signal(signal.SIGCONT)
    task = second.task(task_id)
    assert (len(jobs_of(relay, "moved")), task.get("possiblyBilledTwice")) == (1, None)


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """Run a server that records each request; return its address and the records."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("dialect", ["apimart", "sub2api"])
def test_a_poll_address_on_another_host_never_gets_the_key(
    service: Service, relay: EmulatorProcess, dialect: str
) -> None:
    with listener() as (url, seen):
        prompt = f"led away {dialect} {{{{fault:job dialect={dialect} poll_url={url}/v1/tasks/x}}}}"
        service.made(prompt=prompt)
    assert seen == []
    assert len(jobs_of(relay, f"led away {dialect}")) == 1


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_kills_at_random_moments_never_submit_a_job_twice(
    start_service: Start, relay: EmulatorProcess, tmp_path: Path
) -> None:
    """Kill one of two instances again and again, each time when the answers of its submits are in Redis."""
    rng = random.Random(7)
    with redis_server(tmp_path, port := free_port()):
        shared = settings(f"{relay.url}/v1", REDIS_URL=f"redis://127.0.0.1:{port}", WORKER_CONCURRENCY="10")
        services = [start_service(**shared), start_service(**shared)]
        task_ids: list[str] = []
        for number in range(6):
            for service in services:
                prompt = f"killed at random {number} {{{{fault:job job_s={rng.uniform(0.5, 3):.2f}}}}}"
                task_ids += [service.accepted(prompt=prompt, seed=seed) for seed in range(3)]
            time.sleep(rng.uniform(0.3, 1.5))
            services[number % 2].kill()
            services[number % 2].start()
        tasks = [services[0].completed(task_id, within_s=60) for task_id in dict.fromkeys(task_ids)]
        for service in services:
            service.end()
    assert len(jobs_of(relay, "killed at random")) == len(tasks) == 36
    assert not any(task.get("possiblyBilledTwice") for task in tasks)
