"""Processes of a fault test: instances of the service, and a pair of Redis servers behind one address."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import RedisError

from imagegen.redis_client.server_binary import find_binary
from tests.faults.proxy import FaultProxy
from tests.forked import ForkedProcess
from tests.ports import free_port
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
KILL_TIMEOUT_S = 60.0
KILL_SEED = int(os.environ.get("KILL_SEED", "20261123"))
KILL_STEPS = ("start.before", "start.after", "finish.before", "finish.after")
"""Steps at which `tests.faults.instance` can kill itself."""

DEAD_PRIMARY = ("127.0.0.1", "1")
"""A replica of this address keeps its data and receives nothing."""


@dataclass
class ServiceProcess:
    """One instance of the service on its own port; it can be killed, frozen and started again.

    Args:
        log: where its output goes, appended over all its lives.
        kill_file: where `kill_at` names a step; None for an instance without such steps.
    """

    settings: Mapping[str, str]
    log: Path
    kill_file: Path | None = None
    port: int = field(default_factory=free_port)
    process: ForkedProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, http: aiohttp.ClientSession) -> None:
        """Start the process and wait until it is ready."""
        environ, program = {**os.environ, **self.settings, "PORT": str(self.port)}, [str(ROOT / "run.py")]
        if self.kill_file is not None:
            environ["KILL_FILE"], program = str(self.kill_file), ["-m", "tests.faults.instance"]
        with self.log.open("ab") as log:
            self.process = await asyncio.to_thread(
                ForkedProcess, program, cwd=self.log.parent, env=environ, stdout=log, stderr=log
            )
        await eventually(lambda: self.is_ready(http), START_TIMEOUT_S)

    async def is_ready(self, http: aiohttp.ClientSession) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with http.get(f"{self.url}/readyz") as response:
                return response.status == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        """End the process by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def kill_at(self, step: str) -> None:
        """Wait until the process has killed itself at its next `step`, one of `KILL_STEPS`."""
        assert self.process is not None
        assert self.kill_file is not None
        self.kill_file.write_text(step)
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await asyncio.to_thread(self.process.wait)

    @property
    def resident_mib(self) -> int:
        """Resident memory of the process."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

    async def ensure_dead(self) -> None:
        """Kill the process where it still runs, also a frozen one."""
        if self.process is not None and self.process.poll() is None:
            await self.kill()

    async def end(self) -> int:
        """End the process by SIGTERM; return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait)


class RedisServer:
    """A server without persistence, on a TCP port and a unix socket."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.port = free_port()
        self.socket = str(folder / "redis.sock")
        self.client = Redis(unix_socket_path=self.socket)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the server, empty, and wait until it answers."""
        self._process = await asyncio.create_subprocess_exec(
            find_binary().path,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket),
            *("--save", "", "--appendonly", "no", "--dir", str(self._folder), "--repl-diskless-sync-delay", "0"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        await eventually(self._answers, START_TIMEOUT_S)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        await self.client.aclose()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _answers(self) -> bool:
        try:
            return bool(await self.client.ping())
        except (RedisError, OSError):
            return False


class RedisPair:
    """A primary and its replica behind one address, which fails over as a managed service does.

    The address is that of `proxy`; each failover starts an empty server that becomes the new replica.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers = 0
        self.primary = self._new_server()
        self.replica = self._new_server()
        self.proxy = FaultProxy(self.primary.socket)

    async def __aenter__(self) -> Self:
        await self.primary.start()
        await self._replicate(self.replica)
        await self.proxy.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.proxy.__aexit__()
        await asyncio.gather(self.primary.stop(), self.replica.stop())

    async def fail_over(self, lose_s: float) -> None:
        """Promote the replica, which lacks the last `lose_s` seconds of writes."""
        await self.replica.client.execute_command("REPLICAOF", *DEAD_PRIMARY)
        await asyncio.sleep(lose_s)
        old, self.primary = self.primary, self.replica
        self.proxy.to(self.primary.socket)
        self.proxy.cut()
        await self.primary.client.execute_command("REPLICAOF", "NO", "ONE")
        await old.stop()
        self.replica = self._new_server()
        await self._replicate(self.replica)

    def _new_server(self) -> RedisServer:
        self._servers += 1
        return RedisServer(self._folder / f"redis{self._servers}")

    async def _replicate(self, replica: RedisServer) -> None:
        await replica.start()
        await replica.client.execute_command("REPLICAOF", "127.0.0.1", str(self.primary.port))

        async def is_linked() -> bool:
            return (await replica.client.info("replication")).get("master_link_status") == "up"

        await eventually(is_linked, START_TIMEOUT_S)
