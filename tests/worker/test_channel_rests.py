"""Channels that rest since their images do not come, or can't be used, by hand-set clocks."""

from __future__ import annotations

import math

import pytest

from imagegen.channels_file import Channel, ChannelKey
from imagegen.errors import UpstreamError
from imagegen.worker.answer_times import LOST_FOR_S, MIN_SILENT_S, SILENT_CALLS
from imagegen.worker.channel_report import ChannelReport
from imagegen.worker.key_health import PROBE_S
from imagegen.worker.pacing import MAX_UNSAVED, USELESS_TASKS
from imagegen.worker.router import Router
from tests.support import Clock, logged
from tests.worker.routed_calls import ends, router, taken


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


def test_a_channel_of_which_no_image_can_be_fetched_leaves_the_calls_of_the_model_to_others(clock: Clock) -> None:
    keys = (ChannelKey("a", "file"),)
    made = router(clock, Channel("one", "together", keys), Channel("two", "together", keys))
    for number in range(MAX_UNSAVED):
        made.images_wait(f"task {number}", "one", "m")
    made.images_wait("task", "former channel", "m")
    assert [ends(made, taken(made)) for _ in range(3)] == ["two-a"] * 3
    assert {ends(made, taken(made, "other")) for _ in range(4)} == {"one-a", "two-a"}
    made.image_saved("one", "m")
    clock.now += PROBE_S
    assert {ends(made, taken(made)) for _ in range(4)} == {"one-a", "two-a"}


def test_a_channel_without_a_usable_image_for_tasks_in_a_row_rests_until_one_of_its_images_is_saved(
    clock: Clock,
) -> None:
    keys = (ChannelKey("a", "file"),)
    made = router(clock, Channel("one", "together", keys, priority=1), Channel("two", "together", keys))
    for number in range(3 * USELESS_TASKS):  # one task of a few has an image, and one asks again and again
        made.images_useless("poison", "one", "m")
        made.images_useless(f"poison {number}", "one", "m")
        if number % (USELESS_TASKS - 2) == 0:
            made.image_saved("one", "m")
    assert [ends(made, taken(made)) for _ in range(3)] == ["one-a"] * 3
    made.image_saved("one", "m")
    for number in range(USELESS_TASKS):
        made.images_useless(f"task {number}", "one", "m")
    assert [ends(made, taken(made)) for _ in range(3)] == ["two-a"] * 3
    assert {ends(made, taken(made, "other")) for _ in range(3)} == {"one-a"}
    probes = 0
    for _ in range(3600):
        clock.now += 1
        probes += ends(made, taken(made)) == "one-a"
    assert 15 <= probes <= 30
    made.image_saved("one", "m")
    assert ends(made, taken(made)) == "one-a"


def test_few_tasks_that_wait_for_their_images_move_calls_to_another_channel_but_stop_none_without_one(
    clock: Clock,
) -> None:
    keys = (ChannelKey("a", "file"), ChannelKey("b", "file"))
    lone = router(clock, Channel("one", "together", keys))
    both = router(clock, Channel("one", "together", keys, priority=1), Channel("two", "together", keys))
    for made in (lone, both):
        for number in range(USELESS_TASKS):
            assert ends(made, taken(made)).startswith("one")
            made.images_wait(f"task {number}", "one", "m")
    assert ends(lone, taken(lone)).startswith("one")
    assert ends(both, taken(both)).startswith("two")


LOST = UpstreamError("upstream_timeout", "no answer in time", retryable=True, ambiguous=True)


def answered_once(clock: Clock, *channels: Channel) -> Router:
    """Return a router of channels of which the first has answered a call after 1 s."""
    made = router(clock, *channels)
    call = taken(made)
    clock.now += 1.0
    assert ends(made, call).startswith("first")
    return made


@pytest.mark.parametrize(("concurrency", "silent_calls"), [(None, 3), (1, 1)])
def test_a_channel_with_calls_open_for_far_longer_than_usual_is_left_until_it_answers_one(
    clock: Clock, concurrency: int | None, silent_calls: int
) -> None:
    keys = (ChannelKey("a", "file"),)
    first = Channel("first", "together", keys, priority=1, concurrency=concurrency)
    made = answered_once(clock, first, Channel("second", "together", keys))
    hung = [taken(made) for _ in range(silent_calls)]
    clock.now += MIN_SILENT_S
    assert {call.route.channel.name for call in hung} == {"first"}
    report = ChannelReport(made.routes, made, clock=made.clock, wall=lambda: clock.now)
    assert [status.state for status in report.channels()] == ["healthy", "healthy"]
    clock.now += 1.0
    assert [status.state for status in report.channels()] == ["resting", "healthy"]
    with logged("WARNING") as lines:
        assert [ends(made, taken(made)) for _ in range(5)] == ["second-a"] * 5
    assert [line for line in lines if "answers no call for m" in line] == lines[:1]
    assert made.opens_at("other", clock.now) == (clock.now if concurrency is None else math.inf)
    ends(made, hung.pop())
    for call in hung:
        ends(made, call, LOST)
    assert ends(made, taken(made)) == "first-a"


def test_a_channel_is_left_for_a_minute_after_calls_that_got_no_answer_in_time(clock: Clock) -> None:
    keys = (ChannelKey("a", "file"),)
    made = answered_once(clock, Channel("first", "together", keys, priority=1), Channel("second", "together", keys))
    hung = [taken(made) for _ in range(SILENT_CALLS)]
    clock.now += 120.0
    for call in hung:
        assert ends(made, call, LOST) == "first-a"
    assert ends(made, taken(made)) == "second-a"
    clock.now += LOST_FOR_S
    assert ends(made, taken(made)) == "first-a"


def test_a_channel_that_answers_others_is_not_left_for_calls_that_get_no_answer(clock: Clock) -> None:
    keys = (ChannelKey("a", "file"),)
    made = answered_once(clock, Channel("first", "together", keys, priority=1), Channel("second", "together", keys))
    for _ in range(2 * SILENT_CALLS):
        taken(made)
    for _ in range(10):
        clock.now += MIN_SILENT_S - 1
        assert ends(made, taken(made)) == "first-a"


def test_a_silent_channel_keeps_its_calls_while_no_other_one_takes_them(clock: Clock) -> None:
    keys = (ChannelKey("a", "file"),)
    made = answered_once(clock, Channel("first", "together", keys, priority=1), Channel("second", "together", keys))
    for _ in range(SILENT_CALLS):
        taken(made)
    clock.now += MIN_SILENT_S + 1
    for _ in range(2):
        failed = UpstreamError("upstream_error", "no connection", retryable=True)
        assert ends(made, taken(made), failed) == "second-a"
    assert ends(made, taken(made)) == "first-a"
