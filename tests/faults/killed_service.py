"""Instance that is killed at chosen steps and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.faults.fleet import wait_until
from tests.forked import ForkedProcess
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("KILL_SEED", "20261123"))
STEPS = ("start.before", "start.after", "finish.before", "finish.after")


@dataclass
class Service:
    """One instance that is restarted each time it dies."""

    environ: dict[str, str]
    wish: Path
    port: int = field(default_factory=free_port)
    process: ForkedProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, http: aiohttp.ClientSession) -> None:
        environ = {**os.environ, **self.environ, "PORT": str(self.port), "KILL_FILE": str(self.wish)}
        self.process = await asyncio.to_thread(
            ForkedProcess, ["-m", "tests.faults.instance"], cwd=ROOT, env=environ, stdout=2
        )
        await wait_until(lambda: self._ready(http), within_s=60)

    async def die(self, step: str) -> None:
        """Kill the instance when it next reaches the step, or at once."""
        assert self.process is not None
        if step in STEPS:
            self.wish.write_text(step)
        else:
            self.process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(60):
            await asyncio.to_thread(self.process.wait)

    async def end(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait)

    async def _ready(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(f"{self.url}/readyz") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
