"""Owns the names of all keys in Redis, with types and lifetimes. All carry one hash tag, so Redis Cluster works."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "pool"


@dataclass(frozen=True, slots=True)
class Keys:
    """prefix: the hash tag, `imagegen` unless set otherwise."""

    prefix: str

    @property
    def stream(self) -> str:
        """Stream: one entry a task that is not finished; deleting the entry is what finishes the task. No end."""
        return f"{{{self.prefix}}}:tasks"

    @property
    def dead_letters(self) -> str:
        """List: the last 100 entries that could not be read. A week."""
        return f"{{{self.prefix}}}:dead"

    @property
    def notifications(self) -> str:
        """Pub/sub channel on which instances talk to each other."""
        return f"{{{self.prefix}}}:control"

    @property
    def outbox(self) -> str:
        """Sorted set: what webhooks are still to be called, by the Unix time in ms at which nobody cares for it.
        No end, but empty where all is delivered."""
        return f"{{{self.prefix}}}:outbox"

    def probe(self, kind: str) -> str:
        """Any: what the start tries its commands on. Deleted at once, or after a minute."""
        return f"{{{self.prefix}}}:probe:{kind}"

    def record(self, task_id: str) -> str:
        """String: the task's record. While unfinished: its deadline and `RESULT_TTL`; then `RESULT_TTL`."""
        return f"{{{self.prefix}}}:task:{task_id}"

    def checkpoint(self, task_id: str) -> str:
        """String: who runs the task and how far, written before each paid call. Two leases and ten minutes, renewed;
        of a claim that was handed back as long as the record."""
        return f"{{{self.prefix}}}:run:{task_id}"

    @property
    def image_index(self) -> str:
        """Sorted set: the pictures kept in Redis, oldest first, and their bytes in all. Longer than any of them."""
        return f"{{{self.prefix}}}:pictures"

    def image_part(self, name: str, part: int) -> str:
        """String: a part of a picture's bytes. Until the picture expires."""
        return f"{{{self.prefix}}}:picture:{name}:{part}"

    def rate_limit(self, name: str) -> str:
        """String: what a client spent of one rate limit. The window's length."""
        return f"{{{self.prefix}}}:window:{name}"

    def idempotency(self, name: str) -> str:
        """String: the task that a client's idempotency key was used for. A day."""
        return f"{{{self.prefix}}}:once:{name}"

    def delivery_log(self, task_id: str) -> str:
        """String: the delivery log of a task's webhooks, and those that joined. As long as the record."""
        return f"{{{self.prefix}}}:hooks:{task_id}"
