"""Limit of one submit's cost: the field `maxCostUsd`, and the submits that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from imagegen.errors import FieldError, InvalidRequest
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.preview import over_limit
from imagegen.tasks.cost import micro_usd_limit
from imagegen.tasks.field_faults import field_errors
from imagegen.tasks.submission import Submission
from imagegen.tasks.validation import Dollars
from imagegen.web.handler_services import Services
from imagegen.web.price_preview import preview_price

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
        return micro_usd_limit(_MAX_COST.validate_python(body[sent[0]]))
    except ValidationError as error:
        details = [FieldError(sent[0], fault.message) for fault in field_errors(error)]
        raise InvalidRequest(details=details) from error


async def find_free_task(services: Services, submission: Submission, *, fresh: bool) -> SubmitResult | None:
    """Return the unfinished or finished task of a submission that would cost too much with all its images new.

    None if enough of them exist in a task that differs only in `n`. fresh: a finished task does not do.
    Raises MaxCostExceeded, MaxCostPriceUnknown; QueueUnavailable, StoreUnavailable.
    """
    price = await preview_price(services, submission, fresh=fresh)
    if price.task is not None and (price.is_joined or price.is_hit):
        return SubmitResult(price.task, CacheResult.COALESCED if price.is_joined else CacheResult.HIT)
    limit = submission.max_micro_usd
    if limit is None or (price.micro_usd is not None and price.micro_usd <= limit):
        return None
    raise over_limit(submission, price.micro_usd)
