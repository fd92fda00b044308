"""Channels of an upstream that answers as each key is scripted."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tests.image_bytes import image_file
from tests.service.running import Service

Start = Callable[..., Service]
SCHNELL = "black-forest-labs/FLUX.1-schnell"
GOOD, REVOKED, LIMITED = "good-key-0123456789", "revoked-key-0123456789", "limited-key-0123456789"
IMAGE = json.dumps({"data": [{"b64_json": base64.b64encode(image_file()).decode()}]}).encode()
Reply = tuple[int, dict[str, str], bytes]


class Upstream:
    """A fake of Together that answers by key; `calls` has key, model and time of each paid call.

    of_prompts: replies to calls with a text in their prompt, whatever their key. silent: it answers no paid call before
    the end of `serving`.
    """

    def __init__(
        self, replies: Mapping[str, Reply] | None = None, delay_s: float = 0.0, *, silent: bool = False
    ) -> None:
        self.replies = dict(replies or {})
        self.of_prompts: dict[str, Reply] = {}
        self.ended = Event()
        self.calls: list[tuple[str, str, float]] = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                upstream.calls.append((key, body["model"], time.monotonic()))
                time.sleep(delay_s)
                if silent:
                    upstream.ended.wait()
                    self.close_connection = True
                    return
                of_prompt = [reply for text, reply in upstream.of_prompts.items() if text in body["prompt"]]
                self._answer(*(of_prompt or [upstream.replies.get(key, (200, {}, IMAGE))])[0])

            def do_GET(self) -> None:
                self._answer(200, {}, b"[]")

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def times(self, key: str) -> list[float]:
        return [at for named, _, at in self.calls if named == key]


@contextmanager
def serving(*upstreams: Upstream) -> Iterator[None]:
    threads = [Thread(target=upstream.server.serve_forever, args=(0.05,)) for upstream in upstreams]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for upstream, thread in zip(upstreams, threads, strict=True):
            upstream.ended.set()
            upstream.server.shutdown()
            upstream.server.server_close()
            thread.join()


def error(status: int, message: str = "no", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": "error"}}).encode()


def write(path: Path, *channels: Mapping[str, Any]) -> str:
    """Write a file of channels; return its name."""
    lines = []
    for channel in channels:
        lines += ["[[channels]]", *(f"{name} = {json.dumps(value)}" for name, value in channel.items())]
    path.write_text("\n".join(lines))
    return str(path)


def channel(name: str, url: str, *keys: str, **fields: object) -> dict[str, object]:
    return {"name": name, "provider": "together", "base_url": url, "keys": list(keys), **fields}


def all_done(service: Service, count: int, **fields: object) -> list[dict[str, Any]]:
    """Submit tasks and return them once all are final."""
    ids = [service.accepted(prompt=f"number {number}", **fields) for number in range(count)]
    return [service.finished(task_id, 60) for task_id in ids]


def channels_of(service: Service) -> dict[str, dict[str, Any]]:
    answer = service.get_as_admin("/api/channels")
    assert answer.status == 200, answer.body
    return {channel["name"]: channel for channel in answer.json["channels"]}
