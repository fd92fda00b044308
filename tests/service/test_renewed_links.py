"""Links of provider jobs that die before their images are fetched."""

from __future__ import annotations

from pathlib import Path

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import KEY, calls_about, eventually
from tests.service.scripted_channels import Start


def test_a_job_with_a_dead_link_gives_its_image_after_a_kill_and_is_paid_once(
    start_service: Start, tmp_path: Path
) -> None:
    with EmulatorProcess("replicate", module="imagegen.emulator.job_command") as upstream:
        settings = {"PROVIDER": "replicate", "REPLICATE_API_TOKEN": KEY, "REPLICATE_API_URL": upstream.url}
        service = start_service(DATA_DIR=str(tmp_path / "data"), LEASE_SECONDS="1", **settings)
        task_id = service.accepted(prompt="a cat {{fault:job dead_links=1}}", model="black-forest-labs/flux-schnell")
        eventually(lambda: service.task(task_id).get("reason") == "retrying")
        service.kill()
        service.start()
        task = service.completed(task_id, 60)
        (call,) = calls_about(upstream, "a cat")
        assert call["job"]["polls"] >= 2
        assert task.get("possiblyBilledTwice", 0) == 0
        assert service.get(task["data"][0]["url"]).status == 200
