"""Foreign values in every key of ours: each costs its own task at most, and no loop."""

from __future__ import annotations

import asyncio
import random
import re
import time

import pytest

from imagegen import line_limit
from imagegen.accounts.usage_store import UsageStore
from imagegen.queue.claim import StartResult
from imagegen.redis_client.keys import GROUP
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State
from tests.conftest import Instance, MakeInstance
from tests.queue.webhook_tasks import deliver, finish, hook, submit_hooks, waiting
from tests.support import eventually, logged, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
CHANCE = random.Random(5)
GARBAGE = [
    b"",
    b"junk",
    b"\xff\xfe\x00",
    b"[" * 5_000,
    b"99 pending 1-0 5 5 aa\n{}",
    b"1 pending x-y 5 5 aa\n{}",
    b'1-0 {"owner":"x","phase":"calling","ambiguous":99,"reason":"of a newer version"}',
    CHANCE.randbytes(200),
]
KINDS = ["string", "list", "set", "hash", "zset", "stream"]


async def put(instance: Instance, key: str, kind: str, garbage: bytes) -> None:
    """Replace our value by one of the given type."""
    redis = instance.connection.commands
    await redis.delete(key)
    match kind:
        case "string":
            await redis.set(key, garbage)
        case "list":
            await redis.rpush(key, garbage)
        case "set":
            await redis.sadd(key, garbage)
        case "hash":
            await redis.hset(key, "field", garbage)
        case "zset":
            await redis.zadd(key, {garbage: 1.0})
        case _:
            await redis.xadd(key, {"field": garbage or b"x"})


async def runs_tasks(instance: Instance, name: str) -> None:
    """Check that a new task is claimed, run and finished, and that all loops are alive."""
    await instance.client_queue.submit(submission(name))
    while True:
        claim = await instance.claim()
        while (came := await instance.worker_queue.start(claim)) is StartResult.INHERITED:
            pass
        assert came is StartResult.STARTED
        now = time.time()
        final = await instance.worker_queue.finish(
            claim, transitions.completed(claim.task, [IMAGE], [], now=now, ttl_s=60)
        )
        assert final.state is State.COMPLETED
        if claim.task.id == submission(name).task_id:
            break
    assert [loop.get_name() for loop in instance.loops if loop.done()] == []


def keys_of(instance: Instance, name: str) -> dict[str, str]:
    keys, task_id = instance.keys, submission(name).task_id
    return {
        "record": keys.record(task_id),
        "run": keys.checkpoint(task_id),
        "hooks": keys.delivery_log(task_id),
        "outbox": keys.outbox,
        "dead": keys.dead_letters,
        "stream": keys.stream,
    }


@pytest.mark.parametrize("which", ["record", "run", "hooks", "outbox", "dead", "stream"])
async def test_an_instance_starts_despite_a_value_of_any_type(make_instance: MakeInstance, which: str) -> None:
    for number, kind in enumerate(KINDS):
        instance = make_instance(start=False)
        await put(instance, keys_of(instance, f"task {number}")[which], kind, b"junk")
        instance.start()
        await runs_tasks(instance, f"task {number}")
        await instance.crash()


@pytest.mark.parametrize("which", ["record", "run", "hooks", "outbox", "dead", "stream"])
async def test_a_running_instance_continues_despite_a_value_of_any_type(
    make_instance: MakeInstance, which: str
) -> None:
    instance = make_instance(lease_s=1.0)
    await runs_tasks(instance, "before")
    for number, kind in enumerate(KINDS):
        await put(instance, keys_of(instance, f"task {number}")[which], kind, b"junk")
        await runs_tasks(instance, f"task {number}")


@pytest.mark.parametrize("which", ["record", "run", "hooks"])
async def test_a_running_instance_continues_despite_any_bytes(make_instance: MakeInstance, which: str) -> None:
    instance = make_instance()
    for number, garbage in enumerate(GARBAGE):
        name = f"task {number}"
        if which == "record" and garbage.endswith(b"\n{}"):
            continue  # of a newer version, or of another request: both are left alone
        await put(instance, keys_of(instance, name)[which], "string", garbage)
        await runs_tasks(instance, name)


async def test_a_task_whose_record_can_not_be_read_is_unknown_and_can_be_submitted_again(
    make_instance: MakeInstance,
) -> None:
    instance = make_instance()
    for number, garbage in enumerate(garbage for garbage in GARBAGE if not garbage.endswith(b"\n{}")):
        name = f"task {number}"
        await put(instance, keys_of(instance, name)["record"], "string", garbage)
        assert await instance.client_queue.get(submission(name).task_id) is None
        await runs_tasks(instance, name)
        task = await instance.client_queue.get(submission(name).task_id)
        assert task is not None
        assert task.state is State.COMPLETED


async def test_a_running_task_is_shown_by_a_peer_although_its_checkpoint_can_not_be_read(
    make_instance: MakeInstance,
) -> None:
    owner = make_instance()
    peer = make_instance()
    await owner.client_queue.submit(submission("runs"))
    claim = await owner.claim()
    assert await owner.worker_queue.start(claim) is StartResult.STARTED
    for garbage in GARBAGE:
        await put(owner, keys_of(owner, "runs")["run"], "string", garbage)
        task = await peer.client_queue.fresh(claim.task.id)
        assert task is not None
        assert not task.state.is_final


async def test_webhooks_are_delivered_and_kept_despite_an_outbox_of_another_type(make_instance: MakeInstance) -> None:
    instance = make_instance()
    outbox = instance.keys.outbox
    await submit_hooks(instance, "waits", hook("waits"))
    await finish(instance)
    (waiting_name,) = await waiting(instance)
    await asyncio.wait_for(instance.parts.outbox.next(), 20)
    for number, kind in enumerate([kind for kind in KINDS if kind != "zset"]):
        await submit_hooks(instance, f"task {number}", hook())
        await put(instance, outbox, kind, b"junk")
        await finish(instance)
        await deliver(instance)
        assert list(await waiting(instance)) == [waiting_name]
    await put(instance, outbox, "string", b"junk")
    await instance.parts.outbox.release()
    await instance.crash()
    other = make_instance()
    task, _ = await deliver(other)
    assert task.id == submission("waits").task_id


async def test_foreign_entries_and_names_are_skipped(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    await runs_tasks(instance, "before")
    for garbage in GARBAGE:
        await redis.zadd(instance.keys.outbox, {garbage: CHANCE.choice([float("-inf"), 0.0, float("inf")])})
        await redis.xadd(instance.keys.stream, {"v": garbage or b"1", "g": garbage or b"1", "d": garbage})
        await redis.xadd(instance.keys.stream, {b"v": b"1", b"g": b"1", b"d": garbage})
    instance.parts.outbox.check_now()
    await runs_tasks(instance, "after")
    assert instance.connection.meter.dead_letters >= len(GARBAGE)


async def test_a_flood_of_foreign_entries_is_a_few_lines_with_a_count(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_limit, "COUNTED_S", 3.0)
    with logged("ERROR", "{message}") as lines:
        instance = make_instance()
        await runs_tasks(instance, "before")
        commands = instance.connection.commands.pipeline()
        for _ in range(800):
            commands.execute_command("XADD", instance.keys.stream, "*", "of", "another program")
        await commands.execute()
        await runs_tasks(instance, "behind the flood")
        await eventually(lambda: instance.connection.meter.dead_letters == 800, within_s=20)
        await eventually(lambda: sum(map(_values_in, lines)) == 800, within_s=20)
        assert len(lines) <= 40


def _values_in(line: str) -> int:
    match = re.match(r"(\d+) more values", line)
    return int(match[1]) if match else 1


async def test_foreign_messages_are_skipped(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    await eventually(lambda: instance.connection.meter.commands["control"])
    texts = [b'{"from":[],"kind":"busy"}', b'{"from":"x","kind":{}}', b"3", b'{"from":"x","kind":"watch","ids":[{}]}']
    texts += [b'{"from":"x","kind":"change","record":[1]}', b'{"from":"x","kind":"change","record":"\\ud800"}']
    texts += [b'{"from":"x","kind":"lost","ids":3}', *GARBAGE]
    texts += [b'{"from":"y","kind":"%s"}' % kind.encode() for kind in instance.notifier.handlers]
    for text in texts:
        await redis.publish(instance.keys.notifications, text)
    await runs_tasks(instance, "a")


async def test_foreign_names_of_keys_cost_no_list_and_no_report(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis, keys = instance.connection.commands, instance.keys
    for name in (b"\xff\xfe", b"", b"x", b"A" * 32):
        await redis.set(keys.record("").encode() + name, b"junk")
    assert (await instance.client_queue.listing.page(None, None, 10)).task_ids == []
    await runs_tasks(instance, "ours")
    store = UsageStore(instance.connection, keys)
    await redis.hset(keys.dead_instances, mapping={b"\xff\xfe": 1, "gone": 1})
    assert await store.dead() == ["gone"]
    listing = instance.client_queue.listing
    page = await listing.page(None, None, 10)
    assert page.task_ids == [submission("ours").task_id]
    assert [task async for task in listing.counted_by(["gone"])] == []
    await redis.xgroup_createconsumer(keys.stream, GROUP, b"\xff\xfe")
    await runs_tasks(instance, "after")
