"""A forward proxy on loopback, in its own threads: absolute-form requests and CONNECT to any name."""

from __future__ import annotations

import base64
import select
import socket
import socketserver
import threading
from types import TracebackType
from typing import Self


class ForwardProxy:
    """targets: ports by `host` or `host:port`; login: required `user:password`; status: fixed response status."""

    def __init__(self, targets: dict[str, int], *, login: str | None = None, status: int | None = None) -> None:
        self.targets, self.login, self.status = targets, login, status
        self.requests: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    proxy: ForwardProxy


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        proxy = self.server.proxy
        while line := self.rfile.readline().decode():
            method, target, _ = line.split()
            headers = {}
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = header.decode().partition(":")
                headers[name.strip().lower()] = value.strip()
            proxy.requests.append(f"{method} {target}")
            body = self.rfile.read(int(headers.get("content-length", 0)))
            required = proxy.login and "Basic " + base64.b64encode(proxy.login.encode()).decode()
            if required and headers.get("proxy-authorization") != required:
                self._refuse(407)
            elif proxy.status:
                self._refuse(proxy.status)
            elif method == "CONNECT":
                self._tunnel(target)
                return
            else:
                self._forward(method, target, headers, body)

    def _refuse(self, status: int) -> None:
        self.wfile.write(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status)

    def _port(self, address: str) -> int | None:
        targets = self.server.proxy.targets
        return targets.get(address) or targets.get(address.rpartition(":")[0])

    def _tunnel(self, address: str) -> None:
        port = self._port(address)
        if port is None:
            self._refuse(502)
            return
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ends = {self.connection: upstream, upstream: self.connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)

    def _forward(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        address, slash, path = target.removeprefix("http://").partition("/")
        port = self._port(address if ":" in address else f"{address}:80") or self._port(address + ":80")
        if port is None:
            self._refuse(502)
            return
        forwarded = {
            name: value for name, value in headers.items() if name not in ("proxy-authorization", "connection")
        }
        lines = [f"{method} {slash}{path} HTTP/1.1", *(f"{n}: {v}" for n, v in forwarded.items()), "connection: close"]
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            while data := upstream.recv(65536):
                self.wfile.write(data)
        self.connection.shutdown(socket.SHUT_RDWR)
