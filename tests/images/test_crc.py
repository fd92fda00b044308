"""Tests of the check sums that are used where `isal` has no wheel."""

from __future__ import annotations

import os

from imagegen.images.crc import crc32, crc32_combine
from tests.support import over_rows


@over_rows("length", [0, 1, 4_096, 65_536, 65_537, 200_000])
def test_the_check_sum_of_two_parts_is_that_of_the_whole(length: int) -> None:
    first, second = os.urandom(1_000), os.urandom(length)
    assert crc32_combine(crc32(first), crc32(second), length) == crc32(first + second)
