"""Validation of a client's request: the fields, their limits and the text of each error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from typing import Annotated, Any, Literal, NotRequired
from urllib.parse import urlsplit

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, PydanticUndefined
from typing_extensions import TypedDict

from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import printable
from imagegen.tasks.field_faults import NO_CONTROL, RATIO, VISIBLE_TEXT, field_errors, unknown_field
from imagegen.tasks.other_apis import advice_for, is_reserved, our_name
from imagegen.tasks.request import MAX_IMAGES, MAX_SEED, UPLOAD_PATTERN, GenerationRequest, Lora
from imagegen.tasks.sizes import MAX_RATIO, sides_of

MAX_PROMPT_CHARS = 32_000
MAX_MODEL_CHARS = 200
MAX_OPTION_CHARS = 100
MAX_INPUT_IMAGES = 16
MAX_ADDRESS_CHARS = 8_192
"""Of an input image. A signed link with a session token has up to 4,000; a task keeps them all as long as it lives."""

MAX_LORAS = 8
MAX_EXTRA_BYTES = 8 * 1024
MAX_SIDE = 8_192
DEFAULT_SIDE = 512
MAX_PIXELS = 36_000_000
MAX_VARIANT = 1_000_000
MAX_DOLLARS = 1_000_000
MAX_FIELD_ERRORS = 50
MAX_KEY_CHARS = 60
MAX_HINTS = 3
"""Unknown fields of one request that get a did-you-mean, which costs more than all other checks."""

_OF_THE_PROVIDER = "; a field of the provider's own API goes into extra"

_TEXTS = ("prompt", "negative_prompt")
_NEVER_EMPTY = frozenset({"prompt", "model"})
_WHOLE = re.compile(r"[+-]?[0-9]{1,25}(\.0*)?")
_UPLOAD = re.compile(UPLOAD_PATTERN)
_ADDRESS = re.compile(r"https?://[^/?#\s\\]+(?=[/?#]|$)", re.IGNORECASE)
"""Scheme and authority of an address."""

_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_PLAIN_ADDRESS = (
    rf"https?://([A-Za-z0-9._~-]+(:[A-Za-z0-9._~-]*)?@)?[A-Za-z0-9][A-Za-z0-9._-]*(:{_PORT})?([/?#][!-~]*)?"
)
"""Addresses that the schema of the API names, by which clients check what they send: in ASCII, of no IPv6 host."""

_DECIMAL = re.compile(r"[+-]?([0-9]{1,25}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def _whole_number(value: object) -> object:
    """Return an integer: `512`, `512.0` and `"512"` are one number; a boolean is none."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    raise PydanticCustomError("whole_number", "must be a whole number")


def _number(value: object) -> object:
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PydanticCustomError("number", "must be a number")
    return value


def is_image_source(value: str) -> bool:
    """Return whether a text is an http(s) address, a `data:` URI of an image, or an upload."""
    return value[:16].lower().startswith(("https://", "http://", "data:image/")) or bool(_UPLOAD.fullmatch(value))


def _image_source(value: str) -> str:
    if not is_image_source(value):
        raise PydanticCustomError(
            "image_source", "must be an http(s) address, a data:image/ URI, or upload: and 64 hex digits"
        )
    if value[:4].lower() == "http":
        if len(value) > MAX_ADDRESS_CHARS:
            raise PydanticCustomError("long_address", f"must be an address of at most {MAX_ADDRESS_CHARS} characters")
        if not _has_host(value):
            raise PydanticCustomError("no_host", "must be an address with a valid host and port")
    return value


def _has_host(address: str) -> bool:
    """Return whether an address names a host. Without one, a provider may draw, and be paid, without the image."""
    match = _ADDRESS.match(address)
    try:
        parts = urlsplit(match[0]) if match else None
        return parts is not None and bool((parts.hostname or "").strip(".-")) and parts.port != 0
    except ValueError:
        return False


def _at_most(count: int) -> BeforeValidator:
    """Return a validator that counts a list before pydantic looks into it, which makes a fault of each entry."""

    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > count:
            raise PydanticCustomError("too_many", f"must have at most {count} entries")
        return value

    return BeforeValidator(check)


def _boolean(value: object) -> object:
    """Return a boolean for `"true"` and `"false"`, since form fields are texts, and any other value unchanged."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _upper_case(value: object) -> object:
    return value.strip().upper() if isinstance(value, str) else value


def _extra(value: object) -> object:
    """Drop nulls, which count as absent. Raises PydanticCustomError for a field with its own place."""
    if not isinstance(value, dict):
        raise PydanticCustomError("extra", "must be an object")
    fields = {name: part for name, part in value.items() if part is not None}
    if len(msgspec.json.encode(fields)) > MAX_EXTRA_BYTES:
        raise PydanticCustomError("extra", f"must be at most {MAX_EXTRA_BYTES} bytes of JSON")
    for name in fields:
        if is_reserved(name):
            raise PydanticCustomError("extra", f"must not contain {printable(name, MAX_KEY_CHARS)}")
        if name in SPELLINGS:
            raise PydanticCustomError("extra", f"must not contain {name}: send it outside of extra")
        if our_name(name) == "steps":  # they decide the price
            shown = printable(name, MAX_KEY_CHARS)
            raise PydanticCustomError("extra", f"must not contain {shown}: send steps outside of extra")
    return fields


def _visible_text(max_chars: int) -> StringConstraints:
    return StringConstraints(
        strict=True, strip_whitespace=True, min_length=1, max_length=max_chars, pattern=VISIBLE_TEXT
    )


Prompt = Annotated[str, _visible_text(MAX_PROMPT_CHARS)]
ModelId = Annotated[str, _visible_text(MAX_MODEL_CHARS)]
ImageSource = Annotated[
    str,
    StringConstraints(strict=True, strip_whitespace=True, pattern=NO_CONTROL),
    AfterValidator(_image_source),
    Field(json_schema_extra={"pattern": rf"^({_PLAIN_ADDRESS}|data:image/[!-~]+|{UPLOAD_PATTERN})$"}),
]
Option = Annotated[str, _visible_text(MAX_OPTION_CHARS)]
"""A word that a provider understands, such as a quality."""

# The limits come before our own rule: after it pydantic would check them by calls of Python.
_WHOLE_NUMBER = BeforeValidator(_whole_number)
Size = Annotated[int, Field(ge=64, le=MAX_SIDE), _WHOLE_NUMBER, Field(multiple_of=8)]  # the order of the errors
Count = Annotated[int, Field(ge=1, le=MAX_IMAGES), _WHOLE_NUMBER]
Steps = Annotated[int, Field(ge=1, le=100), _WHOLE_NUMBER]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), _WHOLE_NUMBER]
Variant = Annotated[int, Field(ge=0, le=MAX_VARIANT), _WHOLE_NUMBER]
Percent = Annotated[int, Field(ge=0, le=100), _WHOLE_NUMBER]
Switch = Annotated[bool, Field(strict=True), BeforeValidator(_boolean)]
Scale = Annotated[float, BeforeValidator(_number)]
Dollars = Annotated[float, Field(ge=0, le=MAX_DOLLARS), BeforeValidator(_number)]


class LoraParams(TypedDict):
    """Adapter weights, as a client sends them."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    path: Annotated[str, _visible_text(2_000)]
    scale: Annotated[float, Field(ge=-100, le=100), BeforeValidator(_number)]


AspectRatio = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, pattern=RATIO)]
Resolution = Annotated[Literal["512", "1K", "2K", "4K"], BeforeValidator(_upper_case)]


class GenerationParams(BaseModel):
    """The parameters that change the image, as a client sends them.

    Its own validator is built for the documentation only, when that is requested: requests are read by `_validate`.
    """

    model_config = ConfigDict(
        extra="forbid", alias_generator=to_camel, validate_by_name=True, protected_namespaces=(), defer_build=True
    )

    prompt: Annotated[Prompt, Field(description="What to draw.")]
    model: Annotated[ModelId, Field(description="Any model id of the provider.")]
    width: Annotated[Size, Field(description="Pixels.")] = DEFAULT_SIDE
    height: Annotated[Size, Field(description="Pixels.")] = DEFAULT_SIDE
    n: Annotated[Count, Field(description="Images wanted.")] = 1
    steps: Annotated[Steps, Field(description="Not sent where not given.")] | None = None
    seed: Annotated[Seed, Field(description="The same seed, the same image; -1 is absent.")] | None = None
    negative_prompt: Prompt | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100), BeforeValidator(_number)] | None = None
    output_format: Literal["jpeg", "png", "webp"] | None = None
    image_url: Annotated[ImageSource, Field(description="Image to start from.")] | None = None
    reference_images: (
        Annotated[
            tuple[ImageSource, ...],
            Field(min_length=1, max_length=MAX_INPUT_IMAGES, description="Further images to start from."),
            _at_most(MAX_INPUT_IMAGES),
        ]
        | None
    ) = None
    mask: Annotated[ImageSource, Field(description="Image; its transparent part is to be changed.")] | None = None
    aspect_ratio: Annotated[AspectRatio, Field(description="Instead of width and height.")] | None = None
    resolution: Annotated[Resolution, Field(description="Instead of width and height.")] | None = None
    variant: Annotated[
        Variant,
        Field(
            description=(
                "Another variant of the same request is another task. Without a `seed`, a variant over 0 sends "
                "another seed, always the same one, if the model takes seeds."
            )
        ),
    ] = 0
    output_compression: Annotated[Percent, Field(description="Of JPEG and WebP.")] | None = None
    quality: Option | None = None
    background: Option | None = None
    moderation: Option | None = None
    style: Option | None = None
    input_fidelity: Option | None = None
    disable_safety_checker: Switch | None = None
    prompt_upsampling: Switch | None = None
    image_loras: Annotated[tuple[LoraParams, ...], Field(max_length=MAX_LORAS), _at_most(MAX_LORAS)] | None = None
    extra: (
        Annotated[
            dict[str, Any],
            BeforeValidator(_extra),
            Field(description="Further fields for the provider, sent unchanged; at most 8 KiB of JSON."),
        ]
        | None
    ) = None


Adjust = Callable[[GenerationRequest, Collection[str]], GenerationRequest]
"""Fits a request to its model. Gets our names of the fields that were given; raises InvalidRequest with such names."""


def parse(
    body: Mapping[str, Any],
    *,
    default_model: str,
    aliases: Mapping[str, str],
    max_faults: int = MAX_FIELD_ERRORS,
    default_side: int = DEFAULT_SIDE,
    adjust: Adjust | None = None,
) -> GenerationRequest:
    """Read a client's fields, in either spelling; `null`, empty form values and a seed of -1 are absent.

    default_side: pixels of a side that no field gives. adjust: applied last, to a request that is valid without it.

    Raises InvalidRequest with all faults, or the first `max_faults`.
    """
    fields, faults = _normalize_keys(body, max_faults)
    fields.setdefault("model", default_model)
    _normalize_newlines(fields)
    try:
        params = _validate(fields)
    except ValidationError as error:
        raise InvalidRequest(details=(faults + field_errors(error))[:max_faults]) from error
    params.setdefault("n", 1)
    params.setdefault("width", default_side)
    params.setdefault("height", default_side)
    faults += _cross_field_errors(fields, params)
    if faults:
        raise InvalidRequest(details=faults[:max_faults])
    if loras := params.get("image_loras"):
        params["image_loras"] = tuple(Lora(**lora) for lora in loras)
    if params.get("extra") == {}:
        del params["extra"]
    if (alias := aliases.get(params["model"])) is not None:
        params["model"] = alias
    request = GenerationRequest(**params)
    if adjust is None:
        return request
    try:
        return adjust(request, fields.keys())
    except InvalidRequest as error:
        raise InvalidRequest(details=_as_spelled(error.details, body)[:max_faults]) from error


def _normalize_newlines(fields: dict[str, Any]) -> None:
    for name in _TEXTS:
        if type(text := fields.get(name)) is str and "\r" in text:
            fields[name] = text.replace("\r\n", "\n").replace("\r", "\n")


def _as_spelled(errors: Iterable[FieldError], body: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors under the names that the client used."""
    spelled = {SPELLINGS[key]: key for key in body if key in SPELLINGS}
    return [FieldError(spelled.get(error.field, to_camel(error.field)), error.message) for error in errors]


def _cross_field_errors(fields: Mapping[str, Any], params: dict[str, Any]) -> list[FieldError]:
    """Return the errors of fields that are good alone but not together; width and height are computed if need be."""
    errors = []
    ratio, resolution = params.get("aspect_ratio"), params.get("resolution")
    if ratio is not None or resolution is not None:
        name = "aspectRatio" if ratio is not None else "resolution"
        if "width" in fields or "height" in fields:
            errors.append(FieldError(name, "must not be sent together with width or height"))
        elif (sides := sides_of(ratio or "1:1", resolution or "1K")) is None:
            errors.append(FieldError(name, f"must be at most {MAX_RATIO}:1 or 1:{MAX_RATIO}"))
        elif max(sides) > MAX_SIDE:
            errors.append(FieldError(name, f"must give sides of at most {MAX_SIDE} pixels, with resolution"))
        else:
            params["width"], params["height"] = sides
    if params["width"] * params["height"] > MAX_PIXELS:
        errors.append(FieldError("height", f"must be at most {MAX_PIXELS // 1_000_000} megapixels, with width"))
    if "image_url" in params and len(params.get("reference_images", ())) == MAX_INPUT_IMAGES:
        errors.append(FieldError("referenceImages", f"must have at most {MAX_INPUT_IMAGES} entries, with imageUrl"))
    return errors


def _dict_validator(model: type[BaseModel]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a validator to a dict of the given fields: an instance of the model would take more than twice as long."""
    typed_dict: Any = TypedDict
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            fields[name] = Annotated[field.annotation, field]
        else:
            without_default = copy(field)
            without_default.default = PydanticUndefined
            fields[name] = NotRequired[Annotated[field.annotation, without_default]]
    config = with_config(ConfigDict(**{**model.model_config, "defer_build": False}))
    adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(config(typed_dict("Params", fields)))
    return adapter.validate_python


_validate = _dict_validator(GenerationParams)


def _normalize_keys(body: Mapping[str, Any], max_faults: int) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the fields under our names, and the faults of the names. Raises InvalidRequest at `max_faults`."""
    fields: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    faults: list[FieldError] = []
    for key, value in body.items():
        name = SPELLINGS.get(key)
        if name is None:
            text = _unknown_field(key, _NAMES if len(faults) < MAX_HINTS else ())
            faults.append(FieldError(printable(key, MAX_KEY_CHARS), text))
        elif name in spelled:
            faults.append(FieldError(key, f"is the same field as {spelled[name]}: send one of them"))
        else:
            spelled[name] = key
            if not _is_absent(name, value):
                fields[name] = value
        if len(faults) >= max_faults:
            raise InvalidRequest(details=faults)
    return fields, faults


def _is_absent(name: str, value: object) -> bool:
    if value:
        return name == "seed" and value == -1  # what many programs write for a seed of the service's choice
    return value is None or (name not in _NEVER_EMPTY and value in ("", [])) or (name == "extra" and value == {})


def _unknown_field(key: str, names: tuple[str, ...]) -> str:
    """Return the text about an unknown field of a request, with what another image API's field is here."""
    advice = advice_for(key) if len(key) <= MAX_KEY_CHARS else None
    if advice:
        return f"is not a known field; {advice}"
    text = unknown_field(key, names)
    return text if text.endswith("?") else text + _OF_THE_PROVIDER


SPELLINGS = {spelling: name for name in GenerationParams.model_fields for spelling in (name, to_camel(name))}
"""Our name of each field, by its spellings."""

_NAMES = (*(to_camel(name) for name in GenerationParams.model_fields), "webhook", "maxCostUsd")
