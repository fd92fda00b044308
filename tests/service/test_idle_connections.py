"""An upstream that closes idle connections: no call is lost on one that it is about to close."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest

from imagegen.emulator.small_images import DrawnImage, draw
from tests.service.conftest import StartService
from tests.service.running import Service

IDLE_S = 2.0
"""After which the upstream closes a connection: gunicorn's default, the shortest that is common."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answered_at = 0.0

    def do_GET(self) -> None:
        self._answer(draw(DrawnImage("png", 64, 64, "0" * 32)))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.answered_at and time.monotonic() - self.answered_at >= IDLE_S:
            self.close_connection = True  # it closes at the moment at which the request comes
            return
        host, port = self.connection.getsockname()
        self._answer(orjson.dumps({"data": [{"url": f"http://{host}:{port}/1.png"}]}))

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.answered_at = time.monotonic()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def closing_upstream() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_call_after_a_pause_is_not_sent_on_a_connection_that_the_upstream_closes(
    start_service: StartService, closing_upstream: str
) -> None:
    service: Service = start_service(closing_upstream)
    service.completed(service.accepted(prompt="before the pause"))
    time.sleep(IDLE_S)
    task = service.completed(service.accepted(prompt="after the pause"))
    assert (task["attempts"], task.get("possiblyBilledTwice")) == (1, None)
