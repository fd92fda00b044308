"""Owns the calls of Redis: one typed function for each script in lua/ and for each plain command, batched by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, cast

from redis.exceptions import ResponseError

from imagegen.queue.batch import Batcher
from imagegen.queue.connection import DEADLINE_S, Connection
from imagegen.queue.keys import GROUP, Keys
from imagegen.queue.records import VERSION, encode_entry, encode_task, final_record
from imagegen.tasks.task import Task

Entry = tuple[str, dict[bytes, bytes]]

DEAD_LIST_LIFE_S = 7 * 86_400


@dataclass(frozen=True, slots=True)
class SubmitItem:
    """replaced: the finished generation that is to be replaced, or nothing."""

    task_id: str
    generation: int
    digest: str
    entry: bytes
    record: bytes
    replaced: int | None


def submit_item(task: Task, replaced: int | None = None) -> SubmitItem:
    """A pending task as a submit."""
    return SubmitItem(
        task.id, task.generation, task.digest, encode_entry(task), encode_task(task, with_request=False), replaced
    )


@dataclass(frozen=True, slots=True)
class SubmitAnswer:
    """kind: see submit.lua; known: the record that stands, where one does."""

    kind: Literal["new", "again", "known", "full", "collision", "newer", "unreadable"]
    entry_id: str
    generation: int
    known: bytes


@dataclass(frozen=True, slots=True)
class FinishItem:
    task_id: str
    entry_id: str
    generation: int
    record: bytes


@dataclass(frozen=True, slots=True)
class SwapItem:
    """known: what we believe to stand; value: what is to stand."""

    task_id: str
    known: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class ReleaseItem:
    task_id: str
    entry_id: str
    generation: int
    entry: bytes
    run: bytes


@dataclass(frozen=True, slots=True)
class PendingEntry:
    """A claimed entry: who holds it, and since when it was not renewed."""

    entry_id: str
    consumer: str
    idle_s: float


class Scripts:
    """record_life_s: of an unfinished task's record; result_ttl_s: of a finished one's; run_life_s: of a run."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        record_life_s: float,
        result_ttl_s: float,
        run_life_s: float,
        depth: Depth,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._record_life_ms = int(record_life_s * 1000)
        self._result_ttl_ms = max(int(result_ttl_s * 1000), 1)
        self._run_life_ms = int(run_life_s * 1000)
        self._scripts = {
            name: connection.commands.register_script(files(__package__).joinpath(f"lua/{name}.lua").read_text())
            for name in ("submit", "finish", "swap", "renew", "release", "cancel", "bury", "waiting")
        }
        self.depth = depth
        self.submit: Batcher[SubmitItem, SubmitAnswer] = Batcher(self._submit, deadline_s=DEADLINE_S)
        self.finish: Batcher[FinishItem, bytes] = Batcher(self._finish, deadline_s=DEADLINE_S)
        self.swap: Batcher[SwapItem, bytes] = Batcher(self._swap, deadline_s=DEADLINE_S)
        self.first_run: Batcher[tuple[str, bytes], bytes | None] = Batcher(self._first_run, deadline_s=DEADLINE_S)
        self.read: Batcher[str, tuple[bytes | None, bytes | None]] = Batcher(self._read, deadline_s=DEADLINE_S)

    async def _run(self, name: str, keys: list[str], args: Sequence[Any], deadline: float | None = None) -> Any:
        async with self._connection.guarded(deadline):
            return await self._scripts[name](keys=keys, args=args)

    async def _submit(self, items: list[SubmitItem], deadline: float) -> list[SubmitAnswer]:
        keys = [self._keys.stream]
        measure = self.depth.limit if self.depth.stale else ""
        args: list[Any] = [GROUP, self.depth.room, measure, self._record_life_ms]
        for item in items:
            keys.append(self._keys.record(item.task_id))
            args += (item.generation, item.digest, item.entry, item.record, item.replaced or "", VERSION)
        measured, rows = await self._run("submit", keys, args, deadline)
        told = [SubmitAnswer(kind.decode(), entry.decode(), int(gen or 0), known) for kind, entry, gen, known in rows]
        added = sum(bool(answer.entry_id) for answer in told)
        self.depth.submitted(added, measured if measured >= 0 else None)
        return told

    async def _finish(self, items: list[FinishItem], deadline: float) -> list[bytes]:
        """`b''` where it was stored, else the record that stands."""
        keys = [self._keys.stream]
        args: list[Any] = [GROUP, self._result_ttl_ms]
        for item in items:
            keys.append(self._keys.record(item.task_id))
            args += (item.entry_id, item.generation, item.record)
        return cast(list[bytes], await self._run("finish", keys, args, deadline))

    async def _swap(self, items: list[SwapItem], deadline: float) -> list[bytes]:
        """`b''` where it was written, else the run that stands."""
        args: list[Any] = [self._run_life_ms]
        for item in items:
            args += (item.known, item.value)
        return cast(list[bytes], await self._run("swap", [self._keys.run(i.task_id) for i in items], args, deadline))

    async def _first_run(self, items: list[tuple[str, bytes]], deadline: float) -> list[bytes | None]:
        """The start of a first attempt: one plain conditional command each. The run that stands, or None."""
        async with self._connection.guarded(deadline):
            pipeline = self._connection.commands.pipeline(transaction=False)
            for task_id, value in items:
                _ = pipeline.set(self._keys.run(task_id), value, nx=True, get=True, px=self._run_life_ms)
            answers = cast(list[bytes | None], await pipeline.execute())
        return [None if answer == value else answer for answer, (_, value) in zip(answers, items, strict=True)]

    async def _read(self, ids: list[str], deadline: float) -> list[tuple[bytes | None, bytes | None]]:
        """Record and run of each."""
        keys = [key for task_id in ids for key in (self._keys.record(task_id), self._keys.run(task_id))]
        async with self._connection.guarded(deadline):
            found = cast(list[bytes | None], await self._connection.commands.mget(keys))
        return list(zip(found[::2], found[1::2], strict=True))

    async def runs(self, ids: Sequence[str]) -> list[bytes | None]:
        async with self._connection.guarded():
            return cast(list[bytes | None], await self._connection.commands.mget([self._keys.run(i) for i in ids]))

    async def read_entries(self, consumer: str, count: int, block_s: float) -> list[Entry]:
        """The next entries for us, waiting for the first up to `block_s`. Raises RedisError."""
        answer: Any = await self._connection.blocking.xreadgroup(
            GROUP, consumer, {self._keys.stream: ">"}, count=count, block=int(block_s * 1000)
        )
        return _entries(answer[0][1]) if answer else []

    async def make_group(self) -> bool:
        """Makes stream and group; False where they were there."""
        async with self._connection.guarded():
            try:
                await self._connection.commands.xgroup_create(self._keys.stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
                return False
        return True

    async def pending(self) -> list[PendingEntry]:
        """All claimed entries, of every instance."""
        try:
            async with self._connection.guarded():
                rows: Any = await self._connection.commands.xpending_range(self._keys.stream, GROUP, "-", "+", 1000)
        except ResponseError as error:
            if "NOGROUP" in str(error):
                return []
            raise
        return [
            PendingEntry(row["message_id"].decode(), row["consumer"].decode(), row["time_since_delivered"] / 1000)
            for row in rows
        ]

    async def take(self, consumer: str, entry_ids: Sequence[str], min_idle_s: float) -> list[Entry]:
        """Claims those of the entries that nobody renewed for `min_idle_s`; two takers never both get one."""
        async with self._connection.guarded():
            found = await self._connection.commands.xclaim(
                self._keys.stream, GROUP, consumer, int(min_idle_s * 1000), list(entry_ids)
            )
        return _entries(found)

    async def renew(self, consumer: str, claims: Sequence[tuple[str, str]]) -> tuple[set[str], list[str]]:
        """Renews (task id, entry id)s. Returns the entry ids that were lost, and those held but not named."""
        keys = [self._keys.stream, *(self._keys.run(task_id) for task_id, _ in claims)]
        args = [GROUP, consumer, self._run_life_ms, *(entry_id for _, entry_id in claims)]
        lost, unnamed = await self._run("renew", keys, args)
        return {entry.decode() for entry in lost}, [entry.decode() for entry in unnamed]

    async def release(self, items: Sequence[ReleaseItem], *, leaving: str = "") -> int:
        """Hands entries back; `leaving` is the consumer that goes. Returns how many were ours to give."""
        keys = [self._keys.stream]
        args: list[Any] = [GROUP, leaving, self._run_life_ms]
        for item in items:
            keys += (self._keys.record(item.task_id), self._keys.run(item.task_id))
            args += (item.entry_id, VERSION, item.generation, item.entry, item.run)
        return cast(int, await self._run("release", keys, args))

    async def cancel(self, final: Task, tombstone: bytes) -> bytes | None:
        """Cancels this generation: `b''`, or the record that stands, or None where there is none."""
        keys = [self._keys.stream, self._keys.record(final.id), self._keys.run(final.id)]
        args = [GROUP, final.generation, final_record(final), self._result_ttl_ms, tombstone, self._run_life_ms]
        return cast(bytes | None, await self._run("cancel", keys, args))

    async def entry(self, entry_id: str) -> dict[bytes, bytes] | None:
        """What an entry carries; None where it is gone."""
        async with self._connection.guarded():
            found: Any = await self._connection.commands.xrange(self._keys.stream, entry_id, entry_id)
        return found[0][1] if found else None

    async def waiting(self, most: int) -> list[str]:
        """The ids of entries that nobody claimed yet, the oldest first."""
        found = await self._run("waiting", [self._keys.stream], [GROUP, most])
        return [entry_id.decode() for entry_id in found]

    async def bury(self, entry_id: str, held: str) -> None:
        """Moves an entry that nobody can read to the dead-letter list."""
        await self._run("bury", [self._keys.stream, self._keys.dead], [GROUP, entry_id, held, DEAD_LIST_LIFE_S])


class Depth:
    """Counts the waiting tasks without asking Redis each time.

    The count is measured again after 0.5 % of `limit` new tasks, and at every submit while the queue looks full. A
    blocked read that finds nothing says for free that nothing waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting = 0
        self._unmeasured = 0

    @property
    def room(self) -> int:
        return self.limit - self.waiting

    @property
    def stale(self) -> bool:
        return self.room <= 0 or (self.waiting > 0 and self._unmeasured >= max(self.limit // 200, 1))

    def submitted(self, added: int, measured: int | None) -> None:
        self._unmeasured = 0 if measured is not None else self._unmeasured + added
        self.waiting = (self.waiting if measured is None else measured) + added

    def taken(self, count: int) -> None:
        self.waiting = max(self.waiting - count, 0)

    def nothing_waits(self) -> None:
        self.waiting = self._unmeasured = 0


def _entries(answer: Any) -> list[Entry]:
    """Only entries with fields: one that was deleted while it was pending comes without."""
    return [(entry_id.decode(), fields) for entry_id, fields in answer if fields]
