"""Owns the outbox: which webhooks of finished tasks are still to be told, and which instance cares for them.

What this instance finished is delivered from memory, and costs three commands: a name in the outbox, written with the
result; the delivery log; the name's removal. A name falls due, for any instance to take, when nobody moved it on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loguru import logger
from msgspec.structs import replace
from redis.exceptions import ResponseError

from imagegen.queue.connection import Connection
from imagegen.queue.control import Control
from imagegen.queue.hooks import HookCalls
from imagegen.queue.memory import Memory
from imagegen.queue.records import (
    NewerRecord,
    UnreadableRecord,
    decode_hooks,
    decode_record,
    encode_hooks,
    with_hooks,
)
from imagegen.queue.scripts import OUTBOX_GRACE_S, Scripts, outbox_name
from imagegen.tasks.task import Task, to_tell
from imagegen.tasks.webhook import Delivery, Webhook, joined, merged

MAX_HELD = 2_000
"""Names cared for at once; the rest waits in the outbox."""

LOOK_S = 600.0
RENEW_S = 20.0
HELLO_S = 1.0
"""Peers answer our hello within this time; where none does, nobody else cares for what is in the outbox."""

_SHOWN = 20


@dataclass(slots=True)
class _Held:
    """open: numbers of the deliveries that are not done; until: when the name falls due, Unix time."""

    task: Task
    open: dict[int, Delivery]
    until: float


class Outbox:
    """`next` gives what is to be delivered, `tried` takes what came of it. clock: Unix time."""

    def __init__(
        self,
        connection: Connection,
        calls: HookCalls,
        scripts: Scripts,
        memory: Memory,
        control: Control,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._connection = connection
        self._calls = calls
        self._scripts = scripts
        self.memory = self._memory = memory
        self.control = self._control = control
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._ready: asyncio.Queue[tuple[Task, Delivery]] = asyncio.Queue()
        self._busy = asyncio.Event()
        self._look = asyncio.Event()
        self._here = asyncio.Event()
        memory.on_settled = self._settled
        control.on["bye"] = lambda _message: self.look_soon()
        control.on_join.append(self._here.set)

    def look_soon(self) -> None:
        """An instance went: what it cared for may be left behind."""
        self._look.set()

    @property
    def names(self) -> list[str]:
        """What this instance delivers."""
        return list(self._held)

    def elsewhere(self, task: Task) -> bool:
        """Whether another instance knows more of the deliveries of a finished task."""
        return any(_name(task, one) not in self._held for one in to_tell(task))

    async def next(self) -> tuple[Task, Delivery]:
        """A finished task and one of its deliveries, to be made at its `due_at`; each comes once."""
        return await self._ready.get()

    async def tried(self, task: Task, delivery: Delivery) -> None:
        """Keeps what a try brought, and forgets the delivery where it is done. Waits for Redis where it is away."""
        name = _name(task, delivery)
        held = self._held.get(name)
        if held is None:
            return
        held.task = replace(held.task, deliveries=merged(held.task.deliveries, [delivery]))
        held.open[delivery.number] = delivery
        self._memory.joined(held.task)
        await self._connection.until_back(self._log, held)
        if not delivery.pending:
            del held.open[delivery.number]
        if held.open:
            held.until = min(one.due_at or self._clock() for one in held.open.values()) + OUTBOX_GRACE_S
            await self._connection.until_back(self._calls.postpone, {name: held.until})
        else:
            await self._connection.until_back(self._calls.settle, name)
            self._held.pop(name, None)

    async def join(self, task: Task, log: bytes | None, webhooks: Sequence[Webhook]) -> Task | None:
        """Adds webhooks to a task as it was read, with its log; those of a finished one are called at once.

        None where the task changed meanwhile. Raises InvalidRequest for too many, QueueUnavailable.
        """
        late = task.state.final
        wanted = [webhook for webhook in webhooks if not late or webhook.wants(task.state)]
        if not wanted:
            return task
        deliveries = joined(task.deliveries, wanted, task.state if late else None)
        task = replace(task, deliveries=deliveries)
        fresh = deliveries[-len(wanted) :]
        names = [_name(task, one) for one in fresh] if late else []
        if not await self._calls.join(task, log or b"", encode_hooks(task.generation, deliveries), names):
            return None
        self._memory.joined(task)
        if late:
            for one in fresh:
                self._hold(_name(task, one), task, [one])
        return task

    async def release(self) -> None:
        """Leaves all to others, at the end. Raises QueueUnavailable."""
        if self._held:
            await self._calls.postpone(dict.fromkeys(self._held, self._clock()))
            self._held.clear()

    async def renew_forever(self) -> None:
        """Moves names on that wait for long; costs nothing while nothing does."""
        while True:
            while not self._held:
                self._busy.clear()
                await self._busy.wait()
            await asyncio.sleep(RENEW_S)
            now = self._clock()
            soon = [held for held in self._held.items() if held[1].until < now + OUTBOX_GRACE_S / 2]
            if soon:
                until = {name: now + OUTBOX_GRACE_S for name, _ in soon}
                await self._connection.until_back(self._calls.postpone, until)
                for name, held in soon:
                    held.until = until[name]

    async def look_forever(self) -> None:
        """Takes over what nobody cares for: at the start, when it falls due, after a takeover, and now and then."""
        await self._here.wait()
        await asyncio.sleep(HELLO_S)
        until = math.inf if self._control.alone else None
        while True:
            wait_s = await self._connection.until_back(self._take, until)
            until = None
            try:
                async with asyncio.timeout(wait_s):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()

    async def _take(self, until: float | None) -> float:
        """Takes over what is due, or falls due by `until`. Returns the seconds until there may be more."""
        room = MAX_HELD - len(self._held)
        if room <= 0:
            return RENEW_S
        now = self._clock()
        rows = await self._calls.first(_SHOWN)
        others = [due_at for name, due_at in rows if name not in self._held]
        if not others:
            return OUTBOX_GRACE_S if len(rows) == _SHOWN else LOOK_S
        if others[0] > now and until is None:
            return min(others[0] - now + 0.01, LOOK_S)
        names = [name for name in await self._calls.adopt(until or now, room) if name not in self._held]
        await asyncio.gather(*map(self._adopt, names))
        return 0.1

    async def _adopt(self, name: str) -> None:
        """Holds what waits under a name; one whose task is gone or came again is dropped."""
        task_id, generation, *_ = (*name.split(":"), "")
        record, _, log = await self._scripts.read(task_id)
        try:
            task = None if record is None else with_hooks(decode_record(record)[1], log)
        except NewerRecord:
            return
        except UnreadableRecord as error:
            logger.bind(taskId=task_id).error("Webhooks are dropped, the record can't be read: {}", error)
            task = None
        if task is not None and (not task.state.final or str(task.generation) != generation):
            task = None
        waiting = [one for one in to_tell(task) if _name(task, one) == name] if task else []
        if task is None or not waiting:
            await self._calls.settle(name)
            return
        logger.bind(taskId=task_id).info("Took over webhooks that nobody cared for: {}", len(waiting))
        self._hold(name, task, waiting)

    def _settled(self, task: Task) -> None:
        """A task was finished here: its name is in the outbox since then."""
        if waiting := to_tell(task):
            self._hold(outbox_name(task.id, task.generation), task, waiting)

    def _hold(self, name: str, task: Task, waiting: Sequence[Delivery]) -> None:
        if len(self._held) < MAX_HELD and name not in self._held:
            self._held[name] = _Held(task, {one.number: one for one in waiting}, self._clock() + OUTBOX_GRACE_S)
            self._busy.set()
            for one in waiting:
                self._ready.put_nowait((task, one))

    async def _log(self, held: _Held) -> None:
        """Writes the delivery log, with what others wrote meanwhile; one of a newer generation is left alone."""
        task, known = held.task, None
        while True:
            log = encode_hooks(task.generation, task.deliveries)
            try:
                known = await self._calls.write(task.id, known, log)
                if known is None:
                    return
                generation, told = decode_hooks(known)
            except (NewerRecord, UnreadableRecord, ResponseError) as error:
                logger.bind(taskId=task.id).warning("The delivery log is left as it is: {}", error)
                return
            if generation > task.generation:
                return
            if generation == task.generation:
                task = replace(task, deliveries=merged(task.deliveries, told))


def _name(task: Task, delivery: Delivery) -> str:
    return outbox_name(task.id, task.generation, delivery.number if delivery.late else None)
