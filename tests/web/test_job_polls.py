"""Paid jobs of a provider that can't be polled for a while, through the public face."""

from __future__ import annotations

from typing import Any

import pytest

from imagegen.app import QUEUE
from imagegen.providers import job_polling
from imagegen.worker import job_wait
from tests.emulator_fixtures import EmulatedUpstream
from tests.web.conftest import Client, StartService

POLLS = 25
"""Failed ones of a job; without the time of `MIN_USELESS_S` it would be given up before."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let polls follow each other at once."""
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "MAX_FAULT_DELAY_S"):
        monkeypatch.setattr(job_polling, name, 0.01)
    for name in ("MIN_UNREAD_RETRY_S", "MAX_UNREAD_RETRY_S"):
        monkeypatch.setattr(job_wait, name, 0.01)


@pytest.fixture
async def service(start_service: StartService, upstream: EmulatedUpstream) -> Client:
    return await start_service(
        provider="openai", openai_api_key="any", openai_api_url=f"{upstream.url}/v1", worker_concurrency=1
    )


async def submit(service: Client, prompt: str, query: str = "") -> dict[str, Any]:
    response = await service.post(f"/api/images/generate{query}", json={"prompt": prompt})
    task: dict[str, Any] = await response.json()
    return task


@pytest.mark.parametrize("status", [400, 401, 302, 404])
async def test_a_job_is_collected_after_polls_that_no_repeat_changes(
    quick: None, service: Client, upstream: EmulatedUpstream, status: int
) -> None:
    task = await submit(service, f"a cat {{{{fault:job poll_fault={status} polls={POLLS}}}}}", "?wait=60")
    assert (task["status"], task["attempts"], task.get("possiblyBilledTwice", 0)) == ("completed", 1, 0)
    assert (upstream.ledger.total, upstream.ledger.jobs[0].polls > POLLS) == (1, True)


async def test_a_job_that_can_not_be_polled_holds_no_slot(
    quick: None, service: Client, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MIN_UNREAD_RETRY_S", "MAX_UNREAD_RETRY_S"):
        monkeypatch.setattr(job_wait, name, 3_600.0)
    stuck = await submit(service, "a cat {{fault:job poll_fault=400 polls=999}}")
    other = await submit(service, "another cat", "?wait=60")
    assert other["status"] == "completed"
    claim = service.app[QUEUE].dispatcher.claimed[stuck["taskId"]]
    assert claim.checkpoint.job
    assert claim.checkpoint.job.handle.failed_polls.count == job_wait.MAX_FAILED_POLLS


async def test_a_job_is_given_up_after_polls_and_minutes_and_is_not_paid_again(
    quick: None, service: Client, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 0.5)
    task = await submit(service, "a cat {{fault:job poll_fault=400 polls=9999}}", "?wait=60")
    assert (task["status"], task["error"]["code"]) == ("failed", "upstream_bad_response")
    assert (upstream.ledger.total, task["possiblyBilledTwice"]) == (1, 1)
    assert upstream.ledger.jobs[0].polls >= job_polling.MIN_USELESS
