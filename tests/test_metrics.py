from __future__ import annotations

import pytest

from imagegen.metrics import COMMAND_PURPOSES, MONTH_S, Histogram, Meter, RecentRates, TaskLabels
from tests.support import Clock


def test_a_value_on_a_bucket_bound_counts_in_that_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1]
    assert histogram.total == 12.0
    assert histogram.count == 4


def test_histograms_add_up() -> None:
    first, second = Histogram((1.0,)), Histogram((1.0,))
    first.observe(0.5)
    second.observe(3.0)
    first.add(second)
    assert (first.counts, first.total) == ([1, 1], 3.5)


def test_unlisted_models_share_one_label() -> None:
    meter = Meter(["flux"])
    for model in ("flux", "a", "b"):
        meter.finished("failed", "upstream_error", model)
    assert meter.tasks == {
        TaskLabels("failed", "upstream_error", "flux"): 1,
        TaskLabels("failed", "upstream_error", "other"): 2,
    }
    assert meter.finished_by_state() == {"completed": 0, "failed": 3, "cancelled": 0}


def test_the_month_is_projected_from_all_commands_since_the_start() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.redis_commands_sent("claim", 3)
    meter.redis_commands_sent("submit", 3)
    clock.now += 600.0
    assert meter.commands_a_month == pytest.approx(6 / 600 * MONTH_S)


def test_every_purpose_exists_before_its_first_use() -> None:
    assert set(Meter().commands) == set(COMMAND_PURPOSES)


def test_calls_are_counted_by_code_and_by_ambiguity() -> None:
    meter = Meter()
    meter.observe_provider_call("ok", 0.2)
    meter.observe_provider_call("upstream_timeout", 120.0, ambiguous=True)
    assert {code: histogram.count for code, histogram in meter.calls.items()} == {"ok": 1, "upstream_timeout": 1}
    assert meter.ambiguous == 1


def test_images_are_counted_with_their_bytes() -> None:
    meter = Meter()
    meter.images_stored([10, 20])
    assert (meter.images, meter.image_bytes) == (2, 30)


def test_the_first_rates_cover_the_time_since_the_start() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    recent = RecentRates(meter)
    meter.submits["MISS"] += 10
    meter.finished("completed", "", "m")
    meter.requests["GET", "/", 200].observe(0.1)
    meter.redis_commands_sent("submit", 30)
    clock.now += 120.0
    rates = recent.rates()
    assert rates.window_s == 120.0
    assert (rates.submits, rates.finished, rates.requests, rates.commands) == (5.0, 0.5, 0.5, 15.0)


def test_frequently_read_rates_cover_about_the_last_minute() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    recent = RecentRates(meter)
    meter.submits["MISS"] += 1000
    for _ in range(299):
        clock.now += 1.0
        recent.rates()
    clock.now += 1.0
    rates = recent.rates()
    assert rates.submits == 0
    assert 50 <= rates.window_s <= 70


def test_rarely_read_rates_cover_the_time_since_the_last_read() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    recent = RecentRates(meter)
    clock.now += 600.0
    recent.rates()
    clock.now += 600.0
    meter.submits["HIT"] += 20
    rates = recent.rates()
    assert (rates.window_s, rates.submits) == (600.0, 2.0)
