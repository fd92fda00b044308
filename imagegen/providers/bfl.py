"""Provider of Black Forest Labs' API: https://docs.bfl.ai

It has no list of jobs and no request that cancels one. The link of a result ends after ten minutes.
"""

from __future__ import annotations

import time

from imagegen.providers.bfl_requests import edits_of, fields_of, model_path, sent_request, warnings_of
from imagegen.providers.bfl_responses import parse_acceptance, parse_job
from imagegen.providers.http_client import Account
from imagegen.providers.job_api import AcceptedCall, JobApiProvider, SubmitForm
from imagegen.providers.job_polling import JobState
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, Edits
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.request import GenerationRequest


class BflProvider(JobApiProvider):
    """Provider with jobs of Black Forest Labs.

    base_url: of a region, with or without `/v1`.
    """

    name = "bfl"
    version_path = "/v1"
    domains = ("bfl.ai",)
    key_check = "credits"  # https://docs.bfl.ai/api-reference/utility/get-the-users-credits
    max_images_per_call = 1

    @staticmethod
    def account_of(api_key: str) -> Account:
        return Account(secret=api_key, headers=(("x-key", api_key),))

    def edits(self, model: str) -> Edits | None:
        return edits_of(model)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request)

    def submit_form(self, call: Call) -> SubmitForm:
        return SubmitForm(model_path(call.request.model), fields_of(call), warnings_of(call))

    def read_acceptance(self, answer: RawResponse) -> AcceptedCall:
        return parse_acceptance(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())

    async def poll(self, handle: JobHandle) -> JobState:
        address = handle.poll_url or str((self._base / "get_result").with_query(id=handle.id))
        answer = await self.get(address)
        if answer is None:
            return JobState("forgotten")
        return parse_job(answer.status, answer.headers, answer.body, secret=self._secret, now_s=time.time())
