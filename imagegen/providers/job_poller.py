"""Polls of provider jobs: their pace, what a failed poll means, and the addresses that are tried."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.jobs import JobState, parse_acceptance, parse_job, poll_addresses, same_host
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import CallObserver, Reply, forgotten_job
from imagegen.tasks.provider_job import JobHandle

POLL_TIMEOUT_S = 15.0
FIRST_DELAY_S, DELAY_GROWTH, MAX_DELAY_S = 1.0, 1.5, 5.0
MAX_FAULT_DELAY_S = 30.0
"""Longest delay after polls that failed."""

MAX_RETRY_AFTER_S = 60.0
UNKNOWN_GRACE_S = 15.0
"""A relay may not find a job yet that it has just accepted, for example while its databases are synchronised."""

MAX_UNKNOWN, MAX_REFUSED = 3, 8
"""Polls in sequence after which a job is given up: those that do not find it, and those that refuse the key."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""Followed once, and on the host of the poll alone."""

_REFUSALS = frozenset({"upstream_auth", "upstream_billing"})


@dataclass(frozen=True, slots=True)
class JobPoller:
    """Polls the jobs of one account. provider: its name; base: no other host is requested; submit: address of the call.

    get: requests an address with the account's key within some seconds. secret: what no text may show.
    """

    provider: str
    base: URL
    submit: URL
    secret: str
    get: Callable[[URL, float], Awaitable[RawResponse]]
    account: str = field(init=False)

    def __post_init__(self) -> None:
        account = hashlib.sha256(f"{self.base} {self.secret}".encode()).hexdigest()[:16]
        object.__setattr__(self, "account", account)

    async def collect(self, answer: RawResponse, watcher: CallObserver) -> Reply | None:
        """Return the result of the job that a call has begun; None if its response is no acceptance of one.

        Raises UpstreamError once the job can have no image any more.
        """
        accepted = parse_acceptance(answer.status, answer.headers, answer.body)
        if accepted is None:
            return None
        addresses = poll_addresses(self.base, self.submit, accepted.id, accepted.address, accepted.guess)
        now = time.time()
        expires_at = accepted.expires_at if accepted.expires_at and accepted.expires_at > now else None
        handle = JobHandle(self.provider, accepted.id, self.account, str(addresses[0]), now, expires_at)
        await watcher.accepted(handle)
        await asyncio.sleep(_bounded(accepted.retry_after_s) or FIRST_DELAY_S)
        return await self.resume(handle, watcher)

    async def resume(self, handle: JobHandle, watcher: CallObserver) -> Reply:
        """Poll a job until it ends. Raises UpstreamError once it can have no image any more."""
        if handle.provider != self.provider:
            raise forgotten_job()
        poll = _Poll(self, handle, poll_addresses(self.base, self.submit, handle.id, handle.poll_url))
        while True:
            state = await poll.state()
            if state.reply is not None:
                return state.reply
            if state.error is not None:
                raise state.error
            if state.progress is not None:
                watcher.progress(state.progress)
            await asyncio.sleep(poll.delay_s)


class _Poll:
    """Polls of one job. delay_s: until the next poll."""

    def __init__(self, poller: JobPoller, handle: JobHandle, addresses: tuple[URL, ...]) -> None:
        self._poller, self._handle, self._addresses = poller, handle, addresses
        self._unknown = self._refused = self._faults = 0
        self.delay_s = FIRST_DELAY_S / DELAY_GROWTH

    async def state(self) -> JobState:
        """Return the state of the job, `running` while it is unclear. Raises UpstreamError if the job is given up.

        Until one address finds the job, all are tried. A passing fault of the first one ends the round.
        """
        for number, address in enumerate(self._addresses):
            try:
                state = await self._ask(address)
            except UpstreamError as error:
                if error.status is None or (number == 0 and (error.retryable or error.code in _REFUSALS)):
                    return self._failed(error)
                continue
            if state.phase != "forgotten":
                self._addresses = (address,)
                self._unknown = self._refused = self._faults = 0
                self.delay_s = _bounded(state.retry_after_s) or min(self.delay_s * DELAY_GROWTH, MAX_DELAY_S)
                return state
        return self._not_found()

    async def _ask(self, address: URL) -> JobState:
        answer = await self._poller.get(address, POLL_TIMEOUT_S)
        if answer.status in _REDIRECTS and (target := same_host(address, answer.headers.get("Location", ""))):
            answer = await self._poller.get(target, POLL_TIMEOUT_S)
        secret = self._poller.secret
        return parse_job(answer.status, answer.headers, answer.body, secret=secret, now_s=time.time())

    def _not_found(self) -> JobState:
        now, handle = time.time(), self._handle
        self._unknown += 1
        self.delay_s = FIRST_DELAY_S
        has_expired = handle.expires_at is not None and now >= handle.expires_at
        if has_expired or (self._unknown >= MAX_UNKNOWN and now >= handle.accepted_at + UNKNOWN_GRACE_S):
            raise forgotten_job()
        return JobState("running")

    def _failed(self, error: UpstreamError) -> JobState:
        self._faults += 1
        self._refused = self._refused + 1 if error.code in _REFUSALS else 0
        if self._refused >= MAX_REFUSED:
            raise error
        backoff_s = min(FIRST_DELAY_S * 2 ** min(self._faults - 1, 10), MAX_FAULT_DELAY_S)
        self.delay_s = _bounded(error.retry_after_s) or backoff_s * (0.75 + 0.5 * random.random())  # noqa: S311 - jitter
        return JobState("running")


def _bounded(seconds: float | None) -> float | None:
    return None if seconds is None else min(max(seconds, 0.2), MAX_RETRY_AFTER_S)
