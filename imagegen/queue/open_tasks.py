"""Limit of a client's unfinished tasks, exact over all instances and over crashes.

Only clients with such a limit cost commands. A task that has ended is removed with the client's next submit. If the
limit seems reached, the records of the oldest tasks decide: one that is gone, or has ended elsewhere, no longer counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from imagegen.errors import ApiError, QueueUnavailable, TooManyOpenTasks
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import TASK_ID, State, Task

MAX_CHECKED = 100
"""Tasks with records that are read at once."""

CHECK_S = 1.0
"""Shortest time between two reads of the records for one client."""

IN_FLIGHT_S = 10.0
"""A task without a record counts for this long: its submit may be under way."""

MAX_ENDED = 1_000
"""Ended tasks of one client in memory, and in one command."""

_Result = TypeVar("_Result")
OpenLimitOf = Callable[[str], int | None]

_RETRY_AFTER_S = "5"
_SCRIPT = load_script(__package__, "open_tasks")


class OpenTasks:
    """Counter of the unfinished tasks of clients.

    Args:
        limit_of: returns the limit of a client by its name, None without one.
        read: returns a task as Redis has it.
        life_s: longest life of an unfinished task's record.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        limit_of: OpenLimitOf,
        read: Callable[[str], Awaitable[Task | None]],
        *,
        life_s: float,
    ) -> None:
        self._limit_of = limit_of
        self._connection = connection
        self._keys = keys
        self._read = read
        self._life_ms = int(life_s * 1000)
        self._clock = connection.clock
        self._ended: dict[str, dict[str, None]] = {}
        self._checked_at: dict[str, float] = {}

    async def counted(self, client: str, task_id: str, store: Callable[[], Awaitable[tuple[_Result, bool]]]) -> _Result:
        """Count a task, store it, and return the result of that. store: also returns whether it is a new task.

        Raises TooManyOpenTasks, and what `store` raises.
        """
        limit = self._limit_of(client)
        is_new = limit is not None and await self._take(client, task_id, limit)
        try:
            result, is_stored = await store()
        except ApiError as error:
            if is_new and not isinstance(error, QueueUnavailable):  # it is certainly not stored
                self._give_back(client, task_id)
            raise
        if is_new and not is_stored:
            self._give_back(client, task_id)
        return result

    def on_finished(self, task: Task) -> None:
        """Count a task of this instance no longer."""
        if task.client and self._limit_of(task.client) is not None:
            self._give_back(task.client, task.id)

    async def _take(self, client: str, task_id: str, limit: int) -> bool:
        """Return whether the task counts from now on: not if it did before, or opens no task."""
        ended = list(self._ended.pop(client, ()))
        if task_id in ended:
            ended.remove(task_id)
        is_new, oldest = await self._count(client, task_id, limit, ended)
        if oldest and self._clock() - self._checked_at.get(client, 0.0) >= CHECK_S:
            self._checked_at[client] = self._clock()
            if ended := await self._find_ended(oldest):
                is_new, oldest = await self._count(client, task_id, limit, ended)
        if oldest and not await self._exists(task_id):
            raise TooManyOpenTasks(headers={"Retry-After": _RETRY_AFTER_S})
        return is_new

    def _give_back(self, client: str, task_id: str) -> None:
        """Count a task no longer; that is a part of the client's next command."""
        ended = self._ended.setdefault(client, {})
        ended[task_id] = None
        if len(ended) > MAX_ENDED:
            del ended[next(iter(ended))]

    async def _count(
        self, client: str, task_id: str, limit: int, ended: Sequence[str]
    ) -> tuple[bool, dict[str, float]]:
        """Return whether the task is newly counted; at the limit, the oldest ones with the Unix times of submit."""
        uncounted: Sequence[str | bytes] = ended
        while True:
            args: list[Arg] = [task_id, limit, int(self._clock() * 1000), self._life_ms, MAX_CHECKED, *uncounted]
            async with self._connection.deadline():
                reply = await self._connection.commands.run_script(_SCRIPT, [self._keys.open_tasks(client)], args)
            self._connection.meter.redis_commands_sent("submit", 5)
            pairs = iter([] if isinstance(reply, int) else reply)
            times = dict(zip(pairs, pairs, strict=True))
            # What another program wrote counts as ended.
            uncounted = [name for name in times if not TASK_ID.fullmatch(name.decode(errors="replace"))]
            if not uncounted:
                return reply == 1, {name.decode(): float(time) / 1000 for name, time in times.items()}

    async def _find_ended(self, times: dict[str, float]) -> list[str]:
        """Return those of the tasks that have ended or never began."""
        tasks = await asyncio.gather(*map(self._read, times), return_exceptions=True)
        now, ended = self._clock(), []
        for (task_id, time), task in zip(times.items(), tasks, strict=True):
            if isinstance(task, Task):
                has_ended = task.state.is_final
            elif isinstance(task, BaseException):
                if not isinstance(task, ApiError):
                    raise task
                has_ended = False
            else:
                has_ended = now - time > IN_FLIGHT_S
            if has_ended:
                ended.append(task_id)
        return ended

    async def _exists(self, task_id: str) -> bool:
        """Return whether a submit joins or finds a task, which opens none."""
        task = await self._read(task_id)
        return task is not None and task.state not in (State.FAILED, State.CANCELLED)
