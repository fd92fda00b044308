"""The shared Redis connection and its batches: order, one write a turn, and every kind of loss."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from imagegen.errors import QueueUnavailable
from imagegen.redis_client.cluster_multiplexer import ClusterMultiplexer
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.multiplexer import (
    MAX_BYTES,
    MAX_IN_FLIGHT,
    MAX_ITEMS,
    Batcher,
    CommandBatch,
    Multiplexer,
    Script,
)
from imagegen.redis_client.redis_errors import OtherServer
from imagegen.redis_client.topology import Servers
from tests.conftest import MakeInstance
from tests.faults.garbling_proxy import GarblingProxy
from tests.faults.proxy import FaultProxy
from tests.support import eventually

MakeWire = Callable[..., Multiplexer]


@pytest.fixture
async def make_wire() -> AsyncIterator[MakeWire]:
    async with AsyncExitStack() as stack:

        def make(url: str, **options: Any) -> Multiplexer:
            wire = ClusterMultiplexer(Servers(url, "imagegen"), **options)
            stack.push_async_callback(wire.close)
            return wire

        yield make


def chunks_seen(proxy: FaultProxy) -> list[bytes]:
    """Record what the server reads from now on, write by write."""
    chunks: list[bytes] = []

    def record(chunk: bytes) -> bool:
        chunks.append(chunk)
        return False

    proxy.drop_reply = record
    return chunks


async def echo(wire: Multiplexer, text: str) -> str:
    reply: bytes = await wire.execute("ECHO", text)
    return reply.decode()


async def test_calls_of_one_turn_go_out_in_one_write_and_each_gets_its_own_answer(
    make_wire: MakeWire, proxy: FaultProxy
) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    chunks = chunks_seen(proxy)
    texts = [str(number) for number in range(50)]
    assert await asyncio.gather(*(echo(wire, text) for text in texts)) == texts
    assert len(chunks) == 1


async def test_an_error_reaches_only_its_own_call(make_wire: MakeWire, redis_url: str, prefix: str) -> None:
    wire = make_wire(redis_url)
    answers = await asyncio.gather(echo(wire, "a"), wire.execute("LPUSH"), echo(wire, "b"), return_exceptions=True)
    assert (answers[0], type(answers[1]), answers[2]) == ("a", ResponseError, "b")


async def test_commands_sent_together_are_answered_together(make_wire: MakeWire, redis_url: str) -> None:
    wire = make_wire(redis_url)
    assert await wire.execute_batch(CommandBatch([("ECHO", "a"), ("ECHO", "b")])) == [b"a", b"b"]
    with pytest.raises(ResponseError):
        await wire.execute_batch(CommandBatch([("ECHO", "a"), ("LPUSH",), ("ECHO", "b")]))


async def test_an_unknown_script_is_sent_in_full(make_wire: MakeWire, redis_url: str, prefix: str) -> None:
    wire = make_wire(redis_url)
    script = Script(f"return {{'{prefix}', ARGV[1]}}")
    asked = [wire.evalsha(script, [], [number]) for number in range(3)]
    assert await asyncio.gather(*asked) == [[prefix.encode(), str(number).encode()] for number in range(3)]
    assert (await wire.execute("SCRIPT", "EXISTS", script.sha)) == [1]


async def test_unanswered_calls_are_sent_again_on_a_new_connection(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.drop_reply = lambda chunk: b"once" in chunk and proxy.dropped == 0
    assert [*await asyncio.gather(echo(wire, "once"), echo(wire, "twice"))] == ["once", "twice"]
    assert proxy.dropped == 1


@pytest.mark.parametrize(("sends", "lost"), [(1, 1), (3, 3)])
async def test_repeated_losses_raise_an_error(make_wire: MakeWire, proxy: FaultProxy, sends: int, lost: int) -> None:
    wire = make_wire(proxy.url, sends=sends)
    await wire.execute("PING")
    proxy.drop_reply = lambda chunk: b"never" in chunk
    with pytest.raises(RedisConnectionError):
        await echo(wire, "never")
    assert proxy.dropped == lost
    assert await echo(wire, "now") == "now"


async def test_a_hanging_call_times_out_and_the_next_one_reconnects(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.black_hole = True
    with pytest.raises(RedisTimeoutError):
        await wire.execute("ECHO", "late", within_s=0.1)
    proxy.black_hole = False
    assert await echo(wire, "now") == "now"


async def test_a_short_deadline_holds_next_to_a_longer_one(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.black_hole = True
    longer = asyncio.ensure_future(wire.execute("ECHO", "a", within_s=30.0))
    with pytest.raises(RedisTimeoutError):
        await asyncio.wait_for(wire.execute("ECHO", "b", within_s=0.1), 15)
    proxy.black_hole = False
    assert await asyncio.wait_for(longer, 20) == b"a"


async def test_an_expired_call_is_not_sent_and_harms_no_connection(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    chunks = chunks_seen(proxy)
    late = asyncio.ensure_future(wire.execute("ECHO", "late", within_s=-1.0))
    assert await echo(wire, "now") == "now"
    with pytest.raises(RedisTimeoutError):
        await late
    assert not any(b"late" in chunk for chunk in chunks)


async def test_a_failed_connection_is_reported_at_once(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    proxy.refuse = True
    with pytest.raises(RedisConnectionError):
        await wire.execute("PING")
    proxy.refuse = False
    assert await wire.execute("PING") == b"PONG"


async def test_a_connection_closed_while_idle_is_renewed_without_error(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.cut()
    await eventually(lambda: not proxy.connected)
    assert await echo(wire, "now") == "now"


async def test_a_script_for_one_server_is_withdrawn_from_another_also_if_the_first_did_not_have_it(
    own_redis: EmbeddedRedis,
) -> None:
    async with FaultProxy(own_redis.url.removeprefix("unix://")) as proxy:
        connection = Connection(proxy.url)

        def lose(request: bytes) -> bool:
            is_sent_whole = b"\r\nEVAL\r\n" in request
            if is_sent_whole:
                connection.recovered.clear()
            return is_sent_whole

        try:
            await connection.multiplexer.execute("PING")
            proxy.drop_reply = lose
            batch = Script("return redis.call('INCR', KEYS[1])").batch(["{imagegen}:count"], [])
            with pytest.raises(OtherServer):
                await connection.multiplexer.execute_batch(batch._replace(one_server=True))
            assert await connection.multiplexer.execute("GET", "{imagegen}:count") == b"1"
        finally:
            await connection.close()


async def test_a_read_only_server_is_left_for_its_successor(
    make_wire: MakeWire, own_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    async with FaultProxy(own_redis.url.removeprefix("unix://")) as proxy:
        wire = make_wire(proxy.url)
        await wire.execute("SET", "a", 1)
        await wire.execute("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(ReadOnlyError):
            await wire.execute("SET", "a", 2)
        folder = tmp_path / "successor"
        successor = EmbeddedRedis(folder)
        await successor.start()
        try:
            proxy.to(successor.url.removeprefix("unix://"))
            assert await wire.execute("SET", "a", 3) == b"OK"
        finally:
            await successor.stop()


@pytest.mark.parametrize("speaks_http", [False, True])
async def test_a_single_server_is_found_again_after_a_redirect_to_another_address(
    own_redis: EmbeddedRedis, *, speaks_http: bool
) -> None:
    writers: list[asyncio.StreamWriter] = []

    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    if not speaks_http:
        other.close()
    async with GarblingProxy(own_redis.url.removeprefix("unix://")) as proxy:
        connection = Connection(proxy.url)
        redirects = [b"-MOVED 5 127.0.0.1:%d\r\n" % port]
        proxy.garble = lambda words: redirects.pop() if words[0] == b"SET" and redirects else None

        async def is_written() -> bool:
            async with asyncio.timeout(20):
                try:
                    return bool(await connection.multiplexer.execute("SET", "a", 1) == b"OK")
                except QueueUnavailable:
                    return False

        await eventually(is_written, within_s=20)
        assert proxy.garbled == 1
        assert not connection.servers.clustered
        await connection.close()
    for writer in writers:
        writer.close()
    other.close()


async def test_a_tls_server_with_a_password_is_reached_after_a_cut(
    make_wire: MakeWire, own_redis: EmbeddedRedis, tls: ssl.SSLContext
) -> None:
    await make_wire(own_redis.url).execute("CONFIG", "SET", "requirepass", "secret")
    async with FaultProxy(own_redis.url.removeprefix("unix://"), tls) as proxy:
        wire = make_wire(proxy.url.replace("//", "//:secret@") + "?ssl_cert_reqs=none")
        long = "x" * 300_000
        assert [*await asyncio.gather(echo(wire, "a"), echo(wire, long), echo(wire, "b"))] == ["a", long, "b"]
        proxy.cut(reset=True)
        assert await echo(wire, "again") == "again"


async def test_closing_ends_running_calls(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.black_hole = True
    call = asyncio.ensure_future(wire.execute("ECHO", "a"))
    await eventually(lambda: wire._sent)
    await wire.close()
    with pytest.raises(RedisConnectionError):
        await call


async def test_a_command_after_the_close_fails_and_opens_no_connection(make_wire: MakeWire, proxy: FaultProxy) -> None:
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    await wire.close()
    with pytest.raises(RedisConnectionError):
        await wire.execute("PING")
    await eventually(lambda: not proxy.connected)


async def test_an_abandoned_read_takes_no_further_entries(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    redis, stream = instance.connection.commands, instance.keys.stream
    reading = asyncio.create_task(instance.verbs.read_entries("gone", 1, 30.0))

    async def blocked() -> bool:
        return bool((await redis.info("clients"))["blocked_clients"] > 0)

    await eventually(blocked)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    async def unblocked() -> bool:
        return not await blocked()

    await eventually(unblocked)
    await redis.xadd(stream, {"a": "b"})
    assert (await redis.xpending(stream, "pool"))["pending"] == 0


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    connection = Connection(redis_url)
    yield connection
    await connection.close()


async def test_batches_are_limited_in_items_and_concurrency(connection: Connection) -> None:
    sizes: list[int] = []
    under_way = most = 0

    def asked(items: list[int]) -> CommandBatch:
        nonlocal under_way, most
        sizes.append(len(items))
        under_way += 1
        most = max(most, under_way)
        return CommandBatch([("ECHO", item) for item in items])

    def answers(_items: list[int], replies: list[bytes]) -> list[int]:
        nonlocal under_way
        under_way -= 1
        return [int(reply) for reply in replies]

    batcher = Batcher(connection.multiplexer, asked, answers)
    count = MAX_ITEMS * (MAX_IN_FLIGHT + 2) + 1
    assert await asyncio.gather(*map(batcher, range(count))) == list(range(count))
    assert sizes == [MAX_ITEMS] * (MAX_IN_FLIGHT + 2) + [1]
    assert most == MAX_IN_FLIGHT


async def test_calls_are_answered_though_the_process_stood_still_beyond_their_deadline(
    make_wire: MakeWire, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Servers, "deadline_s", 0.5)
    wire = make_wire(proxy.url)
    batcher = Batcher[bytes, bytes](
        wire, lambda items: CommandBatch([("ECHO", item) for item in items]), lambda _, replies: replies
    )
    await wire.execute("PING")
    proxy.latency_s = 0.05
    calls = []
    for number in range(2 * MAX_IN_FLIGHT):  # one batch in each turn, and more than may be in flight
        calls.append(batcher(b"%d" % number))
        await asyncio.sleep(0)
    time.sleep(0.8)  # noqa: ASYNC251 - as a container that is paused
    assert await asyncio.gather(*calls) == [b"%d" % number for number in range(2 * MAX_IN_FLIGHT)]


async def test_a_call_fails_in_time_though_the_event_loop_is_always_late(
    make_wire: MakeWire, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Servers, "deadline_s", 0.3)
    wire = make_wire(proxy.url)
    await wire.execute("PING")
    proxy.black_hole = True
    call = asyncio.create_task(wire.execute("PING"))
    began = time.monotonic()
    while not call.done() and time.monotonic() - began < 4.0:
        time.sleep(0.25)  # noqa: ASYNC251 - each check is late
        await asyncio.sleep(0)
    with pytest.raises(RedisTimeoutError):
        await asyncio.wait_for(call, 0)


async def test_a_batch_is_limited_in_bytes(connection: Connection) -> None:
    taken: list[list[int]] = []

    def asked(items: list[int]) -> CommandBatch:
        taken.append(items)
        return CommandBatch([("ECHO", item) for item in items])

    batcher = Batcher(
        connection.multiplexer, asked, lambda _items, replies: list(map(int, replies)), size=lambda item: item
    )
    sizes = [MAX_BYTES * 3, 1, MAX_BYTES - 1, 5, 6]
    assert await asyncio.gather(*map(batcher, sizes)) == sizes
    assert taken == [sizes[:1], sizes[1:3], sizes[3:]]


@pytest.mark.parametrize(("side", "fault"), [("asked", ValueError), ("answers", QueueUnavailable)])
async def test_a_broken_batch_fails_only_its_own_waiters(
    connection: Connection, side: str, fault: type[Exception]
) -> None:
    def asked(items: list[str]) -> CommandBatch:
        if "bad" in items and side == "asked":
            raise ValueError("bad")
        return CommandBatch([("ECHO", item) for item in items])

    def answers(items: list[str], replies: list[bytes]) -> list[bytes]:
        if "bad" in items:
            raise ValueError("bad")
        return replies

    batcher = Batcher(connection.multiplexer, asked, answers)
    both = await asyncio.gather(batcher("good"), batcher("bad"), return_exceptions=True)
    assert [type(error) for error in both] == [fault, fault]
    assert await batcher("good") == b"good"


async def test_a_reconnect_to_another_server_is_reported_before_any_command(
    own_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    successor = EmbeddedRedis(tmp_path / "successor")
    await successor.start()
    async with FaultProxy(own_redis.url.removeprefix("unix://")) as proxy:
        connection = Connection(proxy.url)
        reported: list[tuple[str, str]] = []
        connection.on_new_server.append(lambda known, new: reported.append((known.run_id, new.run_id)))
        try:
            await connection.multiplexer.execute("PING")
            proxy.cut()
            await eventually(lambda: not proxy.connected)
            await connection.multiplexer.execute("PING")
            assert reported == []
            proxy.to(successor.url.removeprefix("unix://"))
            proxy.cut()
            await eventually(lambda: not proxy.connected)
            assert await connection.multiplexer.execute("DBSIZE") == 0
            assert len(reported) == 1
            assert connection.server
            assert reported[0][0] != reported[0][1] == connection.server.run_id
        finally:
            await connection.close()
            await successor.stop()
