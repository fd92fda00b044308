"""Route of many submits in one request: POST /api/images/batch. A bad entry does not affect the others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import msgspec
from aiohttp import web
from msgspec.structs import replace

from imagegen.errors import ApiError, FieldError, InvalidRequest, RateLimited
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.tasks.validation import MAX_FIELD_ERRORS
from imagegen.web.api.schemas import RefusedEntry
from imagegen.web.api.tasks import build_submit_response
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body import ReceivedBody, parse_object, receive_json
from imagegen.web.http.body_admission import BODY_ADMISSION
from imagegen.web.http.error_responses import error_view
from imagegen.web.http.responses import json_response, language, request_id_of
from imagegen.web.max_cost import MAX_COST_FIELDS
from imagegen.web.submitter import SubmitOptions, refuse_while_draining, submit_parsed

MAX_ENTRIES = 50

_OF_AN_ENTRY = "is a field of each entry of requests, and limits the cost of that one"
_MIN_ERRORS = 3
"""Field errors named of each bad entry at least."""


async def batch(request: web.Request) -> web.StreamResponse:
    """Submit each entry; every entry counts against the limit for generations."""
    options = SubmitOptions.from_request(request)
    async with receive_json(request, request.app[SERVICES].inputs.uploads) as body:
        return await _submit_all(request, body, options)


async def _submit_all(request: web.Request, body: ReceivedBody, options: SubmitOptions) -> web.StreamResponse:
    entries = _entries(parse_object(body.raw))
    options = msgspec.structs.replace(options, max_errors=max(_MIN_ERRORS, MAX_FIELD_ERRORS // len(entries)))
    refuse_while_draining(request.app[SERVICES])
    await request.app[BODY_ADMISSION].turns.turn(len(entries))
    admission = await request.app[RATE_LIMITS].admit(request, len(entries))
    admitted = [
        _submit(request, index, entry, body, options) for index, entry in enumerate(entries[: admission.admitted])
    ]
    results = await asyncio.gather(*admitted)
    error = RateLimited(headers={"Retry-After": str(admission.retry_after_s)})
    results += [_refusal(request, error) for _ in entries[admission.admitted :]]
    return json_response({"success": True, "results": results})


def _unknown(name: str) -> str:
    return _OF_AN_ENTRY if name in MAX_COST_FIELDS else "is not a known field; did you mean requests?"


def _entries(body: Mapping[str, Any]) -> list[Any]:
    unknown = (name for name in body if name != "requests")
    errors = [FieldError(name[:60], _unknown(name)) for name in islice(unknown, MAX_FIELD_ERRORS - 1)]
    entries = body.get("requests")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENTRIES:
        errors.append(FieldError("requests", f"must be a list of 1 to {MAX_ENTRIES} requests"))
    if errors:
        raise InvalidRequest(details=errors)
    return list(entries or ())


async def _submit(
    request: web.Request, index: int, entry: object, body: ReceivedBody, options: SubmitOptions
) -> Mapping[str, object]:
    """Return the response body for one entry; an error is a body too."""
    services, place = request.app[SERVICES], f"requests[{index}]"
    try:
        if not isinstance(entry, dict):
            raise InvalidRequest(details=[FieldError(place, "must be an object")])
        submitted = await submit_parsed(services, entry, body, options.for_batch_entry(index))
    except ApiError as error:
        error.details = tuple(
            field if field.field == place else replace(field, field=f"{place}.{field.field}") for field in error.details
        )
        return _refusal(request, error)
    response = await build_submit_response(request, services, submitted)
    return response.view | {"statusCode": response.status}


def _refusal(request: web.Request, error: ApiError) -> RefusedEntry:
    view = cast(RefusedEntry, error_view(error, request_id_of(request), language(request)))
    if retry_after := error.headers.get("Retry-After"):
        view["retryAfterSeconds"] = int(retry_after)
    return view
