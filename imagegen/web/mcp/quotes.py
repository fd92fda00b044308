"""Quote of a call: price, waiting time, limits and what would refuse it, without a submit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from imagegen.errors import ApiError, BudgetExceeded, PriceUnknown, RateLimited
from imagegen.formats import rfc3339
from imagegen.queue.eta import QueuePosition
from imagegen.queue.preview import over_limit
from imagegen.ratelimit.limits import RATE_LIMITS, Allowance
from imagegen.tasks.cost import day_end, dollars
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task
from imagegen.web.api.models import capabilities_view
from imagegen.web.guard import client_of
from imagegen.web.handler_services import Services
from imagegen.web.http.body import ReceivedBody
from imagegen.web.mcp.tool_results import error_view, failure_view
from imagegen.web.mcp.views import QuoteView, ToolErrorView
from imagegen.web.price_preview import PricePreview, preview_price
from imagegen.web.submitter import SubmitOptions, is_final_answer, parse_fields


async def quote(services: Services, fields: Mapping[str, Any], body: ReceivedBody, options: SubmitOptions) -> QuoteView:
    """Return what the submit of these fields would cost and meet now. Nothing is stored or counted as a submit.

    Raises InvalidRequest, NotAllowed, UnsupportedImage, QueueUnavailable, StoreUnavailable.
    """
    parsed = parse_fields(services, fields, options)
    settled = await services.inputs.identify(parsed.request, body, scope=client_of(options.request).scope)
    request, submission = parsed.request, replace(parsed, request=settled).submission(services.identity, options)
    price = await preview_price(services, submission)
    place = await _place(services, submission, price)
    budget_left = await services.queue.preview.budget_left(services.queue.limits_of(submission.client))
    allowance = await options.request.app[RATE_LIMITS].peek(options.request, request.units)
    view: QuoteView = {
        "model": request.model,
        "n": request.n,
        "width": request.width,
        "height": request.height,
        "costUsd": None if price.micro_usd is None else dollars(price.micro_usd),
        "cached": price.is_hit,
        "joins": price.is_joined,
        "reusedImages": price.reused,
        "taskId": submission.task_id,
        "queuePosition": place.position,
        "etaSeconds": place.eta_s,
        "budgetLeftUsd": None if budget_left is None else dollars(budget_left),
        "callsLeft": allowance.calls,
        "limits": _limits(services, request),
    }
    resets_at = rfc3339(day_end(services.queue.clock()))
    if budget_left is not None:
        view["budgetResetsAt"] = resets_at
    if (refusal := _refusal(submission, price, budget_left, allowance, resets_at)) is not None:
        view["refusal"] = refusal
    if warnings := services.with_notices(_as_task(services, submission)).warnings:
        view["warnings"] = list(warnings)
    return view


def quote_text(view: QuoteView) -> str:
    """Return a quote in one sentence."""
    price, budget_left = view.get("costUsd"), view.get("budgetLeftUsd")
    cost = "an unknown price" if price is None else f"{price:g} USD"
    facts = [f"{view['n']} image(s) of {view['model']}, {view['width']}x{view['height']}: {cost}"]
    if view["cached"]:
        facts.append("they exist already")
    elif view["joins"]:
        facts.append("they are being made, and joining is free")
    elif reused := view["reusedImages"]:
        facts.append(f"{reused} of them exist already")
    if view["etaSeconds"] is not None:
        facts.append(f"ready in about {view['etaSeconds']:g} s")
    if budget_left is not None:
        facts.append(f"{budget_left:g} USD left of today's budget")
    refusal = f" Now it would be refused: {view['refusal']['code']}." if "refusal" in view else ""
    return f"{', '.join(facts)}. Nothing was submitted.{refusal}"


async def _place(services: Services, submission: Submission, price: PricePreview) -> QueuePosition:
    """Return the place of the task, or the place behind all waiting tasks."""
    queue, task = services.queue, price.task
    if price.is_hit or (price.reused and price.micro_usd == 0):
        return QueuePosition(None, 0.0)
    if price.is_joined and task is not None:
        return await queue.position(task)
    new = _as_task(services, submission)
    place = await queue.position(new)
    return queue.preview.next_in_line(new) or place


def _refusal(
    submission: Submission, price: PricePreview, budget_left: int | None, allowance: Allowance, resets_at: str
) -> ToolErrorView | None:
    """Return the error with which the submit would be answered now; None if it would be accepted."""
    task, micro_usd, limit = price.task, price.micro_usd, submission.max_micro_usd
    error: ApiError | None = None
    if allowance.retry_after_s:
        error = RateLimited(headers={"Retry-After": str(allowance.retry_after_s)})
    elif task is not None and is_final_answer(task):
        return failure_view(task)
    elif micro_usd == 0:
        return None
    elif limit is not None and (micro_usd is None or micro_usd > limit):
        error = over_limit(submission, micro_usd)
    elif budget_left is not None and micro_usd is None:
        error = PriceUnknown(model=submission.model)
    elif budget_left is not None and micro_usd is not None and micro_usd > budget_left:
        error = BudgetExceeded(resets_at=resets_at)
    return None if error is None else error_view(error, None if micro_usd is None else dollars(micro_usd))


def _as_task(services: Services, submission: Submission) -> Task:
    """Return a task as the submit would make it now."""
    now = services.queue.clock()
    return Task(
        submission.task_id,
        0,
        0,
        submission.digest,
        submission.model,
        submission.request_json,
        now,
        entry_id=f"{int(now * 1000)}-0",
        client=submission.client,
    )


def _limits(services: Services, request: GenerationRequest) -> Any:
    row = services.models.describe(request.model)
    return None if row is None else capabilities_view(row)
