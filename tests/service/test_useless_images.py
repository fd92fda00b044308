"""Channels that give no usable images, through the running service."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from imagegen.worker.pacing import DOUBTED_TASKS, USELESS_TASKS
from tests.image_bytes import image_file
from tests.service.running import eventually
from tests.service.scripted_channels import GOOD, Reply, Start, Upstream, all_done, channel, channels_of, serving, write

HTML_IMAGE = json.dumps({"data": [{"b64_json": base64.b64encode(b"<html>no image</html>").decode()}]}).encode()
BROKEN_IMAGE: Reply = (
    200,
    {},
    json.dumps({"data": [{"b64_json": base64.b64encode(image_file()[:-20]).decode()}]}).encode(),
)
NO_IMAGES: dict[str, Reply] = {
    "no image": (200, {}, HTML_IMAGE),
    "text that is no base64": (200, {}, b'{"data":[{"b64_json":"!!!!"}]}'),
    "a link into this network": (200, {}, b'{"data":[{"url":"http://10.1.2.3/x.png"}]}'),
    "an empty list": (200, {}, b'{"data":[]}'),
    "a page": (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
}


@pytest.mark.parametrize("priority", [5, 0], ids=["of higher priority", "of equal priority"])
@pytest.mark.parametrize("reply", NO_IMAGES.values(), ids=NO_IMAGES)
def test_a_channel_that_gives_no_usable_images_is_left_for_another_one(
    start_service: Start, tmp_path: Path, reply: Reply, priority: int
) -> None:
    bad, good = Upstream({GOOD: reply}), Upstream(delay_s=0.02)
    channels = channel("bad", bad.url, GOOD, priority=priority), channel("good", good.url, GOOD)
    with serving(bad, good):
        service = start_service(CHANNELS_FILE=write(tmp_path / "c.toml", *channels), allowed=("can be used, of",))
        tasks = all_done(service, 30)
        completed = [task for task in tasks if task["status"] == "completed"]
        assert len(completed) >= 30 - DOUBTED_TASKS
        assert {task["channel"] for task in completed} == {"good"}
        assert len(good.calls) == len(completed)
        assert len(bad.calls) <= 15
        assert sum(task.get("possiblyBilledTwice", 0) for task in tasks) <= len(bad.calls)
        assert channels_of(service)["bad"]["state"] == "resting"
        assert "in a row; a call in 0.5 s probes it" in service.log


def test_a_lone_channel_that_gives_no_usable_images_gets_few_calls_until_it_does(
    start_service: Start, tmp_path: Path
) -> None:
    upstream = Upstream({GOOD: NO_IMAGES["no image"]})
    file = write(tmp_path / "c.toml", channel("lone", upstream.url, GOOD))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file, allowed=("can be used, of",))
        ids = [service.accepted(prompt=f"number {number}") for number in range(30)]
        eventually(lambda: len(upstream.calls) >= USELESS_TASKS + 2)
        assert channels_of(service)["lone"]["state"] == "resting"
        assert len(upstream.calls) <= 15
        upstream.replies.clear()
        states = [service.finished(task_id, 30)["status"] for task_id in ids]
        assert states.count("completed") >= 15
        assert len(upstream.calls) == 30


def test_a_few_prompts_with_unusable_images_keep_no_others_from_a_lone_channel(
    start_service: Start, tmp_path: Path
) -> None:
    upstream = Upstream(delay_s=0.02)
    upstream.of_prompts["poison"] = NO_IMAGES["no image"]
    file = write(tmp_path / "c.toml", channel("lone", upstream.url, GOOD))
    with serving(upstream):
        service = start_service(CHANNELS_FILE=file, allowed=("can be used, of",))
        poison = [service.accepted(prompt=f"poison {number}") for number in range(6)]
        good = [service.accepted(prompt=f"good {number}") for number in range(30)]
        assert {service.finished(task_id, 20)["status"] for task_id in good} == {"completed"}
        assert {service.finished(task_id, 20)["status"] for task_id in poison} == {"failed"}
        assert len(upstream.calls) == 36


@pytest.mark.parametrize("reply", [BROKEN_IMAGE, NO_IMAGES["an empty list"]], ids=["a broken image", "an empty list"])
def test_a_task_with_an_unusable_image_fails_with_that_cause_if_another_call_is_too_dear(
    start_service: Start, tmp_path: Path, reply: Reply
) -> None:
    bad = Upstream({GOOD: reply})
    with serving(bad):
        service = start_service(CHANNELS_FILE=write(tmp_path / "c.toml", channel("bad", bad.url, GOOD)))
        price = service.finished(service.accepted(prompt="once"))["cost"]["charged"] / 2
        task = service.finished(service.accepted(prompt="twice", maxCostUsd=price))
        assert (task["status"], task["error"]["code"]) == ("failed", "upstream_bad_response")
        assert len(bad.calls) == 3
