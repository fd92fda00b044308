"""Tests of polls against an emulated relay: pace, faults, addresses, and jobs that are gone."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.job_poller import JobPoller
from imagegen.providers.openai import OpenAICompatibleProvider, split_endpoint
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call
from imagegen.tasks.provider_job import JobHandle
from tests.emulated_jobs import Recorder, failed, replied
from tests.emulator_fixtures import EmulatedUpstream
from tests.providers.conftest import MakeCall, RawServer
from tests.support import over_rows

MakeProvider = Callable[..., OpenAICompatibleProvider]


@pytest.fixture
async def relay() -> AsyncIterator[EmulatedUpstream]:
    async with EmulatedUpstream(image="tiny") as relay:
        yield relay


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let polls follow each other at once."""
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "MAX_FAULT_DELAY_S", "MAX_RETRY_AFTER_S"):
        monkeypatch.setattr(job_polling, name, 0.02)
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 0.0)
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.2)


@pytest.fixture
def make_provider(session: aiohttp.ClientSession, relay: EmulatedUpstream) -> MakeProvider:
    def make(key: str = "sk-a-key", path: str = "/v1", **more: Any) -> OpenAICompatibleProvider:
        return OpenAICompatibleProvider(session, base_url=relay.url + path, api_key=key, timeout_s=30, **more)

    return make


def with_fault(make_call: MakeCall, fault: str) -> Call:
    return make_call(prompt=f"a cat {{{{fault:{fault}}}}}")


async def test_the_handle_is_kept_before_the_first_poll(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    call = with_fault(make_call, "job job_s=0.2")
    observer, reply = await replied(make_provider(), call, lambda: relay.ledger.jobs[0].polls)
    (handle,) = observer.handles
    assert (observer.noted, handle.provider, handle.poll_url) == ([0], "openai", f"{relay.url}/v1/tasks/{handle.id}")
    assert "sk-a-key" not in repr(handle)
    assert len(reply.images) == 1
    assert reply.details
    assert reply.details.cost_micro_usd == 40_000
    assert observer.parts == sorted(observer.parts)


async def test_a_handle_is_enough_to_collect_the_result(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    observer, reply = await replied(make_provider(), with_fault(make_call, "job dialect=sub2api"))
    later = await make_provider().resume(observer.handles[0], Recorder())
    assert later.images == reply.images
    assert relay.ledger.total == 1


async def test_a_job_that_is_gone_is_an_ambiguous_call(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    old = JobHandle("openai", "task_0", accepted_at=time.time() - 60)
    with pytest.raises(UpstreamError) as caught:
        await make_provider().resume(old, Recorder())
    assert (caught.value.code, caught.value.retryable, caught.value.ambiguous) == ("upstream_error", True, True)


async def test_the_jobs_of_another_key_are_gone(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    observer, _ = await replied(make_provider(), with_fault(make_call, "job"))
    handle = JobHandle("openai", observer.handles[0].id, accepted_at=0.0)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider("sk-other").resume(handle, Recorder())


async def test_the_jobs_of_another_provider_are_gone_without_a_poll(
    make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().resume(JobHandle("fal", "task_0"), Recorder())


async def test_a_job_that_has_expired_upstream_is_gone_without_another_poll(
    make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "MAX_FAULT_DELAY_S"):
        monkeypatch.setattr(job_polling, name, 60.0)
    handle = JobHandle("openai", "task_0", accepted_at=time.time(), expires_at=time.time() - 1)
    async with asyncio.timeout(20):
        with pytest.raises(UpstreamError, match="does not find the job"):
            await make_provider().resume(handle, Recorder())


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_no_number_of_failed_polls_ends_a_job(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream, status: int
) -> None:
    observer, reply = await replied(make_provider(), with_fault(make_call, f"job poll_fault={status} polls=20"))
    assert (len(reply.images), max(polls.count for polls in observer.failed)) == (1, 20)
    assert relay.ledger.jobs[0].polls > 20


async def test_a_refused_key_ends_a_job_that_may_be_paid_after_some_polls(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    _, error = await failed(make_provider(), with_fault(make_call, "job poll_fault=401 polls=99"))
    assert (error.code, error.ambiguous, error.retryable) == ("upstream_auth", True, False)
    assert relay.ledger.jobs[0].polls == job_polling.MIN_USELESS


async def test_without_an_address_all_usual_ones_are_tried(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    observer, _ = await replied(make_provider(), with_fault(make_call, "job dialect=newapi"))
    assert observer.handles[0].poll_url.endswith("/v1/tasks/" + observer.handles[0].id)
    assert relay.ledger.jobs[0].collected


@over_rows(
    ("address", "base", "path"),
    [
        ("https://a.example/v1", "https://a.example/v1", "images/generations"),
        ("https://a.example/v1/", "https://a.example/v1", "images/generations"),
        ("https://a.example/v1/images/generations", "https://a.example/v1", "images/generations"),
        ("https://a.example/v1/images/generations/async/", "https://a.example/v1", "images/generations/async"),
        ("https://a.example/v1/async/images/generations", "https://a.example/v1", "async/images/generations"),
        ("https://a.example", "https://a.example", "images/generations"),
    ],
)
def test_an_address_may_end_in_the_path_of_the_paid_call(address: str, base: str, path: str) -> None:
    assert split_endpoint(address) == (base, path)


@pytest.mark.parametrize(
    ("target", "followed"),
    [
        ("/v1/tasks/7/", True),
        ("https://relay.example/x", True),
        ("https://evil.example/v1/tasks/7", False),
        ("", False),
    ],
)
async def test_a_redirected_poll_stays_on_its_host(
    quick: None, relay: EmulatedUpstream, target: str, followed: bool
) -> None:
    requested: list[str] = []
    done = b'{"data":{"status":"completed","result":{"images":[{"url":"https://a.example/1.png"}]}}}'

    async def get(url: URL, _timeout_s: float) -> RawResponse:
        requested.append(str(url))
        if str(url) == "https://relay.example/v1/tasks/7":
            return RawResponse(307, {"Location": target}, b"")
        return RawResponse(200, {}, done) if followed else RawResponse(404, {}, b"{}")

    base = URL("https://relay.example/v1")
    poller = JobPoller("openai", base, URL(f"{base}/images/generations"), "a secret", get)
    handle = JobHandle("openai", "7", accepted_at=1.0)
    if followed:
        assert len((await poller.resume(handle, Recorder())).images) == 1
        assert len(requested) == 2
    else:
        with pytest.raises(UpstreamError, match="can't be read"):
            await poller.resume(handle, Recorder())
    assert {URL(url).host for url in requested} == {"relay.example"}


async def test_an_address_of_another_host_in_a_stored_handle_is_not_requested(
    quick: None, relay: EmulatedUpstream
) -> None:
    requested: list[str] = []

    async def get(url: URL, _timeout_s: float) -> RawResponse:
        requested.append(str(url))
        return RawResponse(404, {}, b"{}")

    base = URL("https://relay.example/v1")
    poller = JobPoller("openai", base, URL(f"{base}/images/generations"), "a secret", get)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await poller.resume(JobHandle("openai", "7", poll_url="https://old.example/v1/tasks/7"), Recorder())
    assert {URL(url).host for url in requested} == {"relay.example"}


async def test_the_warnings_of_a_call_are_in_the_handle_of_its_job(
    quick: None, make_provider: MakeProvider, make_call: MakeCall, relay: EmulatedUpstream
) -> None:
    provider, observer = make_provider(), Recorder()
    relay.set_fault("job dialect=newapi")
    call = make_call(model="gpt-image-2", steps=4)
    reply = await provider.generate(call, observer)
    (handle,) = observer.handles
    assert len(reply.warnings) == 1
    assert "steps" in reply.warnings[0]
    assert handle.warnings == (await provider.resume(handle, Recorder())).warnings == reply.warnings


@pytest.mark.parametrize(("first", "text"), [(400, "can't be read"), (404, "does not find the job")])
async def test_a_job_is_gone_only_if_its_own_address_does_not_find_it(
    quick: None, relay: EmulatedUpstream, first: int, text: str
) -> None:
    async def get(url: URL, _timeout_s: float) -> RawResponse:
        return RawResponse(first if str(url) == named else 404, {}, b"{}")

    base, named = URL("https://relay.example/v1"), "https://relay.example/v1/jobs/7"
    poller = JobPoller("openai", base, URL(f"{base}/images/generations"), "a secret", get)
    with pytest.raises(UpstreamError, match=text):
        await poller.resume(JobHandle("openai", "7", poll_url=named, accepted_at=1.0), Recorder())


@pytest.mark.parametrize("body", [b"", b"Accepted", b"{}"])
async def test_an_accepted_call_with_nothing_but_an_address_is_polled_there_and_not_made_again(
    quick: None, session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, body: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if length := re.search(rb"Content-Length: (\d+)", head):
                await reader.readexactly(int(length[1]))
            received.append(head.split(b" HTTP")[0].decode())
            status, answer, more = b"202 Accepted", body, b"Location: /v1/queue/a7\r\n"
            if len(received) == 4:
                status, answer, more = b"200 OK", json.dumps({"data": [{"url": "https://a.example/x"}]}).encode(), b""
            writer.write(b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, more, len(answer), answer))

    received: list[str] = []
    url = await raw_server(serve)
    provider = OpenAICompatibleProvider(session, base_url=f"{url}/v1", api_key="sk-a-key", timeout_s=30)
    observer, reply = await replied(provider, make_call())
    assert received == ["POST /v1/images/generations", *["GET /v1/queue/a7"] * 3]
    assert (observer.handles[0].id, len(reply.images)) == ("a7", 1)
