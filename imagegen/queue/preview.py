"""Preview of a submit: what it would meet in the queue and in its budgets. Nothing is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from imagegen.errors import ApiError, FieldError, MaxCostExceeded, MaxCostPriceUnknown
from imagegen.queue.eta import QueuePosition
from imagegen.queue.families import FamiliesWithImages, has_images
from imagegen.queue.line_mover import LineMover
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.verbs.budget_counters import Limits
from imagegen.tasks.cost import day_of, dollars
from imagegen.tasks.family import RequestFamily, ReusedImages, ReuseImages
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import IN_LINE, Task


class SubmitPreview:
    """Preview of submits on this instance."""

    def __init__(self, verbs: QueueVerbs, mover: LineMover, families: FamiliesWithImages) -> None:
        self._verbs = verbs
        self._lines = verbs.lines
        self._lookup = mover.lookup
        self._families = families
        self._clock = verbs.clock

    async def tasks_with_images(self, submission: Submission, family: RequestFamily) -> Sequence[Task]:
        """Return the tasks with images for a submission: finished ones that differ only in `n`, and its own.

        Raises QueueUnavailable.
        """
        own = await self._lookup.get(submission.task_id)
        own_tasks = [own] if own is not None and own.state.is_final and own.images and not own.stale_images else []
        if not submission.has_siblings or not self._families.may_include(submission.request_json, submission.scope):
            return own_tasks
        tasks = await asyncio.gather(*map(self._lookup.get, family.sibling_ids()))
        return [*own_tasks, *(task for task in tasks if task is not None and has_images(task))]

    async def reused_within_limit(self, submission: Submission, reuse: ReuseImages | None) -> ReusedImages:
        """Return images that exist for a submission that is within its own limit only with these.

        Raises MaxCostExceeded, MaxCostPriceUnknown, StoreUnavailable.
        """
        family, reused, price = submission.family, ReusedImages(), None
        if reuse and family:
            reused = await reuse(submission.task_id, family, await self.tasks_with_images(submission, family))
        if submission.cost is not None:
            missing = submission.wanted - len(reused.images)
            price = submission.cost.for_part(missing, submission.wanted).estimated
        if price is None or price > (submission.max_micro_usd or 0):
            raise over_limit(submission, price)
        return reused

    def next_in_line(self, task: Task) -> QueuePosition | None:
        """Return the place of a new task in its client's own line; None if it would go to the stream."""
        lines, client = self._lines, task.client
        if not client or not (lines.has_line(client) or lines.is_full(client)):
            return None
        estimates, instances = self._lookup.dispatcher.estimates, 1 + len(self._lookup.notifier.peers)
        position = lines.next_position(client, len(estimates.waiting))
        return estimates.position_of(replace(task, entry_id=IN_LINE), self._clock(), instances, position)

    async def budget_left(self, limits: Limits) -> int | None:
        """Return the micro-dollars that are left today of the tightest budget, None without one; costs one command.

        Raises QueueUnavailable.
        """
        if not limits:
            return None
        day = day_of(self._clock())
        await self._verbs.read_budgets(day)
        return max(min(limit - self._verbs.budgets.used(day, slot) for slot, limit in limits), 0)


def over_limit(submission: Submission, micro_usd: int | None) -> ApiError:
    """Return the error of a submission with a price over its limit. micro_usd: the price, None if unknown."""
    if micro_usd is None:
        return MaxCostPriceUnknown(model=submission.model)
    rule = f"must be at least {dollars(micro_usd):g}, or the images fewer, smaller or of a cheaper model"
    limit = dollars(submission.max_micro_usd or 0)
    error = FieldError("maxCostUsd", rule)
    return MaxCostExceeded(details=[error], estimated=f"{dollars(micro_usd):g}", max_usd=f"{limit:g}")
