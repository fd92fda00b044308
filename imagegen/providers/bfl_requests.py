"""Requests in the words of Black Forest Labs' API, which differ by the family of the model. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import Base64Image
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.request_fields import Vocabulary, left_out_warnings, nearest_ratio_of, request_fields
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.sizes import sides_of

MAX_TOLERANCE = 5
"""The most permissive `safety_tolerance` that each model takes: https://docs.bfl.ai"""

_TOLERANCE_FIELDS = frozenset({"safety_tolerance", "disable_safety_checker", "moderation"})
_ALWAYS_UNKNOWN = frozenset(
    {"negative_prompt", "output_compression", "quality", "background", "style", "input_fidelity", "image_loras"}
)
_ADJUSTABLE = frozenset({"steps", "guidance_scale"})
_WORDS = {"guidance_scale": "guidance"}
_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2", "21:9", "9:21", "5:4", "4:5")
_RATIO = re.compile(r"[1-9][0-9]?:[1-9][0-9]?")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class FluxFamily(Struct, frozen=True):
    """Form of the calls of a family of models.

    size: `pixels` as width and height, `ratio`, or `none` if the result has the size of the input image.
    image: the field of the input image; None if they take none. adjustable: whether they take steps and guidance.
    max_images, mask, links: see Edits.
    """

    size: Literal["pixels", "ratio", "none"] = "pixels"
    image: Literal["input_image", "image", "image_prompt"] | None = "input_image"
    adjustable: bool = True
    max_images: int = 8
    mask: bool = False
    links: bool = True

    @property
    def vocabulary(self) -> Vocabulary:
        """The words for the fields; those of the moderation are translated apart."""
        unknown = _ALWAYS_UNKNOWN if self.adjustable else _ALWAYS_UNKNOWN | _ADJUSTABLE
        return Vocabulary(words=_WORDS, unknown=unknown)


_FAMILIES: tuple[tuple[re.Pattern[str], FluxFamily], ...] = (
    (re.compile(r"-fill(?:-|$)"), FluxFamily("none", "image", max_images=1, mask=True, links=False)),
    (re.compile(r"-expand(?:-|$)"), FluxFamily("none", "image", max_images=1, links=False)),
    (re.compile(r"^flux-kontext"), FluxFamily("ratio", adjustable=False, max_images=4)),
    (re.compile(r"-ultra(?:-|$)"), FluxFamily("ratio", "image_prompt", adjustable=False, max_images=1, links=False)),
    (re.compile(r"^flux-2-klein"), FluxFamily(adjustable=False, max_images=4)),
    (re.compile(r"^flux-2-(?:pro|max)"), FluxFamily(adjustable=False)),
    (re.compile(r"^flux-pro-1\.1"), FluxFamily(image="image_prompt", adjustable=False, max_images=1, links=False)),
    (re.compile(r"^flux-(?:dev|pro)(?:-|$)"), FluxFamily(image="image_prompt", max_images=1, links=False)),
)


def family_of(model: str) -> FluxFamily:
    """Return the family of a model; an unknown one is called as FLUX.2 [flex], which takes all fields."""
    return next((family for pattern, family in _FAMILIES if pattern.search(model)), FluxFamily())


def edits_of(model: str) -> Edits | None:
    """Return what a model takes, None if it takes no input images."""
    family = family_of(model)
    return None if family.image is None else Edits(family.max_images, family.mask, family.links)


def model_path(model: str) -> str:
    """Return the path of the paid call. Raises UpstreamError if the model can't be a part of it."""
    if not _MODEL.fullmatch(model):
        raise UpstreamError("model_not_available", "The provider has no model with such a name")
    return model


def fields_of(call: Call) -> dict[str, object]:
    """Build the body. An image in it is a link or base64 without a prefix."""
    request, family = call.request, family_of(call.request.model)
    fields = request_fields(call, family.vocabulary)
    for name in ("model", "n", "disable_safety_checker", "moderation"):
        fields.pop(name, None)
    if family.size != "pixels":
        for name in ("width", "height"):
            fields.pop(name, None)
    if family.size == "ratio" and "aspect_ratio" not in call.without:
        fields.setdefault("aspect_ratio", ratio_of(request))
    if _is_permissive(request) and not call.without & _TOLERANCE_FIELDS:
        fields.setdefault("safety_tolerance", MAX_TOLERANCE)
    return {**fields, **_input_fields(call, family)}


def _is_permissive(request: GenerationRequest) -> bool:
    return request.disable_safety_checker is True or request.moderation == "low"


def _input_fields(call: Call, family: FluxFamily) -> Mapping[str, object]:
    images = [_image(call, source) for source in call.request.input_images]
    if images and family.image is None:
        raise UpstreamError("upstream_invalid_request", "this provider takes no input images for this model")
    first = family.image or ""
    fields: dict[str, object] = {
        first if place == 1 else f"{first}_{place}": image for place, image in enumerate(images, 1)
    }
    return fields if call.request.mask is None else fields | {"mask": _image(call, call.request.mask)}


def _image(call: Call, source: str) -> Base64Image | str:
    """Return a link unchanged, and an image as base64: a `data:` URI is refused."""
    image = call.input(source)
    return image if isinstance(image, str) else Base64Image(image)


def ratio_of(request: GenerationRequest) -> str:
    """Return the aspect ratio to request: as the client gave it, or the nearest one to its size."""
    ratio = request.aspect_ratio
    return ratio if ratio and _RATIO.fullmatch(ratio) else nearest_ratio_of(request.width, request.height, _RATIOS)


def warnings_of(call: Call) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    request, family = call.request, family_of(call.request.model)
    warnings = left_out_warnings(call, family.vocabulary)
    if family.size == "ratio" and (request.aspect_ratio != ratio_of(request) or request.resolution):
        warnings += (f"this provider takes an aspect ratio instead of a size: {ratio_of(request)} was requested",)
    return warnings


def sent_request(request: GenerationRequest) -> GenerationRequest:
    """Return the request without what a call does not carry."""
    family, extra = family_of(request.model), request.extra or {}
    is_permissive = _is_permissive(request) and "safety_tolerance" not in extra
    changes: dict[str, object] = {
        "disable_safety_checker": True if is_permissive else None,
        "moderation": None,
        "aspect_ratio": None,
        "resolution": None,
    }
    if family.size == "ratio" and "aspect_ratio" not in extra:
        ratio = ratio_of(request)
        width, height = sides_of(ratio) or (0, 0)
        changes |= {"aspect_ratio": ratio, "width": width, "height": height}
    elif family.size != "pixels":
        changes |= {"width": 0, "height": 0}
    return replace(sent_in_words(request, family.vocabulary), **changes)
