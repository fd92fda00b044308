"""Requests in the words of Replicate's models, which differ by the family of the model. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import link_or_data_uri
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, nearest_ratio_of, request_fields
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.sizes import sides_of

_NAME = r"[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9][\w.-]{0,99}"
_OFFICIAL = re.compile(_NAME, re.ASCII)
_VERSION = re.compile(rf"(?:({_NAME}):)?([0-9a-f]{{64}})", re.ASCII)
_DEPLOYMENT = re.compile(rf"deployments/{_NAME}", re.ASCII)

_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "5:4", "4:5")
_GPT_RATIOS = ("1:1", "3:2", "2:3")
_MAX_1K_PIXELS, _MAX_2K_PIXELS, _MAX_QUARTER_PIXELS = 1_600_000, 6_000_000, 400_000

_GPT_ONLY = frozenset({"quality", "background", "moderation", "input_fidelity"})
_NOWHERE = frozenset({"image_loras", "style"})
_DIFFUSION = frozenset({"steps", "guidance_scale", "negative_prompt"})


class ReplicateFamily(Struct, frozen=True):
    """Form of the calls of a family of models.

    size: `pixels` as width and height, or `ratio`. ratios: that it takes. resolution: the field that goes with a ratio:
    `resolution` in our words, or `megapixels` for smaller images. count: the field for the number of images; None:
    each call makes one. images: the field of input images. many: how it takes several: as a list, or numbered.
    max_images, mask: see Edits. unknown: fields that it has no place for. words: besides the usual ones.
    """

    size: Literal["pixels", "ratio"] = "ratio"
    ratios: tuple[str, ...] = _RATIOS
    resolution: Literal["resolution", "megapixels"] | None = None
    count: str | None = None
    images: str = "image"
    many: Literal["list", "numbered"] | None = None
    max_images: int = 1
    mask: bool = False
    unknown: frozenset[str] = _GPT_ONLY | _NOWHERE
    words: Mapping[str, str] = {}

    @property
    def max_count(self) -> int:
        return 4 if self.count else 1

    @property
    def vocabulary(self) -> Vocabulary:
        words = {"steps": "num_inference_steps", "output_compression": "output_quality", "n": self.count or "n"}
        return Vocabulary(words={**words, **self.words}, unknown=self.unknown)


_FLUX_WORDS = {"guidance_scale": "guidance"}
_LIST_OF_IMAGES = ReplicateFamily(
    images="image_input",
    many="list",
    max_images=10,
    unknown=_GPT_ONLY | _NOWHERE | _DIFFUSION | {"disable_safety_checker", "prompt_upsampling", "output_compression"},
)
_GPT_IMAGE = ReplicateFamily(
    ratios=_GPT_RATIOS,
    count="number_of_images",
    images="input_images",
    many="list",
    max_images=10,
    unknown=_NOWHERE | _DIFFUSION | {"seed", "disable_safety_checker", "prompt_upsampling"},
    words={"output_compression": "output_compression"},
)

_FAMILIES: tuple[tuple[re.Pattern[str], ReplicateFamily], ...] = (
    (re.compile(r"flux-2"), ReplicateFamily(images="input_image", many="numbered", max_images=8, words=_FLUX_WORDS)),
    (re.compile(r"flux-kontext"), ReplicateFamily(images="input_image", words=_FLUX_WORDS)),
    (re.compile(r"flux-fill"), ReplicateFamily(mask=True, words=_FLUX_WORDS)),
    (re.compile(r"flux-(?:pro|1\.1)"), ReplicateFamily(images="image_prompt", words=_FLUX_WORDS)),
    (re.compile(r"flux-"), ReplicateFamily(resolution="megapixels", count="num_outputs", words=_FLUX_WORDS)),
    (re.compile(r"nano-banana-|gemini-3"), replace(_LIST_OF_IMAGES, resolution="resolution")),
    (re.compile(r"nano-banana|gemini-|seedream"), _LIST_OF_IMAGES),
    (re.compile(r"gpt-image"), _GPT_IMAGE),
    (re.compile(r"recraft"), ReplicateFamily(unknown=_GPT_ONLY | _DIFFUSION | {"image_loras", "seed"})),
    (re.compile(r"imagen-|ideogram|qwen-image|z-image|stable-diffusion-3|photon|hidream"), ReplicateFamily()),
    (re.compile(r"sdxl|/stable-diffusion(?::|$)"), ReplicateFamily("pixels", count="num_outputs", mask=True)),
)


def family_of(model: str) -> ReplicateFamily:
    """Return the family of a model; an unknown one is called as most community models, for one image."""
    return next(
        (family for pattern, family in _FAMILIES if pattern.search(model)), ReplicateFamily("pixels", mask=True)
    )


def edits_of(model: str) -> Edits:
    """Return what a model takes. Replicate fetches links itself."""
    family = family_of(model)
    return Edits(max_images=family.max_images, mask=family.mask)


class Target(Struct, frozen=True):
    """Target of a call. path: below the base. model, version: by which a list of predictions names it; empty if it
    does not."""

    path: str
    model: str = ""
    version: str = ""


def target_of(model: str) -> Target:
    """Return where a call for a model goes: an official model, a version, or a deployment.

    Raises UpstreamError for any other name.
    """
    if match := _VERSION.fullmatch(model):
        return Target("predictions", match[1] or "", match[2])
    if _DEPLOYMENT.fullmatch(model):
        return Target(f"{model}/predictions")
    if _OFFICIAL.fullmatch(model):
        return Target(f"models/{model}/predictions", model)
    raise UpstreamError(
        "model_not_available",
        "The provider's models have names such as black-forest-labs/flux-schnell, or owner/name:version",
    )


def body_of(call: Call) -> dict[str, object]:
    """Build the body. Raises UpstreamError if the model makes fewer images a call; nothing was sent then."""
    family, target = family_of(call.request.model), target_of(call.request.model)
    if call.count > family.max_count:
        detail = f"{call.request.model} makes at most {family.max_count} images a call"
        raise UpstreamError("upstream_invalid_request", detail, max_count=family.max_count)
    fields: dict[str, object] = {"input": input_of(call)}
    return {"version": target.version, **fields} if target.version else fields


def input_of(call: Call) -> dict[str, object]:
    """Build the model's input: only what the client gave, in the words of the model's family."""
    request, family, extra = call.request, family_of(call.request.model), call.request.extra or {}
    fields = request_fields(call, family.vocabulary)
    if "model" not in extra:
        fields.pop("model", None)
    if fields.get("output_format") == "jpeg" and family is not _GPT_IMAGE and "output_format" not in extra:
        fields["output_format"] = "jpg"
    if family.size == "ratio":
        _fill_shape(fields, call, family)
    for name, value in _input_images(call, family).items():
        if name not in extra:
            fields[name] = value
    if request.mask is not None and "mask" not in extra:
        fields["mask"] = link_or_data_uri(call.input(request.mask))
    return fields


def _fill_shape(fields: dict[str, object], call: Call, family: ReplicateFamily) -> None:
    """Replace the size in pixels by a ratio, and what goes with it."""
    request, extra = call.request, call.request.extra or {}
    for name in {"width", "height"} - extra.keys():
        fields.pop(name, None)
    ratio, resolution = shape_of(request, family)
    if "aspect_ratio" not in call.without:
        fields.setdefault("aspect_ratio", ratio)
    if resolution and family.resolution and family.resolution not in call.without:
        fields.setdefault(family.resolution, resolution)


def shape_of(request: GenerationRequest, family: ReplicateFamily) -> tuple[str, str | None]:
    """Return the aspect ratio and the resolution (or megapixels) to request; None is the model's own."""
    ratio, pixels = request.aspect_ratio, request.width * request.height
    if ratio not in family.ratios:
        ratio = nearest_ratio_of(request.width, request.height, family.ratios)
    if family.resolution == "megapixels":
        return ratio, "0.25" if pixels <= _MAX_QUARTER_PIXELS else None
    if family.resolution is None:
        return ratio, None
    resolution = {"512": "1K"}.get(request.resolution or "", request.resolution)
    if resolution is None and not request.aspect_ratio and pixels > _MAX_1K_PIXELS:
        resolution = "2K" if pixels <= _MAX_2K_PIXELS else "4K"
    return ratio, resolution


def _input_images(call: Call, family: ReplicateFamily) -> Mapping[str, object]:
    images = [link_or_data_uri(call.input(source)) for source in call.request.input_images]
    if not images:
        return {}
    if family.many == "list":
        return {family.images: images}
    return {family.images if place == 1 else f"{family.images}_{place}": image for place, image in enumerate(images, 1)}


def warnings_of(call: Call) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    request, family = call.request, family_of(call.request.model)
    warnings = left_out_warnings(call, family.vocabulary)
    if family.size == "pixels":
        return warnings
    ratio, resolution = shape_of(request, family)
    if request.aspect_ratio == ratio and request.resolution in (None, resolution):
        return warnings
    requested = f"{ratio} with {family.resolution} {resolution}" if resolution else ratio
    return (*warnings, f"this model takes an aspect ratio instead of a size: {requested} was requested")


def sent_request(request: GenerationRequest) -> GenerationRequest:
    """Return the request without what a call does not carry."""
    family = family_of(request.model)
    sent = sent_in_words(request, family.vocabulary)
    if family.size == "pixels":
        return sent
    ratio, resolution = shape_of(request, family)
    our_resolution = {"0.25": "512"}.get(resolution or "", resolution)
    width, height = sides_of(ratio, our_resolution or "1K") or (0, 0)
    return replace(sent, aspect_ratio=ratio, resolution=our_resolution, width=width, height=height)
