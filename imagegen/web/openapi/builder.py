"""Builder of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from imagegen import __version__
from imagegen.errors import ApiError, BadRequest, HeadersTooLarge
from imagegen.web.api.schemas import ErrorView
from imagegen.web.openai.schemas import OpenAIError
from imagegen.web.openapi import samples
from imagegen.web.openapi.descriptions import INTRODUCTION, TAGS
from imagegen.web.openapi.document import (
    BUDGET_HEADERS,
    EVENTS,
    JSON,
    Body,
    EventStreamDoc,
    Json,
    Operation,
    Parameter,
    ResponseDoc,
)
from imagegen.web.openapi.json_schemas import Schemas
from imagegen.web.openapi.parameters import HEADERS
from imagegen.web.openapi.properties import complete

_BEFORE_THE_ROUTE = (BadRequest, HeadersTooLarge)
"""Refusals of the parser come before the path shows which API the client uses."""

_GENERAL = "the general limit (`RATE_LIMIT_MAX`)"
_BOTH = f"{_GENERAL}, the limit for generations (`IMAGE_RATE_LIMIT_MAX`) and that of units (`IMAGE_UNITS_PER_MINUTE`)"
_LIMITS = {"none": "no limit", "misses": "no limit", "general": _GENERAL, "generation": _BOTH, "entries": _BOTH}
_NEEDS = {
    "admin": "Needs the admin token.",
    "key": "",
    "link": "A signed link needs no key.",
    "none": "",
}
SECURITY_SCHEMES = {
    "admin": {
        "type": "http",
        "scheme": "bearer",
        "description": "`ADMIN_TOKEN`, or the token in `DATA_DIR/admin.token`. It is good for every other route too.",
    },
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, as soon as one exists."},
    "keyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same API key."},
    "link": {"type": "apiKey", "in": "query", "name": "sig", "description": "Signature of a link, with its `exp`."},
}
_SECURITY = {"admin": ("admin",), "key": ("key", "keyHeader"), "link": ("key", "keyHeader", "link"), "none": ()}
_ERROR_TEXTS = {400: "The request can't be read, or breaks a rule: `details` names every fault."}
_ERROR_HEADERS = {
    401: ("WWW-Authenticate",),
    429: ("Retry-After", *BUDGET_HEADERS),
    503: ("Retry-After",),
}


def build(operations: Sequence[Operation], webhooks: Sequence[Operation], server: str = "/") -> Json:
    """Return the document; it takes about 50 ms. server: the base of all paths in it."""
    builder = Builder([*operations, *webhooks])
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "imagegen",
            "version": __version__,
            "summary": "Paid image APIs as a durable asynchronous API.",
            "description": INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": server}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": _by_path(operations, builder),
        "webhooks": _by_path(webhooks, builder),
    }
    components = builder.components()
    complete(components["schemas"], _samples([document["paths"], document["webhooks"], components["responses"]]))
    return document | {"components": components | {"securitySchemes": SECURITY_SCHEMES}}


def _samples(part: Any) -> Iterator[tuple[Json, Any]]:
    """Yield each example with its schema."""
    if isinstance(part, list):
        for child in part:
            yield from _samples(child)
    elif isinstance(part, dict):
        examples = part.get("examples")
        if isinstance(examples, dict) and "schema" in part:
            yield from ((part["schema"], example["value"]) for example in examples.values())
        for child in part.values():
            yield from _samples(child)


def _by_path(operations: Iterable[Operation], builder: Builder) -> Json:
    paths: Json = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = builder.entry(operation)
    return paths


class Builder:
    """Builder of entries; `components` holds what they refer to."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        shapes = [response.shape for operation in operations for response in operation.answers]
        shapes += [operation.body.shape for operation in operations if operation.body]
        shapes += [
            response.events.data for operation in operations for response in operation.answers if response.events
        ]
        shapes += [ErrorView, OpenAIError]
        self._schemas = Schemas(shape for shape in shapes if shape is not None and not isinstance(shape, Mapping))
        self._parameters: Json = {}
        self._responses: Json = {}

    def components(self) -> Json:
        headers = {
            name: {"description": text, "required": name == "X-Request-Id", "schema": schema}
            for name, (text, schema) in HEADERS.items()
        }
        return {
            "schemas": self._schemas.components,
            "parameters": dict(sorted(self._parameters.items())),
            "headers": headers,
            "responses": dict(sorted(self._responses.items())),
        }

    def entry(self, operation: Operation) -> Json:
        entry: Json = {
            "operationId": operation.name,
            "tags": [operation.tag],
            "summary": operation.summary,
            "description": _description(operation),
        }
        if operation.parameters:
            entry["parameters"] = [self._parameter(parameter) for parameter in operation.parameters]
        if operation.body:
            entry["requestBody"] = {"required": operation.body.required, "content": self._media(operation.body)}
        answers = {response.status: self._response(operation, response) for response in operation.answers}
        entry["responses"] = {
            str(status): response for status, response in sorted((answers | self._errors(operation)).items())
        }
        entry["security"] = [{scheme: []} for scheme in _SECURITY[operation.needs]]
        return entry

    def _media(self, body: Body) -> Json:
        """Return the content of a request body, by media type."""
        media: Json = {name: {"schema": schema} for name, schema in body.others.items()}
        if body.shape is not None:
            media[JSON] = _content(self._schemas.of(body.shape), body.examples)
        return media

    def _parameter(self, parameter: Parameter) -> Json:
        entry: Json = {
            "name": parameter.name,
            "in": parameter.place,
            "description": parameter.text,
            "required": parameter.required,
            "schema": dict(parameter.schema),
        }
        if parameter.example is not None:
            entry["example"] = parameter.example
        name = f"{parameter.place}.{parameter.name}"
        while self._parameters.setdefault(name, entry) != entry:
            name += "_"
        return {"$ref": f"#/components/parameters/{name}"}

    def _response(self, operation: Operation, response: ResponseDoc) -> Json:
        entry: Json = {"description": response.text}
        if operation.envelope != "none":
            entry["headers"] = _headers(*response.headers, *(BUDGET_HEADERS if operation.is_limited else ()))
        content: Json = {}
        if response.shape is not None:
            content |= {
                media: _content(self._schemas.of(response.shape), response.examples) for media in response.media
            }
        content |= {media: {"schema": schema} for media, schema in response.others.items()}
        if response.events:
            content[EVENTS] = self._stream(response.events)
        if content:
            entry["content"] = content
        if response.links:
            entry["links"] = {
                name: {"operationId": target, "parameters": dict(values)}
                for name, (target, values) in response.links.items()
            }
        return entry

    def _stream(self, stream: EventStreamDoc) -> Json:
        """Return the schema of one event: OpenAPI 3.1 has no type for it, so its fields are those of an object."""
        data: Json = {"type": "string", "contentMediaType": JSON}
        if stream.data is not None:
            data["contentSchema"] = self._schemas.of(stream.data)
        fields = {"event": {"type": "string", "enum": [*stream.names]}, "id": {"type": "string"}, "data": data}
        return _content({"type": "object", "properties": fields}, stream.samples)

    def _errors(self, operation: Operation) -> dict[int, Json]:
        """Return references to responses, since many routes share them."""
        kinds = sorted(operation.all_errors, key=lambda kind: kind.status)
        by_status = {status: tuple(group) for status, group in groupby(kinds, key=lambda kind: kind.status)}
        references = {}
        for status in {*by_status, *operation.failures}:
            group, codes = by_status.get(status, ()), operation.failures.get(status, ())
            name = ".".join([operation.envelope, str(status), *(kind.code for kind in group), *codes])
            if name not in self._responses:
                self._responses[name] = self._error(operation.envelope, status, group, codes)
            references[status] = {"$ref": f"#/components/responses/{name}"}
        return references

    def _error(self, envelope: str, status: int, kinds: Sequence[type[ApiError]], codes: Sequence[str]) -> Json:
        api_kinds = [kind for kind in kinds if envelope == "api" or kind in _BEFORE_THE_ROUTE]
        openai_codes = [kind.code for kind in kinds if envelope == "openai" and kind is not HeadersTooLarge]
        choices = []
        if api_kinds:
            rules: Json = {"statusCode": {"const": status}, "code": {"enum": [kind.code for kind in api_kinds]}}
            choices.append(self._schemas.of(ErrorView) | {"properties": rules})
        if openai_codes or codes:
            fields = self._schemas.component("OpenAIErrorFields")
            rules = {"error": fields | {"properties": {"code": {"enum": [*openai_codes, *codes]}}}}
            choices.append(self._schemas.of(OpenAIError) | {"properties": rules})
        examples = {kind.code: samples.error(kind, "api" if kind in api_kinds else envelope) for kind in kinds}
        examples |= {code: samples.failure(status, code) for code in codes}
        text = _ERROR_TEXTS.get(status) or " ".join(f"{samples.error_text(kind)}." for kind in kinds)
        return {
            "description": text or "No image came.",
            "headers": _headers(*_ERROR_HEADERS.get(status, ()), *(["x-should-retry"] if envelope == "openai" else [])),
            "content": {JSON: _content(choices[0] if len(choices) == 1 else {"anyOf": choices}, examples)},
        }


def _description(operation: Operation) -> str:
    limit = f"Counts against {_LIMITS[operation.limit]}." if operation.envelope != "none" else ""
    return "\n\n".join(filter(None, [operation.text, _NEEDS[operation.needs], limit]))


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


def _content(schema: Json, examples: Mapping[str, Any]) -> Json:
    content: Json = {"schema": schema} if schema else {}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return content
