"""Tests of the search for a job in DashScope's list after its response was lost."""

from __future__ import annotations

import time

import pytest

from imagegen.emulator.dashscope import DashScopeEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import dashscope
from imagegen.providers.dashscope import DashScopeProvider
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.protocol import Call
from tests.emulated_jobs import Recorder, failed, quick_polls
from tests.providers.conftest import MakeCall
from tests.providers.dashscope_calls import (
    MESSAGE,
    OLD,
    SYNC,
    MakeProvider,
    emulated_dashscope,
    prompted,
    provider_maker,
)

quick = pytest.fixture(quick_polls)
upstream = pytest.fixture(emulated_dashscope)
make_provider = pytest.fixture(provider_maker)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search the list at once, and read its jobs quickly."""
    monkeypatch.setattr(dashscope, "LISTED_AFTER_S", -60.0)
    monkeypatch.setattr(dashscope, "READ_DELAY_S", 0.02)
    monkeypatch.setattr(dashscope, "RETRY_DELAYS_S", (0.02, 0.02, 0.02))


async def lose(provider: DashScopeProvider, call: Call) -> float:
    """Make a call with a response that is lost, as a process that dies before it; return when it was sent."""
    sent_at = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DashScopeProvider, "search", JobApiProvider.search)
        observer, error = await failed(provider, call)
    assert (observer.handles, error.ambiguous) == ([], True)
    return sent_at


async def test_a_job_with_a_lost_response_is_found_and_collected(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    handle = await provider.find(call, sent_at)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[0].id
    assert len((await provider.resume(handle, Recorder())).images) == 1
    assert upstream.ledger.sums()["submitted"] == 1


async def test_a_job_is_found_despite_faults_that_pass(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost polls=3 poll_fault=503")
    handle = await provider.find(call, await lose(provider, call))
    assert handle is not None


async def test_a_job_is_found_among_others_of_its_model_by_its_prompt(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    other, provider = make_provider("sk-other"), make_provider()
    for name in ("a dog", "a cow"):
        await other.generate(make_call(model=OLD, prompt=name), Recorder())
    call = prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    handle = await provider.find(call, sent_at - 1)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[2].id


@pytest.mark.parametrize("model", [OLD, MESSAGE])
async def test_neither_of_two_jobs_that_fit_is_taken(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost", model)
    sent_at = await lose(provider, call)
    await lose(provider, call)
    assert await provider.find(call, sent_at) is None


async def test_a_job_of_this_process_is_no_other_calls_job(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "", MESSAGE)
    sent_at = time.time()
    await provider.generate(call, Recorder())
    assert await provider.find(call, sent_at) is None


@pytest.mark.parametrize("moved_s", [-100.0, 10.0])
async def test_a_job_of_another_time_is_not_found(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, moved_s: float
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    assert await provider.find(call, sent_at + moved_s) is None


async def test_a_call_that_never_arrived_has_no_job(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "reset")
    sent_at = await lose(provider, call)
    assert await provider.find(call, sent_at) is None
    assert await provider.find(prompted(make_call, model=SYNC), sent_at) is None


async def test_a_list_of_several_pages_is_read_whole(
    at_once: None,
    make_provider: MakeProvider,
    make_call: MakeCall,
    upstream: DashScopeEmulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dashscope, "MAX_LISTED", 2)
    other, provider = make_provider("sk-other"), make_provider()
    call = prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    for number in range(4):
        await other.generate(make_call(model=OLD, prompt=f"dog {number}"), Recorder())
    handle = await provider.find(call, sent_at)
    assert handle is not None
    assert handle.id == upstream.ledger.jobs[0].id
    monkeypatch.setattr(dashscope, "MAX_PAGES", 2)
    assert await provider.find(call, sent_at) is None


async def test_a_list_that_fails_is_an_error_and_not_an_empty_one(
    at_once: None, make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, call = make_provider(), prompted(make_call, "job answer=lost")
    sent_at = await lose(provider, call)
    upstream.revoked.add("sk-a-key")
    with pytest.raises(UpstreamError) as caught:
        await provider.find(call, sent_at)
    assert caught.value.code == "upstream_auth"
