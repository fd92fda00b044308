"""Tests of polls against an emulated relay: pace, faults, addresses, and jobs that are gone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.job_poller import JobPoller
from imagegen.providers.openai import OpenAICompatibleProvider, split_endpoint
from imagegen.providers.post import RawResponse
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import over_rows


@dataclass
class Recorder:
    """A call's observer. polls: of the relay when the handle was kept."""

    upstream: EmulatedUpstream
    handles: list[JobHandle] = field(default_factory=list)
    polls: int = -1
    parts: list[float] = field(default_factory=list)
    failed_polls: int = 0

    def sent(self) -> None:
        """Do nothing."""

    async def takes(self, _job: JobHandle) -> bool:
        return True

    async def accepted(self, handle: JobHandle) -> None:
        self.handles.append(handle)
        self.polls = self.upstream.ledger.jobs[0].polls

    def progress(self, fraction: float) -> None:
        self.parts.append(fraction)

    def polls_failed(self, polls: FailedPolls) -> None:
        self.failed_polls = max(self.failed_polls, polls.count)


@pytest.fixture
async def relay():
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
def make_provider(session, relay):
    def make(key: str = "sk-a-key", path: str = "/v1", **more) -> OpenAICompatibleProvider:
        return OpenAICompatibleProvider(session, base_url=relay.url + path, api_key=key, timeout_s=5, **more)

    return make


async def begun(provider, make_call, relay: EmulatedUpstream, fault: str) -> tuple[Recorder, object]:
    """Make a call; return its observer, and its reply or error."""
    observer = Recorder(relay)
    try:
        return observer, await provider.generate(make_call(prompt=f"a cat {{{{fault:{fault}}}}}"), observer)
    except UpstreamError as error:
        return observer, error


async def test_the_handle_is_kept_before_the_first_poll(quick, make_provider, make_call, relay) -> None:
    observer, reply = await begun(make_provider(), make_call, relay, "job job_s=0.2")
    (handle,) = observer.handles
    assert (observer.polls, handle.provider, handle.poll_url) == (0, "openai", f"{relay.url}/v1/tasks/{handle.id}")
    assert "sk-a-key" not in repr(handle)
    assert len(reply.images) == 1
    assert reply.details.cost_micro_usd == 40_000
    assert observer.parts == sorted(observer.parts)


async def test_a_handle_is_enough_to_collect_the_result(quick, make_provider, make_call, relay) -> None:
    observer, reply = await begun(make_provider(), make_call, relay, "job dialect=sub2api")
    later = await make_provider().resume(observer.handles[0], Recorder(relay))
    assert later.images == reply.images
    assert relay.ledger.total == 1


async def test_a_job_that_is_gone_is_an_ambiguous_call(quick, make_provider, make_call, relay) -> None:
    old = JobHandle("openai", "task_0", accepted_at=time.time() - 60)
    with pytest.raises(UpstreamError) as caught:
        await make_provider().resume(old, Recorder(relay))
    assert (caught.value.code, caught.value.retryable, caught.value.ambiguous) == ("upstream_error", True, True)


async def test_the_jobs_of_another_key_are_gone(quick, make_provider, make_call, relay) -> None:
    observer, _ = await begun(make_provider(), make_call, relay, "job")
    handle = JobHandle("openai", observer.handles[0].id, accepted_at=0.0)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider("sk-other").resume(handle, Recorder(relay))


async def test_the_jobs_of_another_provider_are_gone_without_a_poll(make_provider, make_call, relay) -> None:
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().resume(JobHandle("fal", "task_0"), Recorder(relay))


async def test_a_job_that_has_expired_upstream_is_gone_at_once(make_provider, make_call, relay) -> None:
    handle = JobHandle("openai", "task_0", accepted_at=time.time(), expires_at=time.time() - 1)
    began = time.monotonic()
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().resume(handle, Recorder(relay))
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_no_number_of_failed_polls_ends_a_job(quick, make_provider, make_call, relay, status: int) -> None:
    observer, reply = await begun(make_provider(), make_call, relay, f"job poll_fault={status} polls=20")
    assert (len(reply.images), observer.failed_polls) == (1, 20)
    assert relay.ledger.jobs[0].polls > 20


async def test_a_refused_key_ends_a_job_that_may_be_paid_after_some_polls(
    quick, make_provider, make_call, relay
) -> None:
    _, error = await begun(make_provider(), make_call, relay, "job poll_fault=401 polls=99")
    assert (error.code, error.ambiguous, error.retryable) == ("upstream_auth", True, False)
    assert relay.ledger.jobs[0].polls == job_polling.MIN_USELESS


async def test_without_an_address_all_usual_ones_are_tried(quick, make_provider, make_call, relay) -> None:
    observer, _ = await begun(make_provider(), make_call, relay, "job dialect=newapi")
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
async def test_a_redirected_poll_stays_on_its_host(quick, relay, target: str, followed: bool) -> None:
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
        assert len((await poller.resume(handle, Recorder(relay))).images) == 1
        assert len(requested) == 2
    else:
        with pytest.raises(UpstreamError, match="can't be read"):
            await poller.resume(handle, Recorder(relay))
    assert {URL(url).host for url in requested} == {"relay.example"}


async def test_an_address_of_another_host_in_a_stored_handle_is_not_requested(quick, relay) -> None:
    requested: list[str] = []

    async def get(url: URL, _timeout_s: float) -> RawResponse:
        requested.append(str(url))
        return RawResponse(404, {}, b"{}")

    base = URL("https://relay.example/v1")
    poller = JobPoller("openai", base, URL(f"{base}/images/generations"), "a secret", get)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await poller.resume(JobHandle("openai", "7", poll_url="https://old.example/v1/tasks/7"), Recorder(relay))
    assert {URL(url).host for url in requested} == {"relay.example"}


async def test_the_warnings_of_a_call_are_in_the_handle_of_its_job(quick, make_provider, make_call, relay) -> None:
    provider, observer = make_provider(), Recorder(relay)
    relay.set_fault("job dialect=newapi")
    call = make_call(model="gpt-image-2", steps=4)
    reply = await provider.generate(call, observer)
    (handle,) = observer.handles
    assert len(reply.warnings) == 1
    assert "steps" in reply.warnings[0]
    assert handle.warnings == (await provider.resume(handle, Recorder(relay))).warnings == reply.warnings


@pytest.mark.parametrize(("first", "text"), [(400, "can't be read"), (404, "does not find the job")])
async def test_a_job_is_gone_only_if_its_own_address_does_not_find_it(quick, relay, first: int, text: str) -> None:
    async def get(url: URL, _timeout_s: float) -> RawResponse:
        return RawResponse(first if str(url) == named else 404, {}, b"{}")

    base, named = URL("https://relay.example/v1"), "https://relay.example/v1/jobs/7"
    poller = JobPoller("openai", base, URL(f"{base}/images/generations"), "a secret", get)
    with pytest.raises(UpstreamError, match=text):
        await poller.resume(JobHandle("openai", "7", poll_url=named, accepted_at=1.0), Recorder(relay))
