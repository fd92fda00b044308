"""Calls with a lost answer whose job never arrived, while the provider lists an equal job of another task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import KEY, Service, calls_about, eventually, redis_server
from tests.service.scripted_channels import Start, write

MODELS = {"replicate": "black-forest-labs/flux-schnell", "dashscope": "wan2.2-t2i-flash"}


@pytest.fixture
def shared_redis(tmp_path: Path) -> Iterator[str]:
    (folder := tmp_path / "redis").mkdir()
    with redis_server(folder, port := free_port()):
        yield f"redis://127.0.0.1:{port}"


def instance_for(start_service: Start, redis_url: str, folder: Path, channel: dict[str, Any], model: str) -> Service:
    """Start an instance that alone serves a model, under another name than the provider's."""
    models = [f"{model}={MODELS[channel['provider']]}"]
    file = write(folder / f"{model}.toml", channel | {"models": models})
    data = str(folder / "data")
    return start_service(REDIS_URL=redis_url, CHANNELS_FILE=file, DATA_DIR=data, LEASE_SECONDS="10")


@pytest.mark.parametrize(
    ("provider", "theirs"),
    [("replicate", {"seed": 5}), ("dashscope", {"seed": 6}), ("dashscope", {"seed": 5, "n": 2})],
)
def test_a_job_of_another_task_is_never_taken_for_a_lost_call(
    start_service: Start, shared_redis: str, tmp_path: Path, provider: str, theirs: dict[str, Any]
) -> None:
    with EmulatorProcess(provider, module="imagegen.emulator.job_command") as upstream:
        channel = {"name": provider, "provider": provider, "base_url": upstream.url, "keys": [KEY]}
        one = instance_for(start_service, shared_redis, tmp_path, channel, "a")
        other = instance_for(start_service, shared_redis, tmp_path, channel, "b")
        prompt = "equal prompts {{fault:reset times=1}}"
        lost = one.accepted(prompt=prompt, model="a", seed=5)
        eventually(lambda: calls_about(upstream, "equal prompts"))
        made = other.accepted(prompt=prompt, model="b", **theirs)
        other.completed(made, 60)
        task = one.completed(lost, 60)
        jobs = [call for call in calls_about(upstream, "equal prompts") if call["job"]]
        assert (len(jobs), task["possiblyBilledTwice"]) == (2, 1)


def test_a_job_with_an_unread_response_is_not_taken_for_a_lost_call(
    start_service: Start, shared_redis: str, tmp_path: Path
) -> None:
    with EmulatorProcess("replicate", module="imagegen.emulator.job_command") as upstream:
        channel = {"name": "replicate", "provider": "replicate", "base_url": upstream.url, "keys": [KEY]}
        one = instance_for(start_service, shared_redis, tmp_path, channel, "a")
        other = instance_for(start_service, shared_redis, tmp_path, channel, "b")
        upstream.script("reset", "job answer_s=7")
        lost = one.accepted(prompt="equal prompts", model="a", seed=5)
        eventually(lambda: calls_about(upstream, "equal prompts"))
        made = other.completed(other.accepted(prompt="equal prompts", model="b", seed=5), 90)
        task = one.completed(lost, 90)
        jobs = [call for call in calls_about(upstream, "equal prompts") if call["job"]]
        assert (len(jobs), task["possiblyBilledTwice"]) == (2, 1)
        assert made.get("possiblyBilledTwice", 0) == 0
