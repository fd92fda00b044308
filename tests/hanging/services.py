"""Test that never ends, with a service, an emulator and a Redis server: for tests of interrupted runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.running import Service, redis_server


def test_services_run(tmp_path: Path) -> None:
    with EmulatorProcess() as upstream, redis_server(tmp_path, free_port()):
        settings = {"TOGETHER_API_KEY": "any", "TOGETHER_API_URL": upstream.url}
        service = Service(tmp_path / "service", settings).start()
        try:
            Path(os.environ["HANGS"], "services").write_text(str(os.getpid()))
            signal.pause()
        finally:
            service.end()
            Path(os.environ["HANGS"], "services ended").touch()
