"""Tests of the memory of calls: which variant a call gets, and which call it repeats."""

from __future__ import annotations

import pytest

from imagegen.tasks.validation import MAX_VARIANT
from imagegen.web.openai.client_calls import (
    MAX_DELIVERED,
    MAX_GROUPS,
    REPEAT_S,
    UNSURE_REPEAT_S,
    ClientCalls,
    Ending,
    Mark,
    Marking,
    TrackedCall,
)
from tests.support import Clock

NEW, UNSURE, REPEAT = Mark(Marking.NEW), Mark(Marking.UNSURE), Mark(Marking.REPEAT, 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def calls(clock: Clock) -> ClientCalls:
    return ClientCalls(clock)


def begin(calls: ClientCalls, mark: Mark = NEW, fixed: int | None = None, client: str = "a") -> TrackedCall:
    return calls.begin(client, "request", mark, fixed)


def seen(call: TrackedCall) -> tuple[int | None, bool]:
    return call.variant, call.is_repeat


def test_open_and_delivered_calls_are_followed_by_the_next_variant(calls: ClientCalls) -> None:
    first, second = begin(calls), begin(calls)
    first.end(Ending.DELIVERED)
    third = begin(calls)
    assert [seen(call) for call in (first, second, third)] == [(0, False), (1, False), (2, False)]


def test_a_lost_call_is_repeated_once(calls: ClientCalls) -> None:
    begin(calls).end(Ending.LOST)
    assert [seen(begin(calls)), seen(begin(calls))] == [(0, True), (1, False)]


def test_four_lost_calls_have_four_repeats(calls: ClientCalls) -> None:
    lost = [begin(calls) for _ in range(4)]
    for call in lost:
        call.end(Ending.LOST)
    assert sorted(seen(begin(calls, REPEAT)) for _ in range(4)) == [(variant, True) for variant in range(4)]
    assert seen(begin(calls)) == (4, False)


def test_a_call_with_another_open_repeat_is_not_lost(calls: ClientCalls) -> None:
    first, repeat = begin(calls), begin(calls, REPEAT)
    first.end(Ending.LOST)
    assert (seen(repeat), seen(begin(calls))) == ((0, True), (1, False))
    repeat.end(Ending.LOST)
    assert seen(begin(calls)) == (0, True)


def test_clients_and_requests_do_not_meet(calls: ClientCalls) -> None:
    begin(calls).end(Ending.LOST)
    assert seen(begin(calls, client="b")) == (0, False)
    assert seen(calls.begin("a", "another", NEW)) == (0, False)


def test_marked_repeats_of_open_calls_join_one_each(calls: ClientCalls) -> None:
    for _ in range(3):
        begin(calls)
    assert [begin(calls, REPEAT).variant for _ in range(4)] == [0, 1, 2, 3]
    again = Mark(Marking.REPEAT, 2)
    assert [begin(calls, again).variant for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_marked_repeat_of_an_answer_lost_on_its_way_joins_it(calls: ClientCalls, clock: Clock) -> None:
    begin(calls).end(Ending.DELIVERED)
    repeat = begin(calls, REPEAT)
    assert seen(repeat) == (0, True)
    repeat.end(Ending.DELIVERED)
    clock.now += UNSURE_REPEAT_S + 1
    assert seen(begin(calls, REPEAT)) == (1, False)


def test_a_marked_repeat_of_an_unknown_call_waits_for_its_variant(calls: ClientCalls) -> None:
    call = begin(calls, REPEAT)
    assert seen(call) == (None, False)
    call.join(3)
    assert (seen(call), seen(begin(calls))) == ((3, True), (4, False))
    call.end(Ending.DELIVERED)


def test_repeats_after_a_restart_take_one_lost_call_each(calls: ClientCalls) -> None:
    first, second = begin(calls, REPEAT), begin(calls, REPEAT)
    first.place([0, 1, 2, 3], [1, 2, 3])
    first.end(Ending.DELIVERED)
    second.place([0, 1, 2, 3], [1, 2, 3])
    third = begin(calls, REPEAT)
    assert [seen(call) for call in (first, second, third)] == [(1, True), (2, True), (3, True)]
    assert seen(begin(calls)) == (4, False)


def test_a_repeat_after_a_restart_takes_the_last_call_if_none_is_known_as_lost(calls: ClientCalls) -> None:
    repeats = [begin(calls, REPEAT) for _ in range(3)]
    for repeat in repeats:
        repeat.place([0, 1], [])
    assert [seen(repeat) for repeat in repeats] == [(1, True), (0, True), (2, False)]


def test_a_repeat_of_nothing_is_a_new_call(calls: ClientCalls) -> None:
    lost = begin(calls, REPEAT)
    lost.end(Ending.LOST)
    call = begin(calls, REPEAT)
    call.place([], [])
    assert seen(call) == (0, False)


def test_a_refused_call_comes_again_as_a_new_one(calls: ClientCalls, clock: Clock) -> None:
    for _ in range(3):
        begin(calls)
    calls.refuse("a", UNSURE)
    calls.refuse("a", REPEAT)
    assert seen(begin(calls, REPEAT)) == (3, False)
    assert seen(begin(calls, REPEAT)) == (0, True)
    calls.refuse("a", REPEAT)
    calls.refuse("b", UNSURE)
    assert seen(begin(calls, REPEAT)) == (1, True)
    calls.refuse("a", UNSURE)
    clock.now += 1000
    assert seen(begin(calls, REPEAT)) == (2, True)


def test_repeats_of_calls_that_never_arrived_are_new_calls(calls: ClientCalls) -> None:
    begin(calls, NEW, client="b")
    unreached = [begin(calls, Mark(Marking.REPEAT, count)) for count in (3, 2)]
    for call in unreached:
        call.place([], [])
    later = begin(calls, Mark(Marking.REPEAT, 3))
    assert [seen(call) for call in (*unreached, later)] == [(0, False), (1, False), (1, True)]
    assert seen(begin(calls, Mark(Marking.REPEAT, 6))) == (2, False)


def test_a_marked_repeat_after_one_that_never_arrived_joins_its_call(calls: ClientCalls) -> None:
    first, repeat = begin(calls), begin(calls, REPEAT)
    assert (seen(repeat), seen(begin(calls, Mark(Marking.REPEAT, 4)))) == ((0, True), (0, True))
    for call in (first, repeat):
        call.end(Ending.DELIVERED)
    assert seen(begin(calls, Mark(Marking.REPEAT, 6))) == (0, True)


def test_a_marked_repeat_joins_a_delivered_call_after_one_that_never_arrived(calls: ClientCalls) -> None:
    begin(calls).end(Ending.DELIVERED)
    begin(calls, REPEAT).end(Ending.DELIVERED)
    assert seen(begin(calls, Mark(Marking.REPEAT, 3))) == (0, True)


def test_a_marked_repeat_joins_a_call_that_began_at_another_instance(calls: ClientCalls) -> None:
    repeat = begin(calls, REPEAT)
    repeat.place([0], [])
    repeat.end(Ending.DELIVERED)
    assert seen(begin(calls, Mark(Marking.REPEAT, 3))) == (0, True)


def test_marked_repeats_of_several_answers_lost_on_their_way_join_one_each(calls: ClientCalls) -> None:
    for call in [begin(calls) for _ in range(3)]:
        call.end(Ending.DELIVERED)
    repeats = [begin(calls, REPEAT) for _ in range(3)]
    assert [seen(call) for call in repeats] == [(0, True), (1, True), (2, True)]
    for call in repeats:
        call.end(Ending.DELIVERED)
    again = Mark(Marking.REPEAT, 2)
    assert sorted(seen(begin(calls, again)) for _ in range(3)) == [(0, True), (1, True), (2, True)]


def test_delivered_calls_of_long_ago_are_forgotten(calls: ClientCalls, clock: Clock) -> None:
    for _ in range(MAX_DELIVERED + 1):
        begin(calls).end(Ending.DELIVERED)
    assert seen(begin(calls, REPEAT)) == (1, True)
    clock.now += UNSURE_REPEAT_S + 1
    assert not begin(calls, Mark(Marking.REPEAT, 1), client="a").is_repeat


def test_a_failure_is_repeated_to_those_that_may_repeat_by_themselves(calls: ClientCalls, clock: Clock) -> None:
    begin(calls).end(Ending.FAILED)
    repeat = begin(calls, UNSURE)
    assert seen(repeat) == (0, True)
    repeat.end(Ending.FAILED)
    clock.now += UNSURE_REPEAT_S + 1
    marked = begin(calls, REPEAT)
    assert seen(marked) == (0, True)
    marked.end(Ending.FAILED)
    clock.now += REPEAT_S + 1
    assert seen(begin(calls, REPEAT)) == (0, False)


def test_a_new_call_takes_the_variant_that_gave_no_image(calls: ClientCalls) -> None:
    first, second = begin(calls), begin(calls)
    first.end(Ending.FAILED)
    second.end(Ending.DELIVERED)
    assert [seen(begin(calls)), seen(begin(calls))] == [(0, False), (2, False)]


def test_a_request_with_one_image_keeps_its_variant(calls: ClientCalls) -> None:
    first, second = begin(calls, fixed=7), begin(calls, fixed=7)
    assert [seen(call) for call in (first, second)] == [(7, False), (7, False)]
    first.end(Ending.LOST)
    second.end(Ending.LOST)
    assert seen(begin(calls, fixed=7)) == (7, True)
    assert seen(begin(calls, REPEAT, fixed=7, client="b")) == (7, True)


def variant_of(call: TrackedCall) -> int:
    assert call.variant is not None
    return call.variant


def test_many_taken_variants_are_skipped_in_few_steps(calls: ClientCalls) -> None:
    call, tried = begin(calls), []
    while variant_of(call) < 1000:
        tried.append(call.variant)
        call.skip()
    assert tried[:6] == [0, 1, 2, 3, 4, 6]
    assert len(tried) < 16
    assert begin(calls).variant == variant_of(call) + 1


def test_variants_stay_below_their_limit(calls: ClientCalls) -> None:
    call = begin(calls)
    for _ in range(60):
        call.skip()
        assert 0 <= variant_of(call) <= MAX_VARIANT


def test_the_memory_is_bounded_and_keeps_open_calls(calls: ClientCalls) -> None:
    begin(calls)
    for number in range(MAX_GROUPS + 10):
        calls.begin("b", str(number), NEW).end(Ending.LOST)
    assert seen(begin(calls)) == (1, False)
    assert not calls.begin("b", "0", NEW).is_repeat
    assert calls.begin("b", str(MAX_GROUPS + 9), NEW).is_repeat
