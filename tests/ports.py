"""Loopback ports for the servers that tests start. No two processes of test runs on one machine take the same."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
from collections.abc import Iterator
from functools import cache

_BELOW_EPHEMERAL = range(10_000, 32_000)
"""Linux takes the ports of outgoing connections from 32,768 on, so that none of them takes a server's port first."""

_SHARE = 500


@cache
def _own_ports(_pid: int) -> Iterator[int]:
    """Return the ports of this process, without end. Until its end it holds the one before them, as their lock."""
    for first in _BELOW_EPHEMERAL[::_SHARE]:
        lock = socket.socket()
        try:
            lock.bind(("127.0.0.1", first))
        except OSError:
            lock.close()
            continue
        atexit.register(lock.close)
        return itertools.cycle(range(first + 1, first + _SHARE))
    raise OSError("all ports are taken by other test runs")


def free_port() -> int:
    """Return a port without a listener that no other process of a test run takes."""
    for port in itertools.islice(_own_ports(os.getpid()), _SHARE):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError("no port is free")
