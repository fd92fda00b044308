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

from imagegen.errors import ApiError, FieldFault, InvalidRequest, RateLimited
from imagegen.tasks.fields import MAX_FAULTS
from imagegen.web.body import read_json
from imagegen.web.context import CONTEXT
from imagegen.web.edge import json_response, language
from imagegen.web.errors import error_view
from imagegen.web.generate import answer_of, order_parsed, refuse_while_draining
from imagegen.web.headers import request_id_of
from imagegen.web.ratelimit import RateLimits
from imagegen.web.shapes import RefusedEntry
from imagegen.web.wish import Wish, wish_of

MAX_ENTRIES = 50

_MIN_FAULTS = 3
"""Named of each bad entry, however many there are."""


def batch(rates: RateLimits) -> Handler:
    """The handler; each entry is paid for from the budget for generations."""

    async def handle(request: web.Request) -> web.Response:
        wish = wish_of(request)
        entries = _entries(await read_json(request))
        wish = msgspec.structs.replace(wish, max_faults=max(_MIN_FAULTS, MAX_FAULTS // len(entries)))
        refuse_while_draining(request.app[CONTEXT])
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
        FieldFault(name[:60], "is not a known field; did you mean requests?")
        for name in islice(unknown, MAX_FAULTS - 1)
    ]
    entries = body.get("requests")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENTRIES:
        faults.append(FieldFault("requests", f"must be a list of 1 to {MAX_ENTRIES} requests"))
    if faults:
        raise InvalidRequest(details=faults)
    return list(entries or ())


async def _one(request: web.Request, index: int, entry: object, wish: Wish) -> Mapping[str, object]:
    """The POST answer for one entry, whatever it is."""
    context, place = request.app[CONTEXT], f"requests[{index}]"
    try:
        if not isinstance(entry, dict):
            raise InvalidRequest(details=[FieldFault(place, "must be an object")])
        submitted = await order_parsed(context, entry, wish.of_entry(index))
    except InvalidRequest as error:
        error.details = tuple(
            fault if fault.field == place else replace(fault, field=f"{place}.{fault.field}") for fault in error.details
        )
        return _refusal(request, error)
    except ApiError as error:
        return _refusal(request, error)
    answer = await answer_of(request, context, submitted)
    return answer.view | {"statusCode": answer.status}


def _refusal(request: web.Request, error: ApiError) -> RefusedEntry:
    view = cast(RefusedEntry, error_view(error, request_id_of(request), language(request)))
    if retry_after := error.headers.get("Retry-After"):
        view["retryAfterSeconds"] = int(retry_after)
    return view
