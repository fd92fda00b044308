"""Values that the OpenAPI document is built from: operations, parameters, bodies and responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from aiohttp.typedefs import Handler
from msgspec import Struct, field

from imagegen.errors import (
    ApiError,
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    CrossSiteRefused,
    ExpectationFailed,
    HeadersTooLarge,
    InternalError,
    InvalidJson,
    InvalidRequest,
    QueueUnavailable,
    RateLimited,
    TooManyConnections,
    Unauthorized,
    UnsupportedMediaType,
)

Json = dict[str, Any]
"""A part of the document."""

JSON = "application/json"
EVENTS = "text/event-stream"

ON_EVERY_ROUTE = (BadRequest, CrossSiteRefused, ExpectationFailed, HeadersTooLarge, InternalError)
"""Errors of every route."""

IN_BODY = (InvalidJson, InvalidRequest, BodyTimeout, BodyTooLarge, UnsupportedMediaType, TooManyConnections)
"""Errors of every route that reads a body."""

BUDGET_HEADERS = ("RateLimit-Policy", "RateLimit", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")


class Parameter(Struct, frozen=True):
    """A part of a path, of a query, or a request header."""

    name: str
    place: Literal["path", "query", "header"]
    text: str
    schema: Mapping[str, Any]
    required: bool = False
    example: object = None


class Body(Struct, frozen=True):
    """Body of a request. shape: the model, or a JSON Schema, None if it is no JSON; examples: by name.

    others: JSON Schemas of bodies of other media types, by type.
    """

    shape: Any
    examples: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Json] = field(default_factory=dict)
    required: bool = True


class EventStreamDoc(Struct, frozen=True):
    """Server-sent events. names: of the events; data: the type of each one's JSON; samples: events as they come."""

    names: tuple[str, ...]
    data: Any
    samples: Mapping[str, Mapping[str, str]]


class ResponseDoc(Struct, frozen=True):
    """Response with a status that is no error. shape: a type, a JSON Schema, or None for no body; headers: names.

    others: JSON Schemas of other media types, by type. events: of the stream that the response is or may be.
    links: next steps by name: the operation, and its parameters as runtime expressions.
    """

    status: int
    text: str
    shape: Any = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    media: tuple[str, ...] = (JSON,)
    others: Mapping[str, Json] = field(default_factory=dict)
    events: EventStreamDoc | None = None
    links: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)


class Operation(Struct, frozen=True):
    """Documentation of one route. name: its operationId; errors: besides those of every route, of bodies and of limits.

    failures: codes that no error of ours has, by status. needs: what its caller must show; `link`: an API key or
    a signed link; `key` and `link` count only where keys are set.
    limit: the rate limit that a call counts against; `entries`: the general one, and each entry of the body the limit
    for generations; `misses`: the general one if it finds nothing.
    envelope: form of its errors; `none` if others answer it.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    text: str
    answers: tuple[ResponseDoc, ...]
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    errors: tuple[type[ApiError], ...] = ()
    failures: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    limit: Literal["none", "general", "generation", "entries", "misses"] = "none"
    needs: Literal["key", "admin", "link", "none"] = "key"
    envelope: Literal["api", "openai", "none"] = "api"

    @property
    def is_limited(self) -> bool:
        """Return whether every response of the route carries the headers of rate limits."""
        return self.limit in ("general", "generation", "entries")

    @property
    def all_errors(self) -> tuple[type[ApiError], ...]:
        if self.envelope == "none":
            return ()
        errors = ON_EVERY_ROUTE + self.errors
        if self.body:
            errors += IN_BODY
        if self.needs != "none":
            errors += (Unauthorized, RateLimited)
        if self.needs in ("key", "link"):
            errors += (QueueUnavailable,)
        return tuple(dict.fromkeys((*errors, RateLimited) if self.is_limited else errors))


Route = tuple[Operation, Handler]
"""A route: its documentation, from which it is registered too, and what runs it."""
