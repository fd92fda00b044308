"""Upstream that answers each request at once with Together's success, and accepts webhooks; little work a call.

`python -m bench.upstream` prints its address. What it has no use for, it does not read: every request is good.
"""

from __future__ import annotations

import asyncio
import itertools
import json

MODEL = "black-forest-labs/FLUX.1-schnell"
NUMBERS = itertools.count()


def answer(number: int) -> bytes:
    """The shape of Together's answers, as imagegen/emulator/together_responses.py has it."""
    image = {"index": 0, "url": f"https://api.together.ai/shrt/{number:016x}", "timings": {"inference": 0.5}}
    body = json.dumps({"id": f"bench-{number}", "model": MODEL, "object": "list", "data": [image]}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Answering(asyncio.Protocol):
    """One connection; requests come one after the other, with a Content-Length or without a body."""

    def __init__(self) -> None:
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, separator, body = self._got.partition(b"\r\n\r\n")
        named = head.lower()
        _, _, length = named.partition(b"content-length: ")
        if not separator or len(body) < int(length.partition(b"\r")[0] or 0):
            return
        self._got = b""
        self._transport.write(answer(next(NUMBERS)))
        if b"connection: close" in named:
            self._transport.close()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, backlog=1024)
    print(f"ready on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
