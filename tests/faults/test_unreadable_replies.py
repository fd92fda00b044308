"""Invalid replies: each command is sent again or refused as in an outage, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from redis.exceptions import ResponseError

from imagegen.errors import QueueUnavailable, SettingsError
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import unavailable
from imagegen.tasks.task import State
from tests.conftest import Instance, MakeInstance
from tests.emulator_fixtures import EmulatedUpstream
from tests.faults.fleet import ServiceProcess
from tests.faults.garbling_proxy import WRONG_REPLIES, GarblingProxy
from tests.queue.finishing import end
from tests.support import ADMIN_TOKEN, AS_ADMIN, check_rows, eventually, logged, over_rows, submission

TASKS = 60
FINAL = {"completed", "failed", "cancelled"}
PAGES = ("/api/images?limit=5", "/api/stats", "/api/usage", "/metrics", "/api/admin/keys")


@pytest.fixture
async def garbling(redis_url: str) -> AsyncIterator[GarblingProxy]:
    async with GarblingProxy(redis_url.removeprefix("unix://")) as proxy:
        yield proxy


def garble_once(proxy: GarblingProxy, reply: bytes, *words: bytes) -> None:
    """Pass a reply in place of that to the next command with these words."""
    until = proxy.garbled + 1

    def garble(command: list[bytes]) -> bytes | None:
        return reply if proxy.garbled < until and set(words) <= set(command) else None

    proxy.garble = garble


async def test_a_command_with_a_reply_of_another_type_is_sent_again(garbling: GarblingProxy) -> None:
    connection = Connection(garbling.url)
    try:
        await connection.multiplexer.execute("SET", "{imagegen}:x", "right", "PX", 60_000)
        for reply in (b":7\r\n", b"*0\r\n", b"HTTP/1.1 502 Bad Gateway\r\n\r\n"):
            garble_once(garbling, reply, b"GET")
            before = garbling.garbled
            assert await connection.multiplexer.execute("GET", "{imagegen}:x") == b"right"
            assert garbling.garbled == before + 1
    finally:
        await connection.close()


async def test_a_submit_with_an_unreadable_reply_is_refused_and_its_repeat_joins_the_task(
    make_instance: MakeInstance, garbling: GarblingProxy
) -> None:
    instance = make_instance(start=False, url=garbling.url)
    await instance.verbs.create_group()

    async def check(number_and_reply: tuple[int, bytes]) -> None:
        number, reply = number_and_reply
        wanted = submission(f"number {number}")
        garble_once(garbling, reply, b"{" + instance.keys.prefix.encode() + b"}:task:" + wanted.task_id.encode())
        try:
            await instance.client_queue.submit(wanted)
        except QueueUnavailable:
            submitted = await instance.client_queue.submit(wanted)
            assert submitted.task.id == wanted.task_id

    await check_rows(enumerate(WRONG_REPLIES), check)
    assert await instance.connection.commands.xlen(instance.keys.stream) == len(WRONG_REPLIES)


async def test_a_result_that_redis_has_stored_and_not_confirmed_is_no_call_of_another_instance(
    make_instance: MakeInstance, garbling: GarblingProxy
) -> None:
    instance = make_instance(url=garbling.url, lease_s=1.0)
    await end(instance, await started(instance, "before"))  # so that Redis knows the script
    claim = await started(instance, "a")
    renewals = instance.connection.meter.commands
    before = renewals["renew"]
    entry_id, outbox = claim.entry_id.encode(), instance.keys.outbox.encode()

    def garble(words: list[bytes]) -> bytes | None:
        is_unconfirmed = {entry_id, outbox} <= set(words) and renewals["renew"] == before
        return b"-LOADING Redis is loading the dataset in memory\r\n" if is_unconfirmed else None

    garbling.garble = garble
    with logged("WARNING") as lines:
        await end(instance, claim)
    stored = await instance.read(claim.task.id)
    assert (stored.state, stored.possibly_billed_twice) == (State.COMPLETED, 0)
    assert instance.connection.meter.ambiguous == 0
    assert garbling.garbled > 0
    assert [line for line in lines if "lost" in line] == []


async def test_a_checkpoint_with_an_unreadable_reply_is_written_again(
    make_instance: MakeInstance, garbling: GarblingProxy
) -> None:
    instance = make_instance(url=garbling.url)
    claim = await started(instance, "a")
    key = instance.keys.checkpoint(claim.task.id).encode()

    async def check(reply: bytes) -> None:
        before = garbling.garbled
        garble_once(garbling, reply, key)
        assert await instance.worker_queue.start(claim) is StartResult.STARTED
        assert garbling.garbled == before + 1

    await check_rows(WRONG_REPLIES, check)


async def started(instance: Instance, name: str) -> Claim:
    await instance.client_queue.submit(submission(name))
    claim = await instance.claim()
    while await instance.worker_queue.start(claim) is StartResult.INHERITED:
        pass
    return claim


@over_rows(
    ("text", "is_outage"),
    [
        ("upstream failure", True),  # Envoy
        ("no upstream host", True),
        ("Connection refused", True),  # twemproxy
        ("max requests limit exceeded. Limit: 500000, Usage: 500000", True),  # Upstash
        ("max request size exceeded. Limit: 1048576 bytes, Actual: 1064192 bytes", False),
        ("max single record size exceeded. Limit: 104857600 bytes", False),
        ("Error running script (call to f_1): @user_script:1: Script killed by user with SCRIPT KILL", True),
        ("Error running script (call to f_1): @user_script:1: attempt to index a nil value", False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("value is not an integer or out of range", False),
        ("NOGROUP No such key 'a' or consumer group 'b'", False),
        ("The ID specified in XADD is equal or smaller than the target stream top item", False),
    ],
)
def test_an_error_that_blames_no_command_is_an_outage(text: str, is_outage: bool) -> None:
    assert unavailable(ResponseError(text)) is is_outage


async def test_a_service_between_unreadable_replies_loses_no_task_and_pays_each_once(
    garbling: GarblingProxy, tmp_path: Path
) -> None:
    chance = random.Random(5)
    settings = {
        "REDIS_URL": garbling.url,
        "TOGETHER_API_KEY": "k",
        "LEASE_SECONDS": "2",
        "RATE_LIMIT_MAX": "0",
        "IMAGE_RATE_LIMIT_MAX": "0",
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "DATA_DIR": str(tmp_path / "data"),
    }
    timeout = aiohttp.ClientTimeout(total=30)
    async with EmulatedUpstream(image="png", delay_s=0.1) as upstream, aiohttp.ClientSession(timeout=timeout) as http:
        service = ServiceProcess(settings | {"TOGETHER_API_URL": upstream.url}, tmp_path / "service.log")
        try:
            await service.start(http)
            garbling.garble = lambda _words: chance.choice(WRONG_REPLIES) if chance.random() < 0.05 else None
            ids = await asyncio.gather(*(submit(http, service.url, number) for number in range(TASKS)))
            statuses = Counter([await status_of(http, service.url + page) for page in PAGES for _ in range(5)])
            await eventually(lambda: all_completed(http, service.url, ids), within_s=60)
            garbling.garble = lambda _words: None
            assert set(statuses) <= {200, 503}
            assert Counter(call.prompt for call in upstream.ledger.paid) == {f"number {i}": 1 for i in range(TASKS)}
            assert garbling.garbled > TASKS / 10
            assert await service.end() == 0
        finally:
            await service.ensure_dead()
    lines = [line for line in service.log.read_text().splitlines() if "can't be read" not in line]
    assert [line for line in lines if any(fault in line for fault in ("Traceback", "ERROR", "CRITICAL"))] == []


async def test_scripts_that_get_invalid_replies_alone_are_sent_again_ever_more_rarely(
    make_instance: MakeInstance, garbling: GarblingProxy
) -> None:
    instance = make_instance(url=garbling.url, slots=8)
    claims = [await started(instance, f"number {number}") for number in range(8)]
    garbling.garble = lambda words: b"*0\r\n" if words[0] == b"EVALSHA" else None
    ends = [asyncio.create_task(end(instance, claim)) for claim in claims]
    await eventually(lambda: garbling.garbled > 8)
    before, began_at = garbling.garbled, time.monotonic()
    while time.monotonic() < began_at + 3:
        await instance.connection.multiplexer.execute("GET", instance.keys.pause)  # Redis answers all other commands
    assert garbling.garbled - before < len(claims) * 20
    garbling.garble = lambda _words: None
    await asyncio.gather(*ends)


async def submit(http: aiohttp.ClientSession, url: str, number: int) -> str:
    """Submit a task until it is accepted; each refusal names when to repeat it."""
    while True:
        async with http.post(f"{url}/api/images/generate", json={"prompt": f"number {number}"}) as response:
            body = await response.json()
            if response.status in (200, 202):
                return str(body["taskId"])
            assert (response.status, "Retry-After" in response.headers) == (503, True), body
        await asyncio.sleep(0.05)


async def status_of(http: aiohttp.ClientSession, address: str) -> int:
    async with http.get(address, headers=AS_ADMIN) as response:
        return response.status


async def all_completed(http: aiohttp.ClientSession, url: str, ids: list[str]) -> bool:
    for task_id in ids:
        async with http.get(f"{url}/api/images/{task_id}?wait=5") as response:
            assert response.status in (200, 503)
            task = await response.json()
            assert task.get("status") not in FINAL - {"completed"}, str(task)
            if task.get("status") != "completed":
                return False
    return True


async def test_a_proxy_that_refuses_commands_outside_of_scripts_stops_the_start(garbling: GarblingProxy) -> None:
    """Envoy's redis_proxy passes scripts on, and refuses XGROUP."""
    connection = Connection(garbling.url)
    try:
        for command in (b"XGROUP", b"XREADGROUP"):
            garble_once(garbling, b"-ERR unknown command '%s'\r\n" % command, command)
            with pytest.raises(SettingsError, match=f"REDIS_URL.*{command.decode()}.*no proxy that refuses some"):
                await check_server(connection, "refusing")
        garbling.garble = lambda _words: None
        await check_server(connection, "refusing")
    finally:
        await connection.close()
