"""Check at the start that Redis can run all commands of the queue: one message for errors that last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from loguru import logger

from imagegen.errors import SettingsError
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.redis_errors import (
    CERTIFICATE_REMEDY,
    OLD_REMEDY,
    RIGHTS_REMEDY,
    ReadOnlyError,
    RedisError,
    ResponseError,
    remedy,
    shown,
    unavailable,
)
from imagegen.redis_client.server_info import eviction_warning

KINDS = ("stream", "text", "set", "list")

COMMANDS = 58
"""Commands that the script runs, with its own call, EVAL, and those that are sent alone."""


async def check_server(connection: Connection, prefix: str) -> None:
    """Try all commands once, on keys that are deleted right after. The rights to all other keys are tried too.

    A script may run only if the user has the rights to all keys in its arguments, also to those that it does not use.

    Raises SettingsError for errors that last: a wrong login, missing rights or commands, a server that is too old, a
    read-only replica. If Redis is unreachable, full or loading, or its certificate is not valid now, each caller waits
    for it later.
    """
    keys = Keys(prefix)
    stream = keys.probe("stream")
    alone = (  # on a key that is not there, so that nothing is written
        ("XGROUP", "DELCONSUMER", stream, "g", "c"),
        ("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "STREAMS", stream, ">"),
    )
    try:
        failed = await _probe(connection, keys, alone)
        await connection.ping()
    except (RedisError, OSError, TimeoutError) as error:
        await _judge(connection, prefix, error)
        return
    connection.meter.redis_commands_sent("other", COMMANDS)
    refused = [(command.decode(), text.decode(errors="replace")) for command, text in failed]
    if message := _refusal(connection, prefix, refused):
        raise SettingsError(message)
    replies = [ResponseError(text) for _, text in refused]
    if temporary := next(filter(unavailable, replies), None):
        connection.health.failed(temporary)
    _warn(connection)


async def _probe(connection: Connection, keys: Keys, alone: Iterable[Sequence[str | int]]) -> list[list[bytes]]:
    """Return the commands that failed, with their errors; try without the key that can be spared if one is refused.

    Raises RedisError, OSError.
    """
    script, probes, user = load_script(__package__, "command_check"), map(keys.probe, KINDS), connection.servers.user
    all_keys = [*probes, *keys.needed]
    try:
        return cast(list[list[bytes]], await connection.probe(script, all_keys, alone))
    except ResponseError as error:
        if remedy(error) != RIGHTS_REMEDY or _KEY not in str(error):
            raise
        spared, pattern = keys.spared, f"{keys.spared[:-1]}*"
        failed = await connection.probe(script, [key for key in all_keys if key != spared], alone)
        logger.warning(
            "REDIS_URL: user {} of Redis may not use the keys {}, so a call that may be paid twice is recorded twice "
            "if the connection breaks meanwhile; allow it: ACL SETUSER {} ~{}",
            *(user, pattern, user, pattern),
        )
        return cast(list[list[bytes]], failed)


async def _judge(connection: Connection, prefix: str, error: Exception) -> None:
    """Raise SettingsError if an error of the whole probe will last."""
    if isinstance(error, ReadOnlyError) and connection.servers.sentinel_service is None:
        raise SettingsError(_read_only()) from error
    is_unanswered = unavailable(error) and not isinstance(error, ResponseError)
    if is_unanswered and (fault := await connection.servers.wrong_scheme()) is not None:
        raise SettingsError(f"REDIS_URL: {fault}") from error
    to_do = remedy(error)
    if to_do == RIGHTS_REMEDY:
        what = f"use all keys {{{prefix}}}:*" if _KEY in str(error) else "do what the queue needs"
        fault = f"user {connection.servers.user} of Redis may not {what} ({shown(error)})"
        raise SettingsError(f"REDIS_URL: {fault}. {_grant(connection, prefix)}") from error
    if to_do not in (None, CERTIFICATE_REMEDY):
        raise SettingsError(f"REDIS_URL, REDIS_TOKEN: Redis refuses ({shown(error)}): {to_do}") from error
    if (unknown := await _unknown_service(connection)) is not None:
        raise SettingsError(f"REDIS_URL: {unknown}; set the name of the service there") from error
    if not unavailable(error):
        raise SettingsError(f"REDIS_URL: Redis can't run the scripts of the queue ({shown(error)})") from error
    connection.health.failed(error)


async def _unknown_service(connection: Connection) -> str | None:
    if connection.servers.sentinel_service is None:
        return None
    return await connection.servers.unknown_service()


_KEY = "access"
"""Word of the refusals of a key: `no permissions to access one of the keys`, `No permissions to access a key`."""

_KINDS = (
    ("read-only", ("READONLY", "read only replica")),
    ("keys", ("at least one of the keys", "No permissions to access a key")),
    ("denied", ("The user executing the script", "NOPERM", "no permissions")),
    ("unknown", ("nknown command", "nknown Redis command", "nknown subcommand")),
    ("old", ("syntax error",)),
)
"""Errors of commands within a script, which have no class."""


def _refusal(connection: Connection, prefix: str, failed: Iterable[tuple[str, str]]) -> str | None:
    """Return the one message for the commands that failed; None if no failure lasts."""
    commands: dict[str, list[str]] = {}
    for command, text in failed:
        kind = next((kind for kind, words in _KINDS if any(word in text for word in words)), "passing")
        commands.setdefault(kind, []).append(command)
    user, grant = connection.servers.user, _grant(connection, prefix)
    if "read-only" in commands:
        return None if connection.servers.sentinel_service is not None else _read_only()
    if "old" in commands:
        version = f" {connection.server.version}" if connection.server else ""
        return f"REDIS_URL: this Redis{version} is too old: {OLD_REMEDY}"
    if unknown := commands.get("unknown"):
        return f"REDIS_URL: this Redis lacks {_listed(unknown)}: {OLD_REMEDY}, with no command renamed"
    if denied := commands.get("denied"):
        return f"REDIS_URL: user {user} of Redis may not run {_listed(denied)}. {grant}"
    if "keys" in commands:
        return f"REDIS_URL, REDIS_PREFIX: user {user} of Redis may not use the keys {{{prefix}}}:*. {grant}"
    return None


def _read_only() -> str:
    return (
        "REDIS_URL: this Redis is a read-only replica, or is reached with a read-only login; set the address of its "
        "master, or redis+sentinel://HOST:PORT/SERVICE"
    )


def _grant(connection: Connection, prefix: str) -> str:
    pattern = Keys(prefix).all
    return f"Allow it: ACL SETUSER {connection.servers.user} ~{pattern} &{pattern} +@all -@dangerous +info"


def _listed(commands: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(commands))


def _warn(connection: Connection) -> None:
    """Log what the server, or the rights of the user, can cost later."""
    user, server = connection.servers.user, connection.server
    if server is None:
        logger.warning(
            "REDIS_URL: user {} of Redis may not run INFO, so what a failover loses is not written back; "
            "allow it: ACL SETUSER {} +info, and do not rename it",
            *(user, user),
        )
    elif server.cluster and not server.shard:
        logger.warning(
            "REDIS_URL: user {} of Redis may not run CLUSTER SLOTS, so no other node of the cluster is found when one "
            "fails; allow it: ACL SETUSER {} +cluster|slots",
            *(user, user),
        )
    elif warning := eviction_warning(server.eviction_policy):
        logger.warning("REDIS_URL: {}", warning)
