"""Reader of the table of image models: limits, prices and end dates in `models.toml` and the operator's own file."""

from __future__ import annotations

import math
import re
import tomllib
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from imagegen.errors import SettingsError
from imagegen.providers.model_rules import ModelRow, ModelTable, Steps
from imagegen.providers.prices import RESOLUTIONS, Price
from imagegen.providers.size_limits import SizeLimits, parse_size

MAX_AGE = timedelta(days=120)
"""Age at which the table should be checked again."""

MAX_FILE_BYTES = 1024 * 1024

_RATIO = re.compile(r"[1-9][0-9]{0,3}:[1-9][0-9]{0,3}")


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    models: tuple[dict[str, Any], ...]
    checked: date | None = None


def load_table(provider: str, own_file: Path | None = None) -> ModelTable:
    """Return the packaged table with the operator's rows, which take the place of rows of the same id.

    Raises SettingsError with the file, the row and the rule that it breaks.
    """
    rows, checked = _packaged()
    if own_file is not None:
        own, own_checked = _read(own_file, provider)
        rows, checked = (*rows, *own), own_checked or checked
    return ModelTable(rows, provider, checked)


def parse_rows(text: str, provider: str) -> tuple[tuple[ModelRow, ...], date | None]:
    """Read a table; a row without a provider is the configured one's. Raises ValueError with the row and the rule."""
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is no TOML: {error}") from error
    try:
        file = msgspec.convert(raw, _File)
    except msgspec.ValidationError as error:
        raise ValueError(f"must have `models`, a list of tables, and may have `checked`, a date: {error}") from error
    rows: dict[tuple[str, str], ModelRow] = {}
    for number, fields in enumerate(file.models, start=1):
        name = f"row {number} ({str(fields.get('id', 'without id'))[:80]})"
        try:
            row = msgspec.convert({"provider": provider} | fields, ModelRow)
            _check(row)
        except (msgspec.ValidationError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if (row.provider, row.id) in rows:
            raise ValueError(f"{name}: a row of {row.provider} has this id already")
        rows[row.provider, row.id] = row
    return tuple(rows.values()), file.checked


def _check(row: ModelRow) -> None:
    """Raise ValueError if a value can't be a limit or a price."""
    if not row.id.strip() or not row.provider:
        raise ValueError("id must not be empty")
    sizes, price = row.sizes or SizeLimits(), row.price or Price()
    steps = row.steps if isinstance(row.steps, Steps) else Steps()
    numbers = {
        "max_n": row.max_n,
        "prompt_max": row.prompt_max,
        "max_input_images": row.max_input_images,
        "steps.default": steps.default,
        "steps.max": steps.max,
        "default_steps": price.default_steps,
        "sizes.ratio": sizes.ratio,
        **{f"sizes.{name}": getattr(sizes, name) for name in ("multiple", "min", "max", "min_pixels", "max_pixels")},
    }
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value >= 1):
            raise ValueError(f"{name} must be at least 1")
    for size in (*(sizes.list or ()), *(size for prices in (price.by_quality_size or {}).values() for size in prices)):
        parse_size(size)
    if not sizes.allows(*sizes.nearest(1024, 1024)):
        raise ValueError("sizes: no size meets all limits")
    for ratio in row.ratios or ():
        if not _RATIO.fullmatch(ratio):
            raise ValueError(f"{ratio[:40]!r} is no ratio such as 16:9")
    for name in price.by_resolution or ():
        if name not in RESOLUTIONS:
            raise ValueError(f"by_resolution: {name!r} is not one of {', '.join(RESOLUTIONS)}")
    _check_prices(msgspec.to_builtins(price, builtin_types=(Decimal,)), "price")


def _check_prices(value: object, path: str) -> None:
    """Raise ValueError for a price that is below zero or not finite."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_prices(part, f"{path}.{name}")
    elif isinstance(value, int | Decimal) and not (math.isfinite(value) and 0 <= value < 10**6):
        raise ValueError(f"{path} must be from 0 to a million dollars")


@cache
def _packaged() -> tuple[tuple[ModelRow, ...], date]:
    text = resources.files(__package__).joinpath("models.toml").read_text(encoding="utf-8")
    rows, checked = parse_rows(text, "")
    if checked is None:
        raise ValueError("models.toml: checked is missing")
    return rows, checked


def _read(path: Path, provider: str) -> tuple[tuple[ModelRow, ...], date | None]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"is over {MAX_FILE_BYTES} bytes")
        return parse_rows(raw.decode("utf-8-sig"), provider)
    except OSError as error:
        fault = f"can't be read: {error.strerror or type(error).__name__}"
        raise SettingsError(f"MODELS_FILE: {path} {fault}; name a readable TOML file, or leave it out") from error
    except ValueError as error:
        raise SettingsError(f"MODELS_FILE: {path}: {error}") from error
