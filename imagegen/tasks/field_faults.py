"""Texts about faults of a request's fields, for what pydantic finds."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from imagegen.did_you_mean import nearest
from imagegen.errors import FieldError

_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters but tab and newline."""

_INVISIBLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
)
"""Characters that are no space and have no form: zero-width ones, marks of direction, fillers, variation selectors."""

NO_CONTROL = rf"^[^{_CONTROL}]*$"
VISIBLE_TEXT = rf"^[^{_CONTROL}]*[^\s{_CONTROL}{_INVISIBLE}][^{_CONTROL}]*$"
"""A text without control characters in which something is visible."""

RATIO = r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$"

_RULES = {VISIBLE_TEXT: "must contain a visible character", RATIO: "must be two whole numbers, such as 16:9"}
_OUR_NAMES = {
    "valid tuple": "list",
    "valid dictionary": "object",
    "valid string": "string",
    "valid boolean": "boolean",
    "valid integer": "whole number",
    "valid number": "number",
}
"""What pydantic calls the types of JSON."""


def field_errors(error: ValidationError) -> list[FieldError]:
    """Return the errors of a pydantic model under the names of its fields in camelCase."""
    return [FieldError(_path(fault["loc"]), fault_text(fault)) for fault in faults_of(error)]


def faults_of(error: ValidationError) -> list[ErrorDetails]:
    """Return the faults without those of a list that is too short only since its faulty entries do not count."""
    faults = error.errors(include_url=False)
    return [fault for fault in faults if fault["type"] != "too_short" or _is_short(fault)]


def _is_short(fault: ErrorDetails) -> bool:
    return len(fault["input"]) < int(fault["ctx"]["min_length"])


def unknown_field(key: str, names: Iterable[str]) -> str:
    """Return the text about an unknown field, with the field that is near to it."""
    near = nearest(key, names)
    return "is not a known field" + (f"; did you mean {near}?" if near else "")


def fault_text(fault: ErrorDetails) -> str:
    """Return the rule that a value breaks, to follow the name of its field."""
    unit = "entries" if isinstance(fault["input"], list | tuple) else "characters"
    match fault["type"]:
        case "missing":
            return "is required"
        case "too_short" | "string_too_short" if fault["ctx"]["min_length"] == 1:
            return "must not be empty"
        case "too_short" | "string_too_short":
            return f"must have at least {fault['ctx']['min_length']} {unit}"
        case "too_long" | "string_too_long":
            return f"must have at most {fault['ctx']['max_length']} {unit}"
        case "string_pattern_mismatch":
            return _pattern_text(fault["ctx"]["pattern"], str(fault["input"]))
    text = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    for theirs, ours in _OUR_NAMES.items():
        text = text.replace(f"must be a {theirs}", f"must be {'an' if ours == 'object' else 'a'} {ours}")
    return text


def _pattern_text(pattern: str, text: str) -> str:
    if re.search(f"[{_CONTROL}]", text):
        return "must not contain control characters except tab and newline"
    return _RULES.get(pattern) or f"must match {pattern}"


def _path(location: tuple[int | str, ...]) -> str:
    first, *rest = location or ("",)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    return to_camel(str(first)) + "".join(parts)
