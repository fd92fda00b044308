"""Classification of the errors of Redis: unavailable now, or refused until an operator acts.

Errors are classified by redis-py's classes, since redis-py removes the first word of each reply that has a class
(CLUSTERDOWN, MASTERDOWN, TRYAGAIN, MOVED, NOPERM, LOADING, ...). Only errors without a class are classified by text.
Other packages import the classes that they catch from here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from redis.asyncio.connection import DefaultParser
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    ClusterDownError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

__all__ = [
    "CERTIFICATE_REMEDY",
    "DATABASE_REMEDY",
    "LOGIN_REMEDY",
    "OLD_REMEDY",
    "RIGHTS_REMEDY",
    "TLS_REMEDY",
    "InvalidResponse",
    "OtherServer",
    "OutOfMemoryError",
    "ReadOnlyError",
    "RedisError",
    "ResponseError",
    "UnreadableReply",
    "parse_error",
    "remedy",
    "shown",
    "unavailable",
    "wrong_type",
    "wrong_type_ignored",
]


class OtherServer(Exception):
    """Another server answers, which may lack writes: what was to be sent depends on them."""


_UNAVAILABLE = (
    RedisConnectionError,
    RedisTimeoutError,
    OSError,
    TimeoutError,
    InvalidResponse,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
    TryAgainError,
    AskError,
)
_UNAVAILABLE_WORDS = ("MISCONF", "BUSY", "NOREPLICAS", "OOM", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN")
"""First words that redis-py keeps, or that the error of a script contains."""

_FAULTS_OF_COMMANDS = (
    *("WRONGTYPE", "NOGROUP", "BUSYGROUP", "UNBLOCKED", "NOSCRIPT", "BUSYKEY", "Protocol error", "syntax error"),
    *("no such key", "requires the key to exist", "wrong number of arguments", "equal or smaller", "last possible ID"),
    *("not an integer", "not a valid", "out of range", "would overflow", "would produce", "invalid", "Invalid"),
    *("maximum allowed size", "request size", "record size", "key size", "too large", "too big", "must be"),
    *("script", "Lua ", "Write commands are not allowed"),
)
"""Parts of replies that blame a command, its arguments, or the value of its key.

Redis, Valkey and Upstash use them. Any other error without a class comes from a proxy or a service in front of them
("upstream failure", "no available node", a plan's end), and passes.
"""

LOGIN_REMEDY = "set the right user and password in REDIS_URL or REDIS_TOKEN"
RIGHTS_REMEDY = "give the user in REDIS_URL the rights to all keys, channels and commands that the queue needs"
OLD_REMEDY = "use Redis 7.0 or newer, or Valkey"
COMMANDS_REMEDY = f"{OLD_REMEDY}, with no command renamed, and no proxy that refuses some"
DATABASE_REMEDY = "set the number of a database that exists in REDIS_URL, or leave it out"
CERTIFICATE_REMEDY = "renew the certificate of Redis, or correct the clock of this machine"
TLS_REMEDY = "check the scheme (redis:// or rediss://), the port and ssl_ca_certs in REDIS_URL"

_NOT_VALID_NOW = (9, 10)
"""OpenSSL's errors for a certificate that is not valid yet, or has ended. They pass without a change of settings."""

_REMEDIES_BY_TEXT = (
    (("WRONGPASS", "NOAUTH", "invalid username-password"), LOGIN_REMEDY),
    (("The user executing the script", "NOPERM"), RIGHTS_REMEDY),
    (("unknown command", "Unknown Redis command", "unknown subcommand"), COMMANDS_REMEDY),
    (("syntax error",), OLD_REMEDY),
    (("DB index is out of range", "invalid DB index", "SELECT is not allowed in cluster mode"), DATABASE_REMEDY),
)


class UnreadableReply(InvalidResponse):
    """An invalid reply, such as that of another command: its connection can't be used any more."""


class ScanRefused(Exception):
    """The user in REDIS_URL may not SCAN. Only searches through all tasks need that right, so it is no outage."""


def parse_error(text: str) -> Exception:
    """Return redis-py's exception for an error reply. A redirect that redis-py can't parse is a ResponseError."""
    try:
        return cast(Exception, DefaultParser.parse_error(text))  # type: ignore[no-untyped-call]
    except (ValueError, TypeError):
        return ResponseError(text)


def unavailable(error: BaseException) -> bool:
    """Return whether the error means that Redis can't be used now, and not that a command was wrong."""
    if isinstance(error, _UNAVAILABLE):
        return True
    if not isinstance(error, ResponseError):
        return False
    if remedy(error) is not None:
        return True
    text = str(error)
    if text.startswith(tuple(f"{word} " for word in _UNAVAILABLE_WORDS)) or "killed by user" in text:
        return True  # but not BUSYGROUP
    if any(f"{word} " in text[:120] for word in _UNAVAILABLE_WORDS if word != "BUSY"):
        return True
    return type(error) is ResponseError and not any(words in text for words in _FAULTS_OF_COMMANDS)


def wrong_type(error: BaseException) -> bool:
    """Return whether a key holds another type than a command needs."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


@contextmanager
def wrong_type_ignored() -> Iterator[None]:
    """Return a context that ends at a read of a key that holds another type, which counts as missing."""
    try:
        yield
    except ResponseError as error:
        if not wrong_type(error):
            raise


def remedy(error: BaseException) -> str | None:
    """Return what an operator has to do if Redis refuses permanently; None if the error may be temporary."""
    for cause in _causes(error):
        if isinstance(cause, AuthenticationError | AuthorizationError | AuthenticationWrongNumberOfArgsError):
            return LOGIN_REMEDY
        if isinstance(cause, NoPermissionError):
            return RIGHTS_REMEDY
        if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code in _NOT_VALID_NOW:
            return CERTIFICATE_REMEDY
        if isinstance(cause, ssl.SSLCertVerificationError) or "WRONG_VERSION_NUMBER" in str(cause):
            return TLS_REMEDY
        if isinstance(cause, ResponseError):
            text = str(cause)
            for words, text_remedy in _REMEDIES_BY_TEXT:
                if any(word in text for word in words):
                    return text_remedy
    return None


def channel_remedy(error: BaseException, user: str, channel: str) -> str | None:
    """Return what an operator has to do if Redis refuses the channel of the instances; None for another error."""
    return {
        RIGHTS_REMEDY: f"ACL SETUSER {user} &{channel} +publish +subscribe",
        COMMANDS_REMEDY: "rename neither PUBLISH nor SUBSCRIBE, and use no proxy that refuses them",
    }.get(remedy(error) or "")


def shown(error: BaseException) -> str:
    """Return an error as one short line."""
    text = f"{type(error).__name__}: {error}".strip(": ")
    return text.splitlines()[0][:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(5):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
