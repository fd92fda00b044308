"""Provider of Together.ai's images API: https://docs.together.ai/reference/post-images-generations"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.providers.http_client import Account, ProviderClient
from imagegen.providers.input_bodies import link_or_data_uri
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs, count_of_models
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, request_fields, sent_request
from imagegen.providers.response_parser import parse_models
from imagegen.tasks.request import GenerationRequest

VOCABULARY = Vocabulary(ratio_models=re.compile(r"kontext|^google/", re.IGNORECASE))
"""Kontext and Google's models are sized by a ratio: https://docs.together.ai/docs/images-overview"""

_BY_REFERENCES = re.compile(r"flux\.?2|^google/", re.IGNORECASE)
"""Models that take all input images as `reference_images`, where others have `image_url` for the first."""

InputField = Literal["image_url", "reference_images"]


def input_field_by_name(model: str) -> InputField:
    """Return the field for the first input image, as the model's name suggests."""
    return "reference_images" if _BY_REFERENCES.search(model) else "image_url"


class TogetherProvider(WithoutJobs):
    """Provider of Together.

    base_url: with or without `/v1`; response_format: whether images come as links or in the response itself.

    input_field: returns a model's field for the first input image; the others are always `reference_images`.
    """

    name = "together"
    max_images_per_call = 4

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        api_key: str,
        base_url: str,
        timeout_s: float,
        response_format: Literal["base64", "url"] = "url",
        input_field: Callable[[str], InputField] = input_field_by_name,
    ) -> None:
        base = URL(base_url.strip().rstrip("/").removesuffix("/v1") + "/v1").with_user(None)
        self._upstream = ProviderClient(
            session, base, "images/generations", timeout_s, Account(f"Bearer {api_key}", api_key)
        )
        self._response_format = response_format
        self.images_inline = response_format == "base64"
        self._input_field = input_field
        self.own_hosts = self._upstream.own_hosts
        self.base_url = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:  # noqa: ARG002 - the table of models has what differs
        return Edits()

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        first = self._input_field(call.request.model) if call.request.input_images else "image_url"
        fields = fields_of(call, self._response_format, first)
        reply = await self._upstream.generate(fields, observer)
        warnings = left_out_warnings(call, VOCABULARY)
        if len(reply.images) <= call.count and not warnings:
            return reply
        return replace(reply, images=reply.images[: call.count], warnings=warnings)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request, VOCABULARY)

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_models(await self._upstream.get_json("models"))

    async def check_key(self) -> str:
        return count_of_models(await self.models())


def fields_of(call: Call, response_format: str, input_field: InputField = "image_url") -> dict[str, object]:
    """Build the body from the client's parameters only, since a parameter unknown to a model is a 400.

    The fields of a request have Together's names.
    """
    fields = request_fields(call, VOCABULARY) | _input_fields(call, input_field)
    if "response_format" not in call.without:
        fields["response_format"] = response_format
    return fields


def _input_fields(call: Call, first: InputField) -> dict[str, object]:
    """Return the input images as links or `data:` URIs. first: the field for the first one."""
    images = [link_or_data_uri(call.input(source)) for source in call.request.input_images]
    if not images:
        return {}
    if first == "reference_images":
        return {"reference_images": images}
    return {"image_url": images[0]} | ({"reference_images": images[1:]} if images[1:] else {})
