"""Provider of OpenAI's images API, and of the many services with almost the same API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

import aiohttp
from msgspec import Struct, structs
from msgspec.structs import replace
from yarl import URL

from imagegen.providers.edit_styles import EditStyle, edits_of, input_fields, input_files
from imagegen.providers.http_client import Account, ProviderClient, basic_authorization
from imagegen.providers.job_poller import NotingObserver
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply, WithoutJobControl, count_of_models
from imagegen.providers.request_fields import (
    SizeStyle,
    Vocabulary,
    left_out_warnings,
    request_fields,
    sent_request,
)
from imagegen.providers.response_parser import parse_models
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.request import GenerationRequest

_ADJUSTMENTS = frozenset({"steps", "seed", "negative_prompt", "guidance_scale"})
_DIFFUSION = frozenset({"image_loras", "disable_safety_checker", "prompt_upsampling"})
_GPT_ONLY = frozenset({"quality", "background", "moderation", "style", "input_fidelity"})


class Dialect(Struct, frozen=True):
    """Differences of a service from the others.

    steps_name, format_name: its words for `steps` and `output_format`.
    negative_name: its word for `negative_prompt`; None if it follows the prompt after a `|`.
    response_format: its value in a call, None if the service refuses or ignores the field.
    max_concurrent_calls: what the service works on at once; None if it has no such limit.
    refused: fields (in our words) that it has no place for; they are left out, with a warning.
    edits: how it takes input images, None if it takes none.
    headers: of each request, besides the usual ones.
    """

    size_style: SizeStyle = "size"
    steps_name: str = "steps"
    format_name: str = "output_format"
    negative_name: str | None = "negative_prompt"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    max_images_per_call: int = 1
    max_concurrent_calls: int | None = None
    refused: frozenset[str] = frozenset()
    edits: EditStyle | None = "form"
    headers: tuple[tuple[str, str], ...] = ()

    def for_model(self, model: str) -> Dialect:
        """Return the dialect for a model: GPT image models are as strict behind a gateway as at OpenAI itself."""
        if not model.rpartition("/")[2].startswith(("gpt-image", "chatgpt-image")):
            return self
        return replace(self, response_format=None, refused=self.refused | _GPT_IMAGE.refused, edits="form")

    @property
    def vocabulary(self) -> Vocabulary:
        return _vocabulary_of(self)


@cache
def _vocabulary_of(dialect: Dialect) -> Vocabulary:
    words = {
        "steps": dialect.steps_name,
        "output_format": dialect.format_name,
        "negative_prompt": dialect.negative_name or "negative_prompt",
    }
    differing = {name: word for name, word in words.items() if name != word}
    return Vocabulary(dialect.size_style, differing, dialect.refused)


# https://platform.openai.com/docs/api-reference/images/create
_GPT_IMAGE = Dialect(response_format=None, max_images_per_call=10, refused=_ADJUSTMENTS | _DIFFUSION)

_NEBIUS = Dialect(
    size_style="width_height", steps_name="num_inference_steps", format_name="response_extension", edits=None
)

# `batch_size` is for one of its models only: https://api-docs.siliconflow.cn/docs/api/images-generations-post
_SILICONFLOW = Dialect(
    size_style="image_size",
    steps_name="num_inference_steps",
    response_format=None,
    refused=frozenset({"output_format"}),
    edits="numbered",
)

# https://modelscope.cn/docs/model-service/API-Inference/intro
_MODELSCOPE = Dialect(response_format=None, headers=(("X-ModelScope-Async-Mode", "true"),))

_DIALECTS = {
    "api.openai.com": _GPT_IMAGE,
    "api.deepinfra.com": Dialect(),
    "api.tokenfactory.nebius.com": _NEBIUS,
    "api.studio.nebius.com": _NEBIUS,
    # https://docs.x.ai/developers/model-capabilities/images/generation
    "api.x.ai": Dialect(
        size_style="aspect_ratio",
        max_images_per_call=10,
        refused=_ADJUSTMENTS | _DIFFUSION | {"output_format", "output_compression"},
        edits="objects",
    ),
    "api.siliconflow.cn": _SILICONFLOW,
    "api.siliconflow.com": _SILICONFLOW,
    "api-inference.modelscope.cn": _MODELSCOPE,
}

_LOCAL_DIALECTS = {
    # sd.cpp's sd-server
    1234: Dialect(max_concurrent_calls=1, refused=_ADJUSTMENTS | _DIFFUSION | _GPT_ONLY),
    8000: Dialect(steps_name="num_inference_steps", max_images_per_call=10),  # vLLM-Omni
    8080: Dialect(steps_name="step", negative_name=None, edits="ref_images"),  # LocalAI
}
"""By the port on which each serves by default."""


def dialect_of(base: URL) -> Dialect:
    """Return the dialect of an address; the plain one, an image a call, if it is unknown."""
    dialect = _DIALECTS.get(base.host or "")
    if dialect is None and base.scheme == "http":
        dialect = _LOCAL_DIALECTS.get(base.port or 0)
    return dialect or Dialect()


_ENDPOINT = re.compile(r"(.*?)(?:/((?:async/)?images/generations(?:/async)?))?/*")


def split_endpoint(address: str) -> tuple[str, str]:
    """Return base and path of the paid call of an address, which may be a base or the whole address of a call."""
    match = _ENDPOINT.fullmatch(address.strip())
    return (match[1], match[2] or "images/generations") if match else (address, "images/generations")


class OpenAICompatibleProvider(WithoutJobControl):
    """Provider of one OpenAI-compatible service.

    base_url: as the SDKs take it (`https://api.openai.com/v1`); without a path `/v1` is added. It may also be the
    whole address of a relay's asynchronous route, such as `https://relay/v1/images/generations/async`.

    dialect: None for the dialect of the address.
    """

    name = "openai"

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        base_url: str,
        api_key: str | None,
        timeout_s: float,
        dialect: Dialect | None = None,
    ) -> None:
        address, generations = split_endpoint(base_url)
        url = URL(address)
        base = url.with_user(None)
        if base.path in ("", "/"):
            base = base.with_path("/v1")
        authorization = f"Bearer {api_key}" if api_key else basic_authorization(url)
        secret = api_key or url.password or ""
        self._dialect = dialect or dialect_of(base)
        self._edits_path = generations.replace("generations", "edits")
        self._upstream = ProviderClient(
            session,
            base,
            generations,
            timeout_s,
            Account(authorization, secret, self._dialect.headers),
            jobs_of=self.name,
        )
        self.max_images_per_call = self._dialect.max_images_per_call
        self.images_inline = self._dialect.response_format != "url"
        self.own_hosts = self._upstream.own_hosts
        self.base_url = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:
        return edits_of(self._dialect.for_model(model).edits)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        dialect = self._dialect.for_model(call.request.model)
        fields, warnings = fields_of(call, dialect), left_out_warnings(call, dialect.vocabulary)
        observer = NotingObserver(observer, warnings) if warnings else observer
        if not call.request.image_sources:
            reply = await self._upstream.generate(fields, observer)
        elif dialect.edits == "form":
            reply = await self._upstream.send_form(self._edits_path, fields, input_files(call), observer)
        else:
            path = self._edits_path if dialect.edits == "objects" else None
            reply = await self._upstream.generate(fields | input_fields(call, dialect.edits), observer, path)
        return structs.replace(reply, images=reply.images[: call.count], warnings=warnings)

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        dialect = self._dialect.for_model(request.model)
        sent = sent_request(request, dialect.vocabulary)
        if dialect.negative_name is None and sent.negative_prompt:
            sent = structs.replace(sent, prompt=f"{sent.prompt}|{sent.negative_prompt}", negative_prompt=None)
        return sent

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        reply = await self._upstream.resume(handle, observer)
        return structs.replace(reply, warnings=(*handle.warnings, *reply.warnings)) if handle.warnings else reply

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_models(await self._upstream.get_json("models"))

    async def check_key(self) -> str:
        return count_of_models(await self.models())


def fields_of(call: Call, dialect: Dialect) -> dict[str, object]:
    """Return the fields to send: only what the client gave, in the service's words."""
    fields = request_fields(call, dialect.vocabulary)
    if dialect.negative_name is None and (negative := fields.pop("negative_prompt", None)):
        fields["prompt"] = f"{fields['prompt']}|{negative}"
    if dialect.response_format and "response_format" not in call.without:
        fields["response_format"] = dialect.response_format
    return fields
