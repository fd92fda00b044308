"""Routes of the board: the state of the service, its history, and the pause of claiming."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from imagegen import __version__
from imagegen.accounts.counts import Counts, total_of
from imagegen.accounts.ledger import Ledger
from imagegen.errors import FieldError, InvalidRequest, QueueUnavailable
from imagegen.formats import rfc3339
from imagegen.history.history_store import HistoryStore
from imagegen.history.minutes import Buckets, Minute, quantile
from imagegen.history.recorder import STEP_S, HistoryRecorder, with_unwritten
from imagegen.metrics import CALL_BOUNDS_S, WAIT_BOUNDS_S
from imagegen.queue.pause import ClaimingPause, PauseState
from imagegen.queue.unfinished import UnfinishedTask, UnfinishedTasks
from imagegen.tasks.cost import day_of, dollars
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.read_slots import in_read_slot
from imagegen.web.http.responses import json_response
from imagegen.web.ops.board_views import (
    BoardInstanceView,
    BoardTaskView,
    BoardView,
    HistoryView,
    MinuteView,
    PauseView,
    SpanView,
    TodayView,
    board_task_view,
)
from imagegen.web.ops.stats import budget_stats, queue_stats, upstream_stats
from imagegen.web.ops.telemetry import OBSERVED, Telemetry

MAX_ROWS = 200
"""Unfinished tasks of one response; the ended ones come on top."""

MONTH_PLAN = 500_000
"""Upstash's free plan, in commands a month. https://upstash.com/pricing/redis"""

USAGE_MAX_AGE_S = 60.0

MAX_SINCE_S = 10**12 - 1

_UNIX_S = re.compile(r"0|[1-9][0-9]{0,11}")
_LOOP = "loop"


@dataclass(slots=True)
class Board:
    """Sources of the board. instances: returns the names of those on this queue."""

    pause: ClaimingPause
    unfinished: UnfinishedTasks
    history: HistoryStore
    recorder: HistoryRecorder
    ledger: Ledger
    instances: Callable[[], list[str]]
    _usage: Counts = field(default_factory=Counts)
    _usage_read_at: float = -math.inf

    async def usage_of_today(self, now: float) -> Counts:
        """Return what the usage report has of today, read at most once a minute; the last one if Redis is away."""
        if time.monotonic() - self._usage_read_at >= USAGE_MAX_AGE_S:
            self._usage_read_at = time.monotonic()
            day = day_of(now)
            try:
                self._usage = total_of([total_of(rows.values()) async for _, rows in self.ledger.read([day])])
            except QueueUnavailable:
                self._usage_read_at = -math.inf
        return self._usage


BOARD = web.AppKey("board", Board)


@in_read_slot
async def get_board(request: web.Request) -> web.StreamResponse:
    """Return the state of the service; most of it is from the memory of this process."""
    board, telemetry = request.app[BOARD], request.app[OBSERVED]
    waiting, local = await telemetry.backlog.waiting(), telemetry.backlog.local_status()
    now = board.recorder.recent
    body: BoardView = {
        "success": True,
        "timestamp": rfc3339(time.time()),
        "instance": _instance(request, board, telemetry),
        "queue": queue_stats(waiting, local, telemetry),
        "waitSeconds": _span(now.waits, WAIT_BOUNDS_S),
        "runSeconds": _span(now.runs, CALL_BOUNDS_S),
        "today": _today(await board.usage_of_today(request.app[SERVICES].queue.clock())),
        "budgets": budget_stats(telemetry.budgets),
        "upstream": upstream_stats(telemetry.meter, telemetry.upstream),
        "redis": {
            "up": local.redis_up,
            "server": local.redis_program or None,
            "commandsPerMinute": round(telemetry.recent.rates().commands, 2),
            "monthPlan": MONTH_PLAN,
        },
        "tasks": await _rows(request, board, telemetry),
    }
    return json_response(body)


@in_read_slot
async def get_history(request: web.Request) -> web.StreamResponse:
    """Return the minutes since a time. Raises InvalidRequest, QueueUnavailable."""
    since = request.query.get("since", "0")
    if not _UNIX_S.fullmatch(since):
        raise InvalidRequest(
            details=[FieldError("since", "must be a Unix time in whole seconds, of at most 12 digits")]
        )
    board = request.app[BOARD]
    minutes = with_unwritten(await board.history.read(), board.recorder.unwritten)
    views = [_minute(minute) for minute in minutes if minute.at >= int(since)]
    body: HistoryView = {"success": True, "stepSeconds": STEP_S, "minutes": views}
    return json_response(body)


async def pause(request: web.Request) -> web.StreamResponse:
    """Pause claiming on all instances. Raises QueueUnavailable."""
    return _pause_response(await request.app[BOARD].pause.set(paused=True))


async def resume(request: web.Request) -> web.StreamResponse:
    """Let claiming go on, on all instances. Raises QueueUnavailable."""
    return _pause_response(await request.app[BOARD].pause.set(paused=False))


def _pause_response(state: PauseState) -> web.StreamResponse:
    since = rfc3339(state.since) if state.paused else None
    body: PauseView = {"success": True, "paused": state.paused, "since": since}
    return json_response(body)


def _instance(request: web.Request, board: Board, telemetry: Telemetry) -> BoardInstanceView:
    return {
        "name": telemetry.backlog.instance,
        "version": __version__,
        "uptimeSeconds": round(telemetry.meter.uptime_s, 1),
        "alive": board.instances(),
        "loops": telemetry.loops_by_kind().get(_LOOP, 0),
        "slots": telemetry.upstream.concurrency,
        "draining": request.app[SERVICES].readiness.draining,
        "storeWritable": telemetry.store_writable(),
        "providerKeyAccepted": telemetry.key_accepted(),
    }


async def _rows(request: web.Request, board: Board, telemetry: Telemetry) -> list[BoardTaskView]:
    """Return the rows of unfinished tasks, then of those that ended here, the latest first."""
    rows = {row.task.id: row for row in await board.unfinished.list(MAX_ROWS)}
    for task in reversed(telemetry.backlog.ended):
        listed = rows.get(task.id)
        if listed is None or listed.task.epoch < task.epoch:
            rows[task.id] = UnfinishedTask(task)
    max_attempts = request.app[SERVICES].max_attempts
    return [board_task_view(row, max_attempts) for row in rows.values()]


def _today(usage: Counts) -> TodayView:
    return {
        "completed": usage.completed,
        "failed": usage.failed,
        "cancelled": usage.cancelled,
        "images": usage.images,
        "spent": dollars(usage.spent),
        "savedByCache": dollars(usage.saved_by_cache),
        "savedByCoalescing": dollars(usage.saved_by_coalescing),
    }


def _minute(minute: Minute) -> MinuteView:
    return {
        "at": minute.at,
        "depth": minute.depth,
        "oldestAgeSeconds": minute.oldest_age_s,
        "inFlight": minute.in_flight,
        "instances": minute.instances,
        "submits": minute.submits,
        "tasks": minute.tasks,
        "upstream": minute.calls,
        "waitSeconds": _span(minute.waits, WAIT_BOUNDS_S),
        "runSeconds": _span(minute.runs, CALL_BOUNDS_S),
        "spent": dollars(minute.spent),
        "saved": dollars(minute.saved),
        "commands": minute.commands,
    }


def _span(buckets: Buckets, bounds: tuple[float, ...]) -> SpanView:
    return {"p50": _rounded(quantile(buckets, bounds, 0.5)), "p95": _rounded(quantile(buckets, bounds, 0.95))}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
