"""Names of all keys in Redis, with types and lifetimes. All carry one hash tag, so Redis Cluster works."""

from __future__ import annotations

import re

from msgspec import Struct

GROUP = "pool"

_PATTERN_SIGNS, _ESCAPED = r"[*?\[\]\\^]", r"\\\g<0>"


class Keys(Struct, frozen=True):
    """Names of the keys of one prefix.

    prefix: the hash tag, `imagegen` unless set otherwise.
    """

    prefix: str

    @property
    def all(self) -> str:
        """Pattern of all keys, for SCAN and the rights of a user."""
        return f"{{{re.sub(_PATTERN_SIGNS, _ESCAPED, self.prefix)}}}:*"

    @property
    def needed(self) -> list[str]:
        """Return a key of each kind that every instance may use; a user needs the rights to all but `spared`."""
        names = ("stream", "dead_letters", "outbox", "api_keys", "pause", "server", "history", "lines", "link_key")
        of_tasks = ("record", "end", "joined", "checkpoint", "delivery_log", "found_job", "recorded_call")
        of_others = ("line", "open_tasks", "budgets", "lost_budgets", "usage", "idempotency", "lost_calls")
        keys = [getattr(self, name) for name in (*names, "dead_instances")]
        return keys + [getattr(self, kind)("0") for kind in (*of_tasks, *of_others, "thumbnail", "upload")]

    @property
    def spared(self) -> str:
        """Return a key of the kind that an instance can do without: users of former versions may lack the rights."""
        return self.recorded_call("0")

    @property
    def records(self) -> str:
        """Pattern of the records of all tasks."""
        return f"{self.all[:-1]}task:*"

    @property
    def checkpoints(self) -> str:
        """Pattern of the checkpoints of all tasks."""
        return f"{self.all[:-1]}run:*"

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
        """Pub/sub channel of the instances."""
        return f"{{{self.prefix}}}:control"

    @property
    def outbox(self) -> str:
        """Sorted set: webhooks to be called, by the Unix time in ms at which any instance may claim them.

        No end, but empty once all are delivered.
        """
        return f"{{{self.prefix}}}:outbox"

    @property
    def api_keys(self) -> str:
        """Hash: records of the API keys made at run time, and the budget slot of each name. No end."""
        return f"{{{self.prefix}}}:keys"

    @property
    def pause(self) -> str:
        """String: whether claiming is paused, since when, and the version of that. No end, once it was paused."""
        return f"{{{self.prefix}}}:pause"

    @property
    def server(self) -> str:
        """String: replication id of the server to which all instances have written back what they had. No end."""
        return f"{{{self.prefix}}}:server"

    @property
    def history(self) -> str:
        """Stream: what the instances did in each of the last 24 hours' minutes. 26 hours after the last renewal."""
        return f"{{{self.prefix}}}:history"

    def line(self, client: str) -> str:
        """List: tasks of a client that wait outside of the stream (see lines.lua). No end, but empty in the end."""
        return f"{{{self.prefix}}}:line:{client}"

    @property
    def lines(self) -> str:
        """Set: the clients that have a line. No end, but empty in the end."""
        return f"{{{self.prefix}}}:lines"

    def open_tasks(self, client: str) -> str:
        """Sorted set: unfinished tasks of an API key with a limit of them. As long as the record of the last one."""
        return f"{{{self.prefix}}}:open:{client}"

    def probe(self, kind: str) -> str:
        """Any type: the keys of the command check at the start. Deleted at once, or after a minute."""
        return f"{{{self.prefix}}}:probe:{kind}"

    def budgets(self, day: int | str) -> str:
        """String: what the budgets of a UTC day hold, a 64-bit number each; the first counts the changes. 8 days."""
        return f"{{{self.prefix}}}:budgets:{day}"

    def lost_budgets(self, day: int) -> str:
        """String: description of the last loss of the budgets of a UTC day. 10 minutes."""
        return f"{{{self.prefix}}}:lost-budgets:{day}"

    def recorded_call(self, name: str) -> str:
        """String: count and price of a call of a lost claim that were recorded, so that they are so once. A day."""
        return f"{{{self.prefix}}}:recorded:{name}"

    def record(self, task_id: str) -> str:
        """String: the task's record. While unfinished: its deadline and `RESULT_TTL`; then `RESULT_TTL`."""
        return f"{{{self.prefix}}}:task:{task_id}"

    def end(self, name: str) -> str:
        """String: finished record of a name in the outbox that is tried again. `RESULT_TTL`, or until it is done."""
        return f"{{{self.prefix}}}:end:{name}"

    def joined(self, task_id: str) -> str:
        """String: epoch and clients of an unfinished task, once a second client joined it. As long as the record."""
        return f"{{{self.prefix}}}:joined:{task_id}"

    def checkpoint(self, task_id: str) -> str:
        """String: owner and progress of a task, written before each paid call.

        Two leases and ten minutes, renewed; of a released claim as long as the record.
        """
        return f"{{{self.prefix}}}:run:{task_id}"

    @property
    def image_index(self) -> str:
        """Sorted set: images in Redis, oldest first, and their total bytes. Longer than any of them."""
        return f"{{{self.prefix}}}:pictures"

    def image_part(self, name: str, part: int) -> str:
        """String: a part of an image's bytes. Until the image expires."""
        return f"{{{self.prefix}}}:picture:{name}:{part}"

    def thumbnail(self, name: str) -> str:
        """String: type, size and hash of a thumbnail, or a claim while it is made. Until the image's task expires."""
        return f"{{{self.prefix}}}:thumbnail:{name}"

    def upload(self, sha256: str) -> str:
        """String: type, size and expiry of an uploaded image. Until it expires and no task may need it any more."""
        return f"{{{self.prefix}}}:upload:{sha256}"

    def upload_right(self, sha256: str, owner: str) -> str:
        """String: the key of this owner sent the image, and may use it. Until the upload expires."""
        return f"{{{self.prefix}}}:upload:{sha256}:{owner}"

    @property
    def link_key(self) -> str:
        """String: key of the signatures of links, in hex. No end."""
        return f"{{{self.prefix}}}:link-key"

    def rate_limit(self, name: str) -> str:
        """String: a client's use of one rate limit. The window's length."""
        return f"{{{self.prefix}}}:window:{name}"

    def idempotency(self, name: str) -> str:
        """String: the task that a client's idempotency key was used for. A day."""
        return f"{{{self.prefix}}}:once:{name}"

    def found_job(self, digest: str) -> str:
        """String: the task that found a provider job in the provider's list. One day."""
        return f"{{{self.prefix}}}:job:{digest}"

    def lost_calls(self, name: str) -> str:
        """Sorted set: variants of a client's equal calls that ended without their answer. Ten minutes."""
        return f"{{{self.prefix}}}:lost:{name}"

    def usage(self, day: int) -> str:
        """Hash: counts of the usage report by key and model, and the writers' marks. 92 days."""
        return f"{{{self.prefix}}}:usage:{day}"

    @property
    def dead_instances(self) -> str:
        """Hash: instances that left without a word, until what they ended is in the usage report. 92 days."""
        return f"{{{self.prefix}}}:usage:dead"

    def alert(self, name: str) -> str:
        """String: an alert that was sent, so that no other instance repeats it. An hour to two days."""
        return f"{{{self.prefix}}}:alert:{name}"

    def delivery_log(self, task_id: str) -> str:
        """String: the delivery log of a task's webhooks, and of those added later. As long as the record."""
        return f"{{{self.prefix}}}:hooks:{task_id}"
