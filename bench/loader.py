"""HTTP load from a separate process: keep-alive connections that send prepared requests one after the other.

`python -m bench.loader PORT CONNECTIONS SECONDS` reads what to send from standard input as JSON:
`{"method", "path", "bodies": [...], "again", "keys": [...]}`, again: whether bodies are repeated; keys: API keys that
are sent in turn. It prints as JSON the answers a second, their statuses, its own CPU time, and when it began and ended
on the clock that all processes share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator


def requests(method: str, path: str, bodies: list[str], keys: list[str], *, again: bool) -> Iterator[bytes]:
    """Yield the bytes of each request; without bodies, the same without end."""
    start = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    heads = itertools.cycle([f"{start}Authorization: Bearer {key}\r\n" for key in keys] or [start])
    if not bodies:
        yield from (f"{head}\r\n".encode() for head in heads)
    for body, head in zip(itertools.cycle(bodies) if again else bodies, heads, strict=False):
        raw = body.encode()
        yield f"{head}Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the answer to the last is whole."""

    def __init__(self, wanted: Iterator[bytes], statuses: Counter[str]) -> None:
        self._wanted, self._statuses, self._got, self._need = wanted, statuses, b"", 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        if self._need:
            self._need -= len(data)
        else:
            self._got += data
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self._got.index(b"Content-Length: ") + 16
            self._need = end + 4 + int(self._got[at : self._got.index(b"\r", at)]) - len(self._got)
        if self._need <= 0:
            self._statuses[self._got[9:12].decode()] += 1
            self._got, self._need = b"", 0
            self._next()

    def _next(self) -> None:
        request = next(self._wanted, None)
        if request is None:
            self._end()
        else:
            self._transport.write(request)

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def main(port: int, connections: int, seconds: float) -> None:
    kind = json.loads(sys.stdin.read())
    statuses: Counter[str] = Counter()
    wanted = requests(kind["method"], kind["path"], kind["bodies"], kind["keys"], again=kind["again"])
    loop = asyncio.get_running_loop()
    began_at, used_s = time.monotonic(), time.process_time()
    made = [
        await loop.create_connection(lambda: Connection(wanted, statuses), "127.0.0.1", port)
        for _ in range(connections)
    ]
    await asyncio.wait([protocol.done for _, protocol in made], timeout=seconds)
    ended_at, used_s = time.monotonic(), time.process_time() - used_s
    for transport, _ in made:
        transport.abort()
    per_s = sum(statuses.values()) / (ended_at - began_at)
    found = {"per_s": per_s, "statuses": statuses, "cpu_s": used_s, "began_at": began_at, "ended_at": ended_at}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
