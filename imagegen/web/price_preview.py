"""Price of a submit at this moment: what exists, or is being made, costs nothing."""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.task_lookup import check_digest
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import State, Task
from imagegen.web.handler_services import Services


class PricePreview(Struct, frozen=True):
    """Result of a submit at this moment, and its price.

    task: of the same request, in any state; None without one.
    is_hit: it is completed and its images are there. is_joined: it is unfinished.
    reused: number of images that another task has, which differs only in `n`.
    micro_usd: price of the missing images; None if unknown.
    """

    task: Task | None
    is_hit: bool = False
    is_joined: bool = False
    reused: int = 0
    micro_usd: int | None = None


async def preview_price(services: Services, submission: Submission, *, fresh: bool = False) -> PricePreview:
    """Return what a submit would pay now. Nothing is stored.

    fresh: no image from before is used. Raises QueueUnavailable, StoreUnavailable.
    """
    task = await services.queue.fresh(submission.task_id)
    if task is not None:
        check_digest(task, submission.digest)
        if not task.state.is_final:
            return PricePreview(task, is_joined=True, micro_usd=0)
        is_completed = task.state is State.COMPLETED and not fresh
        if is_completed and await services.store.contains_all(task.id, task.images):
            return PricePreview(task, is_hit=True, micro_usd=0)
    reused = 0 if fresh else await _reusable(services, submission)
    cost = submission.cost
    if cost is not None and reused and submission.family is not None:
        wanted = submission.family.request.n
        cost = cost.for_part(wanted - reused, wanted)
    return PricePreview(task, reused=reused, micro_usd=None if cost is None else cost.estimated)


async def _reusable(services: Services, submission: Submission) -> int:
    """Return how many images the submit would have before its first call, of other tasks and of this one."""
    family = submission.family
    if family is None:
        return 0
    tasks = await services.queue.preview.tasks_with_images(submission, family)
    return await services.count_reusable(family, tasks) if tasks else 0
