"""Tests of the rules about jobs that all providers share: addresses, prices, the pace of polls."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import count

import aiohttp
import pytest
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers import job_api, job_polling
from imagegen.providers.http_client import Account
from imagegen.providers.job_addresses import in_domains
from imagegen.providers.job_api import AcceptedCall, JobApiProvider, PollGate, SubmitForm, job_id
from imagegen.providers.job_polling import JobState, poll_until_end
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, Edits, Reply
from imagegen.tasks.image import ImageLink
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import GenerationRequest
from tests.emulated_jobs import Recorder, quick_polls
from tests.providers.conftest import MakeCall, RawServer, ReadRequest, ScriptedUpstream, details_of
from tests.support import eventually, over_rows

quick = pytest.fixture(quick_polls)
BASE = URL("https://queue.jobs.example/v1")
IMAGES = tuple(ImageLink(f"https://a.example/{number}") for number in range(3))


class ScriptedProvider(JobApiProvider):
    """A provider with scripted states. accepted: what a submit returns."""

    name = "service"
    domains = ("jobs.example",)
    max_images_per_call = 4

    def __init__(
        self,
        session: aiohttp.ClientSession,
        accepted: AcceptedCall,
        *states: JobState | UpstreamError,
        base: str = str(BASE),
    ) -> None:
        super().__init__(session, api_key="k", timeout_s=30, base_url=base)
        self._accepted = accepted
        self.states = list(states)

    @staticmethod
    def account_of(api_key: str) -> Account:
        return Account(f"Key {api_key}", api_key)

    def edits(self, model: str) -> Edits | None:
        return None

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def submit_form(self, call: Call) -> SubmitForm:
        return SubmitForm("generate", {"prompt": call.request.prompt}, ("a warning",))

    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        return self._accepted

    async def poll(self, handle: JobHandle) -> JobState:
        state = self.states.pop(0)
        if isinstance(state, UpstreamError):
            raise state
        return state


@over_rows(
    ("address", "followed"),
    [
        ("https://queue.jobs.example/v1/7", True),
        ("https://eu.jobs.example/7", True),
        ("https://jobs.example/7", True),
        ("/v1/7", True),
        ("7?id=1", True),
        ("https://EU.JOBS.EXAMPLE/7", True),
        ("https://notjobs.example/7", False),
        ("https://jobs.example.evil.example/7", False),
        ("https://evil.example/jobs.example", False),
        ("http://eu.jobs.example/7", False),
        ("https://eu.jobs.example:8443/7", False),
        ("https://a:b@eu.jobs.example/7", False),
        ("https://eu.jobs.example@evil.example/7", False),
        ("http://127.0.0.1:6379/", False),
        ("http://localhost/7", False),
        ("//evil.example/7", False),
        ("file:///etc/passwd", False),
        ("https://eu.jobs.example/" + "a" * 3_000, False),
        ("https://eu.jobs.example/\n7", False),
        ("https://[", False),
        ("", False),
    ],
)
def test_a_key_goes_only_to_the_domains_of_its_provider(address: str, followed: bool) -> None:
    assert (in_domains(BASE, address, ("jobs.example",)) is not None) is followed


@over_rows(
    ("address", "followed"),
    [
        ("http://127.0.0.1:8000/7", True),
        ("/v1/7", True),
        ("http://127.0.0.1:9000/7", False),
        ("http://127.0.0.2:8000/7", False),
        ("http://localhost:8000/7", False),
        ("https://jobs.example/7", False),
    ],
)
def test_an_emulator_on_loopback_may_name_no_other_host(address: str, followed: bool) -> None:
    assert (in_domains(URL("http://127.0.0.1:8000"), address, ("jobs.example",)) is not None) is followed


async def test_addresses_on_other_hosts_are_not_kept_in_the_handle(session: aiohttp.ClientSession) -> None:
    evil = "https://evil.example/7"
    handle = ScriptedProvider(session, AcceptedCall("7")).handle_of(AcceptedCall("7", evil, evil, evil, 9.0), 1.0)
    assert (handle.poll_url, handle.result_url, handle.cancel_url) == ("", "", "")
    assert (handle.accepted_at, handle.expires_at, len(handle.account)) == (1.0, 9.0, 16)


async def test_a_stored_address_on_another_host_is_not_requested(session: aiohttp.ClientSession) -> None:
    service = ScriptedProvider(session, AcceptedCall("7"))
    assert await service.get("https://evil.example/7") is None


@dataclass
class Client:
    """A client with scripted responses by address."""

    responses: dict[str, RawResponse]
    requested: list[str] = field(default_factory=list)

    async def request(self, _method: str, url: URL, _timeout_s: float) -> RawResponse:
        self.requested.append(str(url))
        return self.responses[str(url)]


@pytest.mark.parametrize(
    ("target", "requests"),
    [("https://eu.jobs.example/8", 2), ("/v1/8", 2), ("https://evil.example/8", 1), ("http://eu.jobs.example/8", 1)],
)
async def test_a_redirect_is_followed_once_within_the_domains(
    session: aiohttp.ClientSession, target: str, requests: int
) -> None:
    service, first = ScriptedProvider(session, AcceptedCall("7")), "https://queue.jobs.example/v1/7"
    moved, done = RawResponse(307, {"Location": target}, b""), RawResponse(200, {}, b"{}")
    client = Client({first: moved, "https://eu.jobs.example/8": done, "https://queue.jobs.example/v1/8": done})
    service._client = client  # type: ignore[assignment]  # it has the method that is used
    answer = await service.get(first)
    assert answer is not None
    assert (answer.status, len(client.requested)) == (200 if requests == 2 else 307, requests)


@pytest.fixture
def submit_url(upstream: ScriptedUpstream) -> str:
    upstream.post("http://jobs.example/v1/generate", payload={})
    return "http://jobs.example/v1"


async def test_the_price_of_the_acceptance_is_kept_over_a_takeover(
    quick: None, session: aiohttp.ClientSession, submit_url: str, make_call: MakeCall
) -> None:
    done = JobState("done", reply=Reply(IMAGES))
    accepted = AcceptedCall("7", cost_micro_usd=40_000)
    service = ScriptedProvider(session, accepted, JobState("running", progress=0.5), done, done, base=submit_url)
    observer = Recorder()
    reply = await service.generate(make_call(count=2, n=2), observer)
    assert (reply.images, reply.warnings, observer.parts) == (IMAGES[:2], ("a warning",), [0.5])
    later = await service.resume(observer.handles[0], Recorder())
    assert details_of(reply).cost_micro_usd == details_of(later).cost_micro_usd == 40_000
    assert later.warnings == ("a warning",)


async def test_a_job_that_is_found_has_the_warnings_of_its_call(
    quick: None, session: aiohttp.ClientSession, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def search(*_: object) -> JobHandle:
        return JobHandle("service", "7")

    monkeypatch.setattr(ScriptedProvider, "search", search)
    done = JobState("done", reply=Reply(IMAGES, warnings=("1 of 3 failed",)))
    service = ScriptedProvider(session, AcceptedCall("7"), done)
    handle = await service.find(make_call(), 1.0)
    assert handle is not None
    assert (await service.resume(handle, Recorder())).warnings == ("a warning", "1 of 3 failed")


async def test_a_job_is_searched_for_if_the_response_to_its_call_can_not_be_read(
    quick: None, session: aiohttp.ClientSession, submit_url: str, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def search(*_: object) -> JobHandle:
        return JobHandle("service", "7")

    def unreadable(*_: object) -> AcceptedCall:
        raise UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)

    monkeypatch.setattr(ScriptedProvider, "search", search)
    monkeypatch.setattr(ScriptedProvider, "read_acceptance", unreadable)
    service = ScriptedProvider(session, AcceptedCall("8"), JobState("done", reply=Reply(IMAGES)), base=submit_url)
    observer = Recorder()
    reply = await service.generate(make_call(count=3, n=3), observer)
    assert (reply.images, [handle.id for handle in observer.handles]) == (IMAGES, ["7"])


async def test_a_job_that_is_searched_for_is_reported_as_unread(
    session: aiohttp.ClientSession, submit_url: str, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Recorder()

    async def search(*_: object) -> None:
        await eventually(lambda: observer.unread_count)

    def unreadable(*_: object) -> AcceptedCall:
        raise UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)

    monkeypatch.setattr(job_api, "UNREAD_S", 0.0)
    monkeypatch.setattr(ScriptedProvider, "search", search)
    monkeypatch.setattr(ScriptedProvider, "read_acceptance", unreadable)
    with pytest.raises(UpstreamError, match="not JSON"):
        await ScriptedProvider(session, AcceptedCall("8"), base=submit_url).generate(make_call(), observer)
    assert observer.unread_count == 1


@pytest.mark.parametrize("unclear", [True, False])
async def test_a_job_with_an_unknown_word_for_its_state_is_reported_as_unread(
    quick: None, monkeypatch: pytest.MonkeyPatch, unclear: bool
) -> None:
    observer, polls = Recorder(), count()

    async def poll() -> JobState:
        if observer.unread_count or next(polls) == 50:
            return JobState("done", reply=Reply(IMAGES))
        return JobState("running", unclear=unclear)

    monkeypatch.setattr(job_polling, "UNREAD_S", 0.03)
    await poll_until_end(JobHandle("service", "7"), observer, poll)
    assert observer.unread_count == int(unclear)


async def test_the_price_of_the_result_comes_before_that_of_the_acceptance(
    quick: None, session: aiohttp.ClientSession
) -> None:
    reply = Reply(IMAGES, details=ReplyDetails(cost_micro_usd=1))
    service = ScriptedProvider(session, AcceptedCall("7"), JobState("done", reply=reply))
    handle = JobHandle("service", "7", cost_micro_usd=2)
    assert details_of(await service.resume(handle, Recorder())).cost_micro_usd == 1


@pytest.mark.parametrize(("state", "polls"), [(JobState("done", reply=Reply(IMAGES)), 0), (None, 1)])
async def test_a_job_that_the_acceptance_shows_ended_is_not_polled(
    quick: None,
    session: aiohttp.ClientSession,
    submit_url: str,
    make_call: MakeCall,
    state: JobState | None,
    polls: int,
) -> None:
    service = ScriptedProvider(
        session, AcceptedCall("7", state=state), JobState("done", reply=Reply(IMAGES)), base=submit_url
    )
    observer = Recorder()
    await service.generate(make_call(), observer)
    assert (1 - len(service.states), len(observer.handles)) == (polls, 1)


async def test_a_failed_acceptance_has_a_handle_first(
    quick: None, session: aiohttp.ClientSession, submit_url: str, make_call: MakeCall
) -> None:
    failed = JobState("failed", error=UpstreamError("content_policy", "no"))
    observer = Recorder()
    with pytest.raises(UpstreamError, match="no"):
        await ScriptedProvider(session, AcceptedCall("7", state=failed), base=submit_url).generate(
            make_call(), observer
        )
    assert len(observer.handles) == 1


async def test_the_jobs_of_another_provider_are_forgotten_and_not_cancelled(session: aiohttp.ClientSession) -> None:
    service, handle = ScriptedProvider(session, AcceptedCall("7")), JobHandle("fal", "7", cancel_url=str(BASE))
    with pytest.raises(UpstreamError, match="does not find the job"):
        await service.resume(handle, Recorder())
    assert await service.cancel(handle) is None


BUSY = UpstreamError("upstream_overloaded", "busy", retryable=True, status=503)
PAGE = UpstreamError("upstream_bad_response", "HTTP 200, not JSON", status=200)


async def test_polls_that_fail_are_reported_until_one_does_not(quick: None, session: aiohttp.ClientSession) -> None:
    service = ScriptedProvider(session, AcceptedCall("7"), BUSY, PAGE, PAGE, BUSY, JobState("running"), PAGE)
    service.states.append(JobState("done", reply=Reply(IMAGES)))
    observer = Recorder()
    await service.resume(JobHandle("service", "7"), observer)
    assert [(polls.count, polls.useless) for polls in observer.failed] == [
        *((1, 0), (2, 1), (3, 2), (4, 0), (0, 0)),
        *((1, 1), (0, 0)),
    ]
    since = {polls.since for polls in observer.failed[:4]}
    assert (len(since), observer.failed[4]) == (1, FailedPolls())


@pytest.mark.parametrize("code", ["upstream_auth", "upstream_bad_response", "upstream_invalid_request"])
async def test_a_job_is_given_up_after_some_polls_that_no_repeat_changes(
    quick: None, session: aiohttp.ClientSession, code: str
) -> None:
    fault = UpstreamError(code, "no", status=400)
    service = ScriptedProvider(session, AcceptedCall("7"), *[fault] * (job_polling.MIN_USELESS + 1))
    with pytest.raises(UpstreamError) as caught:
        await service.resume(JobHandle("service", "7"), Recorder())
    assert (caught.value.ambiguous, caught.value.retryable, len(service.states)) == (True, False, 1)
    assert caught.value.code == (code if code == "upstream_auth" else "upstream_bad_response")


async def test_a_job_is_given_up_only_some_minutes_after_the_first_useless_poll(
    quick: None, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 600.0)
    done = JobState("done", reply=Reply(IMAGES))
    service = ScriptedProvider(session, AcceptedCall("7"), *[PAGE] * (job_polling.MIN_USELESS * 3), done)
    reply = await service.resume(JobHandle("service", "7"), Recorder())
    assert reply.images == IMAGES


@pytest.mark.parametrize(("count", "minutes", "is_given_up"), [(9, 11, True), (9, 9, False), (3, 11, False)])
async def test_another_process_goes_on_with_the_polls_of_the_one_before(
    quick: None,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    minutes: int,
    is_given_up: bool,
) -> None:
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 600.0)
    began = time.time() - 60 * minutes
    handle = JobHandle("service", "7", failed_polls=FailedPolls(count, began, count, began))
    service = ScriptedProvider(session, AcceptedCall("7"), PAGE, JobState("done", reply=Reply(IMAGES)))
    if is_given_up:
        with pytest.raises(UpstreamError, match="can't be read"):
            await service.resume(handle, Recorder())
    else:
        await service.resume(handle, Recorder())
    assert len(service.states) == int(is_given_up)


@pytest.mark.parametrize(
    ("status", "confirmed"),
    [(200, True), (202, True), (400, False), (404, False), (401, None), (429, None), (500, None)],
)
async def test_a_cancellation_is_confirmed_refused_or_open(
    session: aiohttp.ClientSession, status: int, confirmed: bool | None
) -> None:
    answer = RawResponse(status, {}, b"")
    assert ScriptedProvider(session, AcceptedCall("7")).read_cancellation(answer) is confirmed


@over_rows("value", ["", " ", "..", "a/b", "a\nb", "é", "a" * 201, 7.5, None, True])
def test_an_unusable_id_is_none(value: object) -> None:
    assert job_id(value).strip() == ""


async def test_polls_of_one_account_are_spaced() -> None:
    gate, loop = PollGate(0.02), asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(gate.wait() for _ in range(6)))
    assert loop.time() - began >= 0.099


async def test_polls_grow_apart_to_the_longest_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def sleep(delay_s: float) -> None:
        delays.append(delay_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    states = [*[JobState("running")] * 8, JobState("running", retry_after_s=7), JobState("done", reply=Reply(IMAGES))]

    async def ask() -> JobState:
        return states.pop(0)

    await poll_until_end(JobHandle("service", "7"), Recorder(), ask, 1.0)
    *paced, asked = delays[1:]
    assert asked == 7
    assert all(0.9 <= delay_s / wanted <= 1.1 for delay_s, wanted in zip(paced, (1, 1.5, 2.25, 3.375, 5), strict=False))
    assert all(4.5 <= delay_s <= 5.5 for delay_s in paced[5:])


def test_a_handle_of_an_older_version_is_read() -> None:
    handle = JobHandle("service", "7", "account", "https://a.example", 1.0, 2.0)
    assert replace(handle, channel="main").channel == "main"
    assert (handle.channel, handle.result_url, handle.cancel_url, handle.cost_micro_usd) == ("", "", "", None)


async def test_a_cancellation_on_a_connection_that_the_provider_has_closed_is_repeated(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await read_request(reader))
        if len(received) > 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    class Cancelling(ScriptedProvider):
        def cancel_request(self, handle: JobHandle) -> tuple[str, str]:
            return "POST", handle.cancel_url

    received: list[bytes] = []
    url = await raw_server(serve)
    provider = Cancelling(session, AcceptedCall("1"), base=url)
    assert await provider.cancel(JobHandle("service", "1", cancel_url=f"{url}/cancel")) is True
    assert len(received) == 2
