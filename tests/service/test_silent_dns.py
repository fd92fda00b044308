"""Webhooks to names without a DNS answer, next to images, tasks and a shutdown."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.service.running import Service, eventually
from tests.support import slowness

SILENT = Path(__file__).parent / "silent_dns.py"
HOSTS = 12


def test_unanswered_names_delay_no_image_task_or_shutdown(
    start_service: Callable[..., Service],
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
        dns.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{dns.getsockname()[1]}"
        service = start_service(program=SILENT, SILENT_DNS=server, SANDBOX_DELAY="0.1")
        url = service.made(prompt="an image")["data"][0]["url"]
        for number in range(HOSTS):
            hook = {"url": f"https://silent{number}.example.com/hook"}
            service.made(prompt=f"silent {number}", webhook=hook)
        dns.settimeout(30)
        dns.recv(512)
        took_s = []
        for _ in range(60):
            began = time.monotonic()
            assert service.get(url).status == 200
            took_s.append(time.monotonic() - began)
        print(f"image reads: median {sorted(took_s)[30] * 1000:.1f} ms, slowest {max(took_s) * 1000:.1f} ms")
        assert sorted(took_s)[30] < 0.5
        began = time.monotonic()
        service.made(prompt="a task meanwhile")
        assert time.monotonic() - began < 8 * slowness()
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        print(f"the end took {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 8 * slowness()  # a name hangs for 15 s
        eventually(lambda: "Traceback" not in service.log)


def test_unfinished_webhooks_are_left_to_the_next_start(
    start_service: Callable[..., Service],
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        service = start_service(SANDBOX_DELAY="0", WEBHOOK_ALLOW_PRIVATE="true")
        for number in range(40):
            hook = {"url": f"http://127.0.0.1:{silent.getsockname()[1]}/{number}/hook"}
            service.made(prompt=f"silent {number}", webhook=hook)
        silent.settimeout(30)
        silent.accept()[0].close()
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert "Session is closed" not in service.log
        assert "Traceback" not in service.log
