"""Route of the counters in JSON: GET /api/stats."""

from __future__ import annotations

import time

from aiohttp import web

from imagegen import __version__
from imagegen.accounts.budget_watch import BudgetWatch
from imagegen.formats import rfc3339
from imagegen.metrics import Meter
from imagegen.queue.monitor import BacklogSize, InstanceStatus
from imagegen.redis_client.server_info import eviction_warning
from imagegen.tasks.cost import dollars
from imagegen.web.api.schemas import (
    BudgetStats,
    HttpStats,
    InstanceStats,
    QueueStats,
    RateStats,
    RedisStats,
    StatsView,
    TaskStats,
    UpstreamStats,
)
from imagegen.web.http.responses import json_response
from imagegen.web.ops.telemetry import OBSERVED, ProviderLimits, Telemetry


async def get_stats(request: web.Request) -> web.StreamResponse:
    """Return the counters. The queue is shared; all else is of this instance, since its start."""
    telemetry = request.app[OBSERVED]
    waiting, local = await telemetry.backlog.waiting(), telemetry.backlog.local_status()
    await telemetry.budgets.refresh()
    meter = telemetry.meter
    body: StatsView = {
        "success": True,
        "timestamp": rfc3339(time.time()),
        "instance": _instance(telemetry, local),
        "queue": queue_stats(waiting, local, telemetry),
        "tasks": _tasks(meter, waiting, local),
        "submits": {kind.lower(): count for kind, count in meter.submits.items()},
        "rates": _rates(telemetry),
        "upstream": upstream_stats(meter, telemetry.upstream),
        "redis": _redis(meter, local),
        "images": {"count": meter.images, "bytes": meter.image_bytes},
        "deadLetters": {"sinceStart": meter.dead_letters, "kept": await telemetry.backlog.dead_letters()},
        "budgets": budget_stats(telemetry.budgets),
        "http": _http(meter),
    }
    return json_response(body)


def _instance(telemetry: Telemetry, local: InstanceStatus) -> InstanceStats:
    return {
        "name": telemetry.backlog.instance,
        "version": __version__,
        "uptimeSeconds": round(telemetry.meter.uptime_s, 1),
        "instances": local.instances,
        "loops": telemetry.loops_by_kind(),
    }


def queue_stats(waiting: BacklogSize, local: InstanceStatus, telemetry: Telemetry) -> QueueStats:
    """Return the state of the queue and of the slots here."""
    since = telemetry.paused_since()
    return {
        "depth": waiting.depth,
        "oldestAgeSeconds": round(waiting.oldest_age_s, 3),
        "limit": telemetry.max_queue,
        "inFlight": local.in_flight,
        "retrying": local.retrying,
        "loopsFree": local.free,
        "waiters": local.waiters,
        "pausedSince": None if since is None else rfc3339(since),
    }


def _tasks(meter: Meter, waiting: BacklogSize, local: InstanceStatus) -> TaskStats:
    """Count by state; a task that waits for its next attempt is pending too."""
    errors: dict[str, int] = {}
    for key, count in meter.tasks.items():
        if key.code:
            errors[key.code] = errors.get(key.code, 0) + count
    ended = meter.finished_by_state()
    return {
        "pending": waiting.depth + local.retrying,
        "processing": local.in_flight,
        "completed": ended["completed"],
        "failed": ended["failed"],
        "cancelled": ended["cancelled"],
        "errors": errors,
        "takenOver": meter.takeovers,
    }


def _rates(telemetry: Telemetry) -> RateStats:
    rates = telemetry.recent.rates()
    return {
        "windowSeconds": round(rates.window_s, 1),
        "submitsPerMinute": round(rates.submits, 2),
        "finishedPerMinute": round(rates.finished, 2),
        "requestsPerMinute": round(rates.requests, 2),
        "redisCommandsPerMinute": round(rates.commands, 2),
    }


def upstream_stats(meter: Meter, rules: ProviderLimits) -> UpstreamStats:
    """Return the limits of the provider, and the calls since the start."""
    blocked = rules.blocked()
    return {
        "concurrency": rules.concurrency,
        "ratePerMinute": rules.rate_per_min,
        "blocked": {"reason": str(blocked[0]), "until": rfc3339(blocked[1])} if blocked else None,
        "calls": {code: histogram.count for code, histogram in meter.calls.items()},
        "ambiguous": meter.ambiguous,
    }


def _redis(meter: Meter, local: InstanceStatus) -> RedisStats:
    return {
        "up": local.redis_up,
        "server": local.redis_program or None,
        "maxmemoryPolicy": local.eviction_policy or None,
        "warning": eviction_warning(local.eviction_policy),
        "commands": {purpose: count for purpose, count in meter.commands.items() if count},
        "commandsTotal": meter.commands.total(),
        "monthProjected": round(meter.commands_a_month),
        "vanished": meter.vanished,
        "writtenBack": dict(meter.written_back),
    }


def budget_stats(budgets: BudgetWatch) -> list[BudgetStats]:
    """Return today's budgets as last seen."""
    return [
        {
            "key": state.key,
            "limit": dollars(state.limit),
            "used": dollars(state.used),
            "left": dollars(state.left),
            "resetsAt": rfc3339(budgets.resets_at),
        }
        for state in budgets.states()
    ]


def _http(meter: Meter) -> HttpStats:
    statuses: dict[str, int] = {}
    for (_, _, status), histogram in meter.requests.items():
        statuses[str(status)] = statuses.get(str(status), 0) + histogram.count
    return {"open": meter.open_requests, "byStatus": dict(sorted(statuses.items()))}
