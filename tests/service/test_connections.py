"""A service of 512 descriptors under a flood of connections, and the hosts that it listens on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import Service, calls_about, eventually, run_to_its_end

LIMITED = Path(__file__).parent / "limited.py"
COUNT = 600
ORDINARY = (" GET /", " POST /", "completed", "listens", "The embedded Redis runs")


@pytest.fixture
def flood() -> Iterator[Callable[[str, bytes], None]]:
    """Open many connections from one address to a service and send bytes on each."""
    with ExitStack() as stack:

        def flood(url: str, words: bytes) -> None:
            host, port = url.removeprefix("http://").split(":")
            for _ in range(COUNT):
                made = stack.enter_context(socket.create_connection((host, int(port)), 30, ("127.0.0.2", 0)))
                with suppress(OSError):
                    made.send(words)

        yield flood


@pytest.mark.parametrize(
    "words",
    [b"", b"GET /healthz HTTP/1.1\r\nHo", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["silent", "half a head", "open after a response"],
)
def test_a_flood_of_connections_delays_no_other_client(
    start_service: Callable[..., Service],
    upstream: EmulatorProcess,
    flood: Callable[[str, bytes], None],
    words: bytes,
) -> None:
    service = start_service(upstream.url, program=LIMITED, NOFILE="512", MAX_ATTEMPTS="1")
    started = service.log
    name = f"in a flood {len(words)} "
    ids = [service.accepted(prompt=name + str(number)) for number in range(10)]
    flood(service.url, words)
    ids += [service.accepted(prompt=name + str(number)) for number in range(10, 30)]
    began = time.monotonic()
    assert service.get("/api/health").status == 200
    assert time.monotonic() - began < 9  # a connection without a head is closed after 10 s
    assert service.get("/readyz").status == 200
    for task_id in ids:
        assert service.get(service.completed(task_id)["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, name)) == len(ids)
    log = service.log.removeprefix(started)
    lines = [line for line in log.splitlines() if not any(word in line for word in ORDINARY)]
    assert len(lines) <= 3, lines


def test_long_requests_of_one_client_do_not_block_another(
    start_service: Callable[..., Service], flood: Callable[[str, bytes], None]
) -> None:
    service = start_service(program=LIMITED, NOFILE="512", SANDBOX_DELAY="60", DRAIN_SECONDS="0")
    task_id = service.accepted(prompt="slow")
    flood(service.url, f"GET /api/images/{task_id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    began = time.monotonic()
    assert service.get("/api/health").status == 200
    assert time.monotonic() - began < 15  # behind hundreds of requests that came before
    assert service.request("DELETE", f"/api/images/{task_id}").status == 200


def test_event_streams_of_many_clients_behind_one_address_keep_no_other_client_out(
    start_service: Callable[..., Service],
) -> None:
    service = start_service(program=LIMITED, NOFILE="512", SANDBOX_DELAY="0")
    task_id = service.accepted(prompt="a cat [slow:60]")
    host, port = service.url.removeprefix("http://").split(":")
    words = f"GET /api/images/{task_id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with ExitStack() as stack:

        def open_stream() -> BinaryIO:
            stream = stack.enter_context(socket.create_connection((host, int(port)), 30))
            stream.sendall(words)
            lines = stack.enter_context(stream.makefile("rb"))
            assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
            return lines

        newest = [open_stream() for _ in range(COUNT)][-1]
        for _ in range(20):
            assert service.get("/api/health").status == 200
        assert service.request("DELETE", f"/api/images/{task_id}").status == 200
        assert any(line.startswith(b"event: cancelled") for line in newest)


def test_long_polls_of_many_clients_behind_one_address_keep_no_other_client_out(
    start_service: Callable[..., Service],
) -> None:
    service = start_service(program=LIMITED, NOFILE="512", SANDBOX_DELAY="0")
    task_id = service.accepted(prompt="a cat [slow:60]")
    eventually(lambda: service.task(task_id)["status"] == "processing")
    host, port = service.url.removeprefix("http://").split(":")
    words = f"GET /api/images/{task_id}?wait=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with ExitStack() as stack:

        def open_poll() -> socket.socket:
            poll = stack.enter_context(socket.create_connection((host, int(port)), 10))
            poll.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert poll.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
            poll.sendall(words)
            return poll

        polls = [open_poll() for _ in range(COUNT)]
        for _ in range(20):
            assert service.get("/api/health").status == 200
        with polls[0].makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            rest = answer.read()
            assert b'"status":"processing"' in rest
            assert b"\r\nConnection: close\r\n" in rest  # else its next request, sent at once, would be lost
        assert service.request("DELETE", f"/api/images/{task_id}").status == 200


def test_of_many_requests_that_are_no_http_five_are_logged(start_service: Callable[..., Service]) -> None:
    service = start_service()
    host, port = service.url.removeprefix("http://").split(":")
    for _ in range(30):
        with socket.create_connection((host, int(port)), 30) as client:
            client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n")
            assert client.recv(65_536).startswith(b"HTTP/1.1 400")
    assert service.log.count("that is no HTTP") == 5


def test_several_hosts_are_listened_on_and_named(start_service: Callable[..., Service]) -> None:
    service = start_service(HOST="127.0.0.1,::1")
    port = int(service.url.rpartition(":")[2])
    assert f"listens on http://127.0.0.1:{port} and http://[::1]:{port}" in service.log
    connection = HTTPConnection("::1", port, timeout=30)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("host", ["203.0.113.7", "127.0.0.1,203.0.113.7", "no.such.host.invalid", "a b", ","])
def test_a_bad_host_is_reported_in_one_message(tmp_path: Path, host: str) -> None:
    ended = run_to_its_end(tmp_path, HOST=host)
    assert ended.returncode == 2
    assert ended.stderr.startswith("HOST")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_webhook_to_this_service_is_refused_at_submit_or_at_delivery(
    start_service: Callable[..., Service], host: str
) -> None:
    service = start_service(HOST=host, WEBHOOK_ALLOW_PRIVATE="true")
    port = service.url.rpartition(":")[2]
    for name in ("127.0.0.1", "LocalHost", "127.1", "[::ffff:127.0.0.1]", "2130706433", "localhost."):
        answer = service.submit(prompt="a loop", webhook={"url": f"http://{name}:{port}/api/images/x/retry"})
        assert (answer.status, answer.error[1]) == (400, "invalid_request"), name
    name = socket.gethostname()
    assert socket.gethostbyname(name).startswith("127.")
    task_id = service.accepted(prompt="a loop", webhook={"url": f"http://{name}:{port}/api/images/x/retry"})
    service.completed(task_id)
    eventually(lambda: service.task(task_id)["webhook"][0]["attempts"] == 1)
    assert "is this service" in service.log
    assert "/api/images/x/retry" not in service.log
