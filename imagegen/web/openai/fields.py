"""Parser of a generation on `/v1`: the union of OpenAI's and Together's fields becomes one request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel, to_snake

from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import MAX_FIELD_ERRORS, GenerationParams
from imagegen.tasks.validation import parse as parse_fields

DEFAULT_SIDE = 1024
MAX_RATIO = 4

_FORMATS = {"url": False, "b64_json": True, "base64": True}
_FIELD_NAMES = {"num_inference_steps": "steps", "guidance": "guidance_scale"}
_FIELD_NAMES |= {spelling: name for name in GenerationParams.model_fields for spelling in (to_camel(name), name)}
"""Our name of each field; of two spellings the later one here counts."""

_UNSUPPORTED = ("image", "mask", "image_base64", "image_strength", "image_loras", "condition_image", "frame_images")
"""Fields that decide the content of the image: without them, another image than the requested one would be paid for."""

_SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX]\s*([0-9]{1,5})\s*")
_RATIO = re.compile(r"\s*([0-9]{1,4})\s*:\s*([0-9]{1,4})\s*")


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """Parsed body. as_base64: the response holds the bytes instead of links; streamed: it is an event stream."""

    request: GenerationRequest
    as_base64: bool
    streamed: bool


def parse(body: Mapping[str, Any], *, default_model: str, aliases: Mapping[str, str]) -> OpenAIRequest:
    """Parse a client's fields; null and empty count as absent, and unknown fields that do no harm are ignored.

    Raises InvalidRequest with every error, under the names that the client used.
    """
    sent = {name: value for name, value in body.items() if not _is_absent(name, value)}
    errors = [FieldError(name, "is not supported by this service") for name in _UNSUPPORTED if name in sent]
    spelled = {ours: name for name, ours in _FIELD_NAMES.items() if name in sent}
    fields = {ours: sent[name] for ours, name in spelled.items()}
    if fields.get("output_format") == "jpg":
        fields["output_format"] = "jpeg"
    _add_size(sent, fields, spelled, errors)
    as_base64 = _as_base64(sent, errors)
    streamed = sent.get("stream", False)
    if not isinstance(streamed, bool):
        errors.append(FieldError("stream", "must be true or false"))
    try:
        request = parse_fields(fields, default_model=default_model, aliases=aliases)
    except InvalidRequest as error:
        errors += [_as_spelled(detail, spelled) for detail in error.details]
        raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS]) from error
    if errors:
        raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS])
    return OpenAIRequest(request, as_base64, streamed is True)


def _is_absent(name: str, value: object) -> bool:
    return value is None or (name not in {"prompt", "model"} and value in ("", []))


def _add_size(
    sent: Mapping[str, Any], fields: dict[str, Any], spelled: dict[str, str], errors: list[FieldError]
) -> None:
    """Fill in the missing sides: from `size`, else from `aspect_ratio`, else the default."""
    missing = [side for side in ("width", "height") if side not in fields]
    if not missing:
        return
    sides = {"width": DEFAULT_SIDE, "height": DEFAULT_SIDE}
    for name, read, rule in (("size", _read_size, "WIDTHxHEIGHT"), ("aspect_ratio", _read_ratio, "16:9, at most 4:1")):
        text = sent.get(name, "auto")
        if text == "auto":
            continue
        match = read(text) if isinstance(text, str) else None
        if match is None:
            errors.append(FieldError(name, f"must be auto, or such as {rule}"))
        else:
            sides = dict(zip(("width", "height"), match, strict=True))
            spelled |= dict.fromkeys(missing, name)
        break
    fields |= {side: sides[side] for side in missing}


def _read_size(text: str) -> tuple[int, int] | None:
    match = _SIZE.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def _read_ratio(text: str) -> tuple[int, int] | None:
    """Return sides of that ratio, of about a megapixel, multiples of 16."""
    match = _RATIO.fullmatch(text)
    wide, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not wide or not high or max(wide, high) > MAX_RATIO * min(wide, high):
        return None
    root = math.sqrt(wide / high)
    return round(DEFAULT_SIDE * root / 16) * 16, round(DEFAULT_SIDE / root / 16) * 16


def _as_base64(sent: Mapping[str, Any], errors: list[FieldError]) -> bool:
    name = sent.get("response_format", "url")
    if isinstance(name, str) and name in _FORMATS:
        return _FORMATS[name]
    errors.append(FieldError("response_format", f"must be one of {', '.join(_FORMATS)}"))
    return False


def _as_spelled(error: FieldError, spelled: Mapping[str, str]) -> FieldError:
    name, bracket, place = error.field.partition("[")
    ours = to_snake(name)
    theirs = spelled.get(ours, ours)
    if theirs in {"size", "aspect_ratio"}:
        return FieldError(theirs, f"{ours} {error.message}")
    return FieldError(theirs + bracket + place, error.message)
