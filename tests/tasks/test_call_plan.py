from __future__ import annotations

from imagegen.tasks.call_plan import PlannedCall, plan_calls, plan_missing_calls
from imagegen.tasks.request import MAX_SEED


def test_pictures_are_spread_over_calls_and_call_k_sends_the_seed_plus_what_was_asked_for() -> None:
    assert list(plan_calls(6, (), 4, 10)) == [PlannedCall((0, 1, 2, 3), 10), PlannedCall((4, 5), 14)]
    assert list(plan_calls(3, (), 1, 10)) == [PlannedCall((0,), 10), PlannedCall((1,), 11), PlannedCall((2,), 12)]


def test_without_a_seed_none_is_sent() -> None:
    assert list(plan_calls(2, (), 1, None)) == [PlannedCall((0,), None), PlannedCall((1,), None)]
    assert list(plan_missing_calls(2, (0,), 4, None)) == [PlannedCall((1,), None)]


def test_what_is_there_is_not_asked_for_again() -> None:
    assert list(plan_calls(6, (0, 1, 2, 3), 4, 10)) == [PlannedCall((4, 5), 14)]
    assert list(plan_calls(2, (0, 1), 4, 10)) == []


def test_the_rest_of_a_call_gets_the_seed_that_its_first_place_would_have_had() -> None:
    assert list(plan_calls(4, (0,), 4, 10)) == [PlannedCall((1, 2, 3), 11)]


def test_what_was_left_out_is_asked_for_with_seeds_that_were_not_sent() -> None:
    assert list(plan_missing_calls(4, (0, 2), 4, 10)) == [PlannedCall((1, 3), 14)]
    assert list(plan_missing_calls(4, (0, 2), 1, 10)) == [PlannedCall((1,), 14), PlannedCall((3,), 15)]


def test_a_second_round_that_was_broken_off_goes_on_above_the_seeds_it_sent() -> None:
    assert list(plan_missing_calls(4, (0, 1, 2), 1, 10, {10, 12, 14})) == [PlannedCall((3,), 15)]
    assert list(plan_missing_calls(6, (0, 1, 2, 4), 4, 10, {10, 14})) == [PlannedCall((3, 5), 16)]


def test_seeds_wrap_around_at_their_end() -> None:
    assert [share.seed for share in plan_calls(2, (), 1, MAX_SEED)] == [MAX_SEED, 0]
    assert [share.seed for share in plan_missing_calls(2, (1,), 1, MAX_SEED, {0})] == [1]
