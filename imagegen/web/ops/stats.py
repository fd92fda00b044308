"""Route of the counters in JSON: GET /api/stats."""

from __future__ import annotations

import time

from aiohttp import web

from imagegen import __version__
from imagegen.formats import rfc3339
from imagegen.metrics import Meter
from imagegen.queue.monitor import BacklogSize, InstanceStatus
from imagegen.redis_client.server_info import eviction_warning
from imagegen.web.api.schemas import (
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
from imagegen.web.ops.metrics import OBSERVED, ProviderLimits, Telemetry


async def get_stats(request: web.Request) -> web.StreamResponse:
    """Return the counters. The queue is shared; all else is of this instance, since its start."""
    observed = request.app[OBSERVED]
    waiting, here = await observed.backlog.waiting(), observed.backlog.local_status()
    meter = observed.meter
    answer: StatsView = {
        "success": True,
        "timestamp": rfc3339(time.time()),
        "instance": _instance(observed, here),
        "queue": _queue(waiting, here, observed.max_queue),
        "tasks": _tasks(meter, waiting, here),
        "submits": {kind.lower(): count for kind, count in meter.submits.items()},
        "rates": _rates(observed),
        "upstream": _upstream(meter, observed.upstream),
        "redis": _redis(meter, here),
        "images": {"count": meter.images, "bytes": meter.image_bytes},
        "deadLetters": {"sinceStart": meter.dead_letters, "kept": await observed.backlog.dead_letters()},
        "http": _http(meter),
    }
    return json_response(answer)


def _instance(observed: Telemetry, here: InstanceStatus) -> InstanceStats:
    return {
        "name": observed.backlog.instance,
        "version": __version__,
        "uptimeSeconds": round(observed.meter.uptime_s, 1),
        "instances": here.instances,
        "loops": observed.loops_by_kind(),
    }


def _queue(waiting: BacklogSize, here: InstanceStatus, max_queue: int) -> QueueStats:
    return {
        "depth": waiting.depth,
        "oldestAgeSeconds": round(waiting.oldest_age_s, 3),
        "limit": max_queue,
        "inFlight": here.in_flight,
        "retrying": here.retrying,
        "loopsFree": here.free,
        "waiters": here.waiters,
    }


def _tasks(meter: Meter, waiting: BacklogSize, here: InstanceStatus) -> TaskStats:
    """Count by state; a task that waits for its next attempt is pending too."""
    errors: dict[str, int] = {}
    for key, count in meter.tasks.items():
        if key.code:
            errors[key.code] = errors.get(key.code, 0) + count
    ended = meter.finished_by_state()
    return {
        "pending": waiting.depth + here.retrying,
        "processing": here.in_flight,
        "completed": ended["completed"],
        "failed": ended["failed"],
        "cancelled": ended["cancelled"],
        "errors": errors,
        "takenOver": meter.takeovers,
    }


def _rates(observed: Telemetry) -> RateStats:
    rates = observed.recent.rates()
    return {
        "windowSeconds": round(rates.window_s, 1),
        "submitsPerMinute": round(rates.submits, 2),
        "finishedPerMinute": round(rates.finished, 2),
        "requestsPerMinute": round(rates.requests, 2),
        "redisCommandsPerMinute": round(rates.commands, 2),
    }


def _upstream(meter: Meter, rules: ProviderLimits) -> UpstreamStats:
    blocked = rules.blocked()
    return {
        "concurrency": rules.concurrency,
        "ratePerMinute": rules.rate_per_min,
        "blocked": {"reason": str(blocked[0]), "until": rfc3339(blocked[1])} if blocked else None,
        "calls": {code: histogram.count for code, histogram in meter.calls.items()},
        "ambiguous": meter.ambiguous,
    }


def _redis(meter: Meter, here: InstanceStatus) -> RedisStats:
    return {
        "up": here.redis_up,
        "maxmemoryPolicy": here.eviction_policy or None,
        "warning": eviction_warning(here.eviction_policy),
        "commands": {purpose: count for purpose, count in meter.commands.items() if count},
        "commandsTotal": meter.commands.total(),
        "monthProjected": round(meter.commands_a_month),
        "vanished": meter.vanished,
        "writtenBack": dict(meter.written_back),
    }


def _http(meter: Meter) -> HttpStats:
    statuses: dict[str, int] = {}
    for (_, _, status), histogram in meter.requests.items():
        statuses[str(status)] = statuses.get(str(status), 0) + histogram.count
    return {"open": meter.open_requests, "byStatus": dict(sorted(statuses.items()))}
