"""Tests of malloc tuning by the page faults of a separate process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imagegen.memory_tuning import tune_malloc

FAULTS = """
import resource
from imagegen.memory_tuning import tune_malloc
if {tuned}:
    tune_malloc()
def pass_through():
    pieces = [b"x" * 100_000 for _ in range(40)]
for _ in range(5):
    pass_through()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    pass_through()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, tuned: bool) -> int:
    command = [sys.executable, "-c", FAULTS.format(tuned=tuned)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_image_buffers_are_not_returned_to_the_system_each_time() -> None:
    if not tune_malloc():
        pytest.skip("this C library's malloc can't be tuned")
    assert faults(tuned=True) < faults(tuned=False) / 10
