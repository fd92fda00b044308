"""Classification of the errors of Redis: unavailable now, or refused until an operator acts.

Errors are classified by redis-py's classes, since redis-py removes the first word of each reply that has a class
(CLUSTERDOWN, MASTERDOWN, TRYAGAIN, MOVED, NOPERM, LOADING, ...). Only errors without a class are classified by text.
Other packages import the classes that they catch from here.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator

from loguru import logger
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
    "DATABASE_REMEDY",
    "LOGIN_REMEDY",
    "OLD_REMEDY",
    "RIGHTS_REMEDY",
    "TLS_REMEDY",
    "OutOfMemoryError",
    "ReadOnlyError",
    "RedisError",
    "ResponseError",
    "remedy",
    "shown",
    "unavailable",
    "wrong_type",
]

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

_UPSTASH_LIMITS = (
    "capacity quota exceeded",
    "requests limit exceeded",
    "request limit exceeded",
    "max concurrent connections",
)
"""https://upstash.com/docs/redis/troubleshooting: plain ERR replies that mean the plan's end."""

LOGIN_REMEDY = "set the right user and password in REDIS_URL or REDIS_TOKEN"
RIGHTS_REMEDY = "give the user in REDIS_URL the rights to all keys, channels and commands that the queue needs"
OLD_REMEDY = "use Redis 7.0 or newer, or Valkey"
DATABASE_REMEDY = "set the number of a database that exists in REDIS_URL, or leave it out"
TLS_REMEDY = "check the scheme (redis:// or rediss://), the port and ssl_ca_certs in REDIS_URL"

_REMEDIES_BY_TEXT = (
    (("WRONGPASS", "NOAUTH", "invalid username-password"), LOGIN_REMEDY),
    (("The user executing the script", "NOPERM"), RIGHTS_REMEDY),
    (("unknown command", "Unknown Redis command", "unknown subcommand"), f"{OLD_REMEDY}, with no command renamed"),
    (("syntax error",), OLD_REMEDY),
    (("DB index is out of range", "invalid DB index", "SELECT is not allowed in cluster mode"), DATABASE_REMEDY),
)


class ScanRefused(Exception):
    """The user in REDIS_URL may not SCAN. Only searches through all tasks need that right, so it is no outage."""


def unavailable(error: BaseException) -> bool:
    """Return whether the error means that Redis can't be used now, and not that a command was wrong."""
    if isinstance(error, _UNAVAILABLE):
        return True
    if not isinstance(error, ResponseError):
        return False
    if remedy(error) is not None:
        return True
    text = str(error)
    return (
        text.startswith(_UNAVAILABLE_WORDS)
        or any(f"{word} " in text[:120] for word in _UNAVAILABLE_WORDS if word != "BUSY")
        or any(words in text for words in _UPSTASH_LIMITS)
    )


def wrong_type(error: BaseException) -> bool:
    """Return whether a key holds another type than a command needs."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def remedy(error: BaseException) -> str | None:
    """Return what an operator has to do if Redis refuses permanently; None if the error may be temporary."""
    for cause in _causes(error):
        if isinstance(cause, AuthenticationError | AuthorizationError | AuthenticationWrongNumberOfArgsError):
            return LOGIN_REMEDY
        if isinstance(cause, NoPermissionError):
            return RIGHTS_REMEDY
        if isinstance(cause, ssl.SSLCertVerificationError) or "WRONG_VERSION_NUMBER" in str(cause):
            return TLS_REMEDY
        if isinstance(cause, ResponseError):
            text = str(cause)
            for words, text_remedy in _REMEDIES_BY_TEXT:
                if any(word in text for word in words):
                    return text_remedy
    return None


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


REFUSED_S, PARTLY_S = 10.0, 3.0
"""Seconds that a permanent refusal counts, or one of a full or read-only server or a cluster that is down.

Other commands succeed there meanwhile, and must not report Redis as back.
"""


MAX_OUTAGES, OUTAGES_S, LONG_S = 3, 60.0, 5.0
"""Outages that are logged in so many seconds, as where one of several connections is refused now and then.

A further one is logged once it is long.
"""


class Health:
    """Availability of Redis: one log line when it is lost, one with the downtime when it is back.

    A refusal that an operator must fix has a line also if the outage began with another error.

    down_since, back_at: monotonic times when the present outage began, and when the last one ended.
    cause: the last error in one line.
    on_down: called at the begin of an outage with whether Redis refuses commands; else it does not answer.
    """

    def __init__(self) -> None:
        self.down_since: float | None = None
        self.cause = ""
        self._refused_until = -math.inf
        self.back_at = -math.inf
        self.on_down: list[Callable[[bool], None]] = []
        self._back = asyncio.Event()
        self._back.set()
        self._logged_at: deque[float] = deque(maxlen=MAX_OUTAGES)
        self._is_logged = False
        self._unlogged = 0
        self._remedy: str | None = None

    @property
    def refused(self) -> bool:
        """Whether Redis has just refused a command that the queue needs."""
        return self.down_since is not None and time.monotonic() < self._refused_until

    def failed(self, error: BaseException) -> None:
        to_do, now = remedy(error), time.monotonic()
        self.cause = shown(error)
        if to_do is not None or isinstance(error, ResponseError):
            self._refused_until = now + (PARTLY_S if to_do is None else REFUSED_S)
        if begins := self.down_since is None:
            self.down_since, self._is_logged, self._remedy = now, False, None
            self._back.clear()
        is_new = not self._is_logged or (to_do is not None and self._remedy is None)
        if is_new:
            self._log(error, to_do, now)
        if begins:
            for callback in self.on_down:
                callback(self.refused)

    def _log(self, error: BaseException, to_do: str | None, now: float) -> None:
        full = len(self._logged_at) == MAX_OUTAGES and now - self._logged_at[0] < OUTAGES_S
        began_at = self.down_since or now
        if full and not self._is_logged and now - began_at < LONG_S:
            return
        if not self._is_logged:
            self._logged_at.append(now)
        unlogged, self._unlogged = self._unlogged, 0
        self._is_logged, self._remedy = True, to_do
        more = f" ({unlogged} shorter outages before are not in the log)" if unlogged else ""
        logger.warning("Redis can't be used: {}{}{}", shown(error), f"; {to_do}" if to_do else "", more)

    def succeeded(self) -> None:
        if self.down_since is not None and not self.refused:
            if self._is_logged:
                logger.info("Redis is back after {:.1f} s", time.monotonic() - self.down_since)
            else:
                self._unlogged += 1
            self.down_since, self.back_at = None, time.monotonic()
            self._back.set()

    async def wait(self, at_most_s: float) -> None:
        """Wait until Redis is back, or the time is over."""
        if self._back.is_set():
            await asyncio.sleep(at_most_s)
            return
        try:
            async with asyncio.timeout(at_most_s):
                await self._back.wait()
        except TimeoutError:
            return
