"""Owns what a client may ask for: the fields, their limits, the canonical form and the fingerprint."""

from __future__ import annotations

import difflib
import hashlib
import hmac
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from imagegen.errors import FieldFault, InvalidRequest

MAX_PROMPT_CHARS = 4_000
MAX_MODEL_CHARS = 200
MAX_IMAGES = 8
MAX_REFERENCE_IMAGES = 16
MAX_FAULTS = 50
MAX_SEED = 2**63 - 1

_encode = msgspec.json.Encoder().encode
_WHOLE = re.compile(r"[+-]?\d{1,25}(\.0*)?")
_DECIMAL = re.compile(r"[+-]?(\d{1,25}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")


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


def _no_control_characters(value: str) -> str:
    if not value.isprintable() and any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in value):
        raise PydanticCustomError("control_character", "must not contain control characters but tab and newline")
    return value


def _image_source(value: str) -> str:
    if not value.lower().startswith(("https://", "http://", "data:image/")):
        raise PydanticCustomError("image_source", "must be an http(s) address or a data:image/ URI")
    return value


def _says(pattern: str) -> Any:
    """What a validator asks for, for those who read the schema."""
    return Field(json_schema_extra={"pattern": pattern})


_NO_CONTROLS = AfterValidator(_no_control_characters)
_PRINTED = _says(r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")

# Limits stand with the string or number, before our own rule: behind it pydantic would check them by calls of Python.
_Text = StringConstraints(strict=True, strip_whitespace=True)
_Prompt = StringConstraints(strict=True, strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_CHARS)
_Model = StringConstraints(strict=True, strip_whitespace=True, min_length=1, max_length=MAX_MODEL_CHARS)

Text = Annotated[str, _Text, _NO_CONTROLS, _PRINTED]
Prompt = Annotated[str, _Prompt, _NO_CONTROLS, _PRINTED]
ModelId = Annotated[str, _Model, _NO_CONTROLS, _PRINTED]
ImageSource = Annotated[Text, AfterValidator(_image_source), _says(r"^(https?://|data:image/)[!-~]+$")]
ImageSources = Annotated[tuple[ImageSource, ...], Field(min_length=1, max_length=MAX_REFERENCE_IMAGES)]
_WHOLE_NUMBER = BeforeValidator(_whole_number)
Size = Annotated[int, Field(ge=64, le=2048), _WHOLE_NUMBER, Field(multiple_of=8)]  # in this order it is told of
Count = Annotated[int, Field(ge=1, le=MAX_IMAGES), _WHOLE_NUMBER]
Steps = Annotated[int, Field(ge=1, le=100), _WHOLE_NUMBER]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), _WHOLE_NUMBER]


class GenerationRequest(BaseModel):
    """What changes the picture, and nothing else; defaults are filled in before it is made."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True, protected_namespaces=()
    )

    prompt: Annotated[Prompt, Field(description="What to draw.")]
    model: Annotated[ModelId, Field(description="Any model id of the provider.")]
    width: Annotated[Size, Field(description="Pixels.")] = 512
    height: Annotated[Size, Field(description="Pixels.")] = 512
    n: Annotated[Count, Field(description="Pictures wanted.")] = 1
    steps: Annotated[Steps, Field(description="Not sent where not given.")] | None = None
    seed: Annotated[Seed, Field(description="The same seed, the same picture.")] | None = None
    negative_prompt: Prompt | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100), BeforeValidator(_number)] | None = None
    output_format: Literal["jpeg", "png", "webp"] | None = None
    image_url: ImageSource | None = None
    reference_images: (
        Annotated[tuple[ImageSource, ...], Field(min_length=1, max_length=MAX_REFERENCE_IMAGES)] | None
    ) = None

    @classmethod
    def parse(cls, body: Mapping[str, Any], *, default_model: str, aliases: Mapping[str, str]) -> Self:
        """Reads a client's fields, in either spelling, `null` as absent. Raises InvalidRequest with every fault."""
        fields, faults = _one_spelling(body)
        fields.setdefault("model", default_model)
        try:
            request = cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidRequest(details=(faults + _faults(error))[:MAX_FAULTS]) from error
        if faults:
            raise InvalidRequest(details=faults[:MAX_FAULTS])
        model = aliases.get(request.model)
        return request.model_copy(update={"model": model}) if model else request

    def stored(self) -> dict[str, Any]:
        """The fields that are set, in snake_case."""
        return {name: value for name, value in self.__dict__.items() if value is not None}

    def stored_json(self) -> bytes:
        """`stored` as JSON, to be kept; `restore` reads it back.

        The bytes that orjson makes would hold on to the 4 KiB that it made them in.
        """
        return _encode(self.stored())

    @classmethod
    def restore(cls, stored_json: bytes) -> Self:
        """Reads what `stored_json` made. Raises ValueError where it is none."""
        return cls.model_validate_json(stored_json)

    def canonical(self, provider: str, scope: str | None) -> bytes:
        """One spelling of everything that changes the picture: sorted keys, no nulls, whole numbers as integers.

        The provider is part of it, so that a sandbox picture is never served as a real one; `scope` is the
        client's key name where each key has its own tasks.
        """
        fields = {**self.stored(), "provider": provider}
        if scope is not None:
            fields["scope"] = scope
        scale = fields.get("guidance_scale")
        if scale is not None and scale == int(scale):
            fields["guidance_scale"] = int(scale)
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def fingerprint(canonical: bytes, secret: str | None) -> str:
    """The task id: the MD5 of the canonical request, or its HMAC where a secret is set. 32 hex digits."""
    if secret:
        return hmac.digest(secret.encode(), canonical, "md5").hex()
    return hashlib.md5(canonical, usedforsecurity=False).hexdigest()


def digest(canonical: bytes) -> str:
    """What is compared on a hit, since MD5 is not trusted: 32 hex digits of the canonical request's SHA-256."""
    return hashlib.sha256(canonical).hexdigest()[:32]


def _one_spelling(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldFault]]:
    fields: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    faults = []
    for key, value in body.items():
        name = _SPELLINGS.get(key)
        if name is None:
            faults.append(FieldFault(_shown(key), _unknown(key, [*sorted(_SPELLINGS), "webhook"])))
        elif name in spelled:
            faults.append(FieldFault(key, f"is the same field as {spelled[name]}: send one of them"))
        else:
            spelled[name] = key
            if value is not None:
                fields[name] = value
    return fields, faults


def _unknown(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key[:60], names, n=1)
    return "is not a known field" + (f"; did you mean {near[0]}?" if near else "")


def _shown(key: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in key[:60])


def _faults(error: ValidationError) -> list[FieldFault]:
    return [FieldFault(_path(e["loc"]), _sentence(e)) for e in error.errors(include_url=False)]


def _path(location: tuple[int | str, ...]) -> str:
    first, *rest = location or ("",)
    return to_camel(str(first)) + "".join(f"[{part}]" for part in rest if isinstance(part, int))


def _sentence(error: ErrorDetails) -> str:
    unit = "entries" if isinstance(error["input"], list | tuple) else "characters"
    match error["type"]:
        case "missing":
            return "is required"
        case "too_short" | "string_too_short":
            return f"must have at least {error['ctx']['min_length']} {unit}"
        case "too_long" | "string_too_long":
            return f"must have at most {error['ctx']['max_length']} {unit}"
    return error["msg"].replace("Input should", "must").replace("must be a valid tuple", "must be a list")


_SPELLINGS = {spelling: name for name in GenerationRequest.model_fields for spelling in (name, to_camel(name))}
