"""Models of the emulator: their parameters, their limits, and which are gone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from . import gpt_image, together_responses
from .image_request import ImageRequest
from .together_responses import Response

_CHOOSY: Final = frozenset(
    ("steps", "guidance_scale", "negative_prompt", "image_url", "reference_images", "image_loras", "prompt_upsampling")
)


@dataclass(frozen=True, slots=True)
class Model:
    """A model's limits.

    takes: its optional parameters; each other one is a 400.
    steps, side: lowest and highest; multiple: of each side, in pixels; sizes: if any, the only ones.
    sized_by_ratio: width and height are ignored, as `aspect_ratio` or the input image decides.
    """

    takes: frozenset[str] = _CHOOSY
    steps: tuple[int, int] = (1, 100)
    side: tuple[int, int] = (64, 2048)
    multiple: int = 8
    sizes: frozenset[tuple[int, int]] = frozenset()
    sized_by_ratio: bool = False


def _flux1(*takes: str, steps: tuple[int, int] = (1, 50)) -> Model:
    return Model(frozenset(takes), steps, side=(64, 1792), multiple=16)


_ANY: Final = Model()
_KONTEXT: Final = Model(frozenset(("steps", "image_url")), (1, 50), sized_by_ratio=True)
_GOOGLE_SIZES: Final = frozenset(
    (
        (1024, 1024),
        (1248, 832),
        (832, 1248),
        (1184, 864),
        (864, 1184),
        (1152, 896),
        (896, 1152),
        (1344, 768),
        (768, 1344),
    )
)

KNOWN: Final[Mapping[str, Model]] = {
    "black-forest-labs/FLUX.1-schnell": _flux1("steps", "negative_prompt", steps=(1, 12)),
    "black-forest-labs/FLUX.1-schnell-Free": _flux1("steps", "negative_prompt", steps=(1, 4)),
    "black-forest-labs/FLUX.1-dev": _flux1("steps"),
    "black-forest-labs/FLUX.1-krea-dev": _flux1("steps"),
    "black-forest-labs/FLUX.1.1-pro": Model(frozenset(("negative_prompt",)), side=(256, 1440), multiple=32),
    "black-forest-labs/FLUX.1-kontext-pro": _KONTEXT,
    "black-forest-labs/FLUX.1-kontext-max": _KONTEXT,
    "black-forest-labs/FLUX.2-dev": Model(
        frozenset(("steps", "guidance_scale", "reference_images", "image_loras")), (1, 50), (64, 1920)
    ),
    "black-forest-labs/FLUX.2-flex": Model(
        frozenset(("steps", "guidance_scale", "image_url", "reference_images")), (1, 50), (64, 1920)
    ),
    "black-forest-labs/FLUX.2-pro": Model(
        frozenset(("image_url", "reference_images", "prompt_upsampling")), side=(256, 1440), multiple=16
    ),
    "Qwen/Qwen-Image-2.0": Model(frozenset()),
    "Qwen/Qwen-Image-2.0-Pro": Model(frozenset()),
    "google/flash-image-2.5": Model(frozenset(("reference_images",)), sizes=_GOOGLE_SIZES),
    "google/imagen-4.0-preview": Model(frozenset(), sizes=_GOOGLE_SIZES),
}

# What a call to it gets since it went: schnell-Free by 2026-01, FLUX.1-dev 2026-02, krea-dev 2026-05-27.
RETIRED: Final[Mapping[str, str]] = {
    "black-forest-labs/FLUX.1-schnell-Free": "404_model",
    "black-forest-labs/FLUX.1-dev": "400_non_serverless",
    "black-forest-labs/FLUX.1-krea-dev": "400_non_serverless",
    "meta-llama/Llama-3.3-70B-Instruct-Turbo": "400_not_image",
}

_MAX_IMAGES: Final = 4


def refusal(image_request: ImageRequest, request_id: str, revived: Collection[str] = ()) -> Response | None:
    """Return the refusal of a request by its model, None if it is accepted. revived: retired models that are served."""
    if gpt_image.is_for_openai(image_request):
        return gpt_image.refusal(image_request, request_id)
    retired = RETIRED.get(image_request.model)
    if retired is not None and image_request.model not in revived:
        return together_responses.error(retired, request_id, model=image_request.model)
    model = KNOWN.get(image_request.model, _ANY)
    for parameter in sorted(_CHOOSY.intersection(image_request.body) - model.takes):
        return together_responses.error("400_unsupported", request_id, parameter=parameter)
    steps, (low, high) = image_request.body.get("steps"), model.steps
    if steps is not None and not (isinstance(steps, int) and low <= steps <= high):
        return together_responses.error("400_steps", request_id, low=low, high=high)
    if not 1 <= image_request.n <= _MAX_IMAGES:
        return together_responses.invalid(f"n must be between 1 and {_MAX_IMAGES}", request_id)
    return None if model.sized_by_ratio else _size_refusal(image_request, model, request_id)


def size_of(image_request: ImageRequest) -> tuple[int, int]:
    """Return width and height of the images."""
    return (
        (1024, 1024)
        if KNOWN.get(image_request.model, _ANY).sized_by_ratio
        else (image_request.width, image_request.height)
    )


def _size_refusal(image_request: ImageRequest, model: Model, request_id: str) -> Response | None:
    if model.sizes:
        if (image_request.width, image_request.height) in model.sizes:
            return None
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(model.sizes))
        return together_responses.invalid(f"width and height must be one of {listed}", request_id)
    low, high = model.side
    for parameter, value in (("width", image_request.width), ("height", image_request.height)):
        if not low <= value <= high:
            return together_responses.error("400_size", request_id, parameter=parameter, low=low, high=high)
        if value % model.multiple:
            return together_responses.error("400_multiple", request_id, parameter=parameter, multiple=model.multiple)
    return None
