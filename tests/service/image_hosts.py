"""Upstreams with large images, and the calls that a service has made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.forked import PipedProcess
from tests.service.running import Service

ROOT = Path(__file__).resolve().parents[2]
IMAGE_BYTES = 2_100_000


@contextmanager
def image_host(form: str) -> Iterator[str]:
    """Run an upstream with large images."""
    command = ["-m", "bench.imagehost", str(IMAGE_BYTES), form, "1"]
    with PipedProcess(command, cwd=ROOT, env=os.environ, stderr=2) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


def calls(service: Service) -> int:
    """Return the number of upstream calls of this process."""
    return sum(service.get_as_admin("/api/stats").json["upstream"]["calls"].values())
