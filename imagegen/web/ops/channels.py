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
from imagegen.web.ops.telemetry import OBSERVED

CHANNELS = web.AppKey[Callable[[], Sequence[ChannelStatus]]]("channels")

Errors = Annotated[dict[str, int], Field(description="Failed calls by their code.")]
Spent = Annotated[float, Field(description="US dollars.")]
Until = Annotated[Timestamp | None, Field(description="When it is called again, at the earliest.")]
Reason = Annotated[str | None, Field(description="Code of why it rests.")]

KeyState = Annotated[
    str,
    Field(
        description="`cooling`: after a rate limit; `out`: refused.",
        json_schema_extra={"enum": ["healthy", "cooling", "out"]},
    ),
]
ChannelState = Annotated[
    str,
    Field(
        description="`resting`: no calls for a while; `out`: all its keys are refused.",
        json_schema_extra={"enum": ["healthy", "resting", "out"]},
    ),
]


class CallCountsView(TypedDict):
    """Calls since the start of the instance."""

    inFlight: Annotated[Count, Field(description="Calls that run.")]
    calls: Annotated[Count, Field(description="Calls that ended, failed ones too.")]
    errors: Errors
    spentUsd: Spent


class ChannelKeyView(CallCountsView):
    """A key of a channel; the key itself is never shown."""

    id: Annotated[str, Field(description="The first 8 digits of its fingerprint.")]
    source: Annotated[str | None, Field(description="The variable with it, as `env:NAME`, or `file`.")]
    last4: Annotated[str | None, Field(description="Its last characters; null if it is short.")]
    state: KeyState
    until: Until
    reason: Reason


class ChannelView(CallCountsView):
    """A channel. `resting`: it takes no calls for a while; `out`: all its keys are refused."""

    name: Annotated[str, Field(description="As in the file; with the simple settings the provider.")]
    provider: Annotated[str, Field(description="Kind of its API.")]
    priority: Annotated[int, Field(description="A higher one is preferred.")]
    weight: Annotated[int, Field(description="Share of the calls among channels of one priority.")]
    models: Annotated[list[str], Field(description="Patterns, and renames as `asked=sent`.")]
    host: Annotated[str | None, Field(description="Host of its base address.")]
    state: ChannelState
    until: Until
    reason: Reason
    concurrency: Annotated[int | None, Field(description="Calls at once; null: no separate limit.")]
    ratePerMinute: Annotated[float | None, Field(description="Calls a minute; null: no limit.")]
    keys: Annotated[list[ChannelKeyView], Field(description="Its keys, in the order of the file.")]


class ChannelsView(TypedDict):
    """All channels of the responding instance; counts are since its start."""

    success: Literal[True]
    since: Annotated[Timestamp, Field(description="Start of the instance.")]
    channels: Annotated[list[ChannelView], Field(description="In the order of the file.")]


_COUNTS = {"inFlight": 2, "calls": 120, "errors": {"upstream_rate_limited": 3}, "spentUsd": 0.324}
_KEY = {
    "id": "3fa9c012",
    "source": "env:TOGETHER_API_KEY",
    "last4": "x9Qz",
    "state": "cooling",
    "until": "2026-01-01T00:01:00Z",
    "reason": "upstream_rate_limited",
    **_COUNTS,
}
_CHANNEL = {
    "name": "together-main",
    "provider": "together",
    "priority": 10,
    "weight": 2,
    "models": ["black-forest-labs/*", "flux=black-forest-labs/FLUX.1-schnell"],
    "host": "api.together.xyz",
    "state": "resting",
    "until": "2026-01-01T00:01:00Z",
    "reason": "upstream_rate_limited",
    "concurrency": 10,
    "ratePerMinute": 600.0,
    **_COUNTS,
    "keys": [_KEY],
}
_EXAMPLE = {"success": True, "since": "2026-01-01T00:00:00Z", "channels": [_CHANNEL]}

CHANNELS_OPERATION = Operation(
    "get",
    "/api/channels",
    "getChannels",
    "Operate",
    "Read the state of the channels",
    "Providers and their keys, as CHANNELS_FILE or the simple settings name them. All is of the responding instance.",
    (ResponseDoc(200, "The channels.", ChannelsView, {"a pool": _EXAMPLE}),),
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
