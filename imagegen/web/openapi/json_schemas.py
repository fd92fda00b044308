"""JSON schemas of the OpenAPI document: pydantic makes them from the types, and they are tidied for readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter

from imagegen.web.openapi.document import Json

_PREFIX = "#/components/schemas/"
_VIEW_SUFFIX = "View"
"""Suffix of the response types, which the document's names do not have."""

_KEYWORDS = {"multiple_of": "multipleOf"}
"""pydantic leaves its own keywords in place for numbers when a validator precedes the limits."""

_TEXTS = {
    "State": "Where a task is. `pending`: in the queue, or waiting before its next attempt; `processing`: an attempt "
    "runs; the others are ends.",
}
_NULL = {"type": "null"}


class Schemas:
    """Schemas of the given types, by `of`; their named parts are in `components`."""

    def __init__(self, shapes: Iterable[Any]) -> None:
        kinds = {_key(shape): shape for shape in shapes}
        adapters = [(key, _mode(shape), TypeAdapter(shape)) for key, shape in kinds.items()]
        schemas, definitions = TypeAdapter.json_schemas(adapters, ref_template=_PREFIX + "{model}")
        self._made = {key: _tidy(schema) for (key, _), schema in schemas.items()}
        components = {_shown(name): _tidy(schema) for name, schema in definitions.get("$defs", {}).items()}
        self.components = {
            name: schema | ({"description": _TEXTS[name]} if name in _TEXTS else {})
            for name, schema in sorted(components.items())
        }

    def of(self, shape: Any) -> Json:
        """Return a type's schema; a schema is returned unchanged."""
        return dict(shape) if isinstance(shape, Mapping) else self._made[_key(shape)]

    def component(self, name: str) -> Json:
        """Return a reference to a named part."""
        return {"$ref": _PREFIX + name}


def _key(shape: Any) -> str:
    return shape.__name__ if isinstance(shape, type) else str(shape)


def _mode(shape: Any) -> Any:
    return "validation" if isinstance(shape, type) and issubclass(shape, BaseModel) else "serialization"


def _shown(name: str) -> str:
    return name.removesuffix(_VIEW_SUFFIX)


def _tidy(schema: Json) -> Json:
    """Return a schema without noise: titles made of names, nulls as defaults, a choice of one type and null."""
    tidied: Json = {}
    for name, value in schema.items():
        match name:
            case "title":
                continue
            case "default" if value is None or value == "":
                continue
            case "$ref":
                tidied[name] = _PREFIX + _shown(value.removeprefix(_PREFIX))
            case "properties":
                tidied[name] = {key: _tidy(part) for key, part in value.items()}
            case "anyOf":
                tidied |= _choice([_tidy(part) for part in value])
            case "description":
                tidied[name] = " ".join(value.split())
            case _:
                tidied[_KEYWORDS.get(name, name)] = _tidy(value) if isinstance(value, dict) else value
    return tidied


def _choice(parts: list[Json]) -> Json:
    """Return the schema of a choice; a nullable value keeps its description, and its type is a list if it is simple."""
    not_null = [part for part in parts if part != _NULL]
    if len(not_null) != 1 or len(parts) != 2:
        return {"anyOf": parts}
    only = dict(not_null[0])
    text = {"description": only.pop("description")} if "description" in only else {}
    if isinstance(only.get("type"), str):
        values = {"enum": [*only["enum"], None]} if "enum" in only else {}
        return only | {"type": [only["type"], "null"]} | values | text
    return {"anyOf": [only, _NULL]} | text
