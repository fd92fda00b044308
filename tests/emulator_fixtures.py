"""Together's emulator for tests, in the event loop of the test or as a separate process.

    async with EmulatedUpstream(delay_s=0.1) as upstream:
        upstream.script("500", {"fault": "429", "retry_after": 1, "times": 2, "match": "cat"}, "hang")
        …                                    # TOGETHER_API_URL=upstream.url, any key
        await upstream.ledger.wait_for(lambda ledger: ledger.total == 4)
        assert len(upstream.ledger.paid) == 2

    with EmulatorProcess("--image", "png", "--no-image") as upstream:
        upstream.script({"fault": "503", "for_s": 5})
        assert upstream.ledger()["paid"] == 0

The faults and their options: imagegen/emulator/__init__.py.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote

from imagegen.emulator import CallLedger, Emulator, Options
from tests.forked import ForkedProcess

_START_S = 60.0
_STOP_S = 20.0


class EmulatedUpstream:
    """An emulator in this event loop, on a free loopback port; `options` are those of emulator.Options."""

    def __init__(self, **options: Any) -> None:
        self._emulator = Emulator(Options(**options))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the emulator; after `stop()`, on the same port again."""
        await self._emulator.start()

    async def stop(self) -> None:
        """Close all connections and refuse new ones; keep the ledger."""
        await self._emulator.stop()

    @property
    def url(self) -> str:
        """Base URL without `/v1`."""
        return self._emulator.url

    @property
    def host(self) -> str:
        """`127.0.0.1:port`, the host of its image links."""
        return self.url.removeprefix("http://")

    @property
    def ledger(self) -> CallLedger:
        return self._emulator.ledger

    def script(self, *steps: object) -> None:
        """Queue faults: texts (`"429 retry_after=2"`) or mappings (`{"fault": "500", "times": 2}`)."""
        self._emulator.script(steps)

    def set_fault(self, fault: str | None, share: float = 1.0) -> None:
        """Set the response of calls without a queued or prompted fault; None restores good responses."""
        self._emulator.set_fault(fault, share)

    def expire_links(self) -> None:
        self._emulator.expire_links()

    def release(self) -> None:
        """Let the calls of `held=1` be answered."""
        self._emulator.release()

    def clear(self) -> None:
        """Empty the ledger and the queue."""
        self._emulator.ledger.clear()
        self._emulator.clear_script()


class EmulatorProcess:
    """Process of an emulator with these arguments; ready when entered, ended with SIGTERM. module: of its command."""

    def __init__(self, *arguments: str, port: int = 0, module: str = "imagegen.emulator") -> None:
        self._arguments = ["-m", module, "--port", str(port), *arguments]
        self.process: ForkedProcess
        self._output: IO[str]
        self.url = ""

    def __enter__(self) -> Self:
        reading, writing = os.pipe()
        self._output = os.fdopen(reading)
        self.process = ForkedProcess(self._arguments, cwd=Path.cwd(), env=os.environ, stdout=writing)
        os.close(writing)
        line = self._first_line()
        if not line.startswith("emulator ready on "):
            self._end()
            raise RuntimeError(f"the emulator did not start: {line!r}, exit code {self.process.returncode}")
        self.url = line.removeprefix("emulator ready on ").strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ledger(self, text: str = "") -> dict[str, Any]:
        """`{"total", "paid", "in_flight", "peak_in_flight", "calls": […]}`, with the calls that hold `text`."""
        return dict(json.loads(self._request("GET", f"ledger?prompt={quote(text)}")))

    def script(self, *steps: object) -> None:
        self._request("POST", "script", json.dumps(steps).encode())

    def expire_links(self) -> None:
        self._request("POST", "expire")

    def release(self) -> None:
        """Let the calls of `held=1` be answered."""
        self._request("POST", "release")

    def revoke(self, key: str) -> None:
        """Refuse a key from now on; only of providers with jobs."""
        self._request("POST", "revoke", key.encode())

    def clear(self) -> None:
        """Empty the ledger and the queue."""
        self._request("DELETE", "ledger")
        self._request("DELETE", "script")

    def _request(self, method: str, name: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"{self.url}/_emulator/{name}", data=body, method=method)
        with urllib.request.urlopen(request, timeout=_START_S) as response:
            return bytes(response.read())

    def _first_line(self) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            return self._output.readline() if selector.select(_START_S) else ""

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()
