"""Fields of a request in a provider's words, and which of them it has no place for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.providers.protocol import Call
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.sizes import sides_of

SizeStyle = Literal["size", "width_height", "image_size", "aspect_ratio"]

PIXEL_WORDS = frozenset({"width", "height", "size", "image_size"})
_SHAPE_WORDS = frozenset({"aspect_ratio", "resolution"})
_ADDED_BY_PROVIDERS = frozenset({"image_url", "reference_images", "mask"})
_ADDED_LATER = PIXEL_WORDS | _SHAPE_WORDS | _ADDED_BY_PROVIDERS | {"extra", "variant", "n", "seed"}

_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2")
"""Those of xAI, which most other services take too."""

_MAX_1K_PIXELS = 1_400_000
"""Above it the resolution is 2K, the next that such services offer."""


class Vocabulary(Struct, frozen=True):
    """A provider's words for the fields of a request.

    words: its word for a field, where it differs from ours.
    unknown: fields that it has no place for; they are left out, with a warning.
    ratio_models: models that take `aspect_ratio` as well as pixels; None if there are none.
    """

    size_style: SizeStyle = "width_height"
    words: Mapping[str, str] = {}
    unknown: frozenset[str] = frozenset()
    ratio_models: re.Pattern[str] | None = None

    def word(self, name: str) -> str:
        return self.words.get(name, name)

    def takes_ratio(self, model: str) -> bool:
        return self.ratio_models is not None and self.ratio_models.search(model) is not None


def request_fields(call: Call, vocabulary: Vocabulary) -> dict[str, object]:
    """Return what goes out, but for input images: what the client gave, in the provider's words; `extra` unchanged.

    `call.without` is left out: names of ours, of `extra`, or of a size in any way.
    """
    given, extra = call.request.to_dict(), call.request.extra
    fields = {name: value for name, value in given.items() if name not in _ADDED_LATER}
    if call.count > 1:
        fields["n"] = call.count
    if call.seed is not None:
        fields["seed"] = call.seed
    for name in vocabulary.unknown | call.without:
        fields.pop(name, None)
    if vocabulary.words:
        fields = {vocabulary.word(name): value for name, value in fields.items()}
    fields |= _size_fields(call, vocabulary)
    if extra:
        fields |= {name: value for name, value in extra.items() if name not in call.without}
    return fields


def _size_fields(call: Call, vocabulary: Vocabulary) -> dict[str, object]:
    request, without = call.request, call.without
    if vocabulary.size_style == "aspect_ratio":
        ratio, resolution = shape_of(request)
        fields = {"aspect_ratio": ratio, "resolution": resolution.lower()}
        return {name: value for name, value in fields.items() if name not in without}
    if _sends_ratio(request, vocabulary) and "aspect_ratio" not in without:
        shape = {"aspect_ratio": request.aspect_ratio, "resolution": request.resolution}
        return {name: value for name, value in shape.items() if value is not None and name not in without}
    if without & PIXEL_WORDS:
        return {}
    if vocabulary.size_style == "width_height":
        return {"width": request.width, "height": request.height}
    return {vocabulary.size_style: f"{request.width}x{request.height}"}


def _sends_ratio(request: GenerationRequest, vocabulary: Vocabulary) -> bool:
    return request.aspect_ratio is not None and vocabulary.takes_ratio(request.model)


def shape_of(request: GenerationRequest) -> tuple[str, str]:
    """Return the aspect ratio and the resolution to request from a service that takes no pixels."""
    ratio = request.aspect_ratio
    if ratio not in _RATIOS:
        ratio = nearest_ratio(request.width, request.height)
    resolution = request.resolution
    if resolution is None:
        resolution = "1K" if request.aspect_ratio or request.width * request.height <= _MAX_1K_PIXELS else "2K"
    return ratio, {"512": "1K", "4K": "2K"}.get(resolution, resolution)


def nearest_ratio(width: int, height: int) -> str:
    """Return the aspect ratio of most services that changes the image's shape least."""
    return nearest_ratio_of(width, height, _RATIOS)


def nearest_ratio_of(width: int, height: int, ratios: Iterable[str]) -> str:
    """Return the one of some aspect ratios `W:H` that changes the image's shape least."""

    def stretch(ratio: str) -> float:
        across, _, down = ratio.partition(":")
        return abs(math.log(width / height * int(down) / int(across)))

    return min(ratios, key=stretch)


def left_out_warnings(call: Call, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return a warning for each field that was given and is not sent as it was given."""
    request, extra = call.request, call.request.extra
    warnings = [
        f"{name} is not known to this provider and was left out"
        for name in sorted(vocabulary.unknown - call.without)
        if getattr(request, name) is not None
    ]
    if extra:
        warnings += [
            f"{name} was left out: extra has {vocabulary.word(name)}"
            for name in request.__struct_fields__
            if vocabulary.word(name) in extra and getattr(request, name) is not None
        ]
    if vocabulary.size_style == "aspect_ratio":
        ratio, resolution = shape_of(request)
        if (request.aspect_ratio, request.resolution or resolution) != (ratio, resolution):
            warnings.append(f"this provider takes an aspect ratio instead of a size: {ratio} was requested")
    return tuple(warnings)


def sent_request(request: GenerationRequest, vocabulary: Vocabulary) -> GenerationRequest:
    """Return the request without what a call does not carry, so that equal calls have equal fingerprints."""
    sized_by_ratio = (request.aspect_ratio or request.resolution) is not None
    if not (sized_by_ratio or request.extra or vocabulary.unknown) and vocabulary.size_style != "aspect_ratio":
        return request
    changes: dict[str, object] = {}
    if vocabulary.size_style == "aspect_ratio":
        ratio, resolution = shape_of(request)
        width, height = sides_of(ratio, resolution) or (0, 0)
        changes = {"aspect_ratio": ratio, "resolution": resolution, "width": width, "height": height}
    elif sized_by_ratio and not _sends_ratio(request, vocabulary):
        changes = {"aspect_ratio": None, "resolution": None}
    changes |= {name: None for name in vocabulary.unknown if getattr(request, name) is not None}
    if request.extra:
        changes |= _under_our_names(request.extra, vocabulary)
    return replace(request, **changes) if changes else request


def _under_our_names(extra: Mapping[str, object], vocabulary: Vocabulary) -> dict[str, object]:
    """Return fields of `extra` that are the provider's word for one of ours, and the rest of `extra`."""
    ours = {name: extra[word] for name, word in vocabulary.words.items() if word in extra}
    if not ours:
        return {}
    words = {vocabulary.word(name) for name in ours}
    rest = {name: value for name, value in extra.items() if name not in words}
    return {**ours, "extra": rest or None}
