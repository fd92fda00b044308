"""Agents in real time: calls that take longer than a client waits, and many impatient clients that repeat blindly."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from mcp import Client, StdioServerParameters, stdio_client

from tests.emulator_fixtures import EmulatorProcess
from tests.mcp_wire import call, events, headers_of, tokens
from tests.service.running import KEY, RUN, Service

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""

CLIENT_TIMEOUT_S = 60.0
WAIT_S = 45.0
MAX_GAP_S = 10.0
SLOW_S = 70.0

SESSIONS, PROMPTS, AFFORDABLE = 50, 30, 24
TIMEOUTS_S = (5.0, 20.0, CLIENT_TIMEOUT_S)
SEED = 20261129

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def command(service: Service) -> StdioServerParameters:
    return StdioServerParameters(
        command=sys.executable, args=["-m", "imagegen", "mcp", "--url", service.url], cwd=RUN.parent
    )


@asynccontextmanager
async def running(folder: Path, upstream: EmulatorProcess, **settings: str) -> AsyncIterator[Service]:
    """Run the service in front of the upstream; check its log at its end."""
    keyed = {"TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream.url, "ADMIN_TOKEN": "an-admin-token-of-tests"}
    service = Service(folder, keyed | {"LEASE_SECONDS": "10"} | settings)
    await asyncio.to_thread(service.start)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.end)


async def test_each_wire_gets_a_handle_after_45_s_and_the_image_of_a_call_of_70_s(tmp_path: Path) -> None:
    with EmulatorProcess("--image", "png") as upstream:
        upstream.script({"fault": "ok", "delay_s": SLOW_S, "times": 4})
        async with running(tmp_path, upstream, WORKER_CONCURRENCY="4") as service:
            ends = await asyncio.gather(
                *(follow(service, mode, wire) for mode in ("auto", "legacy") for wire in ("http", "stdio"))
            )
        assert upstream.ledger()["paid"] == len(ends)
    for name, handle_s, gap_s, image_s in ends:
        print(f"{name}: handle at {handle_s:.1f} s, largest gap of progress {gap_s:.1f} s, image at {image_s:.1f} s")
        assert WAIT_S - 1 <= handle_s < CLIENT_TIMEOUT_S
        assert gap_s <= MAX_GAP_S
        assert SLOW_S <= image_s < SLOW_S + CLIENT_TIMEOUT_S


async def follow(service: Service, mode: str, wire: str) -> tuple[str, float, float, float]:
    """Return when the handle and the image came, and the longest time without progress, in seconds."""
    began, seen = time.monotonic(), [0.0]

    async def record(progress: float, total: float | None, message: str | None) -> None:
        seen.append(time.monotonic() - began)

    server: Any = f"{service.url}/mcp" if wire == "http" else stdio_client(command(service))
    async with Client(server, mode=mode, read_timeout_seconds=CLIENT_TIMEOUT_S) as client:
        began, seen[:] = time.monotonic(), [0.0]
        found = await client.call_tool("generate_image", {"prompt": f"{mode} {wire}"}, progress_callback=record)
        handle_s = time.monotonic() - began
        seen.append(handle_s)
        gap_s = max(after - before for before, after in pairwise(seen))
        handle: Any = found.structured_content
        assert (handle["status"], handle["next"]) == ("processing", "call get_image_task")
        found = await client.call_tool("get_image_task", {"taskId": handle["taskId"]})
        done: Any = found.structured_content
        assert (done["status"], len(done["urls"])) == ("completed", 1)
        return f"{mode} {wire}", handle_s, gap_s, time.monotonic() - began


@dataclass
class Record:
    """What all sessions saw. late: timeouts that passed; gaps_s: longest times without progress; ends: by outcome."""

    late: Counter[float] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    gaps_s: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def result(self, answer: dict[str, Any]) -> dict[str, Any]:
        self.tokens.append(tokens(answer["result"]))
        return dict(answer["result"]["structuredContent"])


class Agent:
    """A client with a timeout over HTTP. It has no memory of its tasks but the last handle."""

    def __init__(self, http: aiohttp.ClientSession, url: str, record: Record, timeout_s: float) -> None:
        self._http, self._url, self._record, self._timeout_s = http, f"{url}/mcp", record, timeout_s

    async def ask(self, body: dict[str, Any], leave_s: float | None = None) -> dict[str, Any] | None:
        """Return the structured result; None if the client gave up, or left after `leave_s` seconds."""
        within_s = self._timeout_s if leave_s is None else leave_s
        self._record.calls[body["params"]["name"]] += 1
        try:
            async with asyncio.timeout(within_s):
                async with self._http.post(self._url, json=body, headers=headers_of(body)) as response:
                    assert response.status == 200, await response.text()
                    return self._record.result(await self._read(response))
        except TimeoutError:
            if leave_s is None:
                self._record.late[within_s] += 1
            return None

    async def _read(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        """Return the last message, and measure the gaps before each."""
        if response.content_type == "application/json":
            return dict(orjson.loads(await response.read()))
        last_s, text = time.monotonic(), b""
        async for line in response.content:
            text += line
            if line.startswith(b"data: "):
                self._record.gaps_s.append(time.monotonic() - last_s)
                last_s = time.monotonic()
        return events(text.decode())[-1]


async def session(number: int, agent: Agent, record: Record) -> None:
    """Want one image until it is there or refused: repeat blindly after a timeout, ask for a handle where one came."""
    chance = random.Random(SEED + number)
    meta = {"progressToken": number} if number % 2 else {}
    body = call("generate_image", meta=meta, prompt=f"image {number % PROMPTS}")
    while True:
        leave_s = chance.uniform(0.05, 3.0) if chance.random() < 0.2 else None
        seen = await agent.ask(body, leave_s)
        if seen is None:
            continue
        while seen is not None and seen["status"] in ("pending", "processing") and chance.random() < 0.5:
            seen = await agent.ask(call("get_image_task", meta=meta, taskId=seen["taskId"]))
        if seen is not None and seen["status"] not in ("pending", "processing"):
            record.ends[seen["status"]] += 1
            return


@pytest.mark.usefixtures("one_day")
async def test_fifty_impatient_agents_pay_once_for_each_image_and_stay_in_budget(tmp_path: Path) -> None:
    record, chance = Record(), random.Random(SEED)
    budget = AFFORDABLE * IMAGE_USD
    with EmulatorProcess("--image", "png") as upstream:
        delays = [SLOW_S if number % 3 == 0 else chance.uniform(0.0, SLOW_S) for number in range(PROMPTS)]
        upstream.script(*({"fault": "ok", "delay_s": delay_s} for delay_s in delays))
        settings = {"WORKER_CONCURRENCY": "8", "BUDGET_DAILY_USD": f"{budget:.6f}"}
        began = time.monotonic()
        async with running(tmp_path, upstream, **settings) as service, unlimited_session() as http:
            agents = [Agent(http, service.url, record, TIMEOUTS_S[number % 3]) for number in range(SESSIONS)]
            await asyncio.gather(*(session(number, agent, record) for number, agent in enumerate(agents)))
            usage = (await asyncio.to_thread(service.get_as_admin, "/api/usage")).json
        paid = Counter(each["prompt"] for each in upstream.ledger()["calls"] if each["paid"])
    spent = usage["total"]["spent"]
    print(
        f"{time.monotonic() - began:.0f} s, calls {dict(record.calls)}, ends {dict(record.ends)}, timeouts "
        f"{dict(record.late)}, paid {paid.total()} of {len(paid)} prompts, spent {spent:.6f} of {budget:.6f} USD, "
        f"most tokens {max(record.tokens):.0f}, longest gap of progress {max(record.gaps_s):.1f} s"
    )
    assert set(paid.values()) == {1}, "an image was paid twice"
    assert paid.total() == AFFORDABLE
    assert spent <= budget
    assert record.late[CLIENT_TIMEOUT_S] == 0
    assert record.late[TIMEOUTS_S[0]] > 0, "the clients were not impatient"
    assert record.calls["get_image_task"] > 0, "no client got a handle"
    assert max(record.tokens) < 2_000
    assert max(record.gaps_s) <= MAX_GAP_S
    assert record.ends.keys() == {"completed", "refused"}
    assert record.ends.total() == SESSIONS


def unlimited_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))
