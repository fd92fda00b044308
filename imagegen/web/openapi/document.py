"""Owns the OpenAPI document as a whole: what is said first, the entries put together, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from imagegen import __version__
from imagegen.errors import ApiError, BadRequest, HeadersTooLarge
from imagegen.web.openapi import compatible, images, samples, service
from imagegen.web.openapi.headers import HEADERS
from imagegen.web.openapi.hooks import WEBHOOK, WEBHOOKS
from imagegen.web.openapi.parts import BUDGET_HEADERS, JSON, Answer, Body, Json, Operation, Parameter
from imagegen.web.openapi.schemas import Schemas
from imagegen.web.openapi.texts import INTRODUCTION, TAGS
from imagegen.web.shapes import ErrorView
from imagegen.web.v1.shapes import OpenAIError

OPERATIONS = (*images.OPERATIONS, *compatible.OPERATIONS, *service.OPERATIONS)

_EVENTS = "text/event-stream"
_BUDGETS = {
    "general": "the general limit (`RATE_LIMIT_MAX`)",
    "generation": "the limit for generations (`IMAGE_RATE_LIMIT_MAX`)",
}
_ERROR_TEXTS = {
    400: "The request can't be read, or breaks a rule: `details` names every fault.",
    404: "Not found.",
    500: "Something unforeseen; it was logged under the request's id.",
    502: "The provider failed.",
    504: "The provider did not answer in time.",
}


def build() -> Json:
    """The document; takes some 30 ms."""
    return _Builder().document()


class _Builder:
    """Collects the components while it makes the entries."""

    def __init__(self) -> None:
        shapes = [answer.shape for operation in OPERATIONS for answer in operation.answers]
        shapes += [operation.body.shape for operation in OPERATIONS if operation.body]
        shapes += [ErrorView, OpenAIError, WEBHOOK]
        self._schemas = Schemas(shape for shape in shapes if shape is not None and not isinstance(shape, Mapping))
        self._responses: Json = {}
        self._parameters: Json = {}

    def document(self) -> Json:
        paths: Json = {}
        for operation in OPERATIONS:
            paths.setdefault(operation.path, {})[operation.method] = self._entry(operation)
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "imagegen",
                "version": __version__,
                "summary": "Paid image APIs as a durable asynchronous API.",
                "description": INTRODUCTION,
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "servers": [{"url": "/"}],
            "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
            "paths": paths,
            "webhooks": {name: self._hook(text, state) for name, (text, state) in WEBHOOKS.items()},
            "components": {
                "schemas": self._schemas.components,
                "parameters": dict(sorted(self._parameters.items())),
                "headers": {name: {"description": text, "schema": schema} for name, (text, schema) in HEADERS.items()},
                "responses": dict(sorted(self._responses.items())),
                "securitySchemes": {
                    "admin": {"type": "http", "scheme": "bearer", "description": "The service's `ADMIN_TOKEN`."}
                },
            },
        }

    def _entry(self, operation: Operation) -> Json:
        entry: Json = {
            "operationId": operation.name,
            "tags": [operation.tag],
            "summary": operation.summary,
            "description": _text(operation),
        }
        if operation.parameters:
            entry["parameters"] = [self._parameter(one) for one in operation.parameters]
        if operation.body:
            entry["requestBody"] = self._body(operation.body)
        entry["responses"] = self._answers(operation)
        if operation.admin:
            entry["security"] = [{"admin": []}, {}]
        return entry

    def _parameter(self, parameter: Parameter) -> Json:
        shown = {
            "name": parameter.name,
            "in": parameter.place,
            "description": parameter.text,
            "required": parameter.required,
            "schema": dict(parameter.schema),
        }
        if parameter.example is not None:
            shown["example"] = parameter.example
        name = f"{parameter.place}.{parameter.name}"
        while self._parameters.setdefault(name, shown) != shown:
            name += "_"
        return {"$ref": f"#/components/parameters/{name}"}

    def _body(self, body: Body) -> Json:
        return {"required": True, "content": {JSON: _content(self._schemas.of(body.shape), body.examples)}}

    def _answers(self, operation: Operation) -> Json:
        budget = BUDGET_HEADERS if operation.budgets else ()
        answers = {str(answer.status): self._answer(answer, budget) for answer in operation.answers}
        errors = sorted(operation.every_error, key=lambda kind: kind.status)
        by_status = {status: list(kinds) for status, kinds in groupby(errors, key=lambda kind: kind.status)}
        for status in sorted({*by_status, *operation.failures}):
            kinds, codes = by_status.get(status, []), operation.failures.get(status, ())
            known = answers.get(str(status))
            if known:
                _join(known, self._error(operation.envelope, status, kinds, codes))
            else:
                answers[str(status)] = self._shared(operation.envelope, status, kinds, codes)
        return dict(sorted(answers.items()))

    def _answer(self, answer: Answer, budget: Iterable[str]) -> Json:
        shown: Json = {"description": answer.text, "headers": _headers(*answer.headers, *budget)}
        content: Json = {}
        if answer.shape is not None:
            content |= {media: _content(self._schemas.of(answer.shape), answer.examples) for media in answer.media}
        if answer.events:
            content[_EVENTS] = _content({"type": "string"}, {"events": answer.events})
        if content:
            shown["content"] = content
        if answer.links:
            shown["links"] = {
                name: {"operationId": target, "parameters": dict(values)}
                for name, (target, values) in answer.links.items()
            }
        return shown

    def _shared(self, envelope: str, status: int, kinds: list[type[ApiError]], codes: Iterable[str]) -> Json:
        """A reference to the answer for these errors, which other routes have too."""
        name = ".".join([envelope, str(status), *(kind.code for kind in kinds), *codes])
        if name not in self._responses:
            self._responses[name] = self._error(envelope, status, kinds, codes)
        return {"$ref": f"#/components/responses/{name}"}

    def _error(self, envelope: str, status: int, kinds: list[type[ApiError]], codes: Iterable[str]) -> Json:
        plain = [kind for kind in kinds if envelope == "api" or kind in (BadRequest, HeadersTooLarge)]
        inside = [kind.code for kind in kinds if envelope == "openai" and kind is not HeadersTooLarge]
        choices = []
        if plain:
            rules = {"statusCode": {"const": status}, "code": {"enum": [kind.code for kind in plain]}}
            choices.append(self._schemas.of(ErrorView) | {"properties": rules})
        if inside or codes:
            rules = {"error": {"properties": {"code": {"enum": [*inside, *codes]}}}}
            choices.append(self._schemas.of(OpenAIError) | {"properties": rules})
        examples = {kind.code: samples.error(kind, "api" if kind in plain else envelope) for kind in kinds}
        examples |= {code: samples.failure(status, code) for code in codes}
        text = _ERROR_TEXTS.get(status) or " ".join(f"{kind.en.partition(',')[0]}." for kind in kinds)
        return {
            "description": text or "No picture came.",
            "headers": _headers(*_error_headers(envelope, status)),
            "content": {JSON: _content(_any_of(choices), examples)},
        }

    def _hook(self, text: str, state: Any) -> Json:
        return {
            "post": {
                "operationId": f"on{state.title()}",
                "tags": ["Webhooks"],
                "summary": text,
                "parameters": [self._parameter(one) for one in WEBHOOK_HEADERS],
                "requestBody": {
                    "required": True,
                    "content": {JSON: _content(self._schemas.of(WEBHOOK), {state: samples.hook_event(state)})},
                },
                "responses": WEBHOOK_ANSWERS,
            }
        }
