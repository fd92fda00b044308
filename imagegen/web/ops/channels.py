"""Route of the channels and their keys: GET /api/channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict

from imagegen.formats import rfc3339
from imagegen.providers.channel_counts import CallCounts, ChannelStatus, KeyStatus, errors_by_code
from imagegen.tasks.cost import dollars
from imagegen.web.api.schemas import Count, Timestamp
from imagegen.web.http.responses import json_response
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi.document import Operation, ResponseDoc
from imagegen.web.ops.metrics import OBSERVED

CHANNELS = web.AppKey[Callable[[], Sequence[ChannelStatus]]]("channels")

Errors = Annotated[dict[str, int], Field(description="Failed calls by their code.")]
Spent = Annotated[float, Field(description="US dollars.")]
Until = Annotated[Timestamp | None, Field(description="When it is called again, at the earliest.")]
Reason = Annotated[str | None, Field(description="Code of why it rests.")]


class CallCountsView(TypedDict):
    """Calls since the start of the instance."""

    inFlight: Count
    calls: Count
    errors: Errors
    spentUsd: Spent


class ChannelKeyView(CallCountsView):
    """A key of a channel; the key itself is never shown."""

    id: Annotated[str, Field(description="The first 8 digits of its fingerprint.")]
    source: Annotated[str | None, Field(description="Where it is named: a variable as `env:NAME`, or `file`.")]
    last4: Annotated[str | None, Field(description="Its last characters; null if it is short.")]
    state: Annotated[str, Field(json_schema_extra={"enum": ["healthy", "cooling", "out"]})]
    until: Until
    reason: Reason


class ChannelView(CallCountsView):
    """A channel. `resting`: it takes no calls for a while; `out`: all its keys are refused."""

    name: str
    provider: str
    priority: int
    weight: int
    models: Annotated[list[str], Field(description="Patterns, and renames as `asked=sent`.")]
    host: str | None
    state: Annotated[str, Field(json_schema_extra={"enum": ["healthy", "resting", "out"]})]
    until: Until
    reason: Reason
    concurrency: int | None
    ratePerMinute: float | None
    keys: list[ChannelKeyView]


class ChannelsView(TypedDict):
    """All channels of the responding instance; counts are since its start."""

    success: Literal[True]
    since: Timestamp
    channels: list[ChannelView]


CHANNELS_OPERATION = Operation(
    "get",
    "/api/channels",
    "getChannels",
    "Operate",
    "Read the state of the channels",
    "Providers and their keys, as CHANNELS_FILE or the simple settings name them. All is of the responding instance.",
    (ResponseDoc(200, "The channels.", ChannelsView),),
    (named.LANGUAGE,),
    limit="general",
    needs="admin",
)


async def get_channels(request: web.Request) -> web.StreamResponse:
    """Return the state of each channel and key."""
    meter = request.app[OBSERVED].meter
    views = [_channel_view(status) for status in request.app[CHANNELS]()]
    view: ChannelsView = {"success": True, "since": rfc3339(meter.started_unix_s), "channels": views}
    return json_response(view)


def _channel_view(status: ChannelStatus) -> ChannelView:
    totals = status.totals
    return {
        "name": status.name,
        "provider": status.provider,
        "priority": status.priority,
        "weight": status.weight,
        "models": list(status.models),
        "host": status.host,
        "state": status.state,
        "until": None if status.until is None else rfc3339(status.until),
        "reason": status.reason,
        "concurrency": status.concurrency,
        "ratePerMinute": status.rate_per_min,
        "keys": [_key_view(key) for key in status.keys],
        **_counts(totals),
    }


def _key_view(key: KeyStatus) -> ChannelKeyView:
    return {
        "id": key.id,
        "source": key.source or None,
        "last4": key.last4 or None,
        "state": key.state,
        "until": None if key.until is None else rfc3339(key.until),
        "reason": key.reason,
        **_counts(key.counts),
    }


def _counts(counts: CallCounts) -> CallCountsView:
    return {
        "inFlight": counts.in_flight,
        "calls": counts.calls,
        "errors": errors_by_code(counts),
        "spentUsd": dollars(counts.spent),
    }


ROUTE = (CHANNELS_OPERATION, get_channels)
