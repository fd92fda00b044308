"""Channels with limits of their own beside others, through the running service."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.service.running import eventually
from tests.service.scripted_channels import GOOD, SCHNELL, Start, Upstream, channel, serving, write

CALL_S = 0.8


@pytest.mark.parametrize(
    "fields",
    [{"concurrency": 1}, {"rate": "60/minute"}, {"concurrency": 1, "priority": 5}],
    ids=["full", "paced", "full, with a spare one"],
)
def test_tasks_that_wait_for_a_channel_with_limits_hold_no_slot_and_keep_their_order(
    start_service: Start, tmp_path: Path, fields: dict[str, Any]
) -> None:
    slow, fast = Upstream(delay_s=CALL_S), Upstream()
    channels = [channel("slow", slow.url, GOOD, models=["local/*"], **fields), channel("fast", fast.url, GOOD)]
    with serving(slow, fast):
        file = (
            write(tmp_path / "c.toml", *channels)
            if "priority" in fields
            else write(tmp_path / "c.toml", channels[0], {**channels[1], "models": [SCHNELL]})
        )
        service = start_service(CHANNELS_FILE=file, WORKER_CONCURRENCY="3")
        waiting = [service.accepted(prompt=f"waits {number}", model="local/x") for number in range(8)]
        eventually(lambda: slow.calls)
        others = [service.accepted(prompt=f"other {number}", model=SCHNELL) for number in range(5)]
        assert {service.finished(task_id)["status"] for task_id in others} == {"completed"}
        assert len(slow.calls) <= 3
        tasks = [service.finished(task_id) for task_id in waiting]
        assert {(task["status"], task["channel"], task["attempts"]) for task in tasks} == {("completed", "slow", 1)}
        ends = [task["finishedAt"] for task in tasks]
        assert ends == sorted(ends)
        times = slow.times(GOOD)
        assert all(later - earlier >= CALL_S - 0.05 for earlier, later in pairwise(times))
