"""Tests of the tables that one test goes through."""

from __future__ import annotations

import pytest

from tests.support import over_rows


async def test_a_table_fails_with_each_row_that_fails() -> None:
    @over_rows(("number", "double"), [(1, 2), (3, 3), (4, 8), (5, 5)])
    async def test(number: int, double: int) -> None:
        assert number * 2 == double

    with pytest.raises(AssertionError, match=r"2 rows fail\n\(3, 3\): Assertion.*\n\(5, 5\): Assertion"):
        await test()


def test_a_row_without_the_expected_error_fails_like_any_other() -> None:
    @over_rows("text", ["x", "1", "y", "2"])
    def test(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            int(text)

    with pytest.raises(AssertionError, match=r"2 rows fail\n1: .*DID NOT RAISE.*\n2: .*DID NOT RAISE"):
        test()


def test_tables_multiply_and_keep_the_marks_of_their_test() -> None:
    seen = []

    @over_rows("letter", "ab")
    @over_rows("number", range(2))
    @pytest.mark.xfail
    def test(letter: str, number: int) -> None:
        seen.append(f"{letter}{number}")

    test()
    assert seen == ["a0", "a1", "b0", "b1"]
    assert [mark.name for mark in vars(test)["pytestmark"]] == ["xfail"]


def test_a_row_that_fails_is_called_by_its_name() -> None:
    @over_rows(("number", "double"), [pytest.param(1, 3, id="odd"), (2, 4)])
    def test(number: int, double: int) -> None:
        assert number * 2 == double

    with pytest.raises(AssertionError, match=r"1 rows fail\nodd: Assertion"):
        test()


async def test_each_row_of_a_table_is_given_with_the_fixtures() -> None:
    seen = []

    @over_rows("number", range(3))
    async def test(name: str, number: int) -> None:
        seen.append((name, number))

    await test(name="fixture")
    assert seen == [("fixture", 0), ("fixture", 1), ("fixture", 2)]
