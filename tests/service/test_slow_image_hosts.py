"""Image hosts of the provider that do not answer, or have no image yet: no slot is filled, nothing is paid twice."""

from __future__ import annotations

import time

import pytest

from imagegen.worker.saving import SLOW_AFTER_S
from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import calls_about, eventually
from tests.support import slowness


def is_checkpointed(upstream: EmulatorProcess, prompt: str) -> bool:
    """Return whether a call was answered so long ago that its links are in the checkpoint."""
    calls = calls_about(upstream, prompt)
    return bool(calls and calls[0]["answered_at"] and time.time() - calls[0]["answered_at"] > 2 * SLOW_AFTER_S)


@pytest.mark.parametrize("fault", ["image_hang", "image_404"])
def test_tasks_of_a_bad_image_host_fill_no_slots_and_are_paid_once_also_after_a_kill(
    start_service: StartService, upstream: EmulatorProcess, fault: str
) -> None:
    service = start_service(upstream.url, WORKER_CONCURRENCY="2", FAIR_WINDOW="100")
    bad = [f"{number} of {fault} {{{{fault:{fault} link_times=9}}}}" for number in range(10)]
    began = time.monotonic()
    bad_ids = [service.accepted(prompt=prompt, n=2) for prompt in bad]
    service.made(prompt=f"good beside {fault}")
    assert time.monotonic() - began < 15 * slowness()
    eventually(lambda: all(is_checkpointed(upstream, prompt) for prompt in bad))
    service.kill()
    service.start()
    service.made(prompt=f"good after the kill beside {fault}")
    assert [len(calls_about(upstream, prompt)) for prompt in bad] == [1] * len(bad)
    for task_id in bad_ids:
        assert service.request("DELETE", f"/api/images/{task_id}").status in (200, 409)
