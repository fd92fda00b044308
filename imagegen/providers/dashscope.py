"""Provider of Alibaba's DashScope (Model Studio): https://www.alibabacloud.com/help/en/model-studio/

Most models begin a job; some newer ones answer at once. The jobs of the last day are listed, so a job is found
although the response to its submit was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import quote

from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.formats import parse_http_date
from imagegen.providers.dashscope_requests import ASYNC_HEADERS, edits_of, fields_of, sent_request, shape_of
from imagegen.providers.dashscope_requests import warnings_of as dashscope_warnings
from imagegen.providers.dashscope_responses import (
    JOB_LIFE_S,
    MAX_LISTED,
    ListedJob,
    image_count_of,
    parse_acceptance,
    parse_job,
    parse_page,
    parse_reply,
    prompt_of,
)
from imagegen.providers.http_client import Account
from imagegen.providers.job_api import AcceptedCall, JobApiProvider, SubmitForm
from imagegen.providers.job_polling import POLL_TIMEOUT_S, JobState
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.request import GenerationRequest

MAX_PAGES = 10
"""Pages of the list that are read; a longer list is not complete, so nothing is found in it."""

MAX_CANDIDATES = 20
"""Jobs of the right model and time that are read one by one."""

SKEW_S, LATEST_S = 2.0, 60.0
"""A job is created this much before (clocks differ) or after the call was sent."""

LISTED_AFTER_S = 6.0
"""Until then a new job may be absent from the list."""

READ_DELAY_S, READ_S, READ_AT_ONCE_S = 2.0, 90.0, 10.0
"""Time between two reads of a candidate, which shows its prompt when it has ended; time since the call in which that is
waited for; and time of one search, which is repeated later without a slot meanwhile."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0)
"""Before the search repeats a request that failed for a reason that passes."""


class DashScopeProvider(JobApiProvider):
    """Provider with jobs and direct calls of DashScope.

    base_url: of the region of the key, with or without `/api/v1`.
    """

    name = "dashscope"
    version_path = "/api/v1"
    domains = ()  # responses name no addresses
    key_check = "tasks/00000000-0000-0000-0000-000000000000"  # the state of an unknown job
    max_images_per_call = 4

    @staticmethod
    def account_of(api_key: str) -> Account:
        return Account(f"Bearer {api_key}", api_key)

    def edits(self, model: str) -> Edits | None:
        return edits_of(model)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request)

    def submit_form(self, call: Call) -> SubmitForm:
        shape = shape_of(call.request.model)
        headers = ASYNC_HEADERS if shape.is_job else ()
        return SubmitForm(shape.path, fields_of(call), dashscope_warnings(call), headers)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        """Make one call, which begins a job or is answered at once. Raises UpstreamError."""
        if shape_of(call.request.model).is_job:
            return await super().generate(call, observer)
        form = self.submit_form(call)
        answer = await self._client.submit(form.path, form.fields, observer)
        reply = parse_reply(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())
        return replace(reply, images=reply.images[: call.count], warnings=(*form.warnings, *reply.warnings))

    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        secret, now_s = self._secret, time.time()
        return parse_acceptance(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)

    async def poll(self, handle: JobHandle) -> JobState:
        answer = await self._client.request("GET", self._address_of(handle.id), POLL_TIMEOUT_S)
        return parse_job(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())

    def cancel_request(self, handle: JobHandle) -> tuple[str, str] | None:
        """Return the request that cancels a job; a job that runs already is not cancelled by it."""
        return "POST", f"{self._base}/tasks/{quote(handle.id, safe='')}/cancel"

    async def search(self, call: Call, sent_at: float) -> JobHandle | None:
        """Return the handle of the job of a call with a lost response; None if several jobs may be it.

        A list has only model and time. If it has several such jobs, each one is read for its prompt.
        """
        if not shape_of(call.request.model).is_job:
            return None
        listed_at = min(sent_at, time.time()) + LISTED_AFTER_S  # the clock of another instance may be ahead
        await asyncio.sleep(max(0.0, listed_at - time.time()))
        jobs = await self._candidates(call, sent_at)
        if jobs is None or len(jobs) > MAX_CANDIDATES:
            return None
        match = await self._only_match(jobs, call, min(sent_at, time.time()))
        if match is None:
            return None
        return self.handle_of(AcceptedCall(match.id, expires_at=match.created_at + JOB_LIFE_S), match.created_at)

    async def _candidates(self, call: Call, sent_at: float) -> list[ListedJob] | None:
        """Return the jobs of a call's model that began at its time. Those with kept handles are of other calls.

        None if the list is too long to read. Raises UpstreamError.
        """
        model, jobs = call.request.model, dict[str, ListedJob]()
        number = pages = 1
        while number <= pages:
            query = {"model_name": model, "page_no": str(number), "page_size": str(MAX_LISTED)}
            url = URL(f"{self._base}/tasks/").with_query(query)
            answer = await self._get_patiently(url)
            page = parse_page(answer.status, answer.headers, answer.body, secret=self._secret)
            ahead_s = _seconds_ahead(answer)
            began = [job for job in page.jobs if job.model == model]
            began = [replace(job, created_at=job.created_at - ahead_s) for job in began]
            jobs |= {job.id: job for job in began if -SKEW_S <= job.created_at - sent_at <= LATEST_S}
            pages, number = page.pages, number + 1
            if pages > MAX_PAGES:
                return None
        return [job for job in jobs.values() if job.id not in self.kept_ids and job.id not in call.other_jobs]

    async def _only_match(self, jobs: Iterable[ListedJob], call: Call, sent_at: float) -> ListedJob | None:
        """Return the only job with the prompt and the count of a call, or that may have them; None if several do."""
        until, give_up_at = time.time() + READ_AT_ONCE_S, sent_at + READ_S
        fitting = [job for job in jobs if await self._may_be_of(job, call, until, give_up_at)]
        matches = [job for job in fitting if job.id not in self.kept_ids]
        return matches[0] if len(matches) == 1 else None

    async def _may_be_of(self, job: ListedJob, call: Call, until: float, give_up_at: float) -> bool:
        """Return whether a job may be a call's by what it shows once it has ended.

        Raises UpstreamError, a retryable one if it still runs at `until`; at `give_up_at` it may be the call's.
        """
        while True:
            answer = await self._get_patiently(self._address_of(job.id))
            state = parse_job(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())
            if state.phase != "running" or time.time() >= give_up_at:
                prompt, count = prompt_of(answer.body), image_count_of(answer.body)
                return (prompt is None or prompt.strip() == call.request.prompt) and count in (None, call.count)
            if time.time() >= until:
                text = "A job that may be that of a lost call has not ended yet"
                raise UpstreamError("upstream_overloaded", text, retryable=True)
            await asyncio.sleep(READ_DELAY_S)

    async def _get_patiently(self, url: URL) -> RawResponse:
        """GET an address; repeat it some times while that fails for a reason that passes. Raises UpstreamError."""
        for delay_s in RETRY_DELAYS_S:
            await self._gate.wait()
            with suppress(UpstreamError):
                answer = await self._client.request("GET", url, POLL_TIMEOUT_S)
                if answer.status < 500 and answer.status != 429:
                    return answer
            await asyncio.sleep(delay_s)
        return await self._client.request("GET", url, POLL_TIMEOUT_S)

    def _address_of(self, name: str) -> URL:
        return URL(f"{self._base}/tasks/{quote(name, safe='')}", encoded=True)


def _seconds_ahead(answer: RawResponse) -> float:
    """Return how much the upstream's clock is ahead of ours, by the date of its response; 0 if it has none."""
    sent_at = parse_http_date(answer.headers.get("Date"))
    return 0.0 if sent_at is None else sent_at - time.time()
