"""Polls of relays' jobs: the addresses that are tried, since relays differ and few of them name the right one."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from msgspec import Struct
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.job_addresses import same_host
from imagegen.providers.job_polling import POLL_TIMEOUT_S, REDIRECTS, REFUSALS, JobState, first_delay_s, poll_until_end
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import CallObserver, ForwardingObserver, Reply, forgotten_job
from imagegen.providers.relay_jobs import parse_acceptance, parse_failure, parse_job, poll_addresses
from imagegen.tasks.provider_job import JobHandle, key_fingerprint


class JobPoller(Struct, frozen=True):
    """Poller of the jobs of one account.

    provider: its name; base: no other host is requested; submit: address of the call.
    get: requests an address with the account's key within some seconds. secret: what no text may show.
    """

    provider: str
    base: URL
    submit: URL
    secret: str
    get: Callable[[URL, float], Awaitable[RawResponse]]

    def __repr__(self) -> str:
        return f"JobPoller({self.provider!r})"

    async def collect(self, answer: RawResponse, observer: CallObserver) -> Reply | None:
        """Return the result of the job that a call has begun; None if its response is no acceptance of one.

        Raises UpstreamError once the job can have no image any more.
        """
        accepted = parse_acceptance(answer.status, answer.headers, answer.body)
        if accepted is None:
            if error := parse_failure(answer.status, answer.body, secret=self.secret):
                raise error
            return None
        addresses = poll_addresses(self.base, self.submit, accepted.id, accepted.address, accepted.guess)
        now = time.time()
        expires_at = accepted.expires_at if accepted.expires_at and accepted.expires_at > now else None
        account = key_fingerprint(str(self.base), self.secret)
        handle = JobHandle(self.provider, accepted.id, account, str(addresses[0]), now, expires_at)
        await observer.accepted(handle)
        return await self._poll(handle, observer, first_delay_s(accepted.retry_after_s))

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll a job until it ends. Raises UpstreamError once it can have no image any more."""
        if handle.provider != self.provider:
            raise forgotten_job()
        return await self._poll(handle, observer)

    async def _poll(self, handle: JobHandle, observer: CallObserver, delay_s: float | None = None) -> Reply:
        addresses = _Addresses(self, poll_addresses(self.base, self.submit, handle.id, handle.poll_url))
        return await poll_until_end(handle, observer, addresses.poll, delay_s)


class NotingObserver(ForwardingObserver, frozen=True):
    """Observer of a call that adds the call's warnings to the handle of its job."""

    warnings: tuple[str, ...]

    async def accepted(self, handle: JobHandle) -> None:
        await self.observer.accepted(replace(handle, warnings=self.warnings))


class _Addresses:
    """Addresses at which one job may be polled. Until one of them finds the job, all are tried."""

    def __init__(self, poller: JobPoller, addresses: tuple[URL, ...]) -> None:
        self._poller, self._addresses = poller, addresses

    async def poll(self) -> JobState:
        """Return the state of the job, `forgotten` if an address does not find it and none has it.

        The first address is the most likely one. Raises UpstreamError for a passing fault of it, which ends the round,
        for another fault of it if no other address has the job, and if none has an answer that can be read.
        """
        fault: UpstreamError | None = None
        unknown = is_first = False
        for number, address in enumerate(self._addresses):
            try:
                state = await self._poll_at(address)
            except UpstreamError as error:
                if error.status is None or (number == 0 and (error.retryable or error.code in REFUSALS)):
                    raise
                fault, is_first = fault or error, is_first or number == 0
                continue
            if state.phase != "forgotten":
                self._addresses = (address,)
                return state
            unknown = True
        if fault and (is_first or not unknown):
            raise fault
        return JobState("forgotten")

    async def _poll_at(self, address: URL) -> JobState:
        """Return the state of the job at an address. A redirect is followed once, on the same host."""
        answer = await self._poller.get(address, POLL_TIMEOUT_S)
        if answer.status in REDIRECTS and (target := same_host(address, answer.headers.get("Location", ""))):
            answer = await self._poller.get(target, POLL_TIMEOUT_S)
        secret = self._poller.secret
        return parse_job(answer.status, answer.headers, answer.body, secret=secret, now_s=time.time())
