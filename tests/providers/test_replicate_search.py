"""Tests of the search for a job in Replicate's list after its response was lost."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import pytest

from imagegen.emulator.replicate import PAGE, ReplicateEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import replicate as replicate_module
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.protocol import Call, InputImage
from imagegen.providers.replicate import ReplicateProvider
from tests.emulated_jobs import Recorder, begun_only, failed, made, quick_polls, replied
from tests.providers.conftest import MakeCall
from tests.providers.replicate_calls import LINK, MODEL, emulated_replicate, replicate_provider

quick = pytest.fixture(quick_polls)
HASH = "a1" * 32
service = pytest.fixture(emulated_replicate)
replicate = pytest.fixture(replicate_provider)


LOST = "a cat {{fault:job answer=lost times=1}}"


async def lost(replicate: ReplicateProvider, call: Call) -> float:
    """Make a call with a lost response, as a process that dies before it; return the time before the call."""
    sent_at = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplicateProvider, "search", JobApiProvider.search)
        observer, error = await failed(replicate, call)
    assert (observer.handles, error.ambiguous) == ([], True)
    return sent_at


async def test_a_call_with_a_lost_response_continues_with_the_job_that_it_began(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL, prompt=LOST))
    assert (len(reply.images), len(observer.handles)) == (1, 1)
    assert service.ledger.sums()["submitted"] == 1


async def test_a_call_that_never_arrived_is_not_found(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    observer, error = await failed(replicate, make_call(model=MODEL, prompt="a cat {{fault:reset}}"))
    assert (observer.handles, error.ambiguous) == ([], True)


async def test_a_list_that_fails_leaves_the_call_ambiguous(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise UpstreamError("upstream_auth", "no list")

    monkeypatch.setattr(ReplicateProvider, "search", fail)
    _, error = await failed(replicate, make_call(model=MODEL, prompt=LOST))
    assert (error.code, error.ambiguous) == ("upstream_error", True)


@pytest.mark.parametrize("model", [MODEL, f"stability-ai/sdxl:{HASH}", "deployments/me/mine"])
async def test_a_job_with_a_lost_response_is_found_and_collected(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall, model: str
) -> None:
    call = make_call(model=model, prompt=LOST, seed=5)
    sent_at = await lost(replicate, call)
    handle = await replicate.find(call, sent_at)
    assert handle is not None
    assert handle.id == service.ledger.jobs[0].id
    assert len((await replicate.resume(handle, Recorder())).images) == 1
    assert service.ledger.sums()["submitted"] == 1


async def test_a_job_that_is_listed_late_is_waited_for(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt="a cat {{fault:job answer=lost unknown_s=1.5}}")
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at) is not None


async def test_neither_of_two_equal_jobs_is_taken(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt="a cat {{fault:job answer=lost}}")
    sent_at = await lost(replicate, call)
    await lost(replicate, call)
    assert await replicate.find(call, sent_at) is None


async def test_a_job_of_another_call_is_not_taken(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    sent_at = time.time()
    call = make_call(model=MODEL)
    await made(replicate, call)  # the same input, and its handle was kept
    for other in (call, make_call(model=MODEL, seed=9), make_call(model="black-forest-labs/flux-dev")):
        assert await replicate.find(other, sent_at) is None
    assert service.ledger.sums()["listed"] == 1


async def test_a_job_from_before_the_call_is_not_taken(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "LISTED_WITHIN_S", 0.0)
    call = make_call(model=MODEL, prompt=LOST)
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at + 60) is None


async def test_all_pages_of_the_list_are_read(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL, prompt=LOST)
    sent_at = await lost(replicate, call)
    for number in range(PAGE + 5):
        await begun_only(replicate, make_call(model=MODEL, prompt=f"another {number}"))
    handle = await replicate.find(call, sent_at)
    assert handle is not None
    assert handle.id == service.ledger.jobs[0].id


async def test_an_incomplete_list_finds_nothing(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicate_module, "MAX_PAGES", 1)
    monkeypatch.setattr(replicate_module, "CLOCK_TOLERANCE_S", 600.0)  # all of them may be later than the call
    call = make_call(model=MODEL, prompt=LOST)
    for number in range(PAGE + 1):
        await begun_only(replicate, make_call(model=MODEL, prompt=f"another {number}"))
    sent_at = await lost(replicate, call)
    assert await replicate.find(call, sent_at) is None


async def test_a_list_that_can_not_be_read_now_is_an_error(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    call = make_call(model=MODEL)
    service.revoked.add("r8_secret")
    with pytest.raises(UpstreamError):
        await replicate.find(call, time.time())


async def test_a_call_with_the_bytes_of_an_image_is_not_searched_for(
    replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    async def read() -> AsyncGenerator[bytes, None]:
        yield b"x"

    call = make_call(model=MODEL, imageUrl=LINK)
    call = type(call)(call.request, 1, inputs={LINK: InputImage("image/png", 1, read)})
    assert await replicate.find(call, time.time()) is None
