"""Instances with clocks that are days off or jump: paid images stay, since Redis's clock measures ages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about

DAYS_S = 3 * 86_400.0

_SHIFTED_CLOCK = """
import os, time
_time = time.time
def _shifted():
    with open(os.environ["CLOCK_OFFSET_FILE"]) as file:
        return _time() + float(file.read())
time.time = _shifted
"""


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """Return the file with the clock offset of services that run with `shifted(clock)`."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SHIFTED_CLOCK)
    file = folder / "offset"
    file.write_text("0")
    return file


def shifted(clock: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(clock.parent), "CLOCK_OFFSET_FILE": str(clock)}


def check_stored(service: Service, upstream: EmulatorProcess, task: dict[str, Any], prompt: str) -> None:
    assert service.get(f"/api/images/{task['taskId']}/0").status == 200
    assert service.submit(prompt=prompt).json["cached"] is True
    assert len(calls_about(upstream, prompt)) == 1


@pytest.mark.parametrize("offset_s", [DAYS_S, -DAYS_S])
def test_images_live_on_when_the_clock_jumps(
    start_service: StartService, upstream: EmulatorProcess, clock: Path, offset_s: float
) -> None:
    prompt = f"jump by {offset_s:g}"
    clock.write_text(f"{offset_s}")
    service: Service = start_service(upstream.url, **shifted(clock))
    task = service.made(prompt=prompt)
    clock.write_text("0")
    check_stored(service, upstream, task, prompt)
    service.kill()
    check_stored(service.start(), upstream, task, prompt)


def test_a_start_with_a_clock_that_is_ahead_removes_no_image(
    start_service: StartService, upstream: EmulatorProcess, clock: Path
) -> None:
    service: Service = start_service(upstream.url, **shifted(clock))
    task = service.made(prompt="before")
    service.kill()
    clock.write_text(f"{DAYS_S}")
    service.start()
    service.made(prompt="after")  # by then the first sweep is over
    check_stored(service, upstream, task, "before")


def test_a_repeat_of_a_failed_call_fails_alike_when_the_clock_is_ahead(
    start_service: StartService, upstream: EmulatorProcess, clock: Path
) -> None:
    clock.write_text(f"{DAYS_S}")
    service: Service = start_service(upstream.url, MAX_ATTEMPTS="1", **shifted(clock))
    body = {"prompt": "fails {{fault:500}}", "model": "m"}
    first = service.request("POST", "/v1/images/generations", body)
    again = service.request("POST", "/v1/images/generations", body, headers={"x-stainless-retry-count": "1"})
    assert first.status == again.status >= 500
    assert len(calls_about(upstream, "fails")) == 1
