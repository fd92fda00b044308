"""Channels that rest since their images do not come, or can't be used, by hand-set clocks."""

from __future__ import annotations

import pytest

from imagegen.channels_file import Channel, ChannelKey
from imagegen.worker.key_health import PROBE_S
from imagegen.worker.pacing import MAX_UNSAVED, USELESS_TASKS
from tests.support import Clock
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
