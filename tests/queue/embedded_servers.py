"""Embedded servers on folders, and what a client sees of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from imagegen.redis_client.embedded import EmbeddedRedis

ROOT = Path(__file__).resolve().parents[2]

OTHER_PROCESS = """
import asyncio, sys
from pathlib import Path
from imagegen.redis_client.embedded import EmbeddedRedis

async def main():
    server = EmbeddedRedis(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await server.watch()

asyncio.run(main())
"""


class Servers:
    """Factory of EmbeddedRedis objects; two of them on one folder behave like two processes."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def start(self, data_dir: Path, binary: str | None = None, *, watched: bool = False) -> EmbeddedRedis:
        server = EmbeddedRedis(data_dir, binary)
        await server.start()
        self._stack.push_async_callback(server.stop)
        if watched:
            watching = asyncio.create_task(server.watch())
            self._stack.push_async_callback(asyncio.wait, [watching])
            self._stack.callback(watching.cancel)
        return server

    async def other_process(self, data_dir: Path) -> tuple[asyncio.subprocess.Process, int]:
        """Start a process that runs a server in the folder; return it and the server's pid."""
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", OTHER_PROCESS, str(data_dir)], cwd=ROOT, stdout=-1, stderr=-3
        )
        self._stack.push_async_callback(kill, process)
        assert process.stdout
        return process, int(await asyncio.wait_for(process.stdout.readline(), 60))


async def kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()


@asynccontextmanager
async def client(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    redis = Redis.from_url(server.url, decode_responses=True)
    try:
        yield redis
    finally:
        await redis.aclose()


async def put(server: EmbeddedRedis, value: str) -> None:
    async with client(server) as redis:
        await redis.set("key", value)


async def got(server: EmbeddedRedis) -> bytes | str | None:
    """Return the stored value; None also if no server answers."""
    try:
        async with client(server) as redis:
            return await redis.get("key")
    except (RedisError, OSError):
        return None


def gone(pid: int) -> bool:
    """Return whether the process has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def the_only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


MakeProgram = Callable[[str, str, str], Path]
