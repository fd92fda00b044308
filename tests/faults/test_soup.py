"""All faults that are known, mixed by a seed, against two instances and a Redis that fails over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults.soup import check_invariants, play, soup_world

SEED = int(os.environ.get("SOUP_SEED", "20261128"))


async def simmer(folder: Path, duration_s: float) -> None:
    async with soup_world(folder, SEED) as world:
        counts = await play(world, duration_s)
        print(f"seed {SEED}: {dict(counts)}")
        print(await check_invariants(world))


@pytest.mark.timeout(240)
async def test_every_invariant_holds_after_a_minute_of_mixed_faults(tmp_path: Path) -> None:
    await simmer(tmp_path, 60)


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_every_invariant_holds_after_ten_minutes_of_mixed_faults(tmp_path: Path) -> None:
    await simmer(tmp_path, 600)
