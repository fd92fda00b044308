"""Raw requests that no client library would send."""

from __future__ import annotations

import socket
from http.client import HTTPResponse

from tests.service.running import Answer, Service

JSON = "Content-Type: application/json"


def head(*lines: str) -> bytes:
    """Return the head of a POST of a generation, with a valid Host if the lines have none."""
    named = [] if any(line.lower().startswith("host:") for line in lines) else ["Host: a"]
    return "\r\n".join(["POST /api/images/generate HTTP/1.1", *named, *lines, "", ""]).encode()


def connect(service: Service, within_s: float = 15.0) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=within_s)


def over_the_wire(service: Service, sent: bytes) -> Answer:
    """Send the bytes on a new connection; return the one response."""
    with connect(service) as connection:
        connection.sendall(sent)
        return last_answer(connection)


def last_answer(connection: socket.socket) -> Answer:
    """Return a response after which the service closes the connection."""
    response = HTTPResponse(connection)
    response.begin()
    body = response.read()
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""
    return Answer(response.status, response.headers, body)
