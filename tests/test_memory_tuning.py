"""Tests of malloc tuning by the page faults and the memory of a separate process."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys

import pytest

from imagegen import memory_tuning
from imagegen.memory_tuning import tune_malloc
from tests.support import eventually

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


FREED = """
import asyncio
from imagegen import memory_tuning
memory_tuning.tune_malloc()
async def main():
    returning = asyncio.create_task(memory_tuning.return_freed_memory(0.01))
    await asyncio.sleep(0)
    before = memory_tuning.resident_bytes()
    bursts = [[b"x" * 300_000 for _ in range(150)] for _ in range(2)]
    kept, grown = b"y" * 100_000, memory_tuning.resident_bytes() - before
    for left in (0.75, 0.25):
        bursts.pop()
        async with asyncio.timeout(30):
            while memory_tuning.resident_bytes() - before > grown * left:
                await asyncio.sleep(0.01)
    print(len(kept), returning.done())
asyncio.run(main())
"""


def test_memory_that_each_of_two_bursts_has_freed_goes_back_to_the_system() -> None:
    if not tune_malloc():
        pytest.skip("this C library's malloc can't be tuned")
    ended = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=False)
    assert ended.stdout == "100000 False\n", ended.stderr


async def test_the_return_of_memory_goes_on_after_no_descriptor_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    if not tune_malloc():
        pytest.skip("this C library's malloc can't be tuned")
    readings = 0

    def no_descriptor() -> int:
        nonlocal readings
        readings += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(memory_tuning, "resident_bytes", no_descriptor)
    returning = asyncio.create_task(memory_tuning.return_freed_memory(0.001))
    await eventually(lambda: readings > 2)
    assert not returning.done()
    returning.cancel()
