"""Non-blocking stream of the log: lines that a full pipe, terminal or socket does not take are written later.

A process that blocks on the reader of its log, such as a log driver or a terminal after Ctrl-S, serves no client and
renews no lease. Regular files are written at once.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

MAX_WAITING_BYTES = 1024**2
"""Size of the buffer. Further lines are dropped while nothing is read."""

WRITE_BYTES = 4096
"""A pipe that is ready takes this much at once on Linux: https://man7.org/linux/man-pages/man7/pipe.7.html"""

RETRY_S = 0.1


class NonBlockingStream:
    """Text stream on a descriptor that may be full. Methods may be called in any thread.

    on_dropped: called with the number of lines that were dropped, once all others are written.
    """

    def __init__(self, stream: TextIO, on_dropped: Callable[[int], object]) -> None:
        self._stream = stream
        self._number = _without_blocking(stream.fileno())
        self._on_dropped = on_dropped
        self._ready = select.poll()
        self._ready.register(self._number, select.POLLOUT)
        self._waiting = bytearray()
        self._dropped = 0
        self._is_retrying = False
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> None:
        """Take lines, each with its end."""
        data = text.encode(self._stream.encoding or "utf-8", self._stream.errors or "backslashreplace")
        with self._lock:
            if len(self._waiting) + len(data) > MAX_WAITING_BYTES:
                self._dropped += text.count("\n")
            else:
                self._waiting += data

    def flush(self) -> None:
        """Write what the reader takes at once; the event loop tries again later. Raises OSError."""
        self._write_until(time.monotonic())

    def finish(self, within_s: float) -> None:
        """Write what the reader takes within a time, at the end."""
        deadline = time.monotonic() + within_s
        with suppress(OSError):
            self._write_until(deadline)
            self._report_dropped()
            self._write_until(deadline)

    def _write_until(self, deadline: float) -> None:
        with self._lock:
            while self._waiting and self._ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                try:
                    count = os.write(self._number, self._waiting[:WRITE_BYTES])
                except BlockingIOError:
                    break
                except OSError:
                    self._waiting.clear()
                    raise
                del self._waiting[:count]
            if self._waiting or self._dropped:
                self._retry_later()

    def _retry_later(self) -> None:
        if self._is_retrying:
            return
        try:
            asyncio.get_running_loop().call_later(RETRY_S, self._retry)
        except RuntimeError:  # no event loop in this thread: the next line tries again
            return
        self._is_retrying = True

    def _retry(self) -> None:
        self._is_retrying = False
        with suppress(OSError):
            self.flush()
            self._report_dropped()

    def _report_dropped(self) -> None:
        dropped = 0
        with self._lock:
            if not self._waiting:
                dropped, self._dropped = self._dropped, 0
        if dropped:
            self._on_dropped(dropped)


def _without_blocking(number: int) -> int:
    """Return a descriptor of the same terminal that never blocks; the given one if it is no terminal.

    A terminal is ready as soon as it takes one byte. The flag of the given descriptor would be that of the shell, too.
    """
    try:
        return os.open(os.ttyname(number), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return number


def non_blocking(stream: TextIO, on_dropped: Callable[[int], object]) -> TextIO | NonBlockingStream:
    """Return a stream that never blocks: the same one for a regular file, or without a descriptor."""
    try:
        number = stream.fileno()
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):
        return stream
    has_reader = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(number)
    return NonBlockingStream(stream, on_dropped) if has_reader and hasattr(select, "poll") else stream
