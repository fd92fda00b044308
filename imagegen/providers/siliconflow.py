"""Provider of SiliconFlow's images API: https://docs.siliconflow.cn/en/api-reference/images/images-generations

Links to its images end after an hour. Its errors are read by the parser that all services share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.edit_styles import input_fields
from imagegen.providers.http_client import Account, ProviderClient
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobs, count_of_models
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, request_fields
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.providers.response_parser import parse_models
from imagegen.tasks.request import GenerationRequest

_UNKNOWN = frozenset(
    {
        "output_format",
        "output_compression",
        "quality",
        "background",
        "moderation",
        "style",
        "input_fidelity",
        "disable_safety_checker",
        "prompt_upsampling",
        "image_loras",
    }
)
_WORDS = {"steps": "num_inference_steps", "n": "batch_size"}
_USUAL = Vocabulary("image_size", _WORDS, _UNKNOWN)
_QWEN = Vocabulary("image_size", _WORDS | {"guidance_scale": "cfg"}, _UNKNOWN)

_IS_QWEN = re.compile(r"qwen-image", re.IGNORECASE)
_IS_EDIT = re.compile(r"qwen-image-edit", re.IGNORECASE)
"""Sized by its input image: it takes no `image_size`."""

_SEVERAL_INPUTS = re.compile(r"qwen-image-edit-(?:2509|[2-9][0-9]{3})", re.IGNORECASE)
_IS_KOLORS = re.compile(r"kolors", re.IGNORECASE)


class SiliconFlowProvider(WithoutJobs):
    """Provider of SiliconFlow.

    base_url: with or without `/v1`.
    """

    name = "siliconflow"
    max_images_per_call = 4
    images_inline = False

    def __init__(self, session: aiohttp.ClientSession, *, api_key: str, timeout_s: float, base_url: str) -> None:
        base = URL(base_url.strip().rstrip("/").removesuffix("/v1") + "/v1").with_user(None)
        account = Account(f"Bearer {api_key}", api_key)
        self._upstream = ProviderClient(session, base, "images/generations", timeout_s, account)
        self.own_hosts = self._upstream.own_hosts
        self.base_url: URL | None = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:
        return Edits(max_images=3 if not model or _SEVERAL_INPUTS.search(model) else 1)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        reply = await self._upstream.generate(fields_of(call), observer)
        warnings = left_out_warnings(call, vocabulary_of(call.request.model))
        return replace(reply, images=reply.images[: call.count], warnings=warnings)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return sent_request(request)

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_models(await self._upstream.get_json("models?type=image"))

    async def check_key(self) -> str:
        return count_of_models(await self.models())


def vocabulary_of(model: str) -> Vocabulary:
    """Return the words of a model."""
    return _QWEN if _IS_QWEN.search(model) else _USUAL


def fields_of(call: Call) -> dict[str, object]:
    """Return the body of a call. Raises UpstreamError for several images of a model that makes one a call."""
    model = call.request.model
    if call.count > 1 and not _IS_KOLORS.search(model):
        raise UpstreamError("upstream_invalid_request", "This model makes one image a call", max_count=1)
    fields = request_fields(call, vocabulary_of(model))
    if _IS_EDIT.search(model):
        fields.pop("image_size", None)
    return fields | input_fields(call, "numbered")


def sent_request(request: GenerationRequest) -> GenerationRequest:
    """Return the request without what a call does not carry, so that equal calls have equal fingerprints."""
    sent = sent_in_words(request, vocabulary_of(request.model))
    return replace(sent, width=0, height=0) if _IS_EDIT.search(request.model) else sent
