"""Tests of the tables that one test goes through."""

from __future__ import annotations

import pytest
from support import over_rows


async def test_a_table_fails_with_each_row_that_fails() -> None:
    @over_rows(("number", "double"), [(1, 2), (3, 3), (4, 8), (5, 5)])
    async def test(number: int, double: int) -> None:
        assert number * 2 == double

    with pytest.raises(AssertionError, match=r"2 rows fail\n\(3, 3\): Assertion.*\n\(5, 5\): Assertion"):
        await test()


async def test_each_row_of_a_table_is_given_with_the_fixtures() -> None:
    seen = []

    @over_rows("number", range(3))
    async def test(name: str, number: int) -> None:
        seen.append((name, number))

    await test(name="fixture")
    assert seen == [("fixture", 0), ("fixture", 1), ("fixture", 2)]
