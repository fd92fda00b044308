"""The service without any settings: it draws its own images."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, eventually
from tests.support import slowness

DRAWING = Path(__file__).with_name("drawing.py")


@pytest.fixture(scope="module")
def service(start_for_module: StartService) -> Service:
    return start_for_module(SANDBOX_DELAY="0.2", program=DRAWING)


def drawn(service: Service, **fields: object) -> Image.Image:
    (entry,) = service.made(**fields)["data"]
    with Image.open(io.BytesIO(service.get(entry["url"]).body)) as image:
        image.load()
        return image.convert("RGB")


def test_an_image_of_the_requested_size_takes_under_three_seconds(service: Service) -> None:
    began = time.monotonic()
    (entry,) = service.made(prompt="a lighthouse", width=640, height=384, outputFormat="webp")["data"]
    answer = service.get(entry["url"])
    took_s = time.monotonic() - began
    with Image.open(io.BytesIO(answer.body)) as image:
        image.load()
        assert (image.size, image.format) == ((640, 384), "WEBP")
    assert took_s < 3 * slowness()
    print(f"POST to picture: {took_s:.2f} s")


def test_equal_requests_draw_equal_images_and_prompts_differ(service: Service) -> None:
    first, second = (drawn(service, prompt=prompt, outputFormat="png") for prompt in ("a red boat", "a green hill"))
    difference = ImageChops.difference(first, second).convert("L").point(lambda value: 255 if value else 0)
    assert difference.histogram()[255] > 512 * 512 / 5


def test_progress_shows_more_values_for_four_images(service: Service) -> None:
    task_id, seen = service.accepted(prompt="four boats", n=4), [0]

    def look() -> bool:
        task = service.task(task_id)
        seen.append(task["progress"])
        return bool(task["status"] == "completed")

    eventually(look)
    assert seen == sorted(seen)
    assert len(set(seen) - {0, 100}) >= 3
    print(f"progress: {sorted(set(seen))}")


def test_a_sandbox_image_is_never_served_as_a_real_one(
    service: Service, start_service: StartService, upstream: EmulatorProcess
) -> None:
    real = start_service(upstream.url)
    order = {"prompt": "which one is real"}
    assert service.accepted(**order) != real.accepted(**order)


def test_health(service: Service) -> None:
    seen = service.get("/api/health").json
    assert seen == {"success": True, "message": "Service is healthy", "timestamp": seen["timestamp"]}
    assert seen["timestamp"].endswith("Z")
    assert [service.get(path).status for path in ("/healthz", "/readyz")] == [200, 200]
    assert service.get("/").status < 400
    assert [service.request("HEAD", path).status for path in ("/healthz", "/readyz")] == [200, 200]
