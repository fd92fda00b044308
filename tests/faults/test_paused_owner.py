"""An instance that is paused between the checkpoint of a call and the call itself, while another one takes its task."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.faults.fleet import RedisServer, ServiceProcess
from tests.image_bytes import image_file
from tests.support import eventually


class UnreachedUpstream:
    """Upstream whose port makes no connection until `open`: its queue of connections is full.

    calls: bodies of the paid calls that it has received.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._waiting: list[socket.socket] = []
        self._server: asyncio.Server | None = None
        self.calls: list[bytes] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def fill(self) -> None:
        """Connect until a further connection is not made any more."""
        for _ in range(8):
            client = socket.socket()
            client.setblocking(False)
            self._waiting.append(client)
            try:
                async with asyncio.timeout(0.3):
                    await asyncio.get_running_loop().sock_connect(client, self._listener.getsockname())
            except TimeoutError:
                return
        raise AssertionError("the queue of connections takes more than it should")

    async def open(self) -> None:
        """Take the waiting connections, and all further ones."""
        self._listener.listen(100)
        self._server = await asyncio.start_server(self._serve, sock=self._listener)

    async def close(self) -> None:
        for client in self._waiting:
            client.close()
        if self._server is not None:
            self._server.close()
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"POST"):
                    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    self.calls.append(await reader.readexactly(size))
                    answer, kind = f'{{"data":[{{"index":0,"url":"{self.url}/1.png"}}]}}'.encode(), b"application/json"
                else:
                    answer, kind = image_file(), b"image/png"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (kind, len(answer)))
                writer.write(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def upstream() -> AsyncIterator[UnreachedUpstream]:
    upstream = UnreachedUpstream()
    yield upstream
    await upstream.close()


async def test_an_instance_that_was_paused_while_it_connected_makes_no_call_of_a_task_that_another_one_has_taken(
    tmp_path: Path, upstream: UnreachedUpstream
) -> None:
    settings = {
        "TOGETHER_API_KEY": "k",
        "TOGETHER_API_URL": upstream.url,
        "LEASE_SECONDS": "1",
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with AsyncExitStack() as stack:
        redis = RedisServer(tmp_path / "redis")
        await redis.start()
        stack.push_async_callback(redis.stop)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        first, second = (
            ServiceProcess(settings | {"REDIS_URL": f"unix://{redis.socket}"}, tmp_path / f"{name}.log")
            for name in ("first", "second")
        )
        for service in (first, second):
            stack.push_async_callback(service.ensure_dead)
        await first.start(http)
        await upstream.fill()

        async with http.post(f"{first.url}/api/images/generate", json={"prompt": "a cat"}) as answer:
            task_id = (await answer.json())["taskId"]
        checkpoint = f"{{imagegen}}:run:{task_id}"
        await eventually(lambda: redis.client.exists(checkpoint))
        first.signal(signal.SIGSTOP)
        await upstream.open()
        await second.start(http)
        async with http.get(f"{second.url}/api/images/{task_id}?wait=60") as answer:
            assert (await answer.json())["status"] == "completed"
        assert len(upstream.calls) == 1

        first.signal(signal.SIGCONT)
        async with http.post(f"{first.url}/api/images/generate?wait=30", json={"prompt": "a dog"}) as answer:
            assert (await answer.json())["status"] == "completed"
        assert [b"a cat" in call for call in upstream.calls] == [True, False]
