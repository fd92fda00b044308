"""Renewal, release and takeover of any number of claims, also after an outage; removal of consumers."""

from __future__ import annotations

import asyncio
import os
import re
import signal

import pytest
from redis.exceptions import ResponseError

from imagegen import line_limit
from imagegen.queue import takeover
from imagegen.queue.claim import Claim
from imagegen.queue.verbs.group import PendingEntry
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import WaitReason
from tests.conftest import Instance, MakeInstance
from tests.faults.proxy import FaultProxy
from tests.faults.servers import pid_of
from tests.support import Stopwatch, eventually, logged, submission

LEASE_S = 1.2

Busy = tuple[list[Instance], list[Claim], list[asyncio.Task[Claim | None]]]
"""Instances, the claim of each, and what waits for another claim in each."""


async def fill(instance: Instance, count: int) -> list[Claim]:
    """Submit tasks and claim them; all wait for a retry."""
    await asyncio.gather(*(instance.client_queue.submit(submission(number)) for number in range(count)))
    claims: list[Claim] = []
    while len(claims) < count:
        claims += await instance.parts.leases.hold(
            await instance.verbs.read_entries(instance.parts.dispatcher.instance, 500, 0.01)
        )
    assert len(claims) == count
    return claims


async def owners(instance: Instance) -> dict[str, str]:
    """Return the owner of each entry."""
    return {row.entry_id: row.consumer for row in await instance.verbs.pending_entries()}


async def test_more_than_a_thousand_claims_are_renewed_and_released(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=600.0, max_queue=5_000, start=False)
    await one.verbs.create_group()
    claims = await fill(one, 2_300)
    entry_ids = [claim.entry_id for claim in claims]
    renewal = await one.verbs.renew(one.parts.dispatcher.instance, one.parts.dispatcher.ids())
    assert (renewal.lost, renewal.unlisted, renewal.without_checkpoint) == (set(), [], [])
    assert list(await owners(one)) == entry_ids
    await one.worker_queue.release(claims, leaving=True)
    assert await owners(one) == {}
    assert await one.connection.commands.xlen(one.keys.stream) == 2_300
    assert await one.connection.commands.xinfo_consumers(one.keys.stream, "pool") == []


async def test_a_renewal_finds_lost_and_unnamed_claims_among_thousands(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=600.0, max_queue=5_000, start=False)
    await one.verbs.create_group()
    claims = await fill(one, 1_700)
    stolen = {claims[3].entry_id, claims[1_650].entry_id}
    await one.verbs.claim_expired("thief", list(stolen), 0.0)
    forgotten = one.parts.dispatcher.held.pop(claims[900].entry_id)
    renewal = await one.verbs.renew(one.parts.dispatcher.instance, one.parts.dispatcher.ids())
    assert renewal.lost == stolen
    assert renewal.unlisted == [forgotten.entry_id]


async def test_named_claims_among_more_strays_than_one_page_are_not_lost(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=600.0, max_queue=5_000, start=False)
    await one.verbs.create_group()
    claims = await fill(one, 1_300)
    named = [(claim.task.id, claim.entry_id) for claim in (claims[0], claims[-1])]
    renewal = await one.verbs.renew(one.parts.dispatcher.instance, named)
    assert renewal.lost == set()


async def test_all_of_more_than_a_thousand_claims_are_taken_over(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=LEASE_S, max_queue=5_000, start=False)
    await one.verbs.create_group()
    claims = await fill(one, 1_200)
    two = make_instance(lease_s=LEASE_S, slots=100)
    taken: set[str] = set()
    retry = Retry(600.0, WaitReason.RETRYING)

    async def loop() -> None:
        while (claim := await two.worker_queue.claim()) is not None:
            taken.add(claim.task.id)
            await two.worker_queue.retry(claim, retry)

    loops = [asyncio.create_task(loop()) for _ in range(100)]
    await eventually(lambda: len(taken) == 1_200, within_s=20.0)
    assert taken == {claim.task.id for claim in claims}
    for each in loops:
        each.cancel()
    await asyncio.gather(*loops, return_exceptions=True)


async def two_busy(make_instance: MakeInstance, url: str) -> Busy:
    """Return two instances that hold one claim each, have detected each other and made their first check."""
    both = [make_instance(lease_s=LEASE_S, url=url, slots=1) for _ in range(2)]
    await eventually(lambda: not any(instance.notifier.alone for instance in both))
    waiting = [asyncio.create_task(instance.claim()) for instance in both]
    await eventually(lambda: all(instance.parts.dispatcher.free_slots for instance in both))
    for name in ("a", "b"):
        await both[0].client_queue.submit(submission(name))
    claims = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    for instance, claim in zip(both, claims, strict=True):
        await instance.worker_queue.start(claim)
    # A slot is free for the claim that is taken over.
    more = [asyncio.create_task(instance.worker_queue.claim()) for instance in both]
    for instance, claim in zip(both, claims, strict=True):
        instance.parts.dispatcher.leave_slot(claim)
    return both, claims, more


async def check_unharmed(both: list[Instance], claims: list[Claim], more: list[asyncio.Task[Claim | None]]) -> None:
    """Check that nothing is taken over and all claims are renewed, for longer than a takeover takes."""
    before = {claim.entry_id: instance.parts.dispatcher.instance for instance, claim in zip(both, claims, strict=True)}
    loop = asyncio.get_running_loop()
    until = loop.time() + LEASE_S * 3

    async def renewed() -> bool:
        rows = await both[0].connection.retry_until_available(both[0].verbs.pending_entries)
        return loop.time() > until and all(row.idle_s < LEASE_S for row in rows)

    await eventually(renewed, within_s=20.0)
    assert await owners(both[0]) == before
    assert [instance.connection.meter.takeovers for instance in both] == [0, 0]
    assert not any(claim.lost for claim in claims)
    for each in more:
        each.cancel()


@pytest.mark.parametrize("leases", [1.2, pytest.param(2.0, marks=pytest.mark.faults)])
async def test_an_unnoticed_outage_takes_no_claim_from_a_live_instance(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, leases: float
) -> None:
    both, claims, more = await two_busy(make_instance, own_redis.url)
    await both[0].connection.commands.client_pause(int(LEASE_S * leases * 1000))
    await check_unharmed(both, claims, more)


@pytest.mark.faults
async def test_a_stopped_redis_takes_no_claim_from_a_live_instance(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    both, claims, more = await two_busy(make_instance, own_redis.url)
    os.kill(pid_of(own_redis), signal.SIGSTOP)
    try:
        await asyncio.sleep(LEASE_S * 1.5)
    finally:
        os.kill(pid_of(own_redis), signal.SIGCONT)
    await check_unharmed(both, claims, more)


@pytest.mark.parametrize("fault", ["refuse", pytest.param("black_hole", marks=pytest.mark.faults)])
async def test_a_network_outage_takes_no_claim_from_a_live_instance(
    make_instance: MakeInstance, proxy: FaultProxy, fault: str, service_deadline: None
) -> None:
    both, claims, more = await two_busy(make_instance, proxy.url)
    setattr(proxy, fault, True)
    if fault == "refuse":
        proxy.cut()
    await asyncio.sleep(LEASE_S * 1.5)
    setattr(proxy, fault, False)
    await check_unharmed(both, claims, more)


async def test_refused_writes_take_no_claim_from_a_live_instance(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    both, claims, more = await two_busy(make_instance, own_redis.url)
    commands = both[0].connection.commands
    await commands.config_set("min-replicas-to-write", 1)
    await asyncio.sleep(LEASE_S * 3)  # the refusal lasts longer than a lease and the proof of a takeover together
    await commands.config_set("min-replicas-to-write", 0)
    await check_unharmed(both, claims, more)


async def test_a_jump_of_the_servers_clock_takes_no_claim_from_a_live_instance(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setattr(takeover, "CONFIRM_S", 0.05)
    both, claims, more = await two_busy(make_instance, redis_url)
    for instance, claim in zip(both, claims, strict=True):
        name, key = instance.parts.dispatcher.instance, instance.keys.stream
        instance.connection.clock._offset -= 3_600.0
        await instance.connection.commands.xclaim(key, "pool", name, 0, [claim.entry_id], idle=3_600_000, justid=True)
    for instance in both:
        instance.parts.leases.check_now()
    await check_unharmed(both, claims, more)


async def test_a_dead_instance_is_taken_over_after_the_servers_clock_went_back(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_instance(lease_s=LEASE_S, start=False)
    await one.verbs.create_group()
    (claim,) = await fill(one, 1)
    two = make_instance(lease_s=LEASE_S, start=False)
    pending_entries, transfer_entry = two.verbs.pending_entries, two.verbs.transfer_entry
    renewed: list[str] = []

    async def pending_in_the_future() -> list[PendingEntry]:
        return [
            PendingEntry(row.entry_id, row.consumer, row.idle_s if renewed else 0.0) for row in await pending_entries()
        ]

    async def transfer(consumer: str, entry_id: str) -> None:
        renewed.append(entry_id)
        await transfer_entry(consumer, entry_id)

    monkeypatch.setattr(two.verbs, "pending_entries", pending_in_the_future)
    monkeypatch.setattr(two.verbs, "transfer_entry", transfer)
    two.start()
    taken = await two.claim(30)
    assert (taken.task.id, renewed) == (claim.task.id, [claim.entry_id])


async def test_a_dead_instance_is_taken_over_soon_after_its_lease(make_instance: MakeInstance) -> None:
    one, two = make_instance(lease_s=LEASE_S), make_instance(lease_s=LEASE_S)
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    runs = asyncio.create_task(one.claim())
    await one.client_queue.submit(submission("a"))
    await asyncio.wait_for(runs, 20)
    await one.crash()
    async with Stopwatch() as watch:
        await two.claim()
        assert watch.elapsed_s < LEASE_S * 2 + 5.0


async def test_a_takeover_survives_a_lost_reply(make_instance: MakeInstance, proxy: FaultProxy) -> None:
    """The entries belong to this instance then, so that no other reads them."""
    dead = make_instance(lease_s=LEASE_S, start=False)
    await dead.verbs.create_group()
    await fill(dead, 1)
    two = make_instance(lease_s=LEASE_S, url=proxy.url)
    claims = asyncio.create_task(two.claim(60))
    proxy.drop_reply = lambda request: b"MGET" in request
    await eventually(lambda: proxy.dropped, within_s=30)
    proxy.drop_reply = lambda _request: False
    assert (await asyncio.wait_for(claims, 20)).task.id == submission(0).task_id


async def consumer_names(instance: Instance) -> set[str]:
    """Return the names of the group's consumers; empty while an instance is still making the group."""
    try:
        rows = await instance.connection.commands.xinfo_consumers(instance.keys.stream, "pool")
    except ResponseError:
        return set()
    return {row["name"].decode() for row in rows}


async def test_the_consumer_of_a_dead_instance_is_removed_once_it_holds_nothing(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "GONE_S", 0.3)
    monkeypatch.setattr(takeover, "FIRST_CHECK_S", 0.5)
    monkeypatch.setattr(takeover, "EARLY_CHECK_S", 0.2)
    dead = [make_instance(lease_s=LEASE_S, start=False) for _ in range(4)]
    await dead[0].verbs.create_group()
    await dead[0].client_queue.submit(submission("a"))
    for instance in dead:
        await instance.verbs.read_entries(instance.parts.dispatcher.instance, 1, 0.001)
    lives = make_instance(lease_s=LEASE_S)
    taken = await lives.claim()
    assert taken.task.id == submission("a").task_id
    mine = lives.parts.dispatcher.instance

    async def alone() -> bool:
        return await consumer_names(lives) == {mine}

    await eventually(alone)


async def test_a_live_instance_continues_after_its_consumer_was_removed(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    waiting = asyncio.create_task(one.claim())
    await eventually(lambda: one.parts.dispatcher.free_slots)

    async def blocked() -> bool:
        return one.parts.dispatcher.instance in await consumer_names(two)

    await eventually(blocked)
    assert await two.verbs.retire([one.parts.dispatcher.instance]) == 1
    await two.client_queue.submit(submission("a"))
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id
    (owner,) = (await owners(two)).values()
    assert owner == one.parts.dispatcher.instance


async def test_a_consumer_with_claims_is_not_removed(make_instance: MakeInstance) -> None:
    one = make_instance(start=False)
    await one.verbs.create_group()
    (claim,) = await fill(one, 1)
    assert await one.verbs.retire([one.parts.dispatcher.instance]) == 0
    assert await owners(one) == {claim.entry_id: one.parts.dispatcher.instance}


def about(lines: list[str], *words: str) -> list[str]:
    return [line for line in lines if any(word in line for word in words)]


async def test_many_claims_that_are_taken_over_or_lost_are_a_few_lines_with_a_count(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_limit, "COUNTED_S", 2.0)
    one = make_instance(lease_s=LEASE_S, slots=20)
    runs = [asyncio.create_task(one.claim()) for _ in range(20)]
    for number in range(20):
        await one.client_queue.submit(submission(number))
    for claim in await asyncio.gather(*runs):
        await one.worker_queue.start(claim)
    with logged("INFO", "{message}") as lines:
        await one.crash()
        two = make_instance(lease_s=LEASE_S, slots=20)
        taken = await asyncio.gather(*(two.claim() for _ in range(20)))
        await eventually(lambda: "Took over 15 more tasks\n" in lines, within_s=20)
        assert len(about(lines, "Took over")) == 6
        for claim in taken:
            record = two.keys.record(claim.task.id)
            ended = re.sub(rb" (pending|processing) ", b" completed ", await two.stored(record), count=1)
            await two.connection.commands.set(record, ended)
        await two.connection.multiplexer.execute("XACK", two.keys.stream, "pool", *(claim.entry_id for claim in taken))
        await eventually(lambda: all(claim.lost for claim in taken), within_s=20)
        await eventually(lambda: "15 more claims were lost\n" in lines, within_s=20)
        assert len(about(lines, "claim was lost", "claims were lost")) == 6
