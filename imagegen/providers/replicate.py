"""Provider of Replicate: official models, versions and deployments. https://replicate.com/docs/reference/http

A submit has no `Prefer: wait`, so that the id comes at once. The job of a submit with a lost response is found in the
account's list of predictions.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import orjson
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.formats import parse_http_date
from imagegen.providers.http_client import Account
from imagegen.providers.job_api import AcceptedCall, JobApiProvider, SubmitForm
from imagegen.providers.job_polling import JobState
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.replicate_requests import Target, body_of, edits_of, sent_request, target_of, warnings_of
from imagegen.providers.replicate_responses import (
    ListedPrediction,
    error_of,
    is_cancelled,
    parse_acceptance,
    parse_job,
    parse_page,
)
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.request import GenerationRequest

MAX_PAGES = 20
"""Of 100 jobs each; a longer list counts as incomplete."""

LISTED_WITHIN_S = 10.0
"""How long after its submit a job may be missing in the list."""

CLOCK_TOLERANCE_S = 3.0
"""Replicate's clock is known to a second, by the `Date` of its responses."""


class _Search(Struct, frozen=True):
    """A lost call. input: as JSON; earliest, latest: Unix times of its job by Replicate's clock."""

    target: Target
    input: object
    earliest: float
    latest: float

    def matches(self, listed: ListedPrediction) -> bool:
        version, model = self.target.version, self.target.model
        if version and listed.version not in (version, "hidden"):
            return False
        if model and listed.model and listed.model != model:
            return False
        return self.earliest <= listed.created_at <= self.latest and listed.input == self.input


class ReplicateProvider(JobApiProvider):
    """Provider with jobs of Replicate.

    base_url: with or without `/v1`.
    """

    name = "replicate"
    version_path = "/v1"
    domains = ("api.replicate.com",)
    key_check = "account"  # https://replicate.com/docs/reference/http#account.get
    max_images_per_call = 4

    @staticmethod
    def account_of(api_key: str) -> Account:
        return Account(f"Bearer {api_key}", api_key)

    def edits(self, model: str) -> Edits | None:
        return edits_of(model)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request)

    def submit_form(self, call: Call) -> SubmitForm:
        return SubmitForm(target_of(call.request.model).path, body_of(call), warnings_of(call))

    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        return parse_acceptance(answer, secret=self._secret, now_s=time.time())

    async def poll(self, handle: JobHandle) -> JobState:
        answer = await self.get(handle.poll_url or f"{self._base}/predictions/{handle.id}")
        if answer is None:
            return JobState("forgotten")
        return parse_job(answer, secret=self._secret, now_s=time.time())

    def cancel_request(self, handle: JobHandle) -> tuple[str, str] | None:
        return "POST", handle.cancel_url or f"{self._base}/predictions/{handle.id}/cancel"

    def read_cancellation(self, answer: RawResponse) -> bool | None:
        confirmed = super().read_cancellation(answer)
        return is_cancelled(answer) if confirmed else confirmed

    async def search(self, call: Call, sent_at: float) -> JobHandle | None:
        """Return the handle of the only job with the call's input that was made while the call ran.

        A call with the bytes of input images is not searched for, since lists need not repeat them. Jobs with handles
        that this process has kept belong to other calls. Raises UpstreamError if the list can't be read now.
        """
        try:
            target, inputs = target_of(call.request.model), orjson.loads(orjson.dumps(body_of(call)["input"]))
        except TypeError:
            return None
        wait_until = min(sent_at, time.time()) + LISTED_WITHIN_S  # the clock of another instance may be ahead
        while True:
            matches = await self._search(target, inputs, sent_at, call.other_jobs)
            if matches is None or len(matches) > 1:
                return None
            if matches:
                return self.handle_of(matches[0].call, matches[0].created_at)
            if time.time() >= wait_until:
                return None
            await asyncio.sleep(1.0)

    async def _search(
        self, target: Target, inputs: object, sent_at: float, other_jobs: frozenset[str]
    ) -> list[ListedPrediction] | None:
        """Return the jobs that may be the call's, by this machine's clock; None if the list is too long to be read."""
        begin, offset_s = sent_at - CLOCK_TOLERANCE_S, 0.0
        answer = await self._list_page(self._list_address(begin))
        theirs_s = _clock_offset_s(answer, time.time())
        if abs(theirs_s) > CLOCK_TOLERANCE_S:
            offset_s = theirs_s
            answer = await self._list_page(self._list_address(begin + offset_s))
        latest = sent_at + offset_s + self._timeout_s + CLOCK_TOLERANCE_S
        search = _Search(target, inputs, begin + offset_s, latest)
        matches: dict[str, ListedPrediction] = {}
        taken = {*self.kept_ids, *other_jobs}
        for _ in range(MAX_PAGES):
            page = parse_page(answer, secret=self._secret, now_s=time.time())
            fitting = [listed for listed in page.listed if search.matches(listed)]
            matches |= {listed.call.id: replace(listed, created_at=listed.created_at - offset_s) for listed in fitting}
            if not page.next_url:
                return [listed for name, listed in matches.items() if name not in taken]
            answer = await self._list_page(page.next_url)
        return None

    def _list_address(self, begin: float) -> str:
        after = datetime.fromtimestamp(begin, UTC).isoformat(timespec="milliseconds")
        return str((self._base / "predictions").with_query(created_after=after.replace("+00:00", "Z")))

    async def _list_page(self, address: str) -> RawResponse:
        await self._gate.wait()
        answer = await self.get(address)
        if answer is None:
            raise UpstreamError("upstream_bad_response", "The provider's list of jobs leads to another host")
        if not 200 <= answer.status < 300:
            raise error_of(answer, secret=self._secret, now_s=time.time())
        return answer


def _clock_offset_s(answer: RawResponse, now_s: float) -> float:
    """Return Replicate's clock minus ours; 0 if it is unknown."""
    sent_at = parse_http_date(answer.headers.get("Date"))
    return 0.0 if sent_at is None else sent_at - now_s
