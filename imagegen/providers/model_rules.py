"""Checks of a request against its model's limits, so that a value that the model refuses costs no call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from imagegen.did_you_mean import nearest
from imagegen.errors import FieldError, InvalidRequest
from imagegen.providers.model_table import ModelRow, ModelTable, Steps
from imagegen.providers.prices import RESOLUTIONS
from imagegen.providers.size_limits import SizeLimits
from imagegen.tasks.request import GenerationRequest

IMPOSSIBLE_SIZE = "is not possible"
"""Begin of the error of a size; of both sides if both are to be changed."""

_SIDES = ("width", "height")
_SAME_SHAPE = 1.1
"""Factor by which a size that a ratio and a resolution name may differ from the model's nearest one."""

_SAME_AREA = 1.6

_QUALITIES = ("low", "medium", "high", "xhigh", "max")
"""From the lowest to the highest."""

_OTHER_QUALITIES = {"standard": "medium", "hd": "high", "ultra": "max"}
"""Names of older models."""


@dataclass(frozen=True, slots=True)
class ModelRules:
    """Checks by the rows of a table; a model without a row has none."""

    table: ModelTable

    def __call__(self, request: GenerationRequest, given: Collection[str]) -> GenerationRequest:
        """Return the request, with the model's nearest size if the client gave none in pixels.

        Args:
            given: our names of the fields that the client sent.

        Raises:
            InvalidRequest: with our name of each field, the model's rule and the nearest allowed value.
        """
        row = self.table.find(request.model)
        if row is None:
            return request
        sizes, errors = row.sizes, list(_errors(row, request))
        if sizes is None or sizes.allows(request.width, request.height):
            size = request.width, request.height
        elif fitting := _fitting_size(sizes, request, given):
            size = fitting
        else:
            raise InvalidRequest(details=[*_size_errors(row, sizes, request, given), *errors])
        if errors:
            raise InvalidRequest(details=errors)
        if size == (request.width, request.height):
            return request
        return replace(request, width=size[0], height=size[1])


def _errors(row: ModelRow, request: GenerationRequest) -> Iterator[FieldError]:
    if row.ratios and request.aspect_ratio and request.aspect_ratio not in row.ratios:
        near = min(row.ratios, key=lambda ratio: abs(math.log(_value(ratio) / _value(request.aspect_ratio or "1:1"))))
        yield FieldError("aspect_ratio", f"must be one of {', '.join(row.ratios)} for {row.id}; the nearest is {near}")
    if row.resolutions and request.resolution and request.resolution not in row.resolutions:
        near = _nearest_resolution(request.resolution, row.resolutions)
        yield FieldError(
            "resolution", f"must be one of {', '.join(row.resolutions)} for {row.id}; the nearest is {near}"
        )
    if request.steps is not None:
        yield from _steps_errors(row, request.steps)
    if row.prompt_max is not None and len(request.prompt) > row.prompt_max:
        rule = f"must have at most {row.prompt_max} characters for {row.id}"
        yield FieldError("prompt", f"{rule}, and has {len(request.prompt)}")
    if request.seed is not None and row.seed is False:
        yield _refused("seed", row, "seed")
    if request.background == "transparent" and row.transparent is False:
        yield FieldError("background", f"must not be transparent: {row.id} has no such images; the nearest is opaque")
    if request.mask is not None and row.mask is False:
        yield _refused("mask", row, "mask")
    if request.quality is not None and row.qualities and request.quality not in row.qualities:
        near = _nearest_quality(request.quality, row.qualities)
        rule = f"must be one of {', '.join(row.qualities)} for {row.id}"
        yield FieldError("quality", f"{rule}; the nearest is {near}")
    if request.image_url is not None or request.reference_images is not None:
        yield from _input_errors(row, request)


def _steps_errors(row: ModelRow, steps: int) -> Iterator[FieldError]:
    if row.steps is False:
        yield _refused("steps", row, "steps")
    elif isinstance(row.steps, Steps) and row.steps.max is not None and steps > row.steps.max:
        yield FieldError("steps", f"must be at most {row.steps.max} for {row.id}; the nearest is {row.steps.max}")


def _input_errors(row: ModelRow, request: GenerationRequest) -> Iterator[FieldError]:
    count = len(request.input_images)
    field = "image_url" if request.reference_images is None else "reference_images"
    if count and row.edit is False:
        yield _refused(field, row, "input images")
    elif row.max_input_images is not None and count > row.max_input_images:
        rule = f"must be at most {row.max_input_images} input images for {row.id}, and there are {count}"
        yield FieldError(field, f"{rule}; the nearest is {row.max_input_images}")


def _refused(field: str, row: ModelRow, what: str) -> FieldError:
    return FieldError(field, f"must be absent: {row.id} takes no {what}")


def _size_errors(
    row: ModelRow, sizes: SizeLimits, request: GenerationRequest, given: Collection[str]
) -> Iterator[FieldError]:
    """Yield an error for each given side that is to be changed, or for the ratio or resolution that names the size."""
    asked = request.width, request.height
    near = sizes.nearest(*asked)
    advice = f"{IMPOSSIBLE_SIZE} for {row.id}: {sizes.broken_rules(*asked)}; the nearest size is {near[0]}x{near[1]}"
    sides = [name for name in _SIDES if name in given]
    wrong = [name for name in sides if getattr(request, name) != near[_SIDES.index(name)]]
    shape = "resolution" if "resolution" in given and _has_shape(asked, near) else "aspect_ratio"
    yield from (FieldError(name, advice) for name in wrong or sides or (shape,))


def _fitting_size(sizes: SizeLimits, request: GenerationRequest, given: Collection[str]) -> tuple[int, int] | None:
    """Return the model's size for a request that has another one, None if there is none.

    What the client gave stays, what it left open is the nearest.
    """
    width, height = request.width, request.height
    near = sizes.nearest(width, height)
    match "width" in given, "height" in given:
        case True, True:
            return None
        case True, False:
            fitting = [size for size in (near, (width, width), *sorted(sizes.listed)) if size[0] == width]
        case False, True:
            fitting = [size for size in (near, (height, height), *sorted(sizes.listed)) if size[1] == height]
        case _:
            named = "aspect_ratio" in given or "resolution" in given
            fits = _has_shape((width, height), near) and _within(width * height, math.prod(near), _SAME_AREA)
            fitting = [near] if fits or not named else []
    return next((size for size in fitting if sizes.allows(*size)), None)


def _nearest_quality(quality: str, allowed: tuple[str, ...]) -> str:
    """Return the allowed quality of the same meaning, else the highest lower one, else the best guess."""
    meant = _OTHER_QUALITIES.get(quality, quality)
    if meant in allowed:
        return meant
    if meant in _QUALITIES:
        lower = [name for name in _QUALITIES[: _QUALITIES.index(meant)] if name in allowed]
        return lower[-1] if lower else allowed[0]
    return nearest(quality, allowed) or allowed[0]


def _nearest_resolution(resolution: str, allowed: tuple[str, ...]) -> str:
    """Return the next lower resolution, else the lowest one."""
    side = RESOLUTIONS[resolution]
    lower = [name for name in allowed if RESOLUTIONS[name] < side]
    return max(lower or allowed[:1], key=RESOLUTIONS.__getitem__)


def _has_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return _within(size[0] / size[1], other[0] / other[1], _SAME_SHAPE)


def _within(value: float, other: float, factor: float) -> bool:
    return 1 / factor <= value / other <= factor


def _value(ratio: str) -> float:
    across, _, down = ratio.partition(":")
    return int(across) / int(down)
