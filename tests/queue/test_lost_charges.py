"""Charges of calls that the end of their task lacks, since Redis had lost the checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from redis.exceptions import NoPermissionError, ResponseError

from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.multiplexer import Arg, Script
from tests.conftest import Instance, MakeInstance
from tests.queue_budgets import PRICE, TOTAL, cost_of, limited, put, started, used
from tests.support import eventually, logged


@pytest.fixture
async def pair(make_instance: MakeInstance) -> tuple[Instance, Instance]:
    """Return an instance with claims and its peer, without background loops."""
    one, two = (limited(make_instance(start=False), (TOTAL, 9 * PRICE)) for _ in range(2))
    await one.verbs.create_group()
    two.notifier.silent = True  # else a read of a task of the other one waits a second for its greeting
    return one, two


def charges(instance: Instance) -> list[int]:
    """Return a list of what an instance charges for lost claims from now on."""
    amounts: list[int] = []
    instance.parts.leases.lost_claims.on_charged = lambda _task, amount: amounts.append(amount)
    return amounts


async def give_up(instance: Instance, claim: Claim) -> None:
    """End a claim as an attempt does that finds it lost."""
    claim.mark_lost()
    await instance.worker_queue.give_up(claim)


@pytest.mark.parametrize("by_message", [True, False])
async def test_a_call_whose_checkpoint_was_lost_before_the_cancel_is_charged_once(
    pair: tuple[Instance, Instance], by_message: bool
) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    cancelled = await two.cancel(claim.task.id)
    assert (cost_of(cancelled).charged, await used(one)) == (0, 0)
    if by_message:
        one.parts.dispatcher.mark_finished_elsewhere(cancelled)
    for _ in range(2):
        await give_up(one, claim)
        assert (amounts, await used(one)) == ([PRICE], PRICE)


@pytest.mark.parametrize("leaving", [True, False])
async def test_a_call_of_a_lost_claim_is_charged_if_its_instance_stops(
    pair: tuple[Instance, Instance], leaving: bool
) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    await two.cancel(claim.task.id)
    claim.mark_lost()
    await one.worker_queue.release([claim], leaving=leaving)
    assert (amounts, await used(one)) == ([PRICE], PRICE)
    assert not one.parts.dispatcher.held


@pytest.mark.parametrize("by_message", [True, False])
async def test_a_call_that_a_cancel_has_charged_is_not_charged_again(
    pair: tuple[Instance, Instance], by_message: bool
) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    cancelled = await two.cancel(claim.task.id)
    assert cost_of(cancelled).charged == PRICE
    if by_message:
        one.parts.dispatcher.mark_finished_elsewhere(cancelled)
    await give_up(one, claim)
    assert (amounts, await used(one)) == ([], PRICE)


async def test_a_call_that_is_not_made_since_the_task_was_cancelled_is_not_charged(
    pair: tuple[Instance, Instance],
) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    cancelled = await two.cancel(claim.task.id)
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.paid(PRICE).before_call(PRICE))
    one.parts.dispatcher.mark_finished_elsewhere(cancelled)
    assert await one.worker_queue.start(claim) is not StartResult.STARTED
    await give_up(one, claim)
    assert (amounts, await used(one)) == ([], PRICE)


async def test_a_lost_call_that_was_found_is_charged_before_its_checkpoint_is_written(
    pair: tuple[Instance, Instance],
) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    lost = replace(claim.checkpoint, cost=claim.cost.lost("upstream_timeout"))
    assert await one.worker_queue.checkpoint(claim, lost)
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    await two.cancel(claim.task.id)
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.found(PRICE))
    await give_up(one, claim)
    assert (amounts, await used(one)) == ([PRICE], PRICE)


async def test_a_value_of_another_program_is_no_record_of_a_call(pair: tuple[Instance, Instance]) -> None:
    one, two = pair
    (claim,), amounts = await started(one, "a"), charges(one)
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    await two.cancel(claim.task.id)
    names = one.keys.recorded_call("")

    async def foreign(*args: object) -> object:
        await one.connection.commands.set(f"{names}{args[2].name}", "foreign")  # type: ignore[attr-defined]
        return await record_call(*args)  # type: ignore[arg-type]

    record_call, one.verbs.record_call = one.verbs.record_call, foreign  # type: ignore[assignment]
    await give_up(one, claim)
    assert (amounts, await used(one)) == ([PRICE], PRICE)


async def test_a_user_without_the_right_to_the_mark_records_calls_too(
    pair: tuple[Instance, Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    (claim, ended), amounts, run = await started(one, "a", "b"), charges(one), VerbContext.run

    async def run_if_allowed(context: VerbContext, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        if any(":recorded:" in key for key in keys):
            raise NoPermissionError("No permissions to access a key")
        return await run(context, script, keys, args)

    monkeypatch.setattr(VerbContext, "run", run_if_allowed)
    await one.connection.commands.delete(*(one.keys.checkpoint(each.task.id) for each in (claim, ended)))
    await two.cancel(claim.task.id)
    await one.connection.commands.xtrim(one.keys.stream, maxlen=0, approximate=False)
    await give_up(one, claim)
    await give_up(one, ended)
    assert (amounts, (await one.read(ended.task.id)).possibly_billed_twice) == ([PRICE, PRICE], 1)


async def test_a_loop_goes_on_if_redis_refuses_the_record_of_a_call(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = limited(make_instance(), (TOTAL, 9 * PRICE))
    await put(one, "a")
    claim = await one.claim()
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(PRICE))
    assert await one.worker_queue.start(claim) is StartResult.STARTED
    loop = asyncio.create_task(one.claim())

    async def refuse(*_args: object) -> None:
        raise ResponseError("NOPERM No permissions to access a key")

    monkeypatch.setattr(one.parts.leases.lost_claims, "record", refuse)
    claim.mark_lost()
    with logged("ERROR", "{message}") as lines:
        one.parts.dispatcher.put(claim)
        await eventually(lambda: any("can't be recorded" in line for line in lines))
    await put(one, "b")
    assert (await asyncio.wait_for(loop, 20)).task.id != claim.task.id
