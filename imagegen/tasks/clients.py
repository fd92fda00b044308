"""Names of the clients of a task, which show whether a cancel is that of the last client.

A client is an API key, else an address. Its webhooks count as one more: they keep a task until their client, which has
left it already, cancels once more.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2s

from imagegen.tasks.task import Task

KEY_ID = "key:"
"""Begins the id of a client with an API key; no address begins so."""

UNKNOWN_SUBMITTER = "?"
"""Name of the client that submitted a task of an earlier version, if its record does not have it."""

_NAME_CHARS = 10


@lru_cache(4096)
def owner_name(client_id: str) -> str:
    """Return the name under which a client's data is stored."""
    return blake2s(client_id.encode(), digest_size=8).hexdigest()


@lru_cache(4096)
def submitter_name(client_id: str) -> str:
    """Return the name of a client among those of a task, in few bytes, since each record and entry has it."""
    return owner_name(client_id)[:_NAME_CHARS]


def client_names(client: str, *, has_webhook: bool) -> tuple[str, ...]:
    """Return the names that a submit of a client counts under."""
    return (client, f"+{client}") if has_webhook else (client,)


def first_clients(task: Task) -> tuple[str, ...]:
    """Return the names of a task's clients before another one joined it: its submitter, and the owners of webhooks."""
    owners = [delivery.webhook.owner[:_NAME_CHARS] for delivery in task.deliveries if delivery.webhook.owner]
    submitter = task.submitter
    if not submitter and task.client:
        submitter = submitter_name(KEY_ID + task.client)
    submitter = submitter or (owners[0] if owners else UNKNOWN_SUBMITTER)
    return (submitter, *dict.fromkeys(f"+{owner}" for owner in owners))
