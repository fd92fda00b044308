"""Providers with jobs through the running service: settings, images, errors, and their own ledger of what was paid."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import KEY, Service, calls_about, eventually

Start = Callable[..., Service]


@dataclass(frozen=True)
class Provider:
    """An emulated provider, and a service that uses it. unknown, several: tasks that run from its start on."""

    name: str
    upstream: EmulatorProcess
    service: Service
    unknown: str
    several: str

    def jobs(self, text: str) -> list[dict[str, Any]]:
        return [call["job"] for call in calls_about(self.upstream, text) if call["job"]]


OTHER_SWITCHES = {
    ("fal", "402"): "403_balance",
    ("dashscope", "402"): "400_arrearage",
    ("dashscope", "422"): "400_url",
}
"""Refusals that a provider sends in place of the usual ones."""


def settings_of(name: str, url: str) -> dict[str, str]:
    named = {
        "fal": {"FAL_KEY": KEY, "FAL_API_URL": url},
        "replicate": {"REPLICATE_API_TOKEN": KEY, "REPLICATE_API_URL": url},
        "bfl": {"BFL_API_KEY": KEY, "BFL_API_URL": url},
        "dashscope": {"DASHSCOPE_API_KEY": KEY, "DASHSCOPE_API_URL": url},
    }
    return {"PROVIDER": name, "WORKER_CONCURRENCY": "20", **named[name]}


@pytest.fixture(scope="module", params=["fal", "replicate", "bfl", "dashscope"])
def provider(
    request: pytest.FixtureRequest, start_for_module: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Provider]:
    """Run each provider's service on a queue of its own: the services of a module end together."""
    with EmulatorProcess(request.param, module="imagegen.emulator.job_command") as upstream:
        settings = settings_of(request.param, upstream.url) | {"DRAIN_SECONDS": "0.1"}
        service = start_for_module(home=tmp_path_factory.mktemp(request.param), **settings)
        unknown = service.accepted(prompt="unknown at first {{fault:job unknown_s=3}}")
        several = service.accepted(prompt="three of them", n=3)
        yield Provider(request.param, upstream, service, unknown, several)


def test_an_image_of_the_default_model_is_made_by_one_job(provider: Provider) -> None:
    task = provider.service.made(prompt="the first one")
    assert provider.service.get(task["data"][0]["url"]).body.startswith((b"\x89PNG", b"\xff\xd8"))
    (job,) = provider.jobs("the first one")
    assert (job["charged"], job["collected"], task["attempts"]) == (True, True, 1)


def test_several_images_are_one_job_if_the_provider_makes_several(provider: Provider) -> None:
    task = provider.service.completed(provider.several)
    assert len({image["sha256"] for image in task["data"]}) == 3
    assert len(provider.jobs("three of them")) == (3 if provider.name == "bfl" else 1)


@pytest.mark.parametrize(
    ("switch", "code", "submits"),
    [
        ("402", "upstream_billing", 1),
        ("401", "upstream_auth", 1),
        ("422", "upstream_invalid_request", 1),
        ("job end=moderated", "content_policy", 1),
        ("job end=failed", "upstream_error", 3),
    ],
)
def test_what_goes_wrong_has_its_code(provider: Provider, switch: str, code: str, submits: int) -> None:
    switch = OTHER_SWITCHES.get((provider.name, switch), switch)
    text = f"wrong by {switch}"
    task = provider.service.finished(provider.service.accepted(prompt=f"{text} {{{{fault:{switch}}}}}", seed=submits))
    assert (task["status"], task["error"]["code"]) == ("failed", code)
    assert len(calls_about(provider.upstream, text)) == submits


@pytest.mark.parametrize("provider", ["fal"], indirect=True)
def test_the_place_in_the_queue_of_fal_is_progress_in_the_stream_of_events(provider: Provider) -> None:
    task_id = provider.service.accepted(prompt="in a queue {{fault:job position=10 pending=0.9 job_s=6}}")
    events = provider.service.get(f"/api/images/{task_id}/events").body.decode()
    seen = [int(value) for value in re.findall(r'"progress":(\d+)', events)]
    assert seen == sorted(seen)
    assert {value for value in seen if 10 < value < 60}


def test_a_rate_limit_is_waited_out_and_is_no_attempt(provider: Provider) -> None:
    task = provider.service.made(prompt="limited {{fault:429 retry_after=1 times=1}}")
    assert (task["attempts"], len(provider.jobs("limited"))) == (1, 1)


def test_a_job_that_is_unknown_at_first_is_not_submitted_again(provider: Provider) -> None:
    provider.service.completed(provider.unknown)
    assert len(provider.jobs("unknown at first")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_resumes_the_job_and_never_submits_it_again(provider: Provider, number: signal.Signals) -> None:
    service = provider.service
    text = f"resumed after {number.name}"
    task_id = service.accepted(prompt=f"{text} {{{{fault:job job_s=1.5}}}}", moderation="low", quality="high")
    eventually(lambda: any(job["polls"] for job in provider.jobs(text)))
    service.signal(number)
    service.wait()
    service.start()
    task = service.completed(task_id)
    assert (len(provider.jobs(text)), task.get("possiblyBilledTwice")) == (1, None)
    assert [warning for warning in task["warnings"] if "left out" in warning]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_paused_service_collects_the_job_of_an_ended_instance(start_service: Start, number: signal.Signals) -> None:
    with EmulatorProcess("bfl", module="imagegen.emulator.job_command") as upstream:
        service = start_service(**settings_of("bfl", upstream.url), DRAIN_SECONDS="0.1")
        task_id = service.accepted(prompt="begun before the pause {{fault:job job_s=1.5}}")
        eventually(lambda: any(call["job"]["polls"] for call in calls_about(upstream, "begun before")))
        admin = {"Authorization": f"Bearer {service.admin_token}"}
        assert service.request("POST", "/api/admin/pause", b"", headers=admin).status == 200
        waiting = service.accepted(prompt="submitted during the pause")
        service.signal(number)
        service.wait()
        service.start()
        task = service.completed(task_id, within_s=30)
        assert (len(calls_about(upstream, "begun before")), task.get("possiblyBilledTwice")) == (1, None)
        assert service.get(f"/api/images/{waiting}").json["status"] == "pending"
        assert service.request("POST", "/api/admin/resume", b"", headers=admin).status == 200
        service.completed(waiting)


def test_a_job_with_a_lost_response_is_found_or_recorded_as_paid_twice(provider: Provider) -> None:
    task = provider.service.made(prompt="lost answer {{fault:job answer=lost times=1}}")
    more = {"fal": 1, "bfl": 1, "replicate": 0, "dashscope": 0}[provider.name]
    assert (len(provider.jobs("lost answer")), task.get("possiblyBilledTwice", 0)) == (1 + more, more)


def test_the_ledger_of_the_provider_has_the_price_of_each_charged_job(provider: Provider) -> None:
    for task_id in (provider.unknown, provider.several):
        provider.service.completed(task_id)
    provider.upstream.clear()
    ids = [provider.service.accepted(prompt=f"counted {number} at {time.time()}", n=2) for number in range(3)]
    for task_id in ids:
        provider.service.completed(task_id)
    assert not any(job["cancels"] for job in provider.jobs("counted"))
    ledger = provider.upstream.ledger()
    jobs = 6 if provider.name == "bfl" else 3
    assert (ledger["submitted"], ledger["charged"], ledger["cost_usd"]) == (jobs, jobs, 0.06)


def cancelled_jobs(provider: Provider, text: str) -> list[tuple[bool, int]]:
    return [(job["cancelled"], job["cancels"]) for job in provider.jobs(text)]


def test_a_cancel_ends_the_job_at_the_provider_and_nothing_is_charged(provider: Provider) -> None:
    text, confirmed = "cancelled while it runs", provider.name != "bfl"  # which has no such request
    task_id = provider.service.accepted(prompt=f"{text} {{{{fault:job job_s=30 pending=1}}}}")
    eventually(lambda: any(job["polls"] for job in provider.jobs(text)))
    answer = provider.service.request("DELETE", f"/api/images/{task_id}")
    assert (answer.status, answer.json["cancelledUpstream"]) == (200, confirmed)
    assert cancelled_jobs(provider, text) == [(confirmed, int(confirmed))]
    task = provider.service.task(task_id)
    assert (task["cancelledUpstream"], task["cost"]["charged"] == 0) == (confirmed, confirmed)


def test_a_job_that_is_accepted_after_the_cancel_is_cancelled_too(provider: Provider) -> None:
    text, confirmed = "cancelled before its answer", provider.name != "bfl"
    task_id = provider.service.accepted(prompt=f"{text} {{{{fault:job job_s=30 pending=1 held=1}}}}")
    eventually(lambda: provider.jobs(text))
    answer = provider.service.request("DELETE", f"/api/images/{task_id}")
    assert (answer.status, answer.json["cancelledUpstream"]) == (200, False)
    provider.upstream.release()
    if confirmed:
        eventually(lambda: provider.service.task(task_id)["cancelledUpstream"])
        assert provider.service.task(task_id)["cost"]["charged"] == 0
        assert cancelled_jobs(provider, text) == [(True, 1)]


def test_a_job_that_is_accepted_after_a_cancel_and_another_submit_is_collected_or_cancelled(provider: Provider) -> None:
    text, run_s = "cancelled and submitted again", 60 if provider.name == "fal" else 3
    prompt = f"{text} {{{{fault:job job_s={run_s} pending=1 held=1 times=1}}}}"
    task_id = provider.service.accepted(prompt=prompt)
    eventually(lambda: provider.jobs(text))
    assert provider.service.request("DELETE", f"/api/images/{task_id}").status == 200
    assert provider.service.accepted(prompt=prompt) == task_id
    assert provider.service.completed(task_id).get("possiblyBilledTwice") is None
    provider.upstream.release()
    if provider.name == "fal":
        eventually(lambda: cancelled_jobs(provider, text) == [(True, 1), (False, 0)])


def test_a_job_that_runs_when_the_deadline_of_its_task_comes_is_cancelled(
    provider: Provider, start_service: Start
) -> None:
    text = "overdue"
    service = start_service(**settings_of(provider.name, provider.upstream.url), TASK_DEADLINE="5")
    failed = service.finished(service.accepted(prompt=f"{text} {{{{fault:job job_s=60 pending=1}}}}"))
    assert failed["error"]["code"] == "upstream_timeout"
    if provider.name != "bfl":
        eventually(lambda: cancelled_jobs(provider, text) == [(True, 1)])
