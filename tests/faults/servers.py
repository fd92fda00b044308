"""Real Redis servers as processes: a primary and its replica for a promotion."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from imagegen.redis_client.embedded import EmbeddedRedis
from tests.ports import free_port
from tests.support import eventually

SERVER = shutil.which("redis-server")


def pid_of(server: EmbeddedRedis) -> int:
    """Return the process of a server that runs."""
    assert server.pid is not None
    return server.pid


class RedisServer:
    """A server with a unix socket and a port, without persistence unless `args` enable it."""

    def __init__(self, folder: Path, *args: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.path = str(folder / "redis.sock")
        self._args = args
        self._process: asyncio.subprocess.Process | None = None
        self.redis = Redis(unix_socket_path=self.path)

    async def start(self) -> None:
        if SERVER is None:
            pytest.skip("redis-server is not installed")
        args = ["--port", str(self.port), "--unixsocket", self.path, "--dir", str(self.folder), "--save", ""]
        self._process = await asyncio.create_subprocess_exec(
            SERVER, *args, *self._args, stdout=asyncio.subprocess.DEVNULL
        )
        await eventually(self.answers, within_s=30)

    async def is_linked(self) -> bool:
        """Return whether it receives the writes of its primary."""
        return bool((await self.redis.info("replication"))["master_link_status"] == "up")

    async def answers(self) -> bool:
        try:
            return bool(await self.redis.ping())
        except (OSError, RedisError):
            return False

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def close(self) -> None:
        await self.redis.aclose()
        await self.kill()


@asynccontextmanager
async def primary_and_replica(folder: Path) -> AsyncIterator[tuple[RedisServer, RedisServer]]:
    """Run a primary and a synchronised replica; `promote` stops the replication, so that later writes are lost."""
    primary = RedisServer(folder / "primary", "--repl-diskless-sync-delay", "0")
    await primary.start()
    replica = RedisServer(folder / "replica", "--replicaof", "127.0.0.1", str(primary.port))
    try:
        await replica.start()
        await eventually(replica.is_linked, within_s=20)
        yield primary, replica
    finally:
        await replica.close()
        await primary.close()


async def promote(primary: RedisServer, replica: RedisServer) -> None:
    """Let all writes so far reach the replica, and none from now on."""
    assert await primary.redis.execute_command("WAIT", 1, 5000) == 1
    await replica.redis.execute_command("REPLICAOF", "NO", "ONE")
