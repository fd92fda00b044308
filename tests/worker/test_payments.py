"""Money of a task by the calls of its attempts, under a budget and without one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.channels_file import Channel, Channels, ModelName
from imagegen.errors import UpstreamError
from imagegen.providers.model_rules import ModelRow, ModelTable, Pricing
from imagegen.providers.prices import PerMillionTokens, Price
from imagegen.providers.protocol import Call
from imagegen.queue.checkpoint import decode_checkpoint
from imagegen.tasks.cost import Cost
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State, Task
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.payments import PaymentRules, Payments
from imagegen.worker.permits import Choice
from tests.queue_budgets import cost_of
from tests.worker.conftest import (
    MakeHarness,
    Step,
    WorkerHarness,
    failure,
    fault,
    images,
    loss,
    metered,
    no_model,
    submission,
)

PRICE, DEARER = 1_000, 3_000


def row(name: str, per_image: str, **rules: Any) -> ModelRow:
    return ModelRow(name, "scripted", price=Price(per_image=Decimal(per_image), **rules))


TABLE = ModelTable(
    [
        row("m", "0.001", per_million_tokens=PerMillionTokens(text_in=1, image_in=1, image_out=30)),
        row("dearer", "0.003"),
        row("strict", "0.001", charges_on_refusal="yes"),
    ],
    "scripted",
    date(2026, 1, 1),
)
PRICING = Pricing(TABLE)
REFUSAL = UpstreamError("content_policy", "no", status=400)


RunTask = Callable[..., Awaitable[tuple[Task, WorkerHarness]]]


@pytest.fixture
def run(make_harness: MakeHarness) -> RunTask:
    """Return a function that runs a task by scripted replies and returns it at its end, and its harness.

    budget: of all clients, most: of the submit; in micro-dollars.
    """

    async def run_task(
        *steps: Step, budget: int | None = None, most: int | None = None, **options: Any
    ) -> tuple[Task, WorkerHarness]:
        fields = {name: options.pop(name) for name in ("n", "model") if name in options}
        limits = () if budget is None else ((0, budget),)
        harness = make_harness(*steps, pricing=PRICING, limits_of_slots=lambda _slots: limits, **options)
        harness.instance.client_queue.limits.of_others = limits
        priced = submission("a", **fields)
        request = GenerationRequest.from_json(priced.request_json)
        submitted = await harness.instance.client_queue.submit(
            replace(priced, cost=PRICING.estimate(request), max_micro_usd=most)
        )
        (task,) = await harness.finished(submitted.task.id)
        return task, harness

    return run_task


async def test_a_task_is_charged_the_price_of_all_its_calls(run: RunTask) -> None:
    task, harness = await run(n=6)
    assert task.cost == Cost(6 * PRICE, charged=6 * PRICE)
    assert len(harness.provider.calls) == 2


@pytest.mark.parametrize(
    ("details", "charged"),
    [
        (ReplyDetails(cost_micro_usd=1_234), 1_234),
        (ReplyDetails(usage={"input_tokens": 100, "output_tokens": 200}), 6_100),
        (ReplyDetails(usage={"anything": 1}), PRICE),
    ],
)
async def test_the_figure_of_the_upstream_counts_before_the_table(
    run: RunTask, details: ReplyDetails, charged: int
) -> None:
    task, _ = await run(images(details=details))
    assert (cost_of(task).estimated, cost_of(task).charged) == (PRICE, charged)


@pytest.mark.parametrize(("model", "charged"), [("m", 0), ("strict", PRICE)])
async def test_a_refusal_is_charged_only_by_a_provider_that_charges_it(run: RunTask, model: str, charged: int) -> None:
    task, _ = await run(REFUSAL, model=model)
    assert (task.state, cost_of(task).charged) == (State.FAILED, charged)


async def test_lost_calls_and_useless_replies_are_charged_and_earlier_errors_are_not(run: RunTask) -> None:
    task, _ = await run(fault(429), fault(500), loss(), images(0), images(1))
    assert task.state is State.COMPLETED
    assert (cost_of(task).charged, cost_of(task).unsure) == (3 * PRICE, PRICE)


async def test_a_repeat_without_budget_is_not_made(run: RunTask) -> None:
    task, harness = await run(loss(), budget=PRICE)
    assert (failure(task).code, cost_of(task).charged, cost_of(task).reserved) == ("upstream_timeout", PRICE, 0)
    assert "budget" in failure(task).detail
    assert len(harness.provider.calls) == 1


async def test_missing_images_without_budget_complete_the_task_with_a_warning(run: RunTask) -> None:
    task, harness = await run(images(1), budget=2 * PRICE, n=2)
    assert (task.state, len(task.images), len(harness.provider.calls)) == (State.COMPLETED, 1, 1)
    assert "budget" in task.warnings[0]


@pytest.mark.parametrize("budget", [PRICE, DEARER - 1])
async def test_another_model_that_costs_more_than_is_left_is_not_called(run: RunTask, budget: int) -> None:
    task, harness = await run(no_model(), budget=budget, fallback_models=("dearer",))
    assert (failure(task).code, cost_of(task).charged) == ("model_not_available", 0)
    assert harness.provider.models_called == ["m"]


async def test_another_model_is_reserved_and_charged_at_its_own_price(run: RunTask) -> None:
    task, harness = await run(no_model(), budget=DEARER, fallback_models=("dearer",))
    assert (task.state, cost_of(task).charged) == (State.COMPLETED, DEARER)
    assert harness.instance.verbs.budgets.used(cost_of(task).day, 0) == DEARER


async def test_another_model_without_a_price_is_not_called_under_a_budget(run: RunTask) -> None:
    task, harness = await run(no_model(), budget=10 * PRICE, fallback_models=("unpriced",))
    assert (failure(task).code, harness.provider.models_called) == ("model_not_available", ["m"])


@pytest.mark.parametrize("model", ["dearer", "unpriced"])
async def test_another_model_that_costs_more_than_the_submit_allows_is_not_called(run: RunTask, model: str) -> None:
    task, harness = await run(no_model(), most=DEARER - 5, fallback_models=(model,))
    assert (failure(task).code, cost_of(task).charged) == ("model_not_available", 0)
    assert "maxCostUsd" in failure(task).detail
    assert harness.provider.models_called == ["m"]


@pytest.mark.parametrize(("most", "state", "calls"), [(1, State.FAILED, 1), (2, State.COMPLETED, 2)])
async def test_a_lost_call_is_repeated_only_if_the_submit_allows_both(
    run: RunTask, most: int, state: State, calls: int
) -> None:
    task, harness = await run(loss(), images(1), most=most * PRICE)
    assert (task.state, cost_of(task).charged, len(harness.provider.calls)) == (state, calls * PRICE, calls)


async def test_all_planned_calls_are_made_within_the_exact_limit(run: RunTask) -> None:
    task, _ = await run(n=6, most=6 * PRICE)
    assert (task.state, cost_of(task).charged) == (State.COMPLETED, 6 * PRICE)


async def test_a_call_without_a_price_is_counted_as_unpriced(run: RunTask) -> None:
    task, _ = await run(no_model(), fallback_models=("unpriced",))
    assert (task.state, cost_of(task).unpriced) == (State.COMPLETED, 1)


async def test_a_call_that_the_end_of_the_service_cuts_off_is_charged_as_unsure(make_harness: MakeHarness) -> None:
    begun = asyncio.Event()

    async def hang(_call: Call) -> None:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    harness = make_harness(hang, pricing=PRICING)
    submitted = await harness.instance.client_queue.submit(replace(submission("a"), cost=Cost(PRICE)))
    await asyncio.wait_for(begun.wait(), 20)
    await harness.drain(0.0)
    await harness.instance.worker_queue.release(list(harness.instance.parts.dispatcher.held.values()))
    stored = await harness.instance.stored(harness.instance.keys.checkpoint(submitted.task.id))
    cost = decode_checkpoint(stored)[1].cost
    assert cost is not None
    assert (cost.charged, cost.unsure, cost.calling) == (PRICE, PRICE, 0)


def test_prices_are_those_of_the_table_or_of_unknown_images() -> None:
    request = GenerationRequest(prompt="a", model="other", width=512, height=512, n=3)
    assert PRICING.estimate(request).estimated is None
    assert Pricing(TABLE, unknown_micro_usd=70).estimate(request).estimated == 210
    assert Pricing(TABLE, is_free=True).estimate(request).estimated == 0
    assert PRICING.estimate(replace(request, model="m")).estimated == 3 * PRICE
    assert PRICING.call_price(request, "dearer", 2) == 2 * DEARER


async def test_channels_that_are_over_budget_for_one_model_are_tried_for_the_next_one(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.checkpoint = replace(claim.checkpoint, cost=Cost(PRICE, slots=(0,)))
    channels = [Channel(name, "scripted", models=(ModelName("*"),)) for name in ("one", "two")]
    routes = Routes(Channels(channels), [Route(each, "", metered(), PRICING) for each in channels])
    request = GenerationRequest.from_json(claim.task.request_json)
    payments = Payments(PaymentRules(lambda _slots: ()), harness.instance.worker_queue, routes, claim, request)
    payments.over_budget.add("one")
    assert payments.affordable("m", Choice()).channels == {"one"}
    payments.over_budget.add("two")
    assert payments.affordable("dearer", Choice()).channels == set()
