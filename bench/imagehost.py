"""Upstream that answers each call at once with one image of a given size, as a link to itself or as base64.

`python -m bench.imagehost SIZE_BYTES link|base64 CALLS` prints its address. The first CALLS calls are answered
together, once all of them have come; 1: each at once. `/image` is the image.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys

from PIL import Image


def noise_png(size_bytes: int) -> bytes:
    """Return a PNG of about this size; noise, so that it is as hard to hash as real images are."""
    side = int((size_bytes / 3) ** 0.5)
    file = io.BytesIO()
    pixels = random.Random(1).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def response(body: bytes, content_type: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Host:
    """What all connections share."""

    def __init__(self, size_bytes: int, form: str, together: int) -> None:
        data = noise_png(size_bytes)
        self.form = form
        self.image = response(data, "image/png")
        self.base64 = base64.b64encode(data).decode()
        self.address = ""
        self.together = together
        self.waiting: list[asyncio.Transport] = []

    @property
    def answer(self) -> bytes:
        entry = {"url": f"{self.address}/image"} if self.form == "link" else {"b64_json": self.base64}
        return response(json.dumps({"data": [entry]}).encode(), "application/json")

    def call(self, transport: asyncio.Transport) -> None:
        self.waiting.append(transport)
        if len(self.waiting) >= self.together:
            answer, waiting = self.answer, self.waiting
            self.waiting, self.together = [], 1
            for waiter in waiting:
                waiter.write(answer)


class Serving(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, separator, body = self._got.partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        if not separator or len(body) < int(length.partition(b"\r")[0] or 0):
            return
        self._got = b""
        if head.startswith(b"GET /image"):
            self._transport.write(self._host.image)
        else:
            self._host.call(self._transport)


async def main() -> None:
    host = Host(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    server = await asyncio.get_running_loop().create_server(lambda: Serving(host), "127.0.0.1", 0, backlog=1024)
    host.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(f"ready on {host.address}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
