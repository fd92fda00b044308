"""Image models: their published limits and prices, and the checks of a request against them and the provider's inputs.

A value that the model or the provider refuses then costs no call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.did_you_mean import nearest
from imagegen.errors import FieldError, InvalidRequest
from imagegen.providers.prices import RESOLUTIONS, Price, estimate, settle
from imagegen.providers.protocol import Edits
from imagegen.providers.size_limits import SizeLimits
from imagegen.tasks.cost import Cost
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import Task
from imagegen.tasks.validation import Adjust

NOTICE = timedelta(days=30)
"""Time before a model's end in which its tasks have a warning."""

IMPOSSIBLE_SIZE = "is not possible"
"""Begin of the error of a size; of both sides if both are to be changed."""

_SIDES = ("width", "height")
_SAME_SHAPE = 1.1
"""Factor by which a size that a ratio and a resolution name may differ from the model's nearest one."""

_SAME_AREA = 1.6

_INPUTS = frozenset({"image_url", "reference_images", "mask"})

_QUALITIES = ("low", "medium", "high", "xhigh", "max")
"""From the lowest to the highest."""

_OTHER_QUALITIES = {"standard": "medium", "hd": "high", "ultra": "max"}
"""Names of older models."""


MAX_CACHED = 1_000
"""Prices that are kept; clients may name any model and size."""

_Key = tuple[str, int, int, str | None, str | None, int | None, int, bool | None]


class Steps(Struct, frozen=True, forbid_unknown_fields=True):
    """Steps of a model; None if unknown."""

    default: int | None = None
    max: int | None = None


class ModelRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Published limits and prices of a model; None if unknown.

    aliases: other ids of the same model. max_n: images of one call. prompt_max: characters.
    steps, seed, edit, mask, transparent: False if the model refuses it. ratios, resolutions: the only ones.
    images_as: the field of input images on the wire. takes_ratio: sized by an aspect ratio, not by pixels.
    ends: the first day without the model. certainty: how sure the price is.
    """

    id: str
    provider: str = ""
    aliases: tuple[str, ...] = ()
    sizes: SizeLimits | None = None
    ratios: tuple[str, ...] | None = None
    resolutions: tuple[Literal["512", "1K", "2K", "4K"], ...] | None = None
    takes_ratio: bool | None = None
    steps: Steps | bool | None = None
    max_n: int | None = None
    prompt_max: int | None = None
    seed: bool | None = None
    edit: bool | None = None
    max_input_images: int | None = None
    images_as: Literal["image_url", "reference_images"] | None = None
    mask: bool | None = None
    transparent: bool | None = None
    qualities: tuple[str, ...] | None = None
    price: Price | None = None
    ends: date | None = None
    successor: str | None = None
    source: str | None = None
    certainty: Literal["vendor", "price_list", "copies", "reseller", "unverified"] | None = None

    def end_notice(self, today: date) -> str | None:
        """Return the warning about the model's end, from 30 days before it on."""
        if self.ends is None or self.ends - today > NOTICE:
            return None
        verb = "ends" if self.ends > today else "ended"
        advice = f"; its successor is {self.successor}" if self.successor else ""
        return f"{self.id} {verb} on {self.ends}{advice}"


class ModelTable:
    """Rows of the configured provider by id; the sandbox has no limits, but every model's end date.

    checked: the day on which the packaged rows were last compared with their sources. rows: of the provider.
    listed: rows to show to clients; the sandbox shows Together's, which it draws in place of.
    """

    def __init__(self, rows: Iterable[ModelRow], provider: str, checked: date) -> None:
        self.checked = checked
        self._provider = provider
        self._all = tuple({(row.provider, row.id): row for row in rows}.values())
        self.rows = tuple(row for row in self._all if row.provider == provider)
        listed_providers = (provider, "together") if provider == "sandbox" else (provider,)
        self.listed = tuple(row for row in self._all if row.provider in listed_providers)
        self._by_id = {name: row for row in reversed(self.rows) for name in (*row.aliases, row.id)}
        self._anywhere = {name: row for row in reversed(self._all) for name in (*row.aliases, row.id)}

    @property
    def all_rows(self) -> tuple[ModelRow, ...]:
        """Rows of every provider."""
        return self._all

    def find(self, model: str) -> ModelRow | None:
        """Return the row that limits a model of the configured provider; a gateway's prefix does not matter.

        A gateway names OpenAI's models `openai/gpt-image-2` or `azure/gpt-image-2`, Google's `google/gemini-…`.
        """
        row = self._by_id.get(model)
        if row is None and self._provider in ("openai", "gemini") and "/" in model:
            return self._by_id.get(model.rpartition("/")[2])
        return row

    def describe(self, model: str) -> ModelRow | None:
        """Return the row that describes a model: the sandbox takes the models of every provider."""
        return self.find(model) or (self._anywhere.get(model) if self._provider == "sandbox" else None)

    def max_images_per_call(self, model: str) -> int | None:
        """Return how many images one call may request, None if unknown."""
        row = self.find(model)
        return row.max_n if row else None

    def with_notices(self, task: Task, now: float) -> Task:
        """Return the task with a warning if its model ends soon or has ended. now: Unix time."""
        row = self.describe(task.model)
        if row is None or row.ends is None:
            return task
        notice = row.end_notice(datetime.fromtimestamp(now, UTC).date())
        return task if notice is None or notice in task.warnings else replace(task, warnings=(*task.warnings, notice))


class Pricing:
    """Prices of one provider's models.

    Args:
        table: the published prices.
        is_free: whether nothing is paid, as in the sandbox.
        unknown_micro_usd: price of an image of other models; None if it is unknown.
    """

    def __init__(self, table: ModelTable, *, is_free: bool = False, unknown_micro_usd: int | None = None) -> None:
        self._table = table
        self._is_free = is_free
        self._unknown = unknown_micro_usd
        self._cached: dict[_Key, int | None] = {}

    def image_price(self, request: GenerationRequest, model: str) -> int | None:
        """Return the price of one image of a request with a model, rounded up; None if it is unknown."""
        if self._is_free:
            return 0
        # Every field of a request that `estimate` reads.
        key = (
            model,
            request.width,
            request.height,
            request.quality,
            request.resolution,
            request.steps,
            len(request.input_images),
            request.prompt_upsampling,
        )
        if key in self._cached:
            return self._cached[key]
        price = estimate(self._price_of(model), replace(request, n=1))
        if len(self._cached) >= MAX_CACHED:
            self._cached.clear()
        self._cached[key] = price = self._unknown if price is None else price
        return price

    def estimate(self, request: GenerationRequest, _most: int | None = None) -> Cost:
        """Return the cost of all images of a request, regardless of its limit."""
        each = self.image_price(request, request.model)
        return Cost(None if each is None else each * request.n)

    def call_price(self, request: GenerationRequest, model: str, count: int) -> int | None:
        """Return the price of a call for some images of a request; None if it is unknown."""
        each = self.image_price(request, model)
        return None if each is None else each * count

    def reported_price(self, model: str, details: ReplyDetails | None) -> int | None:
        """Return the price of an answered call by the upstream's own figure, or by its usage; None without both."""
        if self._is_free or details is None:
            return None
        if details.cost_micro_usd is not None:
            return details.cost_micro_usd
        return self.usage_price(model, details.usage) if details.usage else None

    def usage_price(self, model: str, usage: Mapping[str, Any]) -> int | None:
        """Return the price of what the upstream reports as used; None if that does not decide it."""
        return 0 if self._is_free else settle(self._price_of(model), usage)

    def charges_refusal(self, model: str) -> bool:
        """Return whether the provider charges a call that its content policy refuses."""
        price = None if self._is_free else self._price_of(model)
        return price is not None and price.charges_on_refusal == "yes"

    def _price_of(self, model: str) -> Price | None:
        row = self._table.find(model)
        return row.price if row else None


class ModelRules(Struct, frozen=True):
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


def _refused(field: str, row: ModelRow, feature: str) -> FieldError:
    return FieldError(field, f"must be absent: {row.id} takes no {feature}")


def _size_errors(
    row: ModelRow, sizes: SizeLimits, request: GenerationRequest, given: Collection[str]
) -> Iterator[FieldError]:
    """Yield an error for each given side that is to be changed, or for the ratio or resolution that names the size."""
    requested = request.width, request.height
    near = sizes.nearest(*requested)
    advice = (
        f"{IMPOSSIBLE_SIZE} for {row.id}: {sizes.broken_rules(*requested)}; the nearest size is {near[0]}x{near[1]}"
    )
    sides = [name for name in _SIDES if name in given]
    wrong = [name for name in sides if getattr(request, name) != near[_SIDES.index(name)]]
    shape = "resolution" if "resolution" in given and _has_shape(requested, near) else "aspect_ratio"
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
            is_shape_given = "aspect_ratio" in given or "resolution" in given
            fits = _has_shape((width, height), near) and _within(width * height, math.prod(near), _SAME_AREA)
            fitting = [near] if fits or not is_shape_given else []
    return next((size for size in fitting if sizes.allows(*size)), None)


def _nearest_quality(quality: str, allowed: tuple[str, ...]) -> str:
    """Return the allowed quality of the same meaning, else the highest lower one, else the best guess."""
    known_name = _OTHER_QUALITIES.get(quality, quality)
    if known_name in allowed:
        return known_name
    if known_name in _QUALITIES:
        lower = [name for name in _QUALITIES[: _QUALITIES.index(known_name)] if name in allowed]
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


class EditRules(Struct, frozen=True):
    """Rules of a provider. edits: what it takes for a model. then: the rules that follow."""

    edits: Callable[[str], Edits | None]
    then: Adjust | None = None

    def __call__(self, request: GenerationRequest, given: Collection[str]) -> GenerationRequest:
        """Return the request. Raises InvalidRequest with our name of each field, as `Adjust` does."""
        if not _INPUTS.isdisjoint(given) and request.image_sources:
            errors = list(_edit_errors(request, self.edits(request.model)))
            if errors:
                raise InvalidRequest(details=errors)
        return request if self.then is None else self.then(request, given)


def _edit_errors(request: GenerationRequest, edits: Edits | None) -> Iterator[FieldError]:
    count = len(request.input_images)
    field = "reference_images" if request.image_url is None else "image_url"
    if edits is None:
        absent = field if count else "mask"
        yield FieldError(absent, f"must be absent: this provider takes no input images for {request.model}")
        return
    if count > edits.max_images:
        rule = f"this provider takes at most {edits.max_images} for {request.model}"
        yield FieldError("reference_images", f"must leave at most {edits.max_images} input images: {rule}")
    if request.mask is None:
        return
    if not edits.mask:
        yield FieldError("mask", f"must be absent: this provider takes no mask for {request.model}")
    elif not count:
        yield FieldError("mask", "needs an image that it belongs to: send image_url too")
