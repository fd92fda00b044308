"""Owns the submit of many: POST /api/images/batch, where one bad entry spoils no other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from imagegen.errors import ApiError, FieldError, InvalidRequest, RateLimited
from imagegen.ratelimit.limits import RateLimits
from imagegen.tasks.validation import MAX_FIELD_ERRORS
from imagegen.web.api.schemas import RefusedEntry
from imagegen.web.api.submit import build_response, refuse_while_draining, submit_parsed
from imagegen.web.api.submit_options import SubmitOptions, wish_of
from imagegen.web.context import SERVICES
from imagegen.web.http.body import read_json
from imagegen.web.http.errors import error_view
from imagegen.web.http.headers import request_id_of
from imagegen.web.http.middleware import json_response, language

MAX_ENTRIES = 50

_MIN_FAULTS = 3
"""Named of each bad entry, however many there are."""


def batch(rates: RateLimits) -> Handler:
    """The handler; each entry is paid for from the budget for generations."""

    async def handle(request: web.Request) -> web.Response:
        wish = wish_of(request)
        entries = _entries(await read_json(request))
        wish = msgspec.structs.replace(wish, max_faults=max(_MIN_FAULTS, MAX_FIELD_ERRORS // len(entries)))
        refuse_while_draining(request.app[SERVICES])
        admission = await rates.admit(request, len(entries))
        taken = [_one(request, index, entry, wish) for index, entry in enumerate(entries[: admission.admitted])]
        results = await asyncio.gather(*taken)
        late = RateLimited(headers={"Retry-After": str(admission.retry_after_s)})
        results += [_refusal(request, late) for _ in entries[admission.admitted :]]
        return json_response({"success": True, "results": results})

    return handle


def _entries(body: Mapping[str, Any]) -> list[Any]:
    unknown = (name for name in body if name != "requests")
    faults = [
        FieldError(name[:60], "is not a known field; did you mean requests?")
        for name in islice(unknown, MAX_FIELD_ERRORS - 1)
    ]
    entries = body.get("requests")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENTRIES:
        faults.append(FieldError("requests", f"must be a list of 1 to {MAX_ENTRIES} requests"))
    if faults:
        raise InvalidRequest(details=faults)
    return list(entries or ())


async def _one(request: web.Request, index: int, entry: object, wish: SubmitOptions) -> Mapping[str, object]:
    """The POST answer for one entry, whatever it is."""
    context, place = request.app[SERVICES], f"requests[{index}]"
    try:
        if not isinstance(entry, dict):
            raise InvalidRequest(details=[FieldError(place, "must be an object")])
        submitted = await submit_parsed(context, entry, wish.of_entry(index))
    except InvalidRequest as error:
        error.details = tuple(
            fault if fault.field == place else replace(fault, field=f"{place}.{fault.field}") for fault in error.details
        )
        return _refusal(request, error)
    except ApiError as error:
        return _refusal(request, error)
    answer = await build_response(request, context, submitted)
    return answer.view | {"statusCode": answer.status}


def _refusal(request: web.Request, error: ApiError) -> RefusedEntry:
    view = cast(RefusedEntry, error_view(error, request_id_of(request), language(request)))
    if retry_after := error.headers.get("Retry-After"):
        view["retryAfterSeconds"] = int(retry_after)
    return view
