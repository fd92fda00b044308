"""Examples of the board's responses in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from imagegen.web.openapi import samples

_SPANS: dict[str, Any] = {"waitSeconds": {"p50": 0.4, "p95": 3.1}, "runSeconds": {"p50": 2.6, "p95": 7.9}}
_SAVED = {"savedByCache": 0.24, "savedByCoalescing": 0.05}

_TASK = {
    "taskId": samples.TASK_ID,
    "sequence": 1_767_225_600_000_002,
    "status": "pending",
    "prompt": "a lighthouse in a storm",
    "model": samples.MODEL,
    "key": "shop",
    "instance": "web-1-4f21-9c0a17",
    "progress": 0,
    "attempts": 1,
    "maxAttempts": 3,
    "images": 0,
    "reason": "retrying",
    "retryAt": "2026-01-01T00:10:05.000Z",
    "error": None,
    "errorDetail": None,
    "createdAt": "2026-01-01T00:09:51.000Z",
    "startedAt": "2026-01-01T00:09:52.000Z",
    "finishedAt": None,
}
BOARD = {
    "success": True,
    "timestamp": samples.STATS["timestamp"],
    "instance": {
        "name": "web-1-4f21-9c0a17",
        "version": "0.5.0",
        "uptimeSeconds": 601.5,
        "alive": ["web-1-4f21-9c0a17", "web-2-77aa-01bd9e"],
        "loops": 10,
        "slots": 5,
        "draining": False,
        "storeWritable": True,
        "providerKeyAccepted": True,
    },
    "queue": samples.STATS["queue"],
    **_SPANS,
    "today": {"completed": 240, "failed": 2, "cancelled": 1, "images": 240, "spent": 3.2, **_SAVED},
    "budgets": samples.STATS["budgets"],
    "upstream": samples.STATS["upstream"],
    "redis": {"up": True, "server": "redis 7.4.2", "commandsPerMinute": 262.0, "monthPlan": 500_000},
    "tasks": [_TASK],
}
HISTORY = {
    "success": True,
    "stepSeconds": 60,
    "minutes": [
        {
            "at": 1_767_226_140,
            "depth": 14,
            "oldestAgeSeconds": 3.4,
            "inFlight": 5,
            "instances": 2,
            "submits": {"miss": 31, "hit": 9},
            "tasks": {"completed": 28, "failed": 1},
            "upstream": {"ok": 28, "content_policy": 1},
            **_SPANS,
            "spent": 0.08,
            "saved": 0.02,
            "commands": 262,
        }
    ],
}
