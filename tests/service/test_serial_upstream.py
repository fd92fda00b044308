"""An upstream that makes one image at a time: waiting tasks reach no time limit."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest

from imagegen.emulator.small_images import DrawnImage, draw
from tests.service.conftest import StartService
from tests.service.running import eventually

CALL_S, TIMEOUT_S = 1.0, 4.0
"""The last of six calls ends after the time limit of one."""

IMAGE = base64.b64encode(draw(DrawnImage("png", 64, 64, "0" * 32))).decode()


class WebUi(ThreadingHTTPServer):
    """AUTOMATIC1111's web UI, reduced to its lock around each image."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.running = self.most = self.calls = 0
        self.go_on = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: WebUi

    def do_GET(self) -> None:
        self._answer({"progress": 0.5})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.calls += 1
        server.running += 1
        server.most = max(server.most, server.running)
        with server.lock:
            server.go_on.wait()
            time.sleep(CALL_S)
        server.running -= 1
        self._answer({"images": [IMAGE]})

    def _answer(self, body: object) -> None:
        data = orjson.dumps(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def web_ui() -> Iterator[WebUi]:
    with WebUi() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_tasks_wait_for_a_serial_upstream_without_a_time_limit(start_service: StartService, web_ui: WebUi) -> None:
    url = f"http://127.0.0.1:{web_ui.server_port}"
    service = start_service(PROVIDER="a1111", A1111_URL=url, UPSTREAM_TIMEOUT=str(TIMEOUT_S), MAX_ATTEMPTS="1")
    ids = [service.accepted(prompt=f"serial {i}") for i in range(6)]
    eventually(lambda: web_ui.running)
    assert service.task(ids[5]).get("queuePosition", 0) >= 4
    web_ui.go_on.set()
    assert [service.completed(task_id)["attempts"] for task_id in ids] == [1] * 6
    assert (web_ui.calls, web_ui.most) == (6, 1)
