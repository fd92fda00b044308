"""Requests in the words of Gemini's generateContent: https://ai.google.dev/gemini-api/docs/image-generation. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.input_bodies import Base64Image
from imagegen.providers.protocol import Call, Edits
from imagegen.providers.request_fields import PIXEL_WORDS, Vocabulary, left_out_warnings, nearest_ratio_of
from imagegen.providers.request_fields import sent_request as sent_in_words
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.sizes import sides_of

MAX_INPUT_IMAGES = 14
"""Of the models that take most: https://ai.google.dev/gemini-api/docs/image-generation#use-14-images"""

EDITS = Edits(max_images=MAX_INPUT_IMAGES, links=False)

_RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9")
_AREAS = {"512": 512**2, "1K": 1024**2, "2K": 2048**2, "4K": 4096**2}
_SLACK = 1.4
"""A size between two resolutions gets the higher one from this factor of the lower one's area on."""

_USUAL = "1K"
"""Resolution of a call that names none."""

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_PREFIXES = ("models/", "google/")

VOCABULARY = Vocabulary(
    unknown=frozenset(
        {
            "steps",
            "negative_prompt",
            "guidance_scale",
            "output_format",
            "output_compression",
            "quality",
            "background",
            "moderation",
            "style",
            "input_fidelity",
            "prompt_upsampling",
            "image_loras",
        }
    )
)

_HARM_CATEGORIES = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")
"""https://ai.google.dev/gemini-api/docs/safety-settings"""

_TOP_LEVEL = frozenset({"safetySettings", "systemInstruction", "tools", "toolConfig", "cachedContent", "serviceTier"})
_OF_IMAGES = frozenset({"personGeneration", "prominentPeople", "imageOutputOptions"})
_FORBIDDEN = frozenset({"contents", "candidateCount", "aspectRatio", "imageSize", "numberOfImages", "sampleCount"})
"""Names of `extra` that would change the price, the prompt or the shape past our own fields."""

_CAMEL = {
    re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name): name
    for name in (*_TOP_LEVEL, *_OF_IMAGES, *_FORBIDDEN, "generationConfig", "imageConfig", "responseModalities")
}
"""Names by their spelling in snake_case."""


class Shapes(Struct, frozen=True):
    """Aspect ratios and resolutions of a model. resolutions: None if unknown; of a single one nothing is sent."""

    ratios: tuple[str, ...] = _RATIOS
    resolutions: tuple[str, ...] | None = None


def shape_of(request: GenerationRequest, shapes: Shapes) -> tuple[str, str]:
    """Return the aspect ratio and the resolution to request."""
    ratio = request.aspect_ratio
    if ratio not in shapes.ratios:
        ratio = nearest_ratio_of(request.width, request.height, shapes.ratios)
    offered = [name for name in _AREAS if shapes.resolutions is None or name in shapes.resolutions] or [_USUAL]
    wanted = request.resolution
    if wanted is None and request.aspect_ratio:
        wanted = _USUAL
    area = request.width * request.height if wanted is None else _AREAS[wanted]
    fitting = [name for name in offered if _AREAS[name] * _SLACK >= area]
    return ratio, fitting[0] if fitting else offered[-1]


def path_of(model: str) -> str:
    """Return the path of a model's paid call. Raises UpstreamError if its name can't be a part of one."""
    for prefix in _PREFIXES:
        model = model.removeprefix(prefix)
    if not _MODEL.fullmatch(model):
        raise UpstreamError("model_not_available", "The name of the model is no name of a Gemini model")
    return f"models/{model}:generateContent"


def fields_of(call: Call, shapes: Shapes) -> dict[str, object]:
    """Return the body of a call. Raises UpstreamError for a field of `extra` that has a place outside of it."""
    request = call.request
    top, config, image_config = _of_extra({k: v for k, v in (request.extra or {}).items() if k not in call.without})
    parts: list[object] = [{"text": request.prompt}]
    for source in request.input_images:
        image = call.input_bytes(source)
        parts.append({"inlineData": {"mimeType": image.content_type, "data": Base64Image(image)}})
    image_config |= shape_fields(call, shapes)
    config = {"responseModalities": ["IMAGE"], **config}
    if image_config:
        config["imageConfig"] = image_config
    if call.seed is not None and "seed" not in call.without:
        config["seed"] = call.seed
    if request.disable_safety_checker and "disable_safety_checker" not in call.without:
        off = [{"category": f"HARM_CATEGORY_{name}", "threshold": "BLOCK_NONE"} for name in _HARM_CATEGORIES]
        top.setdefault("safetySettings", off)
    return {"contents": [{"role": "user", "parts": parts}], "generationConfig": config, **top}


def shape_fields(
    call: Call, shapes: Shapes, *, ratio: str = "aspectRatio", resolution: str = "imageSize"
) -> dict[str, object]:
    """Return the fields of the shape under their names in the API; none of those that the model refused."""
    if call.without & (PIXEL_WORDS - {"image_size"}):
        return {}
    shape = shape_of(call.request, shapes)
    fields: dict[str, object] = {}
    if "aspect_ratio" not in call.without:
        fields[ratio] = shape[0]
    if _sends(shapes, shape[1]) and not call.without & {"image_size", "resolution"}:
        fields[resolution] = shape[1]
    return fields


def _sends(shapes: Shapes, resolution: str) -> bool:
    """Return whether a resolution is sent; a model without a row need not take any."""
    return resolution != _USUAL if shapes.resolutions is None else len(shapes.resolutions) > 1


def _of_extra(extra: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
    """Return the fields of `extra` at the top, in `generationConfig` and in its `imageConfig`."""
    top: dict[str, object] = {}
    config: dict[str, object] = {}
    image_config: dict[str, object] = {}
    for name, value in _camel(extra).items():
        if name == "generationConfig" and isinstance(value, Mapping):
            config |= _camel(value)
        elif name == "imageConfig" and isinstance(value, Mapping):
            image_config |= _camel(value)
        elif name in _TOP_LEVEL:
            top[name] = value
        elif name in _OF_IMAGES:
            image_config[name] = value
        else:
            config[name] = value
    nested = config.pop("imageConfig", None)
    if isinstance(nested, Mapping):
        image_config = _camel(nested) | image_config
    for name in _FORBIDDEN & (config.keys() | image_config.keys()):
        detail = f"extra must not contain {name}: use the fields of a request in its place"
        raise UpstreamError("upstream_invalid_request", detail)
    return top, config, image_config


def _camel(fields: Mapping[str, object]) -> dict[str, object]:
    """Return fields with Google's own names in the spelling that it prefers; it takes both."""
    return {_CAMEL.get(name, name): value for name, value in fields.items()}


def warnings_of(call: Call, shapes: Shapes) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    return (*left_out_warnings(call, VOCABULARY), *shape_warnings(call.request, shapes))


def shape_warnings(request: GenerationRequest, shapes: Shapes) -> tuple[str, ...]:
    """Return a warning if another shape than the requested one is sent."""
    ratio, resolution = shape_of(request, shapes)
    if request.aspect_ratio == ratio and request.resolution in (None, resolution):
        return ()
    return (f"this model takes an aspect ratio instead of a size: {ratio} at {resolution} was requested",)


def sent_request(request: GenerationRequest, shapes: Shapes) -> GenerationRequest:
    """Return the request without what a call does not carry, so that equal calls have equal fingerprints."""
    sent = sized_request(sent_in_words(request, VOCABULARY), shapes)
    if sent.disable_safety_checker is False:
        sent = replace(sent, disable_safety_checker=None)
    return replace(sent, extra=_camel(sent.extra)) if sent.extra else sent


def sized_request(request: GenerationRequest, shapes: Shapes) -> GenerationRequest:
    """Return the request with the shape that is sent."""
    ratio, resolution = shape_of(request, shapes)
    width, height = sides_of(ratio, resolution) or (0, 0)
    return replace(request, aspect_ratio=ratio, resolution=resolution, width=width, height=height)
