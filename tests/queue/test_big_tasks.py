"""Tasks with requests of hundreds of kilobytes: no script reads many of them, since Redis runs nothing else then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.images.needed_uploads import NeededUploads
from imagegen.queue.verbs.refill_lines import StoppedLine
from imagegen.redis_client.keys import GROUP
from tests.conftest import Instance, MakeInstance
from tests.support import submission

COUNT, BYTES, MOST = 100, 300_000, 16
UPLOAD = "a" * 64
Use = Callable[[Instance], Awaitable[Any]]


async def find_in_line(instance: Instance) -> None:
    task = (await instance.client_queue.submit(submission("a"))).task
    task = replace(task, id="f" * 32, client="c")
    fields = await instance.verbs.read_in_line(task)
    assert fields is None


async def find_uploads(instance: Instance) -> None:
    assert await NeededUploads(instance.connection, instance.keys).among({UPLOAD, "b" * 64}) == {UPLOAD}


async def count_entries(instance: Instance) -> None:
    assert (await instance.verbs.count_entries())["c"] == COUNT


async def find_skipped(instance: Instance) -> None:
    await instance.connection.commands.xgroup_setid(instance.keys.stream, GROUP, "$")
    assert len(await instance.verbs.find_skipped()) == COUNT


async def refill_lines(instance: Instance) -> None:
    batch, moved = [StoppedLine("c", COUNT, f"{0:032x}")], 0
    while batch:
        (row,), batch = await instance.verbs.refill_lines(batch)
        moved += len(row.moved)
    assert moved == COUNT


async def filled(make_instance: MakeInstance) -> Instance:
    """Return an instance with big tasks in the stream and in a line."""
    one = make_instance(start=False)
    await one.verbs.create_group()
    redis, keys, filler = one.connection.commands, one.keys, "x" * BYTES
    await redis.sadd(keys.lines, "c")
    for number in range(COUNT):
        request = filler + (f"upload:{UPLOAD}" if number == 0 else "")
        entry = f'{{"request":"{request}","client":"c"}}'
        await redis.rpush(keys.line("c"), f"1 5 abc {number:032x}\n{{}}\n{entry}")
        await redis.xadd(keys.stream, {"v": "1", "g": "5", "d": entry})
    return one


@pytest.mark.parametrize(
    "use", [find_in_line, find_uploads, count_entries, find_skipped, refill_lines], ids=lambda use: use.__name__
)
async def test_no_script_reads_many_big_tasks_at_once(make_instance: MakeInstance, use: Use) -> None:
    one = await filled(make_instance)
    await one.connection.commands.config_resetstat()
    await use(one)
    stats = await one.connection.commands.info("commandstats")
    scripts = sum(stats[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats)
    assert scripts >= COUNT / MOST


async def test_few_big_tasks_are_listed_with_their_positions(make_instance: MakeInstance) -> None:
    one = await filled(make_instance)
    waiting = await one.verbs.list_waiting()
    assert (len(waiting.ids) <= MOST, len(waiting.ids) + waiting.behind) == (True, COUNT)
    (line,) = await one.verbs.list_lines(["c"])
    assert (len(line.task_ids) <= MOST, line.length) == (True, COUNT)


async def test_few_big_tasks_are_taken_over_by_one_command(make_instance: MakeInstance) -> None:
    one, two = (make_instance(start=False) for _ in range(2))
    await one.verbs.create_group()
    count = 4 * MOST
    for number in range(count):
        request = b'{"prompt":"%s"}' % (b"x" * BYTES)
        await one.client_queue.submit(replace(submission(number), request_json=request))
    entry_ids = [entry_id for entry_id, _ in await one.verbs.read_entries("gone", count, 0.01)]
    await one.connection.commands.config_resetstat()
    claims = await two.parts.takeover.take(dict.fromkeys(entry_ids, 9.0), min_idle_s=0.0)
    assert sorted(claim.entry_id for claim in claims) == sorted(entry_ids)
    stats = await one.connection.commands.info("commandstats")
    assert stats["cmdstat_xclaim"]["calls"] >= count / MOST
