"""All faults mixed by a seed against two instances on a Redis that fails over or is a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.invariants import SILENT_S
from tests.faults.soup import OF_CLUSTER, OF_PAIR, cluster_world, pair_world, play

SEED = int(os.environ.get("SOUP_SEED", "20261128"))
DURATION_S = float(os.environ.get("SOUP_SECONDS", "0"))


async def run_soup(folder: Path, duration_s: float, quiet_within_s: float) -> None:
    async with pair_world(folder, SEED) as world:
        counts = await play(world, OF_PAIR, duration_s, at_least=len(OF_PAIR))
        print(f"seed {SEED}: {dict(counts)}")
        print(await world.rest(quiet_within_s=quiet_within_s))


async def run_soup_in_cluster(folder: Path, duration_s: float, tasks: int, quiet_within_s: float) -> None:
    async with cluster_world(folder, SEED) as world:
        counts = await play(world, OF_CLUSTER, duration_s, at_least=len(OF_CLUSTER), tasks=tasks)
        print(f"seed {SEED}: {dict(counts)}")
        print(await world.rest(quiet_within_s=quiet_within_s))
        if quiet_within_s > SILENT_S:
            print(await world.money(2 * SILENT_S + 60))


@pytest.mark.timeout(400)
async def test_every_invariant_holds_after_each_fault_once(tmp_path: Path) -> None:
    await run_soup(tmp_path, DURATION_S, 10)


@pytest.mark.timeout(400)
async def test_every_invariant_holds_in_a_cluster_with_moving_slots(tmp_path: Path) -> None:
    await run_soup_in_cluster(tmp_path, 0, 0, 10)


@pytest.mark.faults
@pytest.mark.timeout(1500)
async def test_every_invariant_holds_after_ten_minutes_of_mixed_faults(tmp_path: Path) -> None:
    await run_soup(tmp_path, 600, 200)


@pytest.mark.faults
@pytest.mark.timeout(1500)
async def test_a_thousand_tasks_hold_every_invariant_in_a_cluster_with_moving_slots(tmp_path: Path) -> None:
    await run_soup_in_cluster(tmp_path, 60, 1000, 200)
