"""Requests in the words of fal's models, which differ by the family of the model. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import link_or_data_uri
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, nearest_ratio_of, request_fields
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.sizes import sides_of

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]{0,99}(?:/[A-Za-z0-9][\w.-]{0,99}){1,6}", re.ASCII)
_NAMESPACES = frozenset({"workflows", "comfy"})
_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "5:4", "4:5")
_RESOLUTIONS = {"512": "0.5K"}
"""fal's words for a resolution, where they differ from ours."""

_MAX_1K_PIXELS, _MAX_2K_PIXELS = 1_600_000, 6_000_000

_VOCABULARY = Vocabulary(
    size_style="image_size",
    words={
        "steps": "num_inference_steps",
        "n": "num_images",
        "image_loras": "loras",
        "prompt_upsampling": "enhance_prompt",
    },
    unknown=frozenset({"moderation", "output_compression"}),
)


class FalFamily(Struct, frozen=True):
    """Form of the calls of a family of models.

    size: `pixels` as an object, or `ratio`. resolution: whether the ratio goes with one. images: the field of input
    images; `image_url` for one image alone. edit_path: the end of the id of the model that takes input images.
    """

    size: Literal["pixels", "ratio"] = "pixels"
    resolution: bool = False
    images: Literal["image_url", "image_urls"] = "image_url"
    mask: bool = True
    edit_path: str = ""


_FAMILIES: tuple[tuple[re.Pattern[str], FalFamily], ...] = (
    (
        re.compile(r"nano-banana|gemini-"),
        FalFamily("ratio", resolution=True, images="image_urls", mask=False, edit_path="edit"),
    ),
    (re.compile(r"gpt-image"), FalFamily("ratio", resolution=True, images="image_urls")),
    (re.compile(r"kontext.*/multi"), FalFamily("ratio", images="image_urls", mask=False)),
    (re.compile(r"kontext"), FalFamily("ratio", mask=False)),
    (re.compile(r"-ultra(?:/|$)|imagen"), FalFamily("ratio", mask=False)),
    (re.compile(r"flux-2"), FalFamily(images="image_urls", mask=False, edit_path="edit")),
    (re.compile(r"seedream|edit-plus|reve"), FalFamily(images="image_urls", mask=False)),
)


def family_of(model: str) -> FalFamily:
    """Return the family of a model; an unknown one is called as FLUX.1."""
    return next((family for pattern, family in _FAMILIES if pattern.search(model)), FalFamily())


def edits_of(model: str) -> Edits:
    """Return what a model takes. fal fetches links itself."""
    family = family_of(model)
    return Edits(mask=family.mask) if family.images == "image_urls" else Edits(max_images=1, mask=family.mask)


def model_path(request: GenerationRequest) -> str:
    """Return the path of the paid call. Raises UpstreamError if the model can't be a path."""
    model, family = request.model, family_of(request.model)
    if not _MODEL.fullmatch(model):
        raise UpstreamError("model_not_available", "The provider's models have ids such as fal-ai/flux/schnell")
    if family.edit_path and request.image_sources and not model.endswith(f"/{family.edit_path}"):
        return f"{model}/{family.edit_path}"
    return model


def job_addresses(base: str, path: str, name: str) -> tuple[str, str, str]:
    """Return where a job is polled, collected and cancelled: below owner and app, without the rest of the path."""
    parts = path.split("/")
    app = "/".join(parts[: 3 if parts[0] in _NAMESPACES else 2])
    job = f"{base}/{app}/requests/{quote(name, safe='')}"
    return f"{job}/status", job, f"{job}/cancel"


def fields_of(call: Call) -> dict[str, object]:
    """Build the body: only what the client gave, in fal's words. Results are links, so `sync_mode` is never sent."""
    extra = call.request.extra or {}
    fields = request_fields(call, _VOCABULARY)
    fields.pop("model", None)
    _fill_size(fields, call)
    if (unsafe := fields.pop("disable_safety_checker", None)) is not None:
        fields.setdefault("enable_safety_checker", not unsafe)
    for name, value in _input_fields(call).items():
        if name not in extra:
            fields[name] = value
    return fields


def _fill_size(fields: dict[str, object], call: Call) -> None:
    """Replace the size in pixels by what the family takes."""
    request, family = call.request, family_of(call.request.model)
    if "image_size" in (request.extra or {}):
        return
    size = fields.pop("image_size", None)
    if family.size == "pixels":
        if size is not None:
            fields["image_size"] = {"width": request.width, "height": request.height}
        return
    ratio, resolution = shape_of(request)
    if "aspect_ratio" not in call.without:
        fields.setdefault("aspect_ratio", ratio)
    if family.resolution and resolution and "resolution" not in call.without:
        fields.setdefault("resolution", _RESOLUTIONS.get(resolution, resolution))


def shape_of(request: GenerationRequest) -> tuple[str, str | None]:
    """Return the aspect ratio and the resolution to request; None is the model's own resolution."""
    pixels = request.width * request.height
    ratio, resolution = request.aspect_ratio, request.resolution
    if ratio not in _RATIOS:
        ratio = nearest_ratio_of(request.width, request.height, _RATIOS)
    if resolution is None and not request.aspect_ratio and pixels > _MAX_1K_PIXELS:
        resolution = "2K" if pixels <= _MAX_2K_PIXELS else "4K"
    return ratio, resolution


def _input_fields(call: Call) -> Mapping[str, object]:
    family, request = family_of(call.request.model), call.request
    images = [link_or_data_uri(call.input(source)) for source in request.input_images]
    fields: dict[str, object] = {}
    if images:
        fields[family.images] = images[0] if family.images == "image_url" else images
    if request.mask is not None:
        fields["mask_url"] = link_or_data_uri(call.input(request.mask))
    return fields


def warnings_of(call: Call) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    request, warnings = call.request, left_out_warnings(call, _VOCABULARY)
    family = family_of(request.model)
    if family.size == "pixels" or "image_size" in (request.extra or {}):
        return warnings
    ratio, resolution = shape_of(request)
    if request.aspect_ratio == ratio and (family.resolution or request.resolution is None):
        return warnings
    requested = f"{ratio} at {resolution}" if family.resolution and resolution else ratio
    return (*warnings, f"this model takes an aspect ratio instead of a size: {requested} was requested")


def sent_request(request: GenerationRequest) -> GenerationRequest:
    """Return the request without what a call does not carry."""
    family = family_of(request.model)
    sent = sent_in_words(request, _VOCABULARY)
    if "enable_safety_checker" in (request.extra or {}):
        sent = replace(sent, disable_safety_checker=None)
    if family.size == "pixels" or "image_size" in (request.extra or {}):
        return sent
    ratio, resolution = shape_of(request)
    if not family.resolution:
        resolution = None
    width, height = sides_of(ratio, resolution or "1K") or (0, 0)
    return replace(sent, aspect_ratio=ratio, resolution=resolution, width=width, height=height)
