"""Registry of the open client connections: bounded below the limit of descriptors, idle ones closed first."""

from __future__ import annotations

import asyncio
import errno
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
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

    def admit(self, address: str, connecting: int = 0) -> bool:
        """Return whether a client may connect; at the cap, close another one if possible.

        Args:
            address: of the client.
            connecting: connections that were admitted and are not registered yet.
        """
        return len(self._open) + connecting < self.cap or self.close_least_needed(address)

    def close_least_needed(self, address: str | None = None) -> bool:
        """Close the connection that is needed least; return False if all of them are needed.

        That is a connection without any request, of the client with most of them, else the oldest idle one, else the
        oldest with an unfinished request, else the oldest event stream, else the oldest long poll, which is answered
        now, all of the client with most connections, else the oldest of a client that holds more than half, unless it
        is `address` itself.
        """
        self._log_shortage()
        if self._unused_by:
            most = max(self._unused_by, key=lambda holder: len(self._unused_by[holder]))
            victim = next(iter(self._unused_by[most]))
        else:
            holders = Counter(connection.address for connection in self._open)
            idle = [connection for connection in self._open if connection.idle]
            idle = idle or [connection for connection in self._open if connection.receiving]
            idle = idle or [connection for connection in self._open if connection.resumable]
            idle = idle or [connection for connection in self._open if connection.waiting]
            most, count = holders.most_common(1)[0] if holders else ("", 0)
            if idle:
                victim = max(idle, key=lambda connection: holders[connection.address])
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
