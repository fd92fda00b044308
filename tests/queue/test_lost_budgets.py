"""Budgets of a day after Redis has lost changes of them: what each instance has seen is added once."""

from __future__ import annotations

import asyncio
import random

import pytest

from imagegen.errors import BudgetExceeded
from imagegen.tasks.cost import day_of
from tests.conftest import Instance, MakeInstance
from tests.faults.proxy import FaultProxy
from tests.queue_budgets import KEY, PRICE, TOTAL, limited, put, refusals, used
from tests.support import eventually, logged


async def is_used(instance: Instance, amount: int) -> bool:
    return await used(instance) == amount


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_change_after_the_loss_of_others_counts_on_top_of_them(make_instance: MakeInstance, lost: int) -> None:
    one = limited(make_instance(), (TOTAL, 9 * PRICE), (KEY, 9 * PRICE))
    key, redis = one.keys.budgets(day_of(one.client_queue.clock())), one.connection.commands
    await put(one, "a")
    before = await one.stored(key)
    for name in range(lost):
        await put(one, name)
    await redis.set(key, before)
    await put(one, "b")
    await eventually(lambda: is_used(one, (2 + lost) * PRICE))
    assert await used(one, KEY) == (2 + lost) * PRICE
    await put(one, "c")
    assert await used(one) == (3 + lost) * PRICE


@pytest.mark.parametrize("first", [0, 1])
async def test_budgets_that_different_instances_have_seen_are_all_written_back(
    make_instance: MakeInstance, first: int
) -> None:
    instances = [limited(make_instance(start=False), (TOTAL, 100 * PRICE), (KEY, 90 * PRICE)) for _ in range(2)]
    await put(instances[0], "a")
    await put(limited(instances[1], (TOTAL, 100 * PRICE)), "b")
    key = instances[0].keys.budgets(day_of(instances[0].client_queue.clock()))
    await instances[0].connection.commands.delete(key)
    for instance in (instances[first], instances[1 - first], instances[first]):
        await instance.verbs.restore_budgets()
    assert (await used(instances[0]), await used(instances[0], KEY)) == (2 * PRICE, PRICE)
    assert [await instance.verbs.restore_budgets() for instance in instances] == [0, 0]


@pytest.mark.parametrize("seed", range(8))
async def test_instances_that_handle_a_loss_at_different_times_add_all_that_was_lost_once(
    make_instance: MakeInstance, seed: int
) -> None:
    chance, limits = random.Random(seed), ((TOTAL, 1_000 * PRICE), (KEY, 1_000 * PRICE))
    instances = [limited(make_instance(start=False), *limits[: 1 + number % 2]) for number in range(3)]
    key, redis = instances[0].keys.budgets(day_of(instances[0].client_queue.clock())), instances[0].connection.commands
    count, of_key = 0, 0
    await instances[0].verbs.create_group()

    async def put_some(most: int, *among: Instance, least: int = 0) -> None:
        nonlocal count, of_key
        for _ in range(chance.randint(least, most)):
            number = chance.choice([number for number, instance in enumerate(instances) if instance in among])
            await put(instances[number], count)
            count, of_key = count + 1, of_key + number % 2

    for instance in instances * 3:
        await put_some(1, instance, least=1)
    for _ in range(2):
        older = await instances[0].stored(key)
        await put_some(6, *instances)
        if chance.random() < 0.3:
            await redis.delete(key)
        else:
            await redis.set(key, older)
            for instance in instances:
                instance.verbs.budgets.on_new_server()
        waiting = chance.sample(instances, 3)
        await put_some(2, *waiting)
        for instance in list(waiting):
            await instance.verbs.restore_budgets()
            await put_some(3, *instances)
        for instance in instances:
            await instance.verbs.restore_budgets()
        assert (await used(instances[0]), await used(instances[0], KEY)) == (count * PRICE, of_key * PRICE)
        for instance in instances:
            await instance.verbs.read_budgets(day_of(instance.client_queue.clock()))
            assert instance.verbs.budgets.used(day_of(instance.client_queue.clock()), TOTAL) == count * PRICE


async def test_a_budget_whose_key_alone_was_deleted_is_written_back_at_its_next_change(
    make_instance: MakeInstance,
) -> None:
    one, two = (limited(make_instance(), (TOTAL, 5 * PRICE)) for _ in range(2))
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    for instance, name in ((one, "a"), (one, "b"), (two, "c")):
        await put(instance, name)
    await one.connection.commands.delete(one.keys.budgets(day_of(one.client_queue.clock())))
    with logged("WARNING") as lines:
        await put(one, "d")
        await eventually(lambda: is_used(one, 4 * PRICE))
        await eventually(lambda: any("lost a part of the budgets" in line for line in lines))
    await put(two, "e")
    assert await is_used(two, 5 * PRICE)
    assert [type(refusal) for refusal in await refusals(two, "f")] == [BudgetExceeded]


@pytest.mark.parametrize("seed", range(12))
async def test_changes_that_come_while_a_loss_is_handled_count_once_too(make_instance: MakeInstance, seed: int) -> None:
    chance, limits = random.Random(seed), ((TOTAL, 1_000 * PRICE), (KEY, 1_000 * PRICE))
    instances = [limited(make_instance(start=False), *limits[: 1 + number % 2]) for number in range(3)]
    key, redis = instances[0].keys.budgets(day_of(instances[0].client_queue.clock())), instances[0].connection.commands
    for instance in instances:
        instance.verbs.budgets.on_fewer_changes = lambda: None
    numbers = [number for _ in range(3) for number in range(3)]
    await instances[0].verbs.create_group()

    async def put_some(most: int) -> None:
        chosen = [chance.randrange(3) for _ in range(chance.randint(0, most))]
        first = len(numbers)
        numbers.extend(chosen)
        await asyncio.gather(*(put(instances[number], first + at) for at, number in enumerate(chosen)))

    await asyncio.gather(*(put(instances[number], at) for at, number in enumerate(numbers)))
    for _ in range(2):
        older = await instances[0].stored(key)
        await put_some(6)
        await redis.set(key, older)
        for instance in instances:
            instance.verbs.budgets.on_new_server()
        await put_some(4)
        for instance in chance.sample(instances, 3) + instances:
            steps = [put_some(3), instance.verbs.restore_budgets()]
            await asyncio.gather(*(steps if chance.random() < 0.5 else steps[::-1]))
        of_key = sum(number % 2 for number in numbers)
        assert (await used(instances[0]), await used(instances[0], KEY)) == (len(numbers) * PRICE, of_key * PRICE)


async def test_changes_after_a_loss_count_once_if_the_reply_to_their_write_back_is_lost(
    make_instance: MakeInstance, redis_url: str
) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://")) as proxy:
        one, two = limited(make_instance(start=False, url=proxy.url), (TOTAL, 90 * PRICE)), make_instance(start=False)
        one.verbs.budgets.on_fewer_changes = lambda: None
        key, redis = one.keys.budgets(day_of(one.client_queue.clock())), two.connection.commands
        await put(one, "a")
        before = await one.stored(key)
        for name in ("b", "c"):
            await put(one, name)
        await redis.set(key, before)
        await put(one, "d")
        proxy.drop_reply = lambda request: b"lost-budgets" in request and proxy.dropped == 0
        assert await one.connection.retry_until_available(one.verbs.restore_budgets)
        assert proxy.dropped == 1
        assert await used(two) == 4 * PRICE


async def test_the_budgets_of_thousands_of_keys_are_written_back(make_instance: MakeInstance) -> None:
    one, slots = limited(make_instance(start=False), (TOTAL, 90 * PRICE)), 9_000
    day = day_of(one.client_queue.clock())
    key, redis = one.keys.budgets(day), one.connection.commands
    await put(one, "a")
    await redis.set(key, b"".join(number.to_bytes(8) for number in range(9, slots + 11)))
    await one.verbs.read_budgets(day)
    await redis.delete(key)
    assert await one.verbs.restore_budgets()
    assert [await used(one, slot) for slot in (0, 1, 2_000, slots)] == [10, 11, 2_010, slots + 10]
    assert not await one.verbs.restore_budgets()


async def test_first_changes_of_an_instance_on_another_server_hide_no_loss_of_those_before(
    make_instance: MakeInstance,
) -> None:
    one, two = (limited(make_instance(start=False), (TOTAL, 90 * PRICE)) for _ in range(2))
    for instance in (one, two):
        instance.verbs.budgets.on_fewer_changes = lambda: None
    await one.verbs.create_group()
    await put(one, "a")
    await put(one, "b")
    await one.connection.commands.delete(one.keys.budgets(day_of(one.client_queue.clock())))
    for instance in (one, two):
        instance.verbs.budgets.on_new_server()
    await put(two, "c")
    await put(two, "d")
    for instance in (two, one):
        await instance.verbs.restore_budgets()
    assert await used(one) == 4 * PRICE


@pytest.mark.parametrize("start", [True, False])
async def test_budgets_of_others_are_read_after_a_failover_by_an_instance_that_had_seen_none(
    make_instance: MakeInstance, start: bool
) -> None:
    one, two = limited(make_instance(start=False), (TOTAL, 90 * PRICE)), make_instance(start=start)
    await one.verbs.create_group()
    day, budgets = day_of(one.client_queue.clock()), two.verbs.budgets
    budgets.on_new_server()
    for count in range(1, 4):
        await put(one, count)

        async def is_seen() -> bool:
            await two.verbs.read_budgets(day)
            return budgets.used(day, TOTAL) == count * PRICE  # noqa: B023 - awaited within the loop

        await eventually(is_seen)
