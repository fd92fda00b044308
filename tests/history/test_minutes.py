"""Tests of the counts of minutes: sums over instances, and percentiles of merged histograms."""

from __future__ import annotations

import msgspec
import pytest

from imagegen.history.minutes import Minute, merge_into, quantile
from tests.support import over_rows

BOUNDS = (1.0, 2.0, 4.0)


def test_minutes_of_two_instances_add_up_but_not_what_both_see() -> None:
    one = Minute(60, 5, 2.0, 3, {"miss": 2}, {"completed": 1}, {"ok": 1}, {0: 1}, {2: 4}, 10, 1, 7, 1)
    two = Minute(60, 4, 9.0, 2, {"miss": 1, "hit": 1}, {"failed": 1}, {}, {0: 2, 3: 1}, {}, 5, 0, 3, 1)
    minutes: dict[int, Minute] = {}
    merge_into(minutes, [one, two])
    submits, tasks = {"miss": 3, "hit": 1}, {"completed": 1, "failed": 1}
    assert minutes == {60: Minute(60, 5, 9.0, 5, submits, tasks, {"ok": 1}, {0: 3, 3: 1}, {2: 4}, 15, 1, 10, 2)}


@over_rows(
    ("buckets", "share", "value"),
    [
        ({}, 0.5, None),
        ({0: 2}, 0.5, 0.5),
        ({1: 4}, 0.25, 1.25),
        ({0: 1, 2: 1}, 0.95, 3.8),
        ({0: 99, 3: 1}, 0.5, 50 / 99),
        ({3: 1}, 0.5, 4.0),
    ],
)
def test_a_percentile_is_interpolated_within_its_bucket(
    buckets: dict[int, int], share: float, value: float | None
) -> None:
    assert quantile(buckets, BOUNDS, share) == pytest.approx(value)


def test_a_minute_of_another_version_can_be_read() -> None:
    stored = b'{"at":60,"tasks":{"completed":1},"waits":{"3":2},"invented_later":[1]}'
    assert msgspec.json.decode(stored, type=Minute) == Minute(60, tasks={"completed": 1}, waits={3: 2})
