"""Identity and state of a Redis server, parsed from its INFO."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

SAFE_POLICY = "noeviction"


def eviction_warning(policy: str) -> str | None:
    """Return what a maxmemory-policy does to tasks; None for the safe one, or for an unknown one."""
    if policy in {"", SAFE_POLICY}:
        return None
    return (
        f"this Redis has maxmemory-policy {policy}: when its memory is full it deletes keys, and accepted tasks and "
        f"paid images are lost with them. Set maxmemory-policy {SAFE_POLICY}"
    )


class ServerInfo(Struct, frozen=True):
    """Fields of one reply of INFO. A field that the server does not report is empty, or None for numbers.

    Attributes:
        run_id: new at each start of a server process.
        replication_ids: of the data set: replication_id, and promoted_from, that of the master before a promotion.
        offset: bytes of the replication stream so far; it never falls while the data set is the same.
        version: of Redis; other programs report the version that they are compatible with.
        program: name and own version, such as `valkey 9.1.2`.
        shard: ids of the cluster nodes that have had our keys, by failovers among them; INFO does not have them.
    """

    run_id: str = ""
    replication_ids: frozenset[str] = frozenset()
    replication_id: str = ""
    promoted_from: str = ""
    offset: int | None = None
    version: str = ""
    program: str = ""
    cluster: bool = False
    role: str = ""
    eviction_policy: str = ""
    time: float | None = None
    shard: frozenset[str] = frozenset()

    @property
    def evicts(self) -> bool:
        """Whether it may delete keys before their time; False if its policy is unknown."""
        return self.eviction_policy not in {"", SAFE_POLICY}

    @classmethod
    def parse(cls, text: str) -> ServerInfo:
        """Parse the fields of INFO that are used here; the rest is ignored."""
        pairs = (line.partition(":") for line in text.splitlines())
        fields = {name: value.strip() for name, colon, value in pairs if colon}
        replication_id, promoted_from = _replication_ids(fields)
        return cls(
            run_id=fields.get("run_id", ""),
            replication_ids=frozenset(name for name in (replication_id, promoted_from) if name),
            replication_id=replication_id,
            promoted_from=promoted_from,
            offset=_number(fields.get("master_repl_offset")),
            version=fields.get("redis_version", ""),
            program=_program(fields),
            cluster=fields.get("cluster_enabled") == "1" or fields.get("redis_mode") == "cluster",
            role=fields.get("role", ""),
            eviction_policy=fields.get("maxmemory_policy", ""),
            time=None if (micros := _number(fields.get("server_time_usec"))) is None else micros / 1e6,
        )

    def replaces(self, previous: ServerInfo) -> bool:
        """Return whether this is another server than the previous one, or the same with less data.

        A cluster's node of another shard took over the slot with all its keys; its data is the same.
        """
        if not self.is_of_shard(previous):
            return False
        if self.run_id != previous.run_id:
            return True
        if self.offset is None or previous.offset is None:
            return False
        return self.offset < previous.offset or not self.replication_ids & previous.replication_ids

    def is_of_shard(self, previous: ServerInfo) -> bool:
        """Return whether this server is no cluster, or took over from the previous one by a failover.

        After forced failovers in a row, two nodes of a shard may have no replication id in common.
        """
        return not self.cluster or bool(self.shard & previous.shard or self.replication_ids & previous.replication_ids)

    def after(self, previous: ServerInfo) -> ServerInfo:
        """Return this server, with the nodes of its shard that the previous one reported."""
        return replace(self, shard=self.shard | previous.shard) if self.is_of_shard(previous) else self


def _program(fields: Mapping[str, str]) -> str:
    """Return the name and version; Valkey has separate fields for both, as it reports itself as Redis 7.2."""
    name = fields.get("server_name", "redis")
    version = fields.get(f"{name}_version") or fields.get("redis_version")
    return f"{name} {version}" if version else ""


def _replication_ids(fields: Mapping[str, str]) -> tuple[str, str]:
    ids = fields.get("master_replid", ""), fields.get("master_replid2", "")
    return ids[0] if ids[0].strip("0") else "", ids[1] if ids[1].strip("0") else ""


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
