"""Route of the usage report, GET /api/usage, with its documentation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired

from aiohttp import hdrs, web
from pydantic import Field
from typing_extensions import TypedDict

from imagegen.accounts.usage_report import COLUMNS, DEFAULT_DAYS, GROUPINGS, MAX_DAYS, UsageQuery, UsageReport
from imagegen.errors import InvalidRequest, QueueUnavailable, Unauthorized
from imagegen.web.api.schemas import Count, Dollars
from imagegen.web.guard import GUARD, client_of
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.read_slots import in_read_slot
from imagegen.web.http.responses import json_response, quality_of
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi.document import Operation, Parameter, ResponseDoc, Route

CSV, JSON = "text/csv", "application/json"

_HEADERS: Mapping[str, str] = {"Cache-Control": "no-store", "Vary": "Accept"}
_DATE = {"type": "string", "format": "date"}

Day = Annotated[str, Field(json_schema_extra={"format": "date"}, description="A day in UTC.")]


class UsageCounts(TypedDict):
    """Counts of a part of the usage. Money is in US dollars."""

    submitted: Annotated[Count, Field(description="Accepted submits.")]
    cached: Annotated[Count, Field(description="Submits that found a completed task.")]
    coalesced: Annotated[Count, Field(description="Submits that joined an unfinished task.")]
    completed: Count
    failed: Count
    cancelled: Count
    images: Annotated[Count, Field(description="Images that were generated.")]
    spent: Annotated[Dollars, Field(description="Price of the calls that were sent.")]
    savedByCache: Annotated[Dollars, Field(description="Estimated price of the hits.")]
    savedByCoalescing: Annotated[Dollars, Field(description="Estimated price of the joins.")]
    ambiguous: Annotated[Dollars, Field(description="Part of `spent` for calls without an answer.")]


class UsageRow(UsageCounts):
    """Counts of a day, a key or a model: it has the field that the report is grouped by."""

    day: NotRequired[Day]
    key: NotRequired[Annotated[str | None, Field(description="Name of the key; null: without one.")]]
    model: NotRequired[str]


UsageView = TypedDict(
    "UsageView",
    {
        "success": Literal[True],
        "from": Day,
        "to": Day,
        "by": Literal["day", "key", "model"],
        "currency": Literal["USD"],
        "rows": list[UsageRow],
        "total": UsageCounts,
    },
)


@in_read_slot
async def get_usage(request: web.Request) -> web.StreamResponse:
    """Return submits, images, costs and savings: of all clients to the operator, of itself to a key.

    Raises InvalidRequest, QueueUnavailable, Unauthorized.
    """
    services, client = request.app[SERVICES], client_of(request)
    if client.key is None and not client.is_admin:
        request.app[GUARD].require_admin(request)
    key = client.name if client.key is not None and not client.is_admin else None
    query = UsageQuery.parse(request.query, services.queue.clock(), key)
    report = await UsageReport.of(services.ledger.read(query.days), query)
    if prefers_csv(request.headers.get(hdrs.ACCEPT, "")):
        headers = {**_HEADERS, "Content-Disposition": f'attachment; filename="{report.file_name}"'}
        text = await asyncio.to_thread(report.to_csv)  # of 20,000 keys in 0.3 s
        return web.Response(text=text, content_type=CSV, charset="utf-8", headers=headers)
    return json_response(await asyncio.to_thread(report.to_view), headers=_HEADERS)


def prefers_csv(accept: str) -> bool:
    """Return whether an Accept header prefers CSV to JSON, which is the default."""
    qualities = {CSV: 0.0, JSON: 0.0}
    ranges = {"text/*": (CSV,), "application/*": (JSON,), "*/*": (CSV, JSON)}
    exact = set()
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((quality_of(parameter) for parameter in parameters if parameter.startswith("q=")), 1.0)
        for kind in ranges.get(media, (media,)):
            if kind == media:
                exact.add(kind)
                qualities[kind] = quality
            elif kind not in exact:
                qualities[kind] = max(qualities[kind], quality)
    return qualities[CSV] > qualities[JSON]


_COUNTS = dict.fromkeys(COLUMNS, 0) | {
    "submitted": 5,
    "cached": 1,
    "coalesced": 1,
    "completed": 3,
    "images": 3,
    "spent": 0.0081,
    "savedByCache": 0.0027,
    "savedByCoalescing": 0.0027,
}

USAGE = Operation(
    "get",
    "/api/usage",
    "getUsage",
    "Operate",
    "Read costs and savings",
    "With the admin token the usage of all clients, with an API key its own. Other instances write theirs once a "
    "minute. Money counts on the day of its budget. As CSV if `Accept` prefers it.",
    (
        ResponseDoc(
            200,
            "The report.",
            UsageView,
            {
                "by key": {
                    "success": True,
                    "from": "2026-01-01",
                    "to": "2026-01-30",
                    "by": "key",
                    "currency": "USD",
                    "rows": [{"key": "shop"} | _COUNTS],
                    "total": _COUNTS,
                }
            },
            headers=("Cache-Control",),
            others={CSV: {"type": "string"}},
        ),
    ),
    (
        Parameter(
            "from",
            "query",
            f"First day in UTC, {DEFAULT_DAYS - 1} days before `to` if absent.",
            _DATE,
            example="2026-01-01",
        ),
        Parameter(
            "to",
            "query",
            f"Last day in UTC, today if absent; at most {MAX_DAYS} days in all.",
            _DATE,
            example="2026-01-30",
        ),
        Parameter(
            "by",
            "query",
            "What a row is.",
            {"type": "string", "enum": [*GROUPINGS], "default": GROUPINGS[0]},
            example="key",
        ),
        named.LANGUAGE,
    ),
    errors=(InvalidRequest, QueueUnavailable, Unauthorized),
    limit="general",
)

ROUTE: Route = (USAGE, get_usage)
