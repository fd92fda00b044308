"""Provider of fal's queue: https://fal.ai/docs/inference-api/queue

The later addresses of a job are those that fal named: they have the app's name without its path. fal itself repeats a
job that its infrastructure fails; a submit with a lost response can't be found again, and is not repeated here.
"""

from __future__ import annotations

import time

from msgspec.structs import replace

from imagegen.providers.fal_requests import (
    edits_of,
    fields_of,
    job_addresses,
    model_path,
    sent_request,
    warnings_of,
)
from imagegen.providers.fal_responses import parse_acceptance, parse_result, parse_status
from imagegen.providers.http_client import Account
from imagegen.providers.job_api import AcceptedCall, JobApiProvider, SubmitForm
from imagegen.providers.job_polling import JobState
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, Edits
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.request import GenerationRequest


class FalProvider(JobApiProvider):
    """Provider with jobs of fal's queue.

    base_url: of the queue.
    """

    name = "fal"
    domains = ("fal.run",)
    key_check = "fal-ai/flux/requests/00000000-0000-0000-0000-000000000000/status"  # the state of an unknown job
    max_images_per_call = 4

    @staticmethod
    def account_of(api_key: str) -> Account:
        return Account(f"Key {api_key}", api_key)

    def edits(self, model: str) -> Edits | None:
        return edits_of(model)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request)

    def submit_form(self, call: Call) -> SubmitForm:
        return SubmitForm(model_path(call.request), fields_of(call), warnings_of(call))

    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        return parse_acceptance(answer, secret=self._secret, now_s=time.time())

    def complete(self, accepted: AcceptedCall, form: SubmitForm) -> AcceptedCall:
        """Return the job with the queue's usual addresses if the response has none that the key may go to."""
        if self.own_address(accepted.poll_url) and self.own_address(accepted.result_url):
            return accepted
        poll_url, result_url, cancel_url = job_addresses(str(self._base), form.path, accepted.id)
        return replace(accepted, poll_url=poll_url, result_url=result_url, cancel_url=cancel_url)

    async def poll(self, handle: JobHandle) -> JobState:
        answer = await self.get(handle.poll_url)
        if answer is None:
            return JobState("forgotten")
        status = parse_status(answer, secret=self._secret, now_s=time.time())
        if status.phase != "done":
            return JobState(status.phase, progress=status.progress, unclear=status.unclear)
        result = await self.get(handle.result_url)
        if result is None:
            return JobState("forgotten")
        return parse_result(result, status, secret=self._secret, now_s=time.time())

    def cancel_request(self, handle: JobHandle) -> tuple[str, str] | None:
        return ("PUT", handle.cancel_url) if handle.cancel_url else None
