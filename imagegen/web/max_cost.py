"""Limit of one submit's cost: the field `maxCostUsd`, and the submits that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from imagegen.errors import ApiError, FieldError, InvalidRequest, MaxCostExceeded, MaxCostPriceUnknown
from imagegen.queue.client_queue import CacheResult, Submission, SubmitResult
from imagegen.queue.task_lookup import check_digest
from imagegen.tasks.cost import MICRO_USD, dollars
from imagegen.tasks.task import State
from imagegen.tasks.validation import Dollars, field_errors
from imagegen.web.context import Services

MAX_COST_FIELDS = ("maxCostUsd", "max_cost_usd")

MaxCost = Annotated[
    Dollars, Field(description="The most that the images may cost, in US dollars; 0: only what exists already.")
]

_MAX_COST: TypeAdapter[float] = TypeAdapter(MaxCost)


def parse_max_cost(body: Mapping[str, Any]) -> int | None:
    """Return the limit in micro-dollars, None without one. Raises InvalidRequest."""
    sent = [name for name in MAX_COST_FIELDS if name in body]
    if len(sent) > 1:
        raise InvalidRequest(details=[FieldError(sent[1], f"is the same field as {sent[0]}: send one of them")])
    if not sent or body[sent[0]] in (None, ""):
        return None
    try:
        return round(_MAX_COST.validate_python(body[sent[0]]) * MICRO_USD)
    except ValidationError as error:
        details = [FieldError(sent[0], fault.message) for fault in field_errors(error)]
        raise InvalidRequest(details=details) from error


async def find_free_task(services: Services, submission: Submission, *, fresh: bool) -> SubmitResult:
    """Return the unfinished or finished task of a submission that would cost too much as a new one.

    fresh: a finished task does not do. Raises MaxCostExceeded, MaxCostPriceUnknown; QueueUnavailable.
    """
    task = await services.queue.fresh(submission.task_id)
    if task is not None:
        check_digest(task, submission.digest)
        if not task.state.is_final:
            return SubmitResult(task, CacheResult.COALESCED)
        is_hit = task.state is State.COMPLETED and not fresh
        if is_hit and await services.store.contains_all(task.id, task.images):
            return SubmitResult(task, CacheResult.HIT)
    raise over_limit(submission)


def over_limit(submission: Submission) -> ApiError:
    """Return the error of a submission that may cost more than its limit."""
    estimated = None if submission.cost is None else submission.cost.estimated
    if estimated is None:
        return MaxCostPriceUnknown(model=submission.model)
    rule = f"must be at least {dollars(estimated):g}, or the images fewer, smaller or of a cheaper model"
    limit = dollars(submission.max_micro_usd or 0)
    error = FieldError("maxCostUsd", rule)
    return MaxCostExceeded(details=[error], estimated=f"{dollars(estimated):g}", max_usd=f"{limit:g}")
