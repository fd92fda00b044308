"""Identity of a Redis server from INFO, and the detection of another server."""

from __future__ import annotations

from msgspec.structs import replace

from imagegen.redis_client.server_info import ServerInfo
from tests.support import over_rows

ID, OTHER = "a" * 40, "b" * 40


def info(run_id: str = "r1", replid: str = ID, replid2: str = "0" * 40, offset: int = 100) -> ServerInfo:
    return ServerInfo.parse(
        f"# Server\r\nredis_version:7.0.15\r\nrun_id:{run_id}\r\nredis_mode:standalone\r\n# Replication\r\n"
        f"role:master\r\nmaster_replid:{replid}\r\nmaster_replid2:{replid2}\r\nmaster_repl_offset:{offset}\r\n"
        "maxmemory_policy:allkeys-lru\r\n"
    )


@over_rows(
    ("new", "differs"),
    [
        (info(), False),
        (info(offset=200), False),
        (info(offset=99), True),
        (info(run_id="r2"), True),
        (info(replid=OTHER), True),
        (info(replid=OTHER, replid2=ID), False),
    ],
)
def test_another_server_or_one_with_less_data_is_recognised(new: ServerInfo, differs: bool) -> None:
    assert new.replaces(info()) is differs


def test_a_server_with_sparse_info_counts_as_the_same() -> None:
    assert not ServerInfo.parse("# Memory\nmaxmemory_policy:noeviction").replaces(ServerInfo.parse(""))


@over_rows(
    ("text", "program"),
    [
        ("redis_version:7.0.15", "redis 7.0.15"),
        ("redis_version:7.2.4\nserver_name:valkey\nvalkey_version:9.1.2", "valkey 9.1.2"),
        ("run_id:r1", ""),
    ],
)
def test_the_program_is_named_with_its_own_version(text: str, program: str) -> None:
    assert ServerInfo.parse(text).program == program


def test_version_role_mode_and_eviction_policy_are_read() -> None:
    server = info()
    assert (server.version, server.role, server.cluster, server.eviction_policy) == (
        "7.0.15",
        "master",
        False,
        "allkeys-lru",
    )
    assert ServerInfo.parse("cluster_enabled:1").cluster


def test_a_slot_migration_loses_nothing_but_a_promotion_may() -> None:
    cluster = "cluster_enabled:1\r\nrun_id:r2\r\nmaster_repl_offset:5\r\nmaster_replid:"
    assert not ServerInfo.parse(f"{cluster}{OTHER}").replaces(info())
    assert ServerInfo.parse(f"{cluster}{OTHER}\r\nmaster_replid2:{ID}").replaces(info())


def test_a_failover_in_a_shard_may_lose_writes_without_a_common_replication_id() -> None:
    def node(run_id: str, replid: str, *shard: str) -> ServerInfo:
        text = f"cluster_enabled:1\r\nrun_id:{run_id}\r\nmaster_repl_offset:5\r\nmaster_replid:{replid}"
        return replace(ServerInfo.parse(text), shard=frozenset(shard))

    first = node("r1", ID, "a", "b")
    second = node("r2", OTHER, "b")
    assert second.replaces(first)
    third = node("r1", "c" * 40, "a")
    assert third.replaces(second.after(first))
    assert not node("r3", "d" * 40, "c").replaces(third)
