"""Budgets of a day whose value another program has overwritten."""

from __future__ import annotations

import pytest

from imagegen.tasks.cost import day_of
from tests.conftest import MakeInstance
from tests.queue_budgets import PRICE, TOTAL, limited, put, refusals, used
from tests.support import eventually

FOREIGN = [b"hello, world", b"7", b"2026-12-01T00:00:00Z", b"\xff" * 16, b"\x7f" * 24, b"{}"]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("way", ["submit", "end", "read"])
async def test_a_foreign_value_of_the_budgets_is_moved_aside_and_what_was_spent_written_back(
    make_instance: MakeInstance, foreign: bytes, way: str
) -> None:
    one = limited(make_instance(), (TOTAL, 4 * PRICE))
    waiting, _ = await put(one, "a", "b")
    redis, key = one.connection.commands, one.keys.budgets(day := day_of(one.client_queue.clock()))
    await redis.set(key, foreign)
    if way == "submit":
        assert await refusals(one, "c") == [None]
    elif way == "end":
        await one.cancel(waiting.id)
    else:
        await one.verbs.read_budgets(day)
        assert one.verbs.budgets.used(day, TOTAL) == 2 * PRICE
    expected = {"submit": 3, "end": 1, "read": 2}[way] * PRICE

    async def is_restored() -> bool:
        return await used(one) == expected

    await eventually(is_restored, 10)
    aside = await one.stored(f"{key}:aside")
    assert aside.rstrip(b"\0") == foreign
    assert 0 < await redis.ttl(f"{key}:aside") <= 7 * 86_400
    assert await redis.ttl(key) > 0
