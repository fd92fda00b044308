"""Parser of a generation on `/v1`: the union of OpenAI's and Together's fields becomes one request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from pydantic.alias_generators import to_snake

from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import printable
from imagegen.providers.model_rules import IMPOSSIBLE_SIZE
from imagegen.tasks.other_apis import is_reserved, our_name
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import MAX_EXTRA_BYTES, MAX_FIELD_ERRORS, MAX_KEY_CHARS, SPELLINGS, Adjust
from imagegen.tasks.validation import parse as parse_fields
from imagegen.web.max_cost import MAX_COST_FIELDS, parse_max_cost

DEFAULT_SIDE = 1024

_FORMATS = {"url": False, "b64_json": True, "base64": True}
_FIELD_NAMES = {"num_inference_steps": "steps", "guidance": "guidance_scale"} | SPELLINGS
"""Our name of each field."""

_LEFT_OUT = frozenset({"user", "safety_identifier", "metadata", "store", "partial_images"})
"""Fields that change neither the image nor its price."""

_OF_THE_CALL = frozenset({"size", "stream", "response_format", *MAX_COST_FIELDS})
"""Fields that are read here: none of them is sent upstream unchanged."""

_AUTO = frozenset({"size", "aspect_ratio", "aspectRatio"})
"""Fields for which `auto` means the default."""

_MIN_FIELD_BYTES = 5
"""Of a field as JSON, without its name."""

_DATA_URI = "data:image/"
_IMAGE_RULE = "an image may only be in image_url, reference_images and mask, or goes to /v1/images/edits"

_SIDES = ("width", "height")
_SHAPE = (*_SIDES, "aspect_ratio", "resolution")
_SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX]\s*([0-9]{1,5})\s*")


class OpenAIRequest(Struct, frozen=True):
    """Parsed body. as_base64: the response holds the bytes instead of links, None if the client named no form.

    streamed: it is an event stream. named_model: as the client spelled it, which may be an alias.
    max_micro_usd: the most that the images may cost, None without a limit.
    """

    request: GenerationRequest
    as_base64: bool | None
    streamed: bool
    named_model: str
    max_micro_usd: int | None


def parse(
    body: Mapping[str, Any], *, default_model: str, aliases: Mapping[str, str], adjust: Adjust | None = None
) -> OpenAIRequest:
    """Parse a client's fields; null and empty count as absent, and unknown fields are the provider's.

    adjust: fits the request to its model, see validation.parse.

    Raises InvalidRequest with every error, under the names that the client used.
    """
    sent = _with_size({name: value for name, value in body.items() if not _is_absent(name, value)})
    errors: list[FieldError] = []
    spelled: dict[str, str] = {}
    fields = _known_fields(sent, spelled, errors)
    _add_unknown_fields(sent, fields, errors)
    _add_size(sent, fields, spelled, errors)
    as_base64 = _as_base64(sent, errors)
    max_micro_usd = _max_micro_usd(body, errors)
    streamed = sent.get("stream", False)
    if not isinstance(streamed, bool):
        errors.append(FieldError("stream", "must be true or false"))
    try:
        request = parse_fields(
            fields, default_model=default_model, aliases=aliases, default_side=DEFAULT_SIDE, adjust=adjust
        )
    except InvalidRequest as error:
        details = error.details
        if fields.get("extra") and "extra" not in spelled:
            spelled["extra"] = name = _largest(fields["extra"])
            if _DATA_URI in str(fields["extra"].get(name)):
                details = tuple(
                    FieldError("extra", _IMAGE_RULE) if each.message.endswith("bytes of JSON") else each
                    for each in details
                )
        errors += dict.fromkeys(_as_spelled(detail, spelled) for detail in details)
        raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS]) from error
    if errors:
        raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS])
    return OpenAIRequest(request, as_base64, streamed is True, str(sent.get("model", "")), max_micro_usd)


def _with_size(sent: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `image_size`, SiliconFlow's name of the size, as `size`; unchanged if it is no size."""
    size = sent.get("image_size")
    if not isinstance(size, str) or not _SIZE.fullmatch(size) or sent.get("size", size) != size:
        return sent
    return {"size": size, **{name: value for name, value in sent.items() if name != "image_size"}}


def _is_absent(name: str, value: object) -> bool:
    if value is None or (value == "auto" and name in _AUTO):
        return True
    return value in ("", []) and name not in {"prompt", "model"}


def _known_fields(sent: Mapping[str, Any], spelled: dict[str, str], errors: list[FieldError]) -> dict[str, Any]:
    """Return the fields under our names; `spelled` receives the client's name of each."""
    fields: dict[str, Any] = {}
    for name, value in sent.items():
        ours = _FIELD_NAMES.get(name)
        if ours is None:
            continue
        if ours in spelled and value != fields[ours]:
            errors.append(FieldError(name, f"is the same field as {spelled[ours]}: send one of them"))
        fields[ours] = value
        spelled[ours] = name
    if fields.get("output_format") == "jpg":
        fields["output_format"] = "jpeg"
    return fields


def _add_unknown_fields(sent: Mapping[str, Any], fields: dict[str, Any], errors: list[FieldError]) -> None:
    """Add the further fields for the provider to `extra`."""
    unknown = sent.keys() - _FIELD_NAMES.keys() - _LEFT_OUT - _OF_THE_CALL
    if not unknown:
        return
    if sum(map(len, unknown)) + _MIN_FIELD_BYTES * len(unknown) > MAX_EXTRA_BYTES:
        longest = printable(max(unknown, key=len), MAX_KEY_CHARS)
        rule = f"fields for the provider must be at most {MAX_EXTRA_BYTES} bytes of JSON"
        raise InvalidRequest(details=[*errors, FieldError(longest, rule)][:MAX_FIELD_ERRORS])
    extra = fields.get("extra", {})
    if isinstance(extra, dict):
        extra = {**extra}
    for name in (name for name in sent if name in unknown):
        if is_reserved(name):
            our_field = our_name(name)
            advice = f"use {our_field}" if our_field else "leave it out"
            advice = "use webhook of /api/images/generate" if our_field == "webhook" else advice
            errors.append(FieldError(printable(name, MAX_KEY_CHARS), f"is not supported here: {advice}"))
        elif isinstance(extra, dict):
            if name in extra:
                errors.append(FieldError(printable(name, MAX_KEY_CHARS), "is in extra too: send one of them"))
            extra[name] = sent[name]
        if len(errors) >= MAX_FIELD_ERRORS:
            raise InvalidRequest(details=errors)
    fields["extra"] = extra


def _largest(extra: Mapping[str, Any]) -> str:
    """Return the name of the largest field, which is the one to blame if all of them are too large."""
    return printable(max(extra, key=lambda name: len(str(extra[name]))), MAX_KEY_CHARS)


def _add_size(
    sent: Mapping[str, Any], fields: dict[str, Any], spelled: dict[str, str], errors: list[FieldError]
) -> None:
    """Read `size` into the sides that have no field."""
    if "size" in sent:
        text = sent["size"]
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            errors.append(FieldError("size", "must be auto, or such as WIDTHxHEIGHT"))
        sides = dict(zip(_SIDES, map(int, match.groups()), strict=True)) if match else {}
        conflicting = [name for name in _SHAPE if name in fields and fields[name] != sides.get(name)]
        errors += [FieldError(spelled[name], "must not be sent together with size") for name in conflicting]
        for side in () if conflicting else sides.keys() - fields.keys():
            fields[side] = sides[side]
            spelled[side] = "size"


def _as_base64(sent: Mapping[str, Any], errors: list[FieldError]) -> bool | None:
    name = sent.get("response_format")
    if name is None:
        return None
    if isinstance(name, str) and name in _FORMATS:
        return _FORMATS[name]
    errors.append(FieldError("response_format", f"must be one of {', '.join(_FORMATS)}"))
    return None


def _max_micro_usd(body: Mapping[str, Any], errors: list[FieldError]) -> int | None:
    """Return the limit of the cost. An empty list is an error here, unlike in other fields."""
    try:
        return parse_max_cost(body)
    except InvalidRequest as error:
        errors += error.details
        return None


def _as_spelled(error: FieldError, spelled: Mapping[str, str]) -> FieldError:
    name, *path = re.split(r"(?=[\[.])", error.field, maxsplit=1)
    our_field = to_snake(name)
    client_name = spelled.get(our_field, our_field)
    if client_name == "size":
        of_both_sides = error.message.startswith(IMPOSSIBLE_SIZE)
        return FieldError(client_name, error.message if of_both_sides else f"{our_field} {error.message}")
    return FieldError(client_name + "".join(path), error.message)
