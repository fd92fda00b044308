"""Health of an image store: whether it can be written, why not, and one log line for each change."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable

from loguru import logger

from imagegen.formats import certificate_fault

MAX_CAUSE_CHARS = 200
READ_LOG_INTERVAL_S = 60.0


class StoreHealth:
    """State of a store: whether images can be saved, and why not.

    Args:
        name: of the store, for the log.
        consequence: of a failure, for the log.
    """

    def __init__(self, name: str, consequence: str = "no new upstream call starts until they can") -> None:
        self.name = name
        self._consequence = consequence
        self.cause = ""
        self._quiet_until = 0.0
        self._writable = asyncio.Event()
        self._writable.set()
        self._listeners: list[Callable[[bool], None]] = []

    @property
    def writable(self) -> bool:
        """Whether images can be saved, by the last attempts."""
        return self._writable.is_set()

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(writable)` at each change."""
        self._listeners.append(listener)

    async def wait_writable(self) -> None:
        """Wait until images can be saved."""
        await self._writable.wait()

    def mark_failed(self, error: BaseException | str) -> None:
        """Record that images can't be saved. The first failure of an outage is logged."""
        cause = error if isinstance(error, str) else describe(error)
        first = self.writable
        self.cause = cause
        if first:
            self._writable.clear()
            logger.warning("Images can't be saved in {}: {}; {}", self.name, cause, self._consequence)
            self._notify(writable=False)

    def mark_ok(self) -> None:
        """Record that images can be saved."""
        if self.writable:
            return
        cause, self.cause = self.cause, ""
        self._writable.set()
        logger.info("Images can be saved in {} again; the last fault was: {}", self.name, cause)
        self._notify(writable=True)

    def log_failed_read(self, error: BaseException) -> None:
        """Log that an image can't be read, unless nothing can be saved either.

        At most one line in READ_LOG_INTERVAL_S: a bad file may be requested again and again.
        """
        now = time.monotonic()
        if self.writable and now >= self._quiet_until:
            self._quiet_until = now + READ_LOG_INTERVAL_S
            logger.warning("An image can't be read from {}: {}", self.name, describe(error))

    def _notify(self, *, writable: bool) -> None:
        for listener in self._listeners:
            listener(writable)


def describe(error: BaseException) -> str:
    """Return a failure's text with its errno name, without paths, so that failures of several images look the same."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{errno.errorcode.get(error.errno, error.errno)} {os.strerror(error.errno)}"
    if fault := certificate_fault(error):
        return f"TLS certificate refused ({fault})"
    text = f"{type(error).__name__}: {error}".strip(": ")
    return text.splitlines()[0][:MAX_CAUSE_CHARS]
