"""Clients of unfinished tasks. A task is cancelled when the last of its clients cancels it; the others leave it.

The record names the client that submitted the task. Redis has a list of the clients only once another one joined (see
verbs/joined.lua), so that a task of one client costs nothing more.
"""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.notifier import Message, Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.tasks.task import Task

MAX_REMEMBERED = 10_000
"""Tasks with several clients of which this instance has seen some."""

MESSAGE = "left"


class _Known(Struct):
    """Clients of an epoch that are certainly in Redis."""

    epoch: int
    clients: set[str]


class JoinedClients:
    """The clients of tasks that this instance has seen; another submit of one of them costs no command.

    An instance that misses the message of a client that left takes it for one that is still there, until its memory of
    the task is over.
    """

    def __init__(self, verbs: QueueVerbs, notifier: Notifier) -> None:
        self._verbs, self._notifier = verbs, notifier
        self._known: dict[str, _Known] = {}
        notifier.handlers[MESSAGE] = self._on_message

    async def join(self, task: Task, client: str) -> bool:
        """Count a client of an unfinished task. Return False if the task is over. Raises QueueUnavailable."""
        known = self._known.get(task.id)
        if known is None or known.epoch != task.epoch:
            known = _Known(task.epoch, {task.submitter})
        if not client or (client in known.clients and not self._notifier.silent):
            return True
        if not await self._verbs.join(task, client):
            return False
        if self._known.get(task.id, known).epoch == known.epoch:
            known = self._known.get(task.id, known)
            known.clients.add(client)
            self._remember(task.id, known)
        return True

    def left(self, task: Task) -> None:
        """Notify all instances that a client left, so that it is counted when it submits again."""
        self._remember(task.id, _Known(task.epoch, set()))
        self._notifier.publish(MESSAGE, id=task.id, epoch=task.epoch)

    def _on_message(self, message: Message) -> None:
        task_id, epoch = message.get("id"), message.get("epoch")
        if isinstance(task_id, str) and isinstance(epoch, int):
            self._remember(task_id, _Known(epoch, set()))

    def _remember(self, task_id: str, known: _Known) -> None:
        self._known.pop(task_id, None)
        self._known[task_id] = known
        if len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
