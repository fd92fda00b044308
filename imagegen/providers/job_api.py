"""Base of providers that answer each paid call with a job: submit, polls, resumption, cancellation.

A provider's own module maps a call to its body and reads its responses; all I/O and all rules about jobs are here.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import ClassVar

import aiohttp
from msgspec import Struct
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.http_client import Account, ProviderClient
from imagegen.providers.job_addresses import in_domains
from imagegen.providers.job_polling import (
    MAX_ID_CHARS,
    POLL_TIMEOUT_S,
    REDIRECTS,
    UNREAD_S,
    JobState,
    first_delay_s,
    poll_until_end,
)
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, forgotten_job
from imagegen.providers.response_parser import error_from_response
from imagegen.tasks.provider_job import JobHandle, key_fingerprint
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import is_useless_response

CANCEL_TIMEOUT_S, CANCEL_TRIES = 10.0, 2
DROPPED_S = 15.0
"""How long the response to a call of a cancelled task is waited for."""

MIN_POLL_GAP_S = 0.05
"""Between two polls of one account. DashScope, the strictest, allows 20 a second; Replicate 3,000 a minute."""

MAX_KEPT_IDS = 1_000

_UNDECIDED = frozenset({401, 402, 403, 407, 408, 425, 429})
"""Refusals of a cancellation that are not about the job."""

_KEY_REFUSALS = frozenset({401, 402, 403})


class SubmitForm(Struct, frozen=True):
    """A call as a provider takes it.

    path: below the base; warnings: about fields that are not sent as given; headers: besides those of the account.
    """

    path: str
    fields: Mapping[str, object]
    warnings: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


class AcceptedCall(Struct, frozen=True):
    """A job that a call has begun, as the response shows it; its addresses are not checked.

    state: of a job that has ended already; None: it is to be polled. expires_at: Unix time.
    """

    id: str
    poll_url: str = ""
    result_url: str = ""
    cancel_url: str = ""
    expires_at: float | None = None
    cost_micro_usd: int | None = None
    state: JobState | None = None


class JobApiProvider(ABC):
    """One account of a provider with jobs.

    domains: registered names of the provider; job addresses are followed only there, by https.
    channel: name of the channel, kept in the handles of its jobs. account: fingerprint of the key, as in the handles.
    base_url: images may be fetched from its host even if it is not public. kept_ids: last jobs with durable handles.
    """

    name: ClassVar[str]
    domains: ClassVar[tuple[str, ...]]
    version_path: ClassVar[str] = ""
    """End of the base URL, which the setting may leave out, such as `/v1`."""
    key_check: ClassVar[str | None] = None
    """Path below the base that only an accepted key may GET, and that costs nothing; None without one."""
    max_images_per_call: int
    images_inline = False

    def __init__(
        self, session: aiohttp.ClientSession, *, api_key: str, timeout_s: float, base_url: str, channel: str = ""
    ) -> None:
        address = base_url.strip().rstrip("/").removesuffix(self.version_path) + self.version_path
        base, account = URL(address).with_user(None), self.account_of(api_key)
        self._base = base
        self._client = ProviderClient(session, base, "", timeout_s, account)
        self._secret = account.secret
        self._channel = channel
        self.account = key_fingerprint(str(base), account.secret)
        self._timeout_s = timeout_s
        self._gate = PollGate(MIN_POLL_GAP_S)
        self._dropped: set[asyncio.Future[None]] = set()
        self.kept_ids: deque[str] = deque(maxlen=MAX_KEPT_IDS)
        self.own_hosts = self._client.own_hosts
        self.base_url: URL | None = self._client.base_url

    @staticmethod
    @abstractmethod
    def account_of(api_key: str) -> Account:
        """Return the credentials and headers of a key."""

    @abstractmethod
    def edits(self, model: str) -> Edits | None:
        """Return the input images that it takes for this model, None if it takes none."""

    @abstractmethod
    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request without what a call does not carry."""

    @abstractmethod
    def submit_form(self, call: Call) -> SubmitForm:
        """Return what to send. Raises UpstreamError for a call that the provider can't take."""

    @abstractmethod
    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        """Return the job of a call. Raises UpstreamError if its response is no acceptance."""

    def complete(self, accepted: AcceptedCall, _form: SubmitForm) -> AcceptedCall:
        """Return the job of a call with the addresses that follow from the call, if the response has none to use."""
        return accepted

    @abstractmethod
    async def poll(self, handle: JobHandle) -> JobState:
        """Return the state of a job. Raises UpstreamError for a failed poll."""

    def cancel_request(self, _handle: JobHandle) -> tuple[str, str] | None:
        """Return method and address that cancel a job, None if the provider has no such request."""
        return None

    def read_cancellation(self, answer: RawResponse) -> bool | None:
        """Return whether the response confirms a cancellation, None if it leaves that open."""
        if 200 <= answer.status < 300:
            return True
        return False if 400 <= answer.status < 500 and answer.status not in _UNDECIDED else None

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        """Begin a job and poll it until it ends. Raises UpstreamError."""
        form, sent_at = self.submit_form(call), time.time()
        try:
            accepted = self.complete(self.read_acceptance(await self._submit(form, observer)), form)
        except UpstreamError as error:
            may_run = error.ambiguous or is_useless_response(error)
            handle = await self._find_lost(call, sent_at, observer) if may_run else None
            if handle is None or not await observer.takes(handle):
                raise
            accepted = AcceptedCall(handle.id)
        else:
            handle = self.handle_of(accepted, time.time(), form.warnings)
        await observer.accepted(handle)
        self.kept_ids.append(handle.id)
        if (state := accepted.state) and (state.error or (state.reply and state.reply.images)):
            reply = _ended(state)
        else:
            reply = await poll_until_end(handle, observer, partial(self._poll_checked, handle), first_delay_s(None))
        return replace(_completed(reply, handle), images=reply.images[: call.count])

    async def _submit(self, form: SubmitForm, observer: CallObserver) -> RawResponse:
        """Send a call. If it is dropped meanwhile its response is still read, so that its job can be cancelled."""
        running = asyncio.ensure_future(self._client.submit(form.path, form.fields, observer, form.headers))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            dropped = asyncio.ensure_future(self._report_dropped(running, form, observer))
            self._dropped.add(dropped)
            dropped.add_done_callback(self._dropped.discard)
            raise

    async def _report_dropped(
        self, running: asyncio.Future[RawResponse], form: SubmitForm, observer: CallObserver
    ) -> None:
        """Report the job of a call that was dropped, if it is accepted within some seconds."""
        with suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(DROPPED_S):
                accepted = self.complete(self.read_acceptance(await running), form)
            await observer.accepted(self.handle_of(accepted, time.time(), form.warnings))

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll the job of an earlier call until it ends. Raises UpstreamError."""
        if handle.provider != self.name:
            raise forgotten_job()
        self.kept_ids.append(handle.id)
        return _completed(await poll_until_end(handle, observer, partial(self._poll_checked, handle)), handle)

    async def _find_lost(self, call: Call, sent_at: float, observer: CallObserver) -> JobHandle | None:
        """Return the job of a submit with a lost response; None if there is none to be found, or no list now."""
        timer = asyncio.get_running_loop().call_later(UNREAD_S, observer.job_unread)
        try:
            return await self.find(call, sent_at)
        except UpstreamError:
            return None
        finally:
            timer.cancel()

    async def find(self, call: Call, sent_at: float) -> JobHandle | None:
        """Return the handle of the job of a call with a lost response, None if it can't be identified."""
        handle = await self.search(call, sent_at)
        return handle and replace(handle, warnings=self.submit_form(call).warnings)

    async def search(self, call: Call, sent_at: float) -> JobHandle | None:  # noqa: ARG002 - most have no list
        """Return None: there is no list of jobs."""
        return None

    async def cancel(self, handle: JobHandle) -> bool | None:
        """Request the end of a job. Return whether the provider confirmed it, None if that is uncertain.

        A request is repeated once if its connection is lost: the provider may have closed a kept one at that moment.
        """
        request = self.cancel_request(handle) if handle.provider == self.name else None
        url = self.own_address(request[1]) if request else None
        if request is None or url is None:
            return None
        for _ in range(CANCEL_TRIES):
            try:
                return self.read_cancellation(await self._client.request(request[0], url, CANCEL_TIMEOUT_S))
            except UpstreamError as error:
                if error.code != "upstream_error":
                    break
        return None

    async def models(self) -> tuple[Mapping[str, object], ...]:
        """Return nothing: the list of the provider is not one of image models."""
        return ()

    async def check_key(self) -> str | None:
        """GET an address that costs nothing with the key. Raises UpstreamError if it is refused."""
        if self.key_check is None:
            return None
        answer = await self._client.request("GET", URL(f"{self._base}/{self.key_check}"), POLL_TIMEOUT_S)
        if answer.status in _KEY_REFUSALS:
            now_s = time.time()
            raise error_from_response(answer.status, answer.headers, answer.body, secret=self._secret, now_s=now_s)
        return ""

    async def close(self) -> None:
        """Wait no longer for the responses to dropped calls. The session is the app's."""
        for dropped in self._dropped:
            dropped.cancel()
        await asyncio.gather(*self._dropped, return_exceptions=True)

    def handle_of(self, accepted: AcceptedCall, accepted_at: float, warnings: tuple[str, ...] = ()) -> JobHandle:
        """Return the handle of a job, with those of its addresses that may be requested. accepted_at: Unix time."""
        addresses = (accepted.poll_url, accepted.result_url, accepted.cancel_url)
        poll_url, result_url, cancel_url = (str(self.own_address(address) or "") for address in addresses)
        return JobHandle(
            self.name,
            accepted.id,
            self.account,
            poll_url,
            accepted_at,
            accepted.expires_at,
            channel=self._channel,
            result_url=result_url,
            cancel_url=cancel_url,
            cost_micro_usd=accepted.cost_micro_usd,
            warnings=warnings,
        )

    def own_address(self, address: str) -> URL | None:
        """Return an address if the key may go there, None otherwise."""
        return in_domains(self._base, address, self.domains)

    async def get(self, address: str) -> RawResponse | None:
        """GET an address of a job with the key; None if the key may not go there. Raises UpstreamError.

        A redirect is followed once, within the provider's domains.
        """
        url = self.own_address(address)
        if url is None:
            return None
        answer = await self._client.request("GET", url, POLL_TIMEOUT_S)
        if answer.status in REDIRECTS:
            target = in_domains(url, answer.headers.get("Location", ""), self.domains)
            if target and self.own_address(str(target)):
                return await self._client.request("GET", target, POLL_TIMEOUT_S)
        return answer

    async def _poll_checked(self, handle: JobHandle) -> JobState:
        await self._gate.wait()
        return await self.poll(handle)


class PollGate:
    """Gate that spaces the polls of all jobs of one account. gap_s: between two polls."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._free_at = 0.0

    async def wait(self) -> None:
        """Return when the next poll may be sent."""
        now = asyncio.get_running_loop().time()
        turn = max(now, self._free_at)
        self._free_at = turn + self._gap_s
        if turn > now:
            await asyncio.sleep(turn - now)


def job_id(value: object) -> str:
    """Return the id of a job that a provider named, empty if it is unusable."""
    value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
        return ""
    return value if value.isascii() and value.isprintable() and value.strip(".") and "/" not in value else ""


def _ended(state: JobState) -> Reply:
    if state.error is not None:
        raise state.error
    return state.reply or Reply(())


def _completed(reply: Reply, handle: JobHandle) -> Reply:
    """Return the reply with what the handle has: warnings, and the price of the acceptance if the result has none."""
    details = reply.details or ReplyDetails()
    reply = replace(reply, warnings=(*handle.warnings, *reply.warnings))
    if handle.cost_micro_usd is None or details.cost_micro_usd is not None:
        return reply
    return replace(reply, details=replace(details, cost_micro_usd=handle.cost_micro_usd))
