"""Owns the calls to OpenAI's images API and to the many services that speak almost the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import aiohttp
from msgspec import structs
from yarl import URL

from imagegen.providers.edit_styles import EditStyle, edits_of, input_fields, input_files
from imagegen.providers.http_client import ProviderClient, basic_authorization
from imagegen.providers.protocol import Call, CallObserver, Edits, Reply
from imagegen.providers.response_parser import parse_models
from imagegen.tasks.request import GenerationRequest

_ADJUSTMENTS = frozenset({"steps", "seed", "negative_prompt", "guidance_scale"})
_EDITS = "images/edits"
_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2")
_SIZE = frozenset({"width", "height", "size", "image_size", "aspect_ratio"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a service differs from the others.

    steps_name, format_name: its words for `steps` and `output_format`.
    negative_name: its word for `negative_prompt`; None where it follows the prompt after a `|`.
    response_format: its value in a call, None if the service refuses or ignores the field.
    max_concurrent_calls: what the service works on at once; None if it has no such limit.
    refused: fields (in our words) that it has no place for; they are left out, with a warning.
    edits: how it takes input images, None if it takes none.
    """

    size_style: Literal["size", "width_height", "image_size", "aspect_ratio"] = "size"
    steps_name: str = "steps"
    format_name: str = "output_format"
    negative_name: str | None = "negative_prompt"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    max_images_per_call: int = 1
    max_concurrent_calls: int | None = None
    refused: frozenset[str] = frozenset()
    edits: EditStyle | None = "form"

    def for_model(self, model: str) -> Dialect:
        """GPT image models are as strict behind a gateway as at OpenAI itself."""
        if not model.rpartition("/")[2].startswith(("gpt-image", "chatgpt-image")):
            return self
        return replace(self, response_format=None, refused=self.refused | _GPT_IMAGE.refused, edits="form")


# https://platform.openai.com/docs/api-reference/images/create
_GPT_IMAGE = Dialect(response_format=None, max_images_per_call=10, refused=_ADJUSTMENTS)

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

_DIALECTS = {
    "api.openai.com": _GPT_IMAGE,
    "api.deepinfra.com": Dialect(),
    "api.tokenfactory.nebius.com": _NEBIUS,
    "api.studio.nebius.com": _NEBIUS,
    # https://docs.x.ai/developers/model-capabilities/images/generation
    "api.x.ai": Dialect(
        size_style="aspect_ratio",
        max_images_per_call=10,
        refused=_ADJUSTMENTS | {"output_format"},
        edits="objects",
    ),
    "api.siliconflow.cn": _SILICONFLOW,
    "api.siliconflow.com": _SILICONFLOW,
}

_LOCAL_DIALECTS = {
    1234: Dialect(max_concurrent_calls=1, refused=_ADJUSTMENTS),  # sd.cpp's sd-server
    8000: Dialect(steps_name="num_inference_steps", max_images_per_call=10),  # vLLM-Omni
    8080: Dialect(steps_name="step", negative_name=None, edits="ref_images"),  # LocalAI
}
"""By the port on which each serves by default."""


def dialect_of(base: URL) -> Dialect:
    """Return the dialect of an address; the plain one, an image a call, if it is unknown."""
    known = _DIALECTS.get(base.host or "")
    if known is None and base.scheme == "http":
        known = _LOCAL_DIALECTS.get(base.port or 0)
    return known or Dialect()


class OpenAICompatibleProvider:
    """base_url: as the SDKs take it (`https://api.openai.com/v1`); without a path `/v1` is added.

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
        url = URL(base_url.strip().rstrip("/"))
        base = url.with_user(None)
        if base.path in ("", "/"):
            base = base.with_path("/v1")
        authorization = f"Bearer {api_key}" if api_key else basic_authorization(url)
        secret = api_key or url.password or ""
        self._upstream = ProviderClient(
            session, base, "images/generations", timeout_s, authorization=authorization, secret=secret
        )
        self._dialect = dialect or dialect_of(base)
        self.max_images_per_call = self._dialect.max_images_per_call
        self.own_hosts = self._upstream.own_hosts
        self.base_url = self._upstream.base_url

    def edits(self, model: str) -> Edits | None:
        return edits_of(self._dialect.for_model(model).edits)

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        dialect = self._dialect.for_model(call.request.model)
        fields = fields_of(call, dialect)
        if not call.request.image_sources:
            reply = await self._upstream.generate(fields, watcher)
        elif dialect.edits == "form":
            reply = await self._upstream.send_form(_EDITS, fields, input_files(call), watcher)
        else:
            path = _EDITS if dialect.edits == "objects" else None
            reply = await self._upstream.generate(fields | input_fields(call, dialect.edits), watcher, path)
        # Only Together counts `x-ratelimit-limit` per second.
        limits = structs.replace(reply.limits, limit_per_s=None)
        return structs.replace(
            reply, images=reply.images[: call.count], limits=limits, warnings=_warnings(call, dialect)
        )

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return parse_models(await self._upstream.get_json("models"))

    async def close(self) -> None:
        """The session is the app's."""


def fields_of(call: Call, dialect: Dialect) -> dict[str, object]:
    """What goes out: only what the client gave, in the service's words."""
    request, left_out = call.request, call.without | dialect.refused

    def given(name: str) -> object:
        return None if name in left_out else getattr(request, name)

    negative = given("negative_prompt")
    after_bar = f"|{negative}" if negative and dialect.negative_name is None else ""
    fields: dict[str, object] = {
        "model": request.model,
        "prompt": request.prompt + after_bar,
        "n": call.count if call.count > 1 else None,
        dialect.steps_name: given("steps"),
        "seed": None if "seed" in left_out else call.seed,
        "guidance_scale": given("guidance_scale"),
        dialect.format_name: given("output_format"),
        "response_format": dialect.response_format,
    }
    if dialect.negative_name:
        fields[dialect.negative_name] = negative
    if not call.without & _SIZE:
        fields |= _size(request, dialect)
    return {name: value for name, value in fields.items() if value is not None and name not in call.without}


def _size(request: GenerationRequest, dialect: Dialect) -> dict[str, object]:
    width, height = request.width, request.height
    match dialect.size_style:
        case "width_height":
            return {"width": width, "height": height}
        case "aspect_ratio":
            resolution = "1k" if max(width, height) <= 1024 else "2k"
            return {"aspect_ratio": nearest_ratio(width, height), "resolution": resolution}
    return {dialect.size_style: f"{width}x{height}"}


def nearest_ratio(width: int, height: int) -> str:
    """Return the offered aspect ratio that changes the image's shape least."""

    def stretch(ratio: str) -> float:
        across, _, down = ratio.partition(":")
        return abs(math.log(width / height * int(down) / int(across)))

    return min(_RATIOS, key=stretch)


def _warnings(call: Call, dialect: Dialect) -> tuple[str, ...]:
    dropped = (name for name in sorted(dialect.refused - call.without) if getattr(call.request, name) is not None)
    warnings = [f"{name} is not known to this provider and was left out" for name in dropped]
    if dialect.size_style == "aspect_ratio":
        ratio = nearest_ratio(call.request.width, call.request.height)
        warnings.append(f"this provider takes an aspect ratio instead of a size: {ratio} was asked for")
    return tuple(warnings)
