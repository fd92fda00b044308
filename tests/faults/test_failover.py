"""Instances after a failover to a replica that lacks the last writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import pytest

from imagegen.queue import recovery
from tests.conftest import Instance, MakeInstance
from tests.faults.counted_calls import Calls, all_final, at_rest, check_paid_once, submit_all
from tests.faults.proxy import FaultProxy
from tests.faults.servers import RedisServer, primary_and_replica, promote
from tests.support import eventually, logged


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, RedisServer]]:
    async with primary_and_replica(tmp_path) as pair:
        yield pair


def on_one_server(one: Instance, two: Instance) -> bool:
    """Return whether both instances are connected to the same Redis."""
    server, other = one.connection.server, two.connection.server
    return server is not None and other is not None and server.run_id == other.run_id


async def has_all(server: RedisServer, keys: Sequence[str]) -> bool:
    return await server.redis.exists(*keys) == len(keys)


def lose_first(instance: Instance, kind: str, count: int) -> None:
    """Let the first messages of a kind be lost on their way to an instance."""
    handlers, left = instance.notifier.handlers, iter(range(count))
    handle = handlers[kind]
    handlers[kind] = lambda message: handle(message) if next(left, None) is None else None


async def billed_again(instance: Instance, ids: Iterable[str]) -> int:
    tasks = [await instance.read(task_id) for task_id in ids]
    return sum(task.possibly_billed_twice for task in tasks)


@pytest.mark.parametrize("ends_first", ["on the new server", "on the old server"])
async def test_calls_of_instances_that_follow_a_failover_at_different_times_are_recorded(
    make_instance: MakeInstance,
    servers: tuple[RedisServer, RedisServer],
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    ends_first: str,
) -> None:
    monkeypatch.setattr(recovery, "MAX_SETTLE_S", 1.0)
    primary, replica = servers
    async with FaultProxy(primary.path) as early, FaultProxy(primary.path) as late:
        one, two = (make_instance(url=proxy.url, slots=8, lease_s=3.0) for proxy in (early, late))
        await eventually(lambda: len(one.notifier.peers) == len(two.notifier.peers) == 1)
        await promote(primary, replica)
        calls.run_on(two, 4)
        ids = await submit_all([one], [f"task {i}" for i in range(4)])
        await eventually(lambda: all(calls.paid[task_id] for task_id in ids))
        early.to(replica.path)
        early.cut()
        calls.run_on(one, 4)
        await eventually(lambda: all(calls.paid[task_id] == 2 for task_id in ids))
        if ends_first == "on the old server":
            calls.go_on.set()
            await eventually(lambda: calls.ended.issuperset(ids))
        late.to(replica.path)
        late.cut()
        await eventually(lambda: on_one_server(one, two))
        if ends_first == "on the new server":
            await eventually(lambda: all(claim.lost for claim in two.parts.dispatcher.held.values()))
            calls.go_on.set()
        await eventually(lambda: all_final([one, two], ids))

        async def recorded() -> bool:
            return await billed_again(one, ids) == await billed_again(two, ids) == 4

        await eventually(recorded)
        for task_id in ids:  # another failover loses the counts
            record = await replica.redis.get(one.keys.record(task_id))
            assert isinstance(record, bytes)
            without_count = record.replace(b'"billed":1,', b"")
            assert without_count != record
            await replica.redis.set(one.keys.record(task_id), without_count, keepttl=True)
        for instance in (one, two):
            instance.parts.recovery.notice("a test lost writes")
        await eventually(recorded)
        await eventually(lambda: at_rest(one))
        assert all(calls.paid[task_id] == 2 for task_id in ids)


async def test_no_call_begins_before_an_instance_that_follows_a_failover_last_has_written_back(
    make_instance: MakeInstance, servers: tuple[RedisServer, RedisServer], calls: Calls
) -> None:
    primary, replica = servers
    async with FaultProxy(primary.path) as early, FaultProxy(primary.path) as late:
        two, three = make_instance(url=early.url, slots=4), make_instance(url=early.url, slots=4)
        one = make_instance(url=late.url, slots=4)
        await eventually(lambda: all(len(i.notifier.peers) == 2 for i in (one, two, three)))
        await promote(primary, replica)
        calls.run_on(one, 4)
        ids = await submit_all([two, three], [f"task {i}" for i in range(4)])
        await eventually(lambda: all(calls.paid[task_id] for task_id in ids))
        calls.run_on(two, 4)
        calls.run_on(three, 4)
        late.refuse = True
        for proxy in (early, late):
            proxy.to(replica.path)
            proxy.cut()
        await primary.kill()
        await eventually(lambda: on_one_server(two, three) and not two.connection.recovered.is_set())
        await two.notifier.attending()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(two.connection.recovered.wait(), recovery.SETTLE_S * 2.5)
        late.refuse = False
        calls.go_on.set()
        await eventually(lambda: calls.ended.issuperset(ids), within_s=20)
        await check_paid_once(calls, [one, two, three], ids)


@pytest.mark.parametrize(("count", "lost"), [(1, 0), (3, 0), (2, 1)])
async def test_a_recovery_ends_once_all_instances_have_written_back_to_a_new_server(
    make_instance: MakeInstance,
    servers: tuple[RedisServer, RedisServer],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    lost: int,
) -> None:
    monkeypatch.setattr(recovery, "SETTLE_S", 15.0)
    monkeypatch.setattr(recovery, "MAX_SETTLE_S", 30.0)
    primary, replica = servers
    async with FaultProxy(primary.path) as proxy:
        instances = [make_instance(url=proxy.url) for _ in range(count)]
        await eventually(lambda: all(len(i.notifier.peers) == count - 1 for i in instances))
        await eventually(lambda: has_all(primary, [instances[0].keys.server]))
        for instance in instances:
            lose_first(instance, "restored", lost)
        await promote(primary, replica)
        proxy.to(replica.path)
        proxy.cut()
        await eventually(
            lambda: all(i.parts.recovery.unsettled and i.connection.recovered.is_set() for i in instances), within_s=10
        )


async def test_a_renewal_that_finds_claims_lost_while_they_are_written_back_begins_no_second_recovery(
    make_instance: MakeInstance, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "NOTICE_S", 1.0)
    instance = make_instance(lease_s=0.6)
    calls.run_on(instance, 2)
    ids = await submit_all([instance], ["a", "b"])
    await eventually(lambda: all(calls.paid[task_id] for task_id in ids))
    restored = instance.connection.meter.written_back
    with logged() as lines:
        await instance.connection.commands.flushall()
        instance.parts.recovery.notice("a test", publish=True)
        await eventually(lambda: restored["running"] == 2)
        await instance.connection.recovered.wait()
    assert len([line for line in lines if "may have lost writes" in line]) == 1
    calls.go_on.set()
    await check_paid_once(calls, [instance], ids)


@pytest.mark.parametrize("count", [1, 2])
async def test_a_failover_with_lost_writes_loses_no_task_and_pays_once(
    make_instance: MakeInstance, servers: tuple[RedisServer, RedisServer], calls: Calls, count: int
) -> None:
    primary, replica = servers
    async with FaultProxy(primary.path) as proxy:
        instances = [make_instance(url=proxy.url, slots=4 // count) for _ in range(count)]
        await eventually(lambda: all(len(i.notifier.peers) == count - 1 for i in instances))
        await promote(primary, replica)
        calls.go_on.set()
        for instance in instances:
            calls.run_on(instance, 4 // count)
        finished = await submit_all(instances, [f"finished {i}" for i in range(20)])
        await eventually(lambda: calls.ended.issuperset(finished))
        calls.go_on.clear()
        running = await submit_all(instances, [f"running {i}" for i in range(4)])
        await eventually(lambda: all(calls.paid[task_id] for task_id in running))
        waiting = await submit_all(instances, [f"waiting {i}" for i in range(20)])
        assert await replica.redis.dbsize() <= 2  # the stream, and the name of the server: no task
        proxy.to(replica.path)
        proxy.cut()
        await primary.kill()
        everything = [*finished, *running, *waiting]
        records = [instances[0].keys.record(task_id) for task_id in everything]
        await eventually(lambda: has_all(replica, records), within_s=30)
        calls.go_on.set()
        await eventually(lambda: calls.ended.issuperset(everything), within_s=20)
        await check_paid_once(calls, instances, everything)
