"""Tests of Replicate's jobs: how they are kept, polled, collected and cancelled, and where the key goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import aiohttp
import pytest
from yarl import URL

from imagegen.emulator.replicate import ReplicateEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.replicate import ReplicateProvider
from imagegen.tasks.provider_job import JobHandle
from tests.emulated_jobs import Recorder, begun_only, failed, quick_polls, replied
from tests.providers.conftest import MakeCall, RawServer, ReadRequest
from tests.providers.replicate_calls import LINK, MODEL, emulated_replicate, replicate_provider
from tests.support import LoopTime

quick = pytest.fixture(quick_polls)
service = pytest.fixture(emulated_replicate)
replicate = pytest.fixture(replicate_provider)


async def test_a_job_is_submitted_polled_and_collected(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL, count=2, n=2))
    (handle,) = observer.handles
    assert (handle.provider, handle.channel, len(reply.images)) == ("replicate", "main", 2)
    assert handle.poll_url == f"{service.url}/v1/predictions/{handle.id}"
    assert "r8_secret" not in repr(handle)
    assert service.ledger.sums() == {"submitted": 1, "charged": 1, "cancelled": 0, "listed": 0, "cost_usd": 0.02}


async def test_a_job_that_has_ended_already_is_not_polled(
    quick: None,
    replicate: ReplicateProvider,
    service: ReplicateEmulator,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReplicateEmulator, "_object", done_at_once(ReplicateEmulator._object))
    _, reply = await replied(replicate, make_call(model=MODEL, prompt="a cat {{fault:job job_s=0}}"))
    assert (len(reply.images), service.ledger.jobs[0].polls) == (1, 0)


def done_at_once(method: Callable[..., object]) -> Callable[..., object]:
    return lambda self, running, **_more: method(self, running)


async def test_the_handle_is_kept_before_the_first_poll(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer = Recorder(lambda: service.ledger.jobs[0].polls)
    await replicate.generate(make_call(model=MODEL), observer)
    assert observer.noted == [0]


async def test_a_handle_is_enough_to_collect_the_result(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, reply = await replied(replicate, make_call(model=MODEL))
    bare = JobHandle("replicate", observer.handles[0].id)
    for handle in (observer.handles[0], bare):
        assert (await replicate.resume(handle, Recorder())).images == reply.images
    assert service.ledger.total == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 900", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("stays_open", [False, True])
async def test_a_result_without_the_end_of_its_response_is_collected(
    quick: None,
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    framing: bytes,
    stays_open: bool,
    is_reading: asyncio.Event,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        body = json.dumps({"id": "1", "status": "succeeded", "output": [LINK]}).encode()
        chunk = b"%x\r\n" % len(body) if framing.endswith(b"chunked") else b""
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b%b" % (framing, chunk, body))
        if stays_open:
            await is_reading.wait()
            await LoopTime().move(30)
            await reader.read()

    replicate = ReplicateProvider(session, api_key="k", base_url=await raw_server(serve), timeout_s=30)
    reply = await replicate.resume(JobHandle("replicate", "1"), Recorder())
    assert len(reply.images) == 1


@pytest.mark.parametrize("options", ["unknown_s=0.3", "poll_fault=503 polls=4", "poll_fault=429 polls=2"])
async def test_polls_that_do_not_find_the_job_or_fail_do_not_end_it(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall, options: str
) -> None:
    _, reply = await replied(replicate, make_call(model=MODEL, prompt=f"a cat {{{{fault:job {options}}}}}"))
    assert (len(reply.images), service.ledger.total) == (1, 1)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("end=failed", "upstream_error"),
        ("end=failed aborted=1", "upstream_overloaded"),
        ("end=moderated", "content_policy"),
    ],
)
async def test_a_job_that_ends_without_an_image_fails_its_call(
    quick: None, replicate: ReplicateProvider, make_call: MakeCall, options: str, code: str
) -> None:
    _, error = await failed(replicate, make_call(model=MODEL, prompt=f"a cat {{{{fault:job {options}}}}}"))
    assert (error.code, error.ambiguous) == (code, False)


async def test_a_job_that_is_gone_is_an_ambiguous_call(
    quick: None, replicate: ReplicateProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    with pytest.raises(UpstreamError) as caught:
        await replicate.resume(JobHandle("replicate", "gone", accepted_at=1.0), Recorder())
    assert caught.value.ambiguous


async def test_a_job_is_cancelled_once(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    observer, _ = await replied(replicate, make_call(model=MODEL))
    assert await replicate.cancel(observer.handles[0]) is False  # it is over
    service.set_fault("job job_s=60")
    slow = await begun_only(replicate, make_call(model=MODEL))
    assert await replicate.cancel(slow) is True
    assert service.ledger.sums()["cancelled"] == 1
    with pytest.raises(UpstreamError, match="cancelled"):
        await replicate.resume(slow, Recorder())
    assert await replicate.cancel(JobHandle("replicate", "gone")) is False


async def test_a_revoked_key_is_refused(
    quick: None, replicate: ReplicateProvider, service: ReplicateEmulator, make_call: MakeCall
) -> None:
    service.revoked.add("r8_secret")
    _, error = await failed(replicate, make_call(model=MODEL))
    assert (error.code, error.retryable) == ("upstream_auth", False)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://api.replicate.com/v1/predictions/1", True),
        ("https://stream.replicate.com/v1/predictions/1", False),
        ("https://api.replicate.com.example/v1/predictions/1", False),
        ("http://127.0.0.1/v1/predictions/1", False),
    ],
)
async def test_the_key_goes_to_addresses_of_replicate_only(
    session: aiohttp.ClientSession, address: str, kept: bool
) -> None:
    replicate = ReplicateProvider(session, api_key="k", base_url="https://api.replicate.com", timeout_s=30)
    assert (replicate.own_address(address) is not None) is kept
    assert replicate.base_url == URL("https://api.replicate.com/v1/")
