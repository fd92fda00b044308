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
    def dead(self) -> str:
        """List: the last 100 entries that could not be read. A week."""
        return f"{{{self.prefix}}}:dead"

    @property
    def control(self) -> str:
        """Pub/sub channel on which instances talk to each other."""
        return f"{{{self.prefix}}}:control"

    def record(self, task_id: str) -> str:
        """String: the task's record. While unfinished: its deadline and `RESULT_TTL`; then `RESULT_TTL`."""
        return f"{{{self.prefix}}}:task:{task_id}"

    def run(self, task_id: str) -> str:
        """String: who runs the task and how far, written before each paid call. Two leases, renewed."""
        return f"{{{self.prefix}}}:run:{task_id}"
