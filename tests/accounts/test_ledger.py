"""Usage report: counted in memory, written once, and completed for instances that died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.accounts import ledger_recovery
from imagegen.accounts.counts import Counts, RowName, Rows, total_of
from imagegen.accounts.ledger import MAX_MODELS, OTHER_MODELS, Ledger
from imagegen.accounts.ledger_recovery import LedgerRecovery
from imagegen.accounts.usage_store import UsageStore
from imagegen.queue import notifier
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.end_marks import writer_name
from imagegen.tasks import transitions
from imagegen.tasks.cost import SECONDS_A_DAY, Cost, day_of
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task, TaskError
from tests.conftest import Instance, MakeInstance
from tests.faults.proxy import FaultProxy
from tests.support import eventually, logged, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
NEW = SubmitResult(Task("a" * 32, 1, 1, "d", "m", b"{}", 1.0), CacheResult.MISS)


def today() -> int:
    return day_of(time.time())


@dataclass
class Books:
    """An instance of the queue with its ledger, as the service connects them."""

    queue: Instance
    store: UsageStore = field(init=False)
    ledger: Ledger = field(init=False)
    recovery: LedgerRecovery = field(init=False)

    def __post_init__(self) -> None:
        queue = self.queue
        self.store = UsageStore(queue.connection, queue.keys)
        self.ledger = Ledger(queue.connection, self.store, queue.verbs.end_marks, interval_s=0.0)
        queue.verbs.end_marks.on_ended = self.ledger.on_ended
        self.recovery = LedgerRecovery(queue.parts, self.store, sure_dead_s=0.0)

    async def submit(self, name: object, *, client: str = "ann", model: str = "m", estimated: int = 100) -> CacheResult:
        sent = replace(submission(name), client=client, model=model, cost=Cost(estimated=estimated))
        result = await self.queue.client_queue.submit(sent)
        self.ledger.on_submitted(sent, result)
        return result.cached

    async def run(self, *, charged: int, unsure: int = 0, fails: bool = False, day: int = 0) -> None:
        """Run the next task to its end."""
        claim = await self.queue.claim()
        await self.queue.worker_queue.start(claim)
        cost = Cost(estimated=100, day=day, charged=charged, unsure=unsure)
        task, now = replace(claim.task, cost=cost), time.time()
        if fails:
            final = transitions.failed(task, TaskError("upstream_error", "no", retryable=False), now=now, ttl_s=60)
        else:
            final = transitions.completed(task, [IMAGE], [], now=now, ttl_s=60)
        await self.queue.worker_queue.finish(claim, final)

    async def rows(self, day: int | None = None) -> Rows:
        rows: Rows = {}
        async for _, part in self.ledger.read([today() if day is None else day]):
            for name, counts in part.items():
                rows.setdefault(name, Counts()).add(counts)
        return rows

    async def total(self) -> Counts:
        return total_of((await self.rows()).values())

    async def eventually_spent(self, micro_usd: int) -> None:
        """Wait until the total has this cost."""

        async def is_spent() -> bool:
            return (await self.total()).spent == micro_usd

        await eventually(is_spent)


MakeBooks = Callable[..., Books]


@pytest.fixture(autouse=True)
def _quick_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_recovery, "ROUND_GAP_S", 0.02)
    monkeypatch.setattr(ledger_recovery, "MAX_ROUNDS", 1_000)
    monkeypatch.setattr(notifier, "SILENT_S", 0.2)


@pytest.fixture
def make_books(make_instance: MakeInstance) -> MakeBooks:
    return lambda **options: Books(make_instance(**options))


async def test_a_row_counts_submits_ends_and_money_before_and_after_it_is_written(make_books: MakeBooks) -> None:
    books = make_books()
    assert await books.submit("a") is CacheResult.MISS
    assert await books.submit("a", client="bob") is CacheResult.COALESCED
    await books.run(charged=90, unsure=40)
    assert await books.submit("a") is CacheResult.HIT
    await books.submit("b", model="n")
    await books.run(charged=0, fails=True)
    await books.submit("c")
    await books.queue.client_queue.cancel(submission("c").task_id)
    expected = {
        ("ann", "m"): Counts(
            submitted=3, cached=1, completed=1, cancelled=1, images=1, spent=90, saved_by_cache=100, ambiguous=40
        ),
        ("bob", "m"): Counts(submitted=1, coalesced=1, saved_by_coalescing=100),
        ("ann", "n"): Counts(submitted=1, failed=1),
    }
    assert await books.rows() == expected
    await books.ledger.write()
    assert not books.ledger.unwritten
    assert await books.rows() == expected
    assert await make_books(start=False).rows() == expected, "another instance reads the same"


async def test_the_rows_of_thousands_of_keys_are_written_and_read_a_thousand_at_a_time(make_books: MakeBooks) -> None:
    books, sent = make_books(), replace(submission("a"), model="m", cost=Cost(estimated=100))
    for number in range(2_500):
        books.ledger.on_submitted(replace(sent, client=f"client-{number}"), NEW)
    written = [len(report[today()]) for report in books.ledger.unwritten.values()]
    await books.ledger.write()
    books.ledger.on_submitted(replace(sent, client="client-0"), NEW)
    parts = [rows async for _, rows in books.ledger.read([today()])]
    assert (max(written), sum(written)) == (1_000, 2_500)
    assert max(map(len, parts)) < 2_000
    assert await books.total() == Counts(submitted=2_501)
    assert len(await books.rows()) == 2_500


async def test_foreign_rows_of_a_report_are_left_out_and_logged_once(make_books: MakeBooks) -> None:
    books = make_books()
    await books.submit("a")
    await books.ledger.write()
    expected = await books.rows()
    foreign: dict[Any, bytes] = {b"\xff": b"1", b"ann n": b"abc", b"ann o": b"9" * 400, b"@x": b"y", b"e": b""}
    await books.queue.connection.commands.hset(books.queue.keys.usage(today()), mapping=foreign)
    with logged("WARNING") as lines:
        assert await books.rows() == await books.rows() == expected
    (line,) = lines
    assert "can't be read and do not count: 5" in line


async def test_money_counts_on_the_day_of_its_budget(make_books: MakeBooks) -> None:
    books = make_books()
    await books.submit("a")
    await books.run(charged=90, day=today() - 1)
    await books.ledger.write()
    assert await books.rows() == {("ann", "m"): Counts(submitted=1, completed=1, images=1)}
    assert await books.rows(today() - 1) == {("ann", "m"): Counts(spent=90)}


async def test_a_report_is_added_once_although_its_reply_is_lost(make_books: MakeBooks, redis_url: str) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://").partition("?")[0]) as proxy:
        books = make_books(url=f"redis://127.0.0.1:{proxy.port}")
        await books.submit("a")
        await books.run(charged=90)
        proxy.drop_reply = lambda chunk: b"usage:" in chunk and not proxy.dropped
        with suppress(Exception):
            await books.ledger.write()
        await books.ledger.write()
        assert proxy.dropped == 1
        assert (await books.total()).spent == 90


async def test_a_report_that_is_being_written_is_read_once(make_books: MakeBooks, redis_url: str) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://").partition("?")[0]) as proxy:
        books = make_books(url=f"redis://127.0.0.1:{proxy.port}")
        await books.submit("a")
        await books.run(charged=90)
        proxy.latency_s = 0.1
        totals = await asyncio.gather(books.ledger.write(), books.total(), books.total())
        assert [total.spent for total in totals[1:]] == [90, 90]


async def test_an_end_is_counted_once_although_its_reply_is_lost(make_books: MakeBooks, redis_url: str) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://").partition("?")[0]) as proxy:
        books = make_books(url=f"redis://127.0.0.1:{proxy.port}")
        await books.submit("a")
        proxy.drop_reply = lambda chunk: b'"counted"' in chunk and not proxy.dropped
        await books.run(charged=90)
        assert proxy.dropped == 1
        assert (await books.total()).spent == 90


async def test_the_loop_writes_only_while_there_is_something_to_write(make_books: MakeBooks) -> None:
    books = make_books()
    commands = books.queue.connection.meter.commands
    writing = asyncio.create_task(books.ledger.write_forever())
    await books.submit("a")
    await eventually(lambda: not books.ledger.unwritten)
    assert commands["usage"] == 4, "EVALSHA, HMGET, HSET and the first time EXPIRE"
    await books.submit("b")
    await eventually(lambda: not books.ledger.unwritten)
    assert commands["usage"] == 7
    await asyncio.wait([writing], timeout=0.05)
    assert commands["usage"] == 7
    assert 0 < await books.queue.connection.commands.ttl(books.queue.keys.usage(today())) <= 92 * SECONDS_A_DAY
    writing.cancel()


async def test_what_a_dead_instance_ended_and_did_not_report_is_counted_once(make_books: MakeBooks) -> None:
    dead, one, other = make_books(), make_books(start=False), make_books(start=False)
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.ledger.write()
    await dead.submit("b", client="bob")
    await dead.run(charged=80, unsure=80)
    await dead.submit("c")
    await dead.run(charged=7, fails=True)
    await dead.queue.crash()
    name = dead.queue.parts.monitor.instance
    assert await dead.queue.verbs.retire([name]) == 1
    recovering = [asyncio.create_task(books.recovery.recover_forever()) for books in (one, other)]
    for books in (one, other, one):
        await books.recovery.on_gone([name])

    async def is_counted() -> bool:
        return (await one.total()).spent == 177

    await eventually(is_counted)
    await one.recovery.on_gone([name])
    await asyncio.wait(recovering, timeout=0.1)

    async def all_are_done() -> bool:
        return not await one.store.dead()

    await eventually(all_are_done)
    assert await one.rows() == {
        ("ann", "m"): Counts(submitted=1, completed=1, failed=1, images=1, spent=97),
        ("bob", "m"): Counts(completed=1, images=1, spent=80, ambiguous=80),
    }
    await dead.ledger.write()
    assert (await one.total()).spent == 177, "it was only frozen, and its report is known to be counted"
    assert dead.ledger.lost == 1
    await dead.submit("d")
    await dead.ledger.write()
    assert (await one.total()).submitted == 4, "it counts on, and its submits are not lost"
    for each in recovering:
        each.cancel()


async def test_a_dead_instance_is_counted_for_although_its_mark_is_foreign(make_books: MakeBooks) -> None:
    dead, finder = make_books(), make_books(start=False)
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.queue.crash()
    name = dead.queue.parts.monitor.instance
    mark: dict[Any, bytes] = {f"@{writer_name(name)}": b"x"}
    await finder.queue.connection.commands.hset(finder.queue.keys.usage(today()), mapping=mark)
    await finder.queue.verbs.retire([name])
    await finder.recovery.on_gone([name])
    counting = asyncio.create_task(finder.recovery.recover_forever())

    async def is_counted() -> bool:
        return counting.done() or (await finder.total()).spent == 90

    await eventually(is_counted)
    assert not counting.done()
    counting.cancel()


async def test_a_dead_instance_is_counted_for_although_the_finder_leaves_at_once(make_books: MakeBooks) -> None:
    dead, finder = make_books(), make_books(start=False)
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.queue.crash()
    name = dead.queue.parts.monitor.instance
    await finder.recovery.on_gone([name])
    await finder.queue.verbs.retire([name])
    later = make_books(start=False)
    recovering = asyncio.create_task(later.recovery.recover_forever())

    async def is_counted() -> bool:
        return (await later.total()).spent == 90

    await eventually(is_counted)
    recovering.cancel()


async def test_nothing_is_counted_for_an_instance_that_lives(make_books: MakeBooks) -> None:
    living, one = make_books(), make_books(start=False)
    await living.submit("a")
    await living.run(charged=90)
    recovering = asyncio.create_task(one.recovery.recover_forever())
    await one.recovery.on_gone([living.queue.parts.monitor.instance])
    await eventually(lambda: one.queue.connection.meter.commands["takeover"])
    await asyncio.wait([recovering], timeout=0.05)
    assert (await one.total()).spent == 0
    await living.ledger.write()
    assert (await one.total()).spent == 90
    recovering.cancel()


@asynccontextmanager
async def searching(books: Books) -> AsyncIterator[LedgerRecovery]:
    """Search for dead instances, without the long wait for those that may live."""
    recovery = LedgerRecovery(books.queue.parts, books.store, sure_dead_s=3_600.0, absent_s=0.05)
    books.queue.parts.takeover.on_gone = recovery.on_gone
    loops = [asyncio.create_task(recovery.search_forever()), asyncio.create_task(recovery.recover_forever())]
    await eventually(lambda: books.queue.notifier.subscribed)
    yield recovery
    for loop in loops:
        loop.cancel()


async def test_an_instance_that_is_seen_to_be_dead_is_counted_for_at_once(make_books: MakeBooks) -> None:
    dead, one = make_books(), make_books()
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.queue.crash()
    async with searching(one) as recovery:
        recovery.suspect()
        await one.eventually_spent(90)
        await dead.ledger.write()
        assert await one.total() == Counts(submitted=1, completed=1, images=1, spent=90)


async def test_an_instance_with_unfinished_tasks_is_counted_for_before_they_are_taken_over(
    make_books: MakeBooks,
) -> None:
    dead, one = make_books(), make_books()
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.submit("b")
    await dead.queue.claim()
    await dead.queue.crash()
    async with searching(one) as recovery:
        recovery.suspect()
        await one.eventually_spent(90)
        assert await one.queue.verbs.pending_entries()


async def searched(books: Books, recovery: LedgerRecovery, rounds: int = 3) -> None:
    """Wait until the instance has greeted the others some times, so that all but the last search are over."""
    for _ in range(rounds):
        greetings = books.queue.connection.meter.commands["control"]
        recovery.suspect()
        await eventually(lambda: books.queue.connection.meter.commands["control"] > greetings)  # noqa: B023


async def test_a_dead_instance_is_not_searched_for_again_if_the_user_may_not_list_the_tasks(
    make_books: MakeBooks, redis_url: str
) -> None:
    dead, one = make_books(), make_books()
    await dead.submit("a")
    await dead.run(charged=90)
    await dead.queue.crash()
    commands = one.queue.connection.commands
    await commands.acl_setuser(
        "listless", enabled=True, passwords=["+word"], keys=["*"], channels=["*"], commands=["+@all", "-scan"]
    )
    address = redis_url.replace("unix://", "unix://listless:word@")
    other = make_books(url=address)
    with logged("WARNING") as lines:
        async with searching(other) as recovery:
            recovery.suspect()
            await eventually(lambda: any("may not run SCAN" in line for line in lines))
            await searched_alone(other, recovery)
    assert sum("may not run SCAN" in line for line in lines) == 1
    assert (await other.total()).spent == 0
    await commands.acl_deluser("listless")


async def searched_alone(books: Books, recovery: LedgerRecovery) -> None:
    """Wait until two more searches have ended."""
    for _ in range(2):
        looks = books.queue.connection.meter.commands["takeover"]
        recovery.suspect()
        await eventually(lambda: books.queue.connection.meter.commands["takeover"] > looks)  # noqa: B023


async def test_nothing_is_counted_for_an_instance_that_answers(make_books: MakeBooks) -> None:
    living, one = make_books(), make_books()
    await living.submit("a")
    await living.run(charged=90)
    await eventually(lambda: one.queue.notifier.peers)
    async with searching(one) as recovery:
        await searched(one, recovery)
    assert (await one.total()).spent == 0
    await living.ledger.write()
    assert (await one.total()).spent == 90


async def test_nothing_is_counted_soon_while_an_instance_that_stands_still_may_be_the_one(
    make_books: MakeBooks,
) -> None:
    frozen, one = make_books(), make_books()
    await frozen.submit("a")
    await frozen.run(charged=90)
    await frozen.queue.crash()
    subscriptions = frozen.queue.connection.subscriptions
    async with subscriptions.subscribed(frozen.queue.keys.notifications), searching(one) as recovery:
        await searched(one, recovery)
        assert (await one.total()).spent == 0


async def test_models_that_clients_make_up_share_one_row(make_books: MakeBooks) -> None:
    books = make_books(start=False)
    for number in range(MAX_MODELS + 50):
        books.ledger.on_submitted(replace(submission(number), model=f"m{number}"), NEW)
    await books.ledger.write()
    rows = await books.rows()
    assert len(rows) == MAX_MODELS + 1
    assert rows[RowName("", OTHER_MODELS)].submitted == 50


async def test_more_rows_than_one_command_takes_are_written_at_once(make_books: MakeBooks) -> None:
    books = make_books(start=False)
    for _ in range(2):
        for number in range(2500):
            books.ledger.on_submitted(replace(submission(number), client=f"k{number}"), NEW)
        await books.ledger.write()
    rows = await books.rows()
    assert len(rows) == 2500
    assert {counts.submitted for counts in rows.values()} == {2}


async def test_the_price_of_a_job_that_is_cancelled_late_is_taken_back(make_books: MakeBooks) -> None:
    books = make_books()
    await books.submit("a")
    await books.run(charged=700, unsure=700)
    (task,) = books.queue.task_cache.results()
    books.ledger.on_taken_back(task, 700)
    assert ((await books.total()).spent, (await books.total()).ambiguous) == (0, 0)
    assert books.queue.connection.meter.taken_back_micro_usd == 700
    assert books.ledger.total.spent == 700, "a counter of Prometheus may not fall"
