"""Fields of a new API key and of a rotation, as the admin routes and the command `imagegen keys` take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel

from imagegen.accounts.api_keys import NAME, ApiKey
from imagegen.errors import FieldError, InvalidRequest
from imagegen.formats import printable
from imagegen.tasks.cost import micro_usd_limit
from imagegen.tasks.field_faults import field_errors, unknown_field
from imagegen.tasks.validation import MAX_FIELD_ERRORS, MAX_KEY_CHARS

DEFAULT_GRACE_S = 86_400.0
MAX_DURATION_S = 315_360_000.0
"""Ten years."""

MAX_PATTERNS = 100
MAX_LIMIT = 1_000_000
"""Of rates and of open tasks."""

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)")


def duration_s(text: str) -> float:
    """Return the seconds of `90d`, `24h`, `30m`, `45s`, `2w` or `3600`. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = float(match[1]) * _UNITS_S[match[2] or "s"] if match else -1.0
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ValueError("must be a duration of at most ten years, as 90d, 24h, 30m or 3600 (seconds)")
    return seconds


def _as_text(value: object) -> object:
    """Return a number of seconds as text."""
    return f"{value:.3f}" if type(value) in (int, float) else value


def _duration(text: str) -> str:
    duration_s(text)
    return text


def _life(text: str) -> str:
    if duration_s(text) <= 0:
        raise ValueError("must be more than 0 seconds")
    return text


def _pattern(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be a pattern of model ids, as flux* or gpt-image-1")
    return text


def _whole(value: object) -> object:
    """Return a float without a fraction as an integer, which it is in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _duration_schema(*, shortest_s: int) -> WithJsonSchema:
    """Return the JSON schema of a duration; it leaves out some long spellings that are valid too, as `600w`.

    Where a duration must be longer than 0, the pattern has a first digit other than 0.
    """
    first = "[1-9]" if shortest_s else "[0-9]"
    pattern = f"^{first}([0-9]{{0,7}}s?|[0-9]{{0,5}}m|[0-9]{{0,3}}h|[0-9]{{0,2}}d|[0-9]?w)$"
    number = {"type": "number", "minimum": shortest_s, "maximum": MAX_DURATION_S}
    return WithJsonSchema({"anyOf": [{"type": "string", "pattern": pattern}, number]})


_Duration = Annotated[str, BeforeValidator(_as_text), AfterValidator(_duration), _duration_schema(shortest_s=0)]
_Life = Annotated[
    str, BeforeValidator(_as_text), AfterValidator(_duration), AfterValidator(_life), _duration_schema(shortest_s=1)
]
_Count = Annotated[int, Field(strict=True, ge=1, le=MAX_LIMIT), BeforeValidator(_whole)]
_Pattern = Annotated[
    str,
    Field(min_length=1, max_length=200),
    AfterValidator(_pattern),
    WithJsonSchema({"type": "string", "pattern": "^[!-~]([ -~]{0,198}[!-~])?$", "examples": ["flux*"]}),
]
"""The schema allows ASCII only: no pattern names all printable characters."""


class _Fields(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class NewKeyFields(_Fields):
    """A new API key. A limit that is absent or null is off."""

    name: Annotated[
        str,
        Field(
            pattern=f"^{NAME.pattern}$",
            description="1 to 64 letters, digits, dots, underscores or hyphens; the first is no dot.",
        ),
    ]
    daily_usd: (
        Annotated[float, Field(strict=True, ge=0, le=1e9, description="Budget of a UTC day in US dollars.")] | None
    ) = None
    rate: Annotated[_Count, Field(description="Requests a minute, in place of `RATE_LIMIT_MAX`.")] | None = None
    images_rate: (
        Annotated[_Count, Field(description="Generations a minute, in place of `IMAGE_RATE_LIMIT_MAX`.")] | None
    ) = None
    open_tasks: Annotated[_Count, Field(description="Unfinished tasks at once.")] | None = None
    models: (
        Annotated[
            tuple[_Pattern, ...],
            Field(
                min_length=1,
                max_length=MAX_PATTERNS,
                description="Patterns of the models that it may use, as `flux*`.",
            ),
        ]
        | None
    ) = None
    max_megapixels: (
        Annotated[float, Field(strict=True, gt=0, le=1000, description="Of one image; 1024 x 1024 pixels are one.")]
        | None
    ) = None
    expires: Annotated[_Life, Field(description="Its life, as `90d`, `12h` or seconds.")] | None = None

    def to_key(self, now: float) -> ApiKey:
        """Return the key without a secret. now: Unix seconds."""
        return ApiKey(
            self.name,
            daily_micro_usd=None if self.daily_usd is None else micro_usd_limit(self.daily_usd),
            rate=self.rate,
            images_rate=self.images_rate,
            open_tasks=self.open_tasks,
            models=self.models or (),
            max_megapixels=self.max_megapixels,
            expires_at=None if self.expires is None else now + duration_s(self.expires),
        )


class RotationFields(_Fields):
    """A rotation of an API key."""

    grace: (
        Annotated[
            _Duration,
            Field(description="How long the secrets from before live, as `24h`, `0` or seconds; 24 hours if absent."),
        ]
        | None
    ) = None

    @property
    def grace_s(self) -> float:
        """Return the life of the secrets from before. Seconds."""
        return DEFAULT_GRACE_S if self.grace is None else duration_s(self.grace)


_Model = TypeVar("_Model", bound=_Fields)


def parse_fields(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    """Return the fields of a body. Raises InvalidRequest with at most `MAX_FIELD_ERRORS` errors; no more are made."""
    names = tuple(field.alias or name for name, field in model.model_fields.items())
    known = {name: value for name, value in fields.items() if name in names or name in model.model_fields}
    unknown = islice((name for name in fields if name not in known), MAX_FIELD_ERRORS)
    errors = [FieldError(printable(name, MAX_KEY_CHARS), unknown_field(name, names)) for name in unknown]
    long = [name for name, value in known.items() if isinstance(value, list) and len(value) > MAX_PATTERNS]
    errors += [FieldError(to_camel(name), f"must have at most {MAX_PATTERNS} entries") for name in long]
    try:
        parsed = model.model_validate({name: value for name, value in known.items() if name not in long})
    except ValidationError as error:
        raise InvalidRequest(details=[*field_errors(error), *errors][:MAX_FIELD_ERRORS]) from error
    if errors:
        raise InvalidRequest(details=errors[:MAX_FIELD_ERRORS])
    return parsed
