"""Checks of the shape of replies: a broken proxy or server may answer a command with the reply of another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

from imagegen.redis_client.redis_errors import UnreadableReply, shown

DECODE_ERRORS = (ValueError, TypeError, LookupError, AttributeError)
"""Errors that the decoding of an invalid reply raises."""

_INTEGER, _TEXT, _TEXT_OR_NONE, _LIST, _LIST_OR_NONE = (int,), (bytes,), (bytes, NoneType), (list,), (list, NoneType)

_TYPES: dict[object, tuple[type, ...]] = {
    **dict.fromkeys(("DEL", "UNLINK", "EXISTS", "EXPIRE", "PEXPIREAT", "PUBLISH", "LLEN", "XLEN"), _INTEGER),
    **dict.fromkeys(("HSET", "HDEL", "ZADD", "ZREM", "XACK", "XDEL"), _INTEGER),
    **dict.fromkeys(("PING", "INFO", "RENAME", "XADD", "ZINCRBY"), _TEXT),
    **dict.fromkeys(("GET", "HGET", "SET"), _TEXT_OR_NONE),
    **dict.fromkeys(("MGET", "HGETALL", "HSCAN", "SCAN", "SMEMBERS", "ZRANGE"), _LIST),
    **dict.fromkeys(("XRANGE", "XPENDING", "XCLAIM"), _LIST),
    "XREADGROUP": _LIST_OR_NONE,
}
"""Types of the replies of commands; of scripts and of commands that are not here all are possible."""


def unreadable_reply(commands: Sequence[Sequence[object]], replies: Sequence[Any]) -> UnreadableReply | None:
    """Return an error for the first reply of a wrong type; None if there is none."""
    for command, reply in zip(commands, replies, strict=True):
        types = _TYPES.get(command[0])
        if types is None or isinstance(reply, Exception):
            continue
        if not isinstance(reply, types) or (isinstance(reply, list) and not _has_right_items(command, reply)):
            return UnreadableReply(f"{command[0]} got a reply of type {type(reply).__name__}")
    return None


def _has_right_items(command: Sequence[object], reply: list[Any]) -> bool:
    match command[0]:
        case "MGET":
            return len(reply) == len(command) - 1 and all(item is None or type(item) is bytes for item in reply)
        case "HGETALL" | "SMEMBERS" | "ZRANGE":
            return all(type(item) is bytes for item in reply)
        case "SCAN" | "HSCAN":
            cursor, items = reply if len(reply) == 2 else (None, None)
            return type(cursor) is bytes and type(items) is list and all(type(item) is bytes for item in items)
        case _:
            return True


def items_of(reply: Any, *types: type) -> list[Any]:
    """Return the items of a script's reply. Raises TypeError if it is no list, or if an item is of another type."""
    if type(reply) is not list or not all(isinstance(item, types) for item in reply):
        raise TypeError(f"not a list of {' or '.join(item.__name__ for item in types)}")
    return reply


@contextmanager
def decoding() -> Iterator[None]:
    """Return a context that decodes a reply; it raises UnreadableReply if that fails."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise unreadable(error) from error


def unreadable(error: BaseException) -> UnreadableReply:
    """Return the error for one of `DECODE_ERRORS`."""
    return UnreadableReply(f"a reply can't be read ({shown(error)})")
