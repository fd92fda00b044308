"""Channels that do not answer, through the running service."""

from __future__ import annotations

from pathlib import Path

from tests.service.running import eventually
from tests.service.scripted_channels import GOOD, Start, Upstream, all_done, channel, channels_of, serving, write


def test_tasks_that_may_only_be_repeated_by_a_hanging_channel_hold_no_slot_while_they_wait_for_it(
    start_service: Start, tmp_path: Path
) -> None:
    silent, other = Upstream(silent=True), Upstream()
    channels = channel("silent", silent.url, GOOD, priority=5), channel("other", other.url, GOOD)
    with serving(silent, other):
        service = start_service(
            CHANNELS_FILE=write(tmp_path / "c.toml", *channels),
            UPSTREAM_TIMEOUT="4",
            WORKER_CONCURRENCY="5",
            allowed=("is dead for",),
        )
        hung = [service.accepted(prompt=f"hangs {number}") for number in range(5)]
        eventually(lambda: channels_of(service)["silent"]["state"] == "resting", 20)
        assert {task["channel"] for task in all_done(service, 20)} == {"other"}
        assert not {"completed", "failed"} & {service.task(task_id)["status"] for task_id in hung}
        assert len(other.calls) == 20
