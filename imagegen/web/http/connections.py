"""Registry of the open client connections: bounded below the limit of descriptors, idle ones closed first."""

from __future__ import annotations

import asyncio
import errno
import resource
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from fcntl import ioctl
from itertools import islice
from termios import FIONREAD
from typing import Protocol

from loguru import logger

from imagegen.line_limit import LineLimit

MAX_CONNECTIONS = 10_000
"""A connection takes about 15 KB."""

RESERVED_DESCRIPTORS = 160
"""For Redis, images on the disk, image links (100) and webhooks; on top of it come those of the upstream calls."""

DESCRIPTORS_PER_SLOT = 3
IDLE_S = 15.0
"""How long a connection may stay open without the first byte of a request."""

SPARED_S, SPARED_PER_S = 0.05, 10_000
"""Age under which a connection without a request is spared: its request may be on its way.

At most as many are spared as come within that time at this rate, so that a flood of them keeps no place for longer.
"""

MAX_LOOKS = 8
"""Connections that are looked at for bytes that wait. If all have some, the next turn of the event loop reads them."""

QUIET_S = 60.0
"""A shortage is logged again after this time without one."""

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Why the system refuses another socket though nothing is wrong with the client's."""

_OPEN_MAX = 65_536


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, _OPEN_MAX, 10_240):  # macOS: the hard limit is infinite, and more than OPEN_MAX is refused
        if wanted != resource.RLIM_INFINITY and soft < wanted:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                break
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_MAX if soft == resource.RLIM_INFINITY else soft


def connection_cap(descriptors: int, slots: int) -> int:
    """Return how many clients may be connected, so that the service itself always has descriptors left.

    Args:
        descriptors: the limit of open descriptors of this process.
        slots: upstream calls at once.
    """
    reserve = max(RESERVED_DESCRIPTORS + DESCRIPTORS_PER_SLOT * slots, descriptors // 4)
    return min(max(descriptors - reserve, descriptors // 4, 1), MAX_CONNECTIONS)


class Outage:
    """Moment when something went wrong last: an outage is logged at its beginning, not with each of its events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = -QUIET_S

    def begins(self) -> bool:
        """Note an event; return whether it is the first one after `QUIET_S` without any."""
        now = self._clock()
        begins = now - self._at >= QUIET_S
        self._at = now
        return begins


class ClientConnection(Protocol):
    """A connection as the registry sees it. address: of the client, without its port."""

    @property
    def address(self) -> str: ...

    @property
    def idle(self) -> bool:
        """Return whether no request is being received or answered."""
        ...

    @property
    def has_unread(self) -> bool:
        """Return whether bytes came that the event loop has not looked at yet."""
        ...

    @property
    def receiving(self) -> bool:
        """Return whether the rest of a request's body is to come."""
        ...

    @property
    def resumable(self) -> bool:
        """Return whether its client continues after a reconnect where the response broke off."""
        ...

    @property
    def waiting(self) -> bool:
        """Return whether its client waits for a change, and repeats its request if it is answered before."""
        ...

    def end_wait(self) -> None:
        """Answer the client that waits, and close the connection."""
        ...

    @property
    def head_begun(self) -> bool:
        """Return whether a part of a request's head came; it has its own time limit."""
        ...

    def force_close(self) -> None: ...


class Connections:
    """The open connections of all listening sockets; at `cap`, a new one takes the place of an idle one.

    refused: limit of the lines about requests that are no HTTP.
    long_readers: connections with large bodies on their way, of which much is read at once.
    """

    def __init__(self, cap: int, *, idle_s: float = IDLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.cap = cap
        self.long_readers = 0
        self._idle_s = idle_s
        self._clock = clock
        self._open: dict[ClientConnection, None] = {}
        self._unused: dict[ClientConnection, float] = {}
        self._unused_by: dict[str, dict[ClientConnection, None]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._shortage = Outage(clock)
        self.slow_heads = Outage(clock)
        self.refused = LineLimit(lambda name, count: logger.info("Refused {} more such requests: {}", count, name))

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: ClientConnection) -> None:
        """Register a connection that was just made."""
        self._open[connection] = None
        self._unused[connection] = self._clock()
        self._unused_by.setdefault(connection.address, {})[connection] = None
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._idle_s, self._close_idle)

    def use(self, connection: ClientConnection) -> None:
        """Note that the first request of a connection came."""
        if self._unused.pop(connection, None) is not None:
            same = self._unused_by[connection.address]
            del same[connection]
            if not same:
                del self._unused_by[connection.address]

    def discard(self, connection: ClientConnection) -> None:
        """Forget a connection that is closed."""
        self.use(connection)
        self._open.pop(connection, None)

    def admit(self, address: str, connecting: int = 0) -> bool | None:
        """Return whether a client may connect; at the cap, close another one if possible.

        None: those that may be closed, or soon will be, have a request that is not read yet; try again in a moment.

        Args:
            address: of the client.
            connecting: connections that were admitted and are not registered yet.
        """
        if len(self._open) + connecting < self.cap:
            return True
        closed = self._close_least_needed(address, spares=True)
        return None if connecting and not closed else closed

    def close_least_needed(self, address: str | None = None) -> bool:
        """Close the connection that is needed least; return False if all of them are needed.

        That is a connection without any request, of the client with most of them, else the oldest idle one, else the
        oldest with an unfinished request, else the oldest event stream, else the oldest long poll, which is answered
        now, all of the client with most connections, else the oldest of a client that holds more than half, unless it
        is `address` itself.
        """
        return bool(self._close_least_needed(address, spares=False))

    def _close_least_needed(self, address: str | None, *, spares: bool) -> bool | None:
        """Close a connection. Return False if all are needed, None if those that are not are spared for now."""
        self._log_shortage()
        if self._unused_by:
            most = max(self._unused_by, key=lambda holder: len(self._unused_by[holder]))
            unused = self._unused_by[most]
            if (victim := self._unspared(unused) if spares else next(iter(unused))) is None:
                return None
        else:
            holders = Counter(connection.address for connection in self._open)
            idle = [connection for connection in self._open if connection.idle]
            are_idle = bool(idle)
            idle = idle or [connection for connection in self._open if connection.receiving]
            idle = idle or [connection for connection in self._open if connection.resumable]
            idle = idle or [connection for connection in self._open if connection.waiting]
            most, count = holders.most_common(1)[0] if holders else ("", 0)
            if idle:
                highest = max(holders[connection.address] for connection in idle)
                oldest = (connection for connection in idle if holders[connection.address] == highest)
                if (victim := _without_unread(oldest) if spares and are_idle else next(oldest)) is None:
                    return None
            elif address not in (None, most) and count > self.cap // 2:
                victim = next(connection for connection in self._open if connection.address == most)
            else:
                return False
        self.discard(victim)
        if victim.waiting:
            victim.end_wait()
        else:
            victim.force_close()
        return True

    def _unspared(self, unused: Iterable[ClientConnection]) -> ClientConnection | None:
        """Return the oldest of a client's connections without a request whose request can't be on its way."""
        spared_s = min(SPARED_S, len(self._unused) / SPARED_PER_S)
        oldest = next(iter(unused))
        return None if self._clock() - self._unused[oldest] < spared_s else _without_unread(unused)

    def close(self) -> None:
        """Stop the timer, and close the connections that were never used."""
        for connection in list(self._unused):
            self.discard(connection)
            connection.force_close()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _close_idle(self) -> None:
        """Close connections that were opened long ago and never used."""
        self._sweep, now = None, self._clock()
        opened_before = now - self._idle_s + 0.01
        old = []
        for connection, opened_at in self._unused.items():
            if opened_at > opened_before:
                break
            old.append(connection)
        for connection in old:
            if not connection.head_begun:
                self.discard(connection)
                connection.force_close()
        if self._unused:
            first = next((at for at in self._unused.values() if at > opened_before), now)
            delay_s = max(first + self._idle_s - now, self._idle_s / 4)
            self._sweep = asyncio.get_running_loop().call_later(delay_s, self._close_idle)

    def _log_shortage(self) -> None:
        if self._shortage.begins():
            logger.warning(
                "All {} client connections are taken ({} without a request): the idle ones are closed for new clients",
                len(self._open),
                len(self._unused),
            )


def _without_unread(connections: Iterable[ClientConnection]) -> ClientConnection | None:
    """Return the first of the connections of which the event loop has read all that came, None if there is none."""
    return next((each for each in islice(connections, MAX_LOOKS) if not each.has_unread), None)


def has_bytes_waiting(descriptor: int) -> bool:
    """Return whether a socket has bytes to be read."""
    count = array("i", [0])
    try:
        ioctl(descriptor, FIONREAD, count)
    except OSError:
        return False
    return count[0] > 0
