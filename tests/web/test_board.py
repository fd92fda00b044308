"""Tests of the board's routes: the pause of claiming on all instances, the snapshot and the history."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from imagegen.app import QUEUE
from imagegen.history.history_store import HistoryStore
from imagegen.queue.pause import PauseState
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import AS_ADMIN, eventually, logged, over_rows

Client = TestClient[web.Request, web.Application]
StartTwo = Callable[..., Awaitable[tuple[Client, Client]]]
StartService = Callable[..., Awaitable[Client]]

HOSTILE = '<img src=x onerror="alert(1)"> \u202e'


async def post(client: Client, path: str) -> dict[str, Any]:
    answer = await client.post(path, headers=AS_ADMIN)
    assert answer.status in (200, 202), await answer.text()
    return dict(await answer.json())


async def get(client: Client, path: str) -> dict[str, Any]:
    answer = await client.get(path, headers=AS_ADMIN)
    assert answer.status == 200, await answer.text()
    return dict(await answer.json())


async def submit(client: Client, prompt: str) -> str:
    answer = await client.post("/api/images/generate", json={"prompt": prompt})
    assert answer.status == 202
    return str((await answer.json())["taskId"])


async def status(client: Client, task_id: str) -> str:
    return str((await get(client, f"/api/images/{task_id}"))["status"])


def is_paused(client: Client) -> bool:
    return client.app[QUEUE].dispatcher.paused


async def test_a_pause_holds_for_all_instances_until_one_resumes(start_two: StartTwo) -> None:
    one, two = await start_two()
    paused = await post(one, "/api/admin/pause")
    assert paused["paused"]
    assert (await post(two, "/api/admin/pause")) == paused  # the same pause
    assert is_paused(one)
    assert is_paused(two)
    ids = [await submit(each, f"{n}") for n, each in enumerate((one, two, one, two))]
    for each in (one, two):
        assert (await get(each, "/api/admin/board"))["queue"]["pausedSince"] == paused["since"]
        stats = await get(each, "/api/stats")
        assert (stats["queue"]["pausedSince"], stats["queue"]["depth"]) == (paused["since"], 4)
        assert await get(each, "/readyz") == {"status": "ready", "paused": True}
        assert "imagegen_claiming_paused 1.0" in await (await each.get("/metrics", headers=AS_ADMIN)).text()
    assert {await status(one, task_id) for task_id in ids} == {"pending"}
    assert not one.app[QUEUE].dispatcher.held
    assert not two.app[QUEUE].dispatcher.held
    assert await post(two, "/api/admin/resume") == {"success": True, "paused": False, "since": None}
    for task_id in ids:
        assert (await get(one, f"/api/images/{task_id}?wait=10"))["status"] == "completed"
    assert await get(one, "/readyz") == {"status": "ready"}


async def test_after_a_pause_an_instance_reads_the_stream_as_before_and_logs_no_outage(
    start_service: StartService,
) -> None:
    client = await start_service()
    reads = client.app[QUEUE].connection.blocking_reads
    with logged("WARNING", "{message}") as lines:
        for prompt in ("a", "b"):
            await eventually(lambda: reads.under_way)
            await post(client, "/api/admin/pause")
            await eventually(lambda: not reads.under_way)
            await post(client, "/api/admin/resume")
            task_id = await submit(client, prompt)
            assert (await get(client, f"/api/images/{task_id}?wait=10"))["status"] == "completed"
        await eventually(lambda: reads.under_way)
    assert [line for line in lines if not line.startswith("Claiming is paused")] == []


async def test_a_repeated_pause_reaches_the_instances_that_missed_the_first(start_two: StartTwo) -> None:
    one, two = await start_two()
    connection, keys = one.app[QUEUE].connection, one.app[QUEUE].keys
    stored = msgspec.json.encode(PauseState(int(connection.clock() * 1000), paused=True, since=connection.clock()))
    await connection.commands.set(keys.pause, stored)  # as a write does whose answer was lost
    assert (await post(one, "/api/admin/pause"))["paused"]
    await eventually(lambda: is_paused(two))


async def test_running_tasks_finish_while_claiming_is_paused(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "held": 1})
    client = await start_paid(worker_concurrency=1)
    running, waiting = await submit(client, "runs"), await submit(client, "waits")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    await post(client, "/api/admin/pause")
    upstream.release()
    assert (await get(client, f"/api/images/{running}?wait=10"))["status"] == "completed"
    view = await get(client, f"/api/images/{waiting}?wait=1")
    assert (view["status"], view["etaSeconds"]) == ("pending", None)
    await post(client, "/api/admin/resume")
    assert (await get(client, f"/api/images/{waiting}?wait=10"))["status"] == "completed"


async def test_a_paused_service_stays_paused_over_a_restart_and_logs_it(start_service: StartService) -> None:
    client = await start_service()
    await post(client, "/api/admin/pause")
    task_id = await submit(client, "waits")
    await client.close()
    with logged("WARNING", "{message}") as lines:
        client = await start_service()
    assert [line for line in lines if line.startswith("Claiming is paused on all instances since ")]
    assert await status(client, task_id) == "pending"
    await post(client, "/api/admin/resume")
    assert (await get(client, f"/api/images/{task_id}?wait=10"))["status"] == "completed"


async def test_no_attempt_that_waits_for_its_turn_calls_during_a_pause(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    client = await start_paid(upstream_rate_per_min=120.0)
    ids = [await submit(client, f"{n}") for n in range(6)]
    await upstream.ledger.wait_for(lambda ledger: ledger.total)
    await post(client, "/api/admin/pause")
    called = upstream.ledger.total
    await asyncio.sleep(1.2)  # two turns of the rate pass
    assert upstream.ledger.total <= called + 1  # one may have had its turn before the pause
    await post(client, "/api/admin/resume")
    for task_id in ids:
        assert (await get(client, f"/api/images/{task_id}?wait=20"))["status"] == "completed"
    assert upstream.ledger.total == len(ids)


async def test_a_pause_that_redis_lost_is_written_back(service: Client) -> None:
    await post(service, "/api/admin/pause")
    queue = service.app[QUEUE]
    await queue.connection.commands.delete(queue.keys.pause)
    queue.pause.read_soon()

    async def is_back() -> bool:
        return bool(await queue.connection.commands.exists(queue.keys.pause))

    await eventually(is_back)
    assert is_paused(service)


FOREIGN_PAUSES = [
    b"",
    b"[",
    b"\xff",
    b'{"version":"x"}',
    b'{"version":9223372036854775807,"paused":true,"since":1}',
    b'{"version":-1,"paused":true,"since":1}',
    b'{"version":9007199254740990,"paused":true,"since":1e300}',
]


@pytest.mark.parametrize("value", FOREIGN_PAUSES)
async def test_a_foreign_value_of_the_pause_does_not_count(service: Client, value: bytes) -> None:
    queue = service.app[QUEUE]
    await queue.connection.commands.set(queue.keys.pause, value)
    await queue.pause.start()
    assert queue.pause.state == PauseState()
    assert (await post(service, "/api/admin/pause"))["paused"]


async def test_a_pause_of_another_type_in_redis_is_replaced_and_the_claims_go_on(service: Client) -> None:
    queue = service.app[QUEUE]
    for name, is_paused_then in (("pause", True), ("resume", False)):
        await queue.connection.commands.delete(queue.keys.pause)
        await queue.connection.commands.rpush(queue.keys.pause, "of another program")
        await queue.pause.start()
        assert (await post(service, f"/api/admin/{name}"))["paused"] is is_paused_then
    assert await get(service, f"/api/images/{await submit(service, 'a')}?wait=10")


async def test_a_foreign_message_about_the_pause_is_left_out(service: Client) -> None:
    queue = service.app[QUEUE]
    queue.pause.on_message({"from": "x", "kind": "pause", "state": {"version": 1, "paused": True, "since": 1e300}})
    assert queue.pause.state == PauseState()


async def test_a_pause_costs_three_commands_and_none_for_each_task(service: Client) -> None:
    queue = service.app[QUEUE]
    meter = queue.connection.meter
    await eventually(lambda: meter.commands["control"] == 6)  # three reads, a mark, the subscription, and the greeting
    await post(service, "/api/admin/pause")
    await queue.notifier.flush()
    before = meter.commands["control"]
    await post(service, "/api/admin/resume")
    await queue.notifier.flush()
    assert meter.commands["control"] == before + 3  # read, written, published
    for n in range(5):
        await get(service, f"/api/images/{await submit(service, str(n))}?wait=10")
    assert meter.commands["control"] == before + 3


async def test_a_pause_set_during_a_read_is_not_written_back(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = service.app[QUEUE]
    meter, commands = queue.connection.meter, queue.connection.commands
    await eventually(lambda: meter.commands["control"] == 6)  # the start is over
    read, answered, delivered = commands.get, asyncio.Event(), asyncio.Event()

    async def delayed(key: str) -> object:
        monkeypatch.setattr(commands, "get", read)
        reply = await read(key)
        answered.set()
        await delivered.wait()
        return reply

    monkeypatch.setattr(commands, "get", delayed)
    reading = asyncio.create_task(queue.pause.start())
    await answered.wait()
    await post(service, "/api/admin/pause")
    delivered.set()
    await reading
    await queue.notifier.flush()
    assert is_paused(service)
    assert meter.commands["control"] == 10  # one read, and the three commands of the pause


async def test_the_board_lists_tasks_of_both_instances_with_cause_and_prompt(
    start_two: StartTwo, upstream: EmulatedUpstream
) -> None:
    upstream.script("400")
    paid = {"provider": "together", "together_api_key": "any", "together_api_url": upstream.url}
    one, two = await start_two(**paid)
    failed = await submit(one, "refused " + "x" * 400)
    await get(one, f"/api/images/{failed}?wait=10")
    await post(one, "/api/admin/pause")
    await eventually(lambda: is_paused(two))
    waiting, elsewhere = await submit(one, HOSTILE), await submit(two, "elsewhere")
    rows = {row["taskId"]: row for row in (await get(one, "/api/admin/board"))["tasks"]}
    assert (rows[waiting]["status"], rows[waiting]["prompt"]) == ("pending", HOSTILE)
    assert (rows[elsewhere]["status"], rows[elsewhere]["prompt"]) == ("pending", "elsewhere")
    assert (rows[failed]["status"], rows[failed]["error"]) == ("failed", "upstream_invalid_request")
    assert rows[failed]["prompt"] == ("refused " + "x" * 400)[:300]
    listed = (await get(two, "/api/images?status=failed"))["tasks"]
    assert [(task["taskId"], task["request"]["prompt"]) for task in listed] == [(failed, "refused " + "x" * 400)]


async def test_a_board_that_is_watched_costs_no_command_on_a_single_instance(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write_nothing(*_: object) -> int:
        return 1

    monkeypatch.setattr(HistoryStore, "add", write_nothing)  # it writes after each minute, whether watched or not
    await eventually(lambda: service.app[QUEUE].notifier.alone)  # until then there may be tasks of others
    await get(service, "/api/admin/board")
    meter = service.app[QUEUE].connection.meter
    before = {name: meter.commands[name] for name in ("stats", "usage")}
    boards = []
    for n in range(3):
        await get(service, f"/api/images/{await submit(service, str(n))}?wait=10")
        boards.append(await get(service, "/api/admin/board"))
    assert [len(board["tasks"]) for board in boards] == [1, 2, 3]
    assert {name: meter.commands[name] for name in before} == before
    assert boards[-1]["instance"]["alive"] == [service.app[QUEUE].monitor.instance]
    assert boards[-1]["instance"]["loops"] > 0
    assert boards[-1]["waitSeconds"]["p95"] is not None


async def test_the_history_shows_the_minute_that_runs(service: Client) -> None:
    await get(service, f"/api/images/{await submit(service, 'a')}?wait=10")
    history = await get(service, "/api/admin/board/history")
    assert history["stepSeconds"] == 60
    assert sum(minute["tasks"].get("completed", 0) for minute in history["minutes"]) == 1
    later = history["minutes"][-1]["at"] + 60
    assert (await get(service, f"/api/admin/board/history?since={later + 60}"))["minutes"] == []
    answer = await service.get("/api/admin/board/history?since=-1", headers=AS_ADMIN)
    assert answer.status == 400


@over_rows(
    ("method", "path"),
    [
        ("GET", "/api/admin/board"),
        ("GET", "/api/admin/board/history"),
        ("POST", "/api/admin/pause"),
        ("POST", "/api/admin/resume"),
    ],
)
async def test_the_boards_data_needs_the_admin_token(service: Client, method: str, path: str) -> None:
    assert (await service.request(method, path)).status == 401
    assert not is_paused(service)
