"""Clients of unfinished tasks. A task is cancelled when the last of its clients cancels it; the others leave it.

The record names the client that submitted the task. Redis has a list of the clients only once another one joined, or
one left (see verbs/joined.lua), so that a task of one client costs nothing more.
"""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.notifier import Message, Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.verbs.cancel import CancelBy
from imagegen.tasks.clients import client_names, first_clients
from imagegen.tasks.task import Task

MAX_REMEMBERED = 10_000
"""Tasks with several clients of which this instance has seen some."""

MESSAGE = "left"

MAX_EPOCH = 2**63

SKEW_S = 5.0
"""Most seconds between the clocks of two instances, each of which follows that of Redis."""


class _StoredClients(Struct):
    """Clients of an epoch that are certainly in Redis."""

    epoch: int
    clients: set[str]


class JoinedClients:
    """The clients of tasks that this instance has seen; another submit of one of them costs no command.

    The first clients of a task are certainly among its clients if this instance has received each message of one that
    left: it has not for a task from before its subscription or before it met a peer, and not if it forgot the message.
    """

    def __init__(self, verbs: QueueVerbs, notifier: Notifier) -> None:
        self._verbs, self._notifier = verbs, notifier
        self._stored: dict[str, _StoredClients] = {}
        self._doubted_until = MAX_EPOCH
        self._leaves = 0
        notifier.handlers[MESSAGE] = self._on_message

    async def join(self, task: Task, client: str, *, has_webhook: bool = False) -> bool:
        """Count a client of an unfinished task. Return False if the task is over. Raises QueueUnavailable."""
        if not client:
            return True
        names, leaves = client_names(client, has_webhook=has_webhook), self._leaves
        is_informed = self._notifier.subscribed and not self._notifier.silent
        if is_informed and self._stored_clients_of(task).clients.issuperset(names):
            return True
        if not await self._verbs.join(task, names):
            return False
        if self._leaves == leaves:
            clients_in_redis = self._stored_clients_of(task)
            clients_in_redis.clients.update(names)
            self._remember(task.id, clients_in_redis)
        return True

    def cancel_by(self, task: Task, client: str) -> CancelBy:
        """Return who cancels a task, and what the other instances receive if it leaves. client: empty for all."""
        if not client:
            return CancelBy()
        channel, message = self._notifier.in_script(MESSAGE, id=task.id, epoch=task.epoch)
        return CancelBy(client, " ".join(first_clients(task)), channel, message)

    def left(self, task: Task, *, published: bool) -> None:
        """Forget the clients of a task that one left, here and elsewhere, so that it is counted when it submits again.

        published: whether the script of the cancel has published it.
        """
        self._doubt(task.id, task.epoch)
        if not published:
            self._notifier.publish(MESSAGE, id=task.id, epoch=task.epoch)

    def doubt_all(self) -> None:
        """Forget all clients, since messages may have been missed, or Redis may have lost them."""
        self._stored.clear()
        self._leaves += 1
        self._doubted_until = int((self._verbs.clock() + SKEW_S) * 1e6)

    def _stored_clients_of(self, task: Task) -> _StoredClients:
        clients_in_redis = self._stored.get(task.id)
        if clients_in_redis is not None and clients_in_redis.epoch == task.epoch:
            return clients_in_redis
        return _StoredClients(task.epoch, set() if task.epoch <= self._doubted_until else set(first_clients(task)))

    def _on_message(self, message: Message) -> None:
        task_id, epoch = message.get("id"), message.get("epoch")
        if isinstance(task_id, str) and isinstance(epoch, int):
            self._doubt(task_id, epoch)

    def _doubt(self, task_id: str, epoch: int) -> None:
        self._leaves += 1
        self._remember(task_id, _StoredClients(epoch, set()))

    def _remember(self, task_id: str, clients_in_redis: _StoredClients) -> None:
        self._stored.pop(task_id, None)
        self._stored[task_id] = clients_in_redis
        if len(self._stored) > MAX_REMEMBERED:
            forgotten = self._stored.pop(next(iter(self._stored)))
            self._doubted_until = max(self._doubted_until, forgotten.epoch)
