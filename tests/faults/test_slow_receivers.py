"""Thousands of webhooks to one slow receiver, and five to another: against the real service, over a restart too."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import KEY, Service, eventually

TASKS, HOOKS_EACH, HOLD_S = 105, 20, 9.0


class Receiver(http.server.ThreadingHTTPServer):
    """Receiver that counts its requests and responds after `hold_s`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hold_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hold_s = hold_s
        self.got: list[float] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook/{path}"

    def has_received(self, count: int) -> bool:
        """Return whether so many requests have come in all."""
        return len(self.got) == count


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(time.monotonic())
        time.sleep(self.server.hold_s)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the service was killed
            self.close_connection = True


@contextmanager
def receiving(hold_s: float) -> Iterator[Receiver]:
    with Receiver(hold_s) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()


@pytest.mark.faults
def test_two_thousand_slow_webhooks_delay_no_other_and_all_arrive(tmp_path: Path) -> None:
    with EmulatorProcess("--image", "png") as upstream, receiving(HOLD_S) as slow, receiving(0.0) as good:
        settings = {"TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream.url, "WEBHOOK_ALLOW_PRIVATE": "true"}
        service = Service(tmp_path / "service", settings | {"WORKER_CONCURRENCY": "20"})
        service.start()
        try:
            for task in range(TASKS):
                for hook in range(HOOKS_EACH):
                    path = f"{task}/{hook}"
                    service.accepted(prompt=f"slow {task}", webhook={"url": slow.url(path)})
            for restart in (False, True):
                if restart:
                    service.kill()
                    service.start()
                before = len(good.got)
                ids = [
                    service.accepted(prompt=f"good {restart} {n}", webhook={"url": good.url(str(n))}) for n in range(5)
                ]
                for task_id in ids:
                    service.completed(task_id)
                done = time.monotonic()
                eventually(partial(good.has_received, before + 5), 5)
                print(f"five webhooks of a healthy receiver: {good.got[-1] - done:.2f} s after the last task")
                assert good.got[-1] - done < 2
            slow.hold_s = 0.0
            eventually(lambda: len(slow.got) >= TASKS * HOOKS_EACH, 300)
            print(f"{len(slow.got)} calls of the slow receiver for {TASKS * HOOKS_EACH} webhooks")
        finally:
            service.end()
