"""Batches of lost tasks and claims that one script restores, and the estimate of what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from imagegen.queue.claim import Claim
from imagegen.queue.verbs.context import VerbContext, batched
from imagegen.redis_client.multiplexer import MAX_ITEMS
from imagegen.tasks.task import Task

_COMMANDS_PER_TASK = 4
"""Estimate: these calls are too rare for an exact count."""

Item = TypeVar("Item", bound=Task | Claim)


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the items in batches that are limited in count and in bytes."""
    return batched(items, MAX_ITEMS, _size_bytes)


def _size_bytes(item: Task | Claim) -> int:
    """Return the approximate size of the record and the entry of a task."""
    return 2 * len((item.task if isinstance(item, Claim) else item).request_json)


def count_restore(context: VerbContext, tasks: int) -> None:
    """Count the commands of one script call for a number of tasks."""
    context.count("restore", 1 + tasks * _COMMANDS_PER_TASK)
