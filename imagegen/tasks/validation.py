"""Validation of a client's request: the fields, their limits and the text of each error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

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
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from imagegen.did_you_mean import nearest
from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import printable
from imagegen.tasks.request import MAX_IMAGES, MAX_SEED, GenerationRequest

MAX_PROMPT_CHARS = 4_000
MAX_MODEL_CHARS = 200
MAX_REFERENCE_IMAGES = 16
MAX_FIELD_ERRORS = 50
MAX_KEY_CHARS = 60
MAX_HINTS = 3
"""Unknown fields of one request that get a did-you-mean, which costs more than all other checks."""

_TEXTS = ("prompt", "negative_prompt")
_NEVER_EMPTY = frozenset({"prompt", "model"})
_WHOLE = re.compile(r"[+-]?[0-9]{1,25}(\.0*)?")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,25}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def _whole_number(value: object) -> object:
    """`512`, `512.0` and `"512"` are one number; a boolean is none."""
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


def _image_source(value: str) -> str:
    if not value[:16].lower().startswith(("https://", "http://", "data:image/")):
        raise PydanticCustomError("image_source", "must be an http(s) address or a data:image/ URI")
    return value


def _check_image_count(value: object) -> object:
    """Count a list before pydantic looks into it, which makes a fault of each entry."""
    if isinstance(value, list) and len(value) > MAX_REFERENCE_IMAGES:
        raise PydanticCustomError("too_many", f"must have at most {MAX_REFERENCE_IMAGES} entries")
    return value


_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters but tab and newline."""

_NO_CONTROL = rf"^[^{_CONTROL}]*$"
_VISIBLE = rf"^[^{_CONTROL}]*[^\s{_CONTROL}][^{_CONTROL}]*$"
"""A text without control characters in which something is visible."""


def _visible_text(max_chars: int) -> StringConstraints:
    return StringConstraints(strict=True, strip_whitespace=True, min_length=1, max_length=max_chars, pattern=_VISIBLE)


Prompt = Annotated[str, _visible_text(MAX_PROMPT_CHARS)]
ModelId = Annotated[str, _visible_text(MAX_MODEL_CHARS)]
ImageSource = Annotated[
    str,
    StringConstraints(strict=True, strip_whitespace=True, pattern=_NO_CONTROL),
    AfterValidator(_image_source),
    Field(json_schema_extra={"pattern": r"^(https?://|data:image/)[!-~]+$"}),
]

# The limits come before our own rule: after it pydantic would check them by calls of Python.
_WHOLE_NUMBER = BeforeValidator(_whole_number)
Size = Annotated[int, Field(ge=64, le=2048), _WHOLE_NUMBER, Field(multiple_of=8)]  # the order of the errors
Count = Annotated[int, Field(ge=1, le=MAX_IMAGES), _WHOLE_NUMBER]
Steps = Annotated[int, Field(ge=1, le=100), _WHOLE_NUMBER]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), _WHOLE_NUMBER]


class GenerationParams(BaseModel):
    """The parameters that change the image, as a client sends them."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, validate_by_name=True, protected_namespaces=())

    prompt: Annotated[Prompt, Field(description="What to draw.")]
    model: Annotated[ModelId, Field(description="Any model id of the provider.")]
    width: Annotated[Size, Field(description="Pixels.")] = 512
    height: Annotated[Size, Field(description="Pixels.")] = 512
    n: Annotated[Count, Field(description="Images wanted.")] = 1
    steps: Annotated[Steps, Field(description="Not sent where not given.")] | None = None
    seed: Annotated[Seed, Field(description="The same seed, the same image; -1 is absent.")] | None = None
    negative_prompt: Prompt | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100), BeforeValidator(_number)] | None = None
    output_format: Literal["jpeg", "png", "webp"] | None = None
    image_url: ImageSource | None = None
    reference_images: (
        Annotated[
            tuple[ImageSource, ...],
            Field(min_length=1, max_length=MAX_REFERENCE_IMAGES),
            BeforeValidator(_check_image_count),
        ]
        | None
    ) = None


def parse(
    body: Mapping[str, Any], *, default_model: str, aliases: Mapping[str, str], max_faults: int = MAX_FIELD_ERRORS
) -> GenerationRequest:
    """Read a client's fields, in either spelling; `null`, empty form values and a seed of -1 are absent.

    Raises InvalidRequest with all faults, or the first `max_faults`.
    """
    fields, faults = _normalize_keys(body, max_faults)
    fields.setdefault("model", default_model)
    for name in _TEXTS:
        if type(text := fields.get(name)) is str and "\r" in text:
            fields[name] = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        params = _validate(fields)
    except ValidationError as error:
        raise InvalidRequest(details=(faults + _field_errors(error))[:max_faults]) from error
    if faults:
        raise InvalidRequest(details=faults)
    if (alias := aliases.get(params["model"])) is not None:
        params["model"] = alias
    return GenerationRequest(**params)


def _dict_validator(model: type[BaseModel]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a validator to a dict of the model's fields: an instance of the model would take half as long again."""
    typed_dict: Any = TypedDict
    fields = {name: Annotated[field.annotation, field] for name, field in model.model_fields.items()}
    adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(with_config(model.model_config)(typed_dict("Params", fields)))
    return adapter.validate_python


_validate = _dict_validator(GenerationParams)


def _normalize_keys(body: Mapping[str, Any], max_faults: int) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the fields under our names, and the faults of the names. Raises InvalidRequest at `max_faults`."""
    fields: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    faults: list[FieldError] = []
    for key, value in body.items():
        name = _SPELLINGS.get(key)
        if name is None:
            faults.append(
                FieldError(printable(key, MAX_KEY_CHARS), unknown_field(key, _NAMES if len(faults) < MAX_HINTS else ()))
            )
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
    return value is None or (name not in _NEVER_EMPTY and value in ("", []))


def unknown_field(key: str, known: tuple[str, ...]) -> str:
    """Return the text about an unknown field, with the field that is near to it or means the same."""
    meant = _OTHERS.get(key) if known is _NAMES else None
    near = meant or nearest(key, known)
    return "is not a known field" + (f"; did you mean {near}?" if near else "")


def _field_errors(error: ValidationError) -> list[FieldError]:
    return [FieldError(_path(e["loc"]), _error_message(e)) for e in error.errors(include_url=False)]


def _path(location: tuple[int | str, ...]) -> str:
    first, *rest = location or ("",)
    return to_camel(str(first)) + "".join(f"[{part}]" for part in rest if isinstance(part, int))


def _error_message(error: ErrorDetails) -> str:
    unit = "entries" if isinstance(error["input"], list | tuple) else "characters"
    match error["type"]:
        case "missing":
            return "is required"
        case "too_short" | "string_too_short":
            return f"must have at least {error['ctx']['min_length']} {unit}"
        case "too_long" | "string_too_long":
            return f"must have at most {error['ctx']['max_length']} {unit}"
        case "string_pattern_mismatch":
            return _pattern_message(error["ctx"]["pattern"], str(error["input"]))
    return error["msg"].replace("Input should", "must").replace("must be a valid tuple", "must be a list")


def _pattern_message(pattern: str, text: str) -> str:
    if re.search(f"[{_CONTROL}]", text):
        return "must not contain control characters except tab and newline"
    return "must contain a visible character" if pattern == _VISIBLE else f"must match {pattern}"


_SPELLINGS = {spelling: name for name in GenerationParams.model_fields for spelling in (name, to_camel(name))}
_NAMES = (*(to_camel(name) for name in GenerationParams.model_fields), "webhook")

_OTHERS = {
    "size": "width and height",
    "image_size": "width and height",
    "imageSize": "width and height",
    "num_images": "n",
    "numImages": "n",
    "num_outputs": "n",
    "number_of_images": "n",
    "numberOfImages": "n",
    "batch_size": "n",
    "num_inference_steps": "steps",
    "numInferenceSteps": "steps",
    "inference_steps": "steps",
    "guidance": "guidanceScale",
    "cfg_scale": "guidanceScale",
    "cfgScale": "guidanceScale",
    "format": "outputFormat",
    "response_format": "outputFormat",
    "image": "imageUrl",
    "init_image": "imageUrl",
    "image_urls": "referenceImages",
    "text": "prompt",
    "model_id": "model",
    "webhook_url": "webhook",
    "callback_url": "webhook",
}
"""Fields of other image APIs, and ours that means the same."""
