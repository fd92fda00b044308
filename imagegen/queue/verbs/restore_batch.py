"""Batches of lost tasks and claims that one script restores, and the estimate of what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from imagegen.queue.claim import Claim
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.multiplexer import MAX_BYTES, MAX_ITEMS
from imagegen.tasks.task import Task

_COMMANDS_PER_TASK = 4
"""Estimate: these calls are too rare for an exact count."""

Item = TypeVar("Item", bound=Task | Claim)


def in_batches(items: Iterable[Item]) -> list[list[Item]]:
    """Split items into batches that are limited in count and in bytes."""
    batches: list[list[Item]] = []
    size = 0
    for item in items:
        if not batches or len(batches[-1]) >= MAX_ITEMS or size >= MAX_BYTES:
            batches.append([])
            size = 0
        size += 2 * len((item.task if isinstance(item, Claim) else item).request_json)
        batches[-1].append(item)
    return batches


def count_restore(context: VerbContext, tasks: int) -> None:
    """Count the commands of one script call for a number of tasks."""
    context.count("restore", 1 + tasks * _COMMANDS_PER_TASK)
