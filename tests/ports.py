"""Loopback ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from functools import cache

from parallel import PROCESS_NUMBER

_BELOW_EPHEMERAL = range(10_000, 32_000)
"""Linux takes the ports of outgoing connections from 32,768 on, so that none of them takes a server's port first."""

_PROCESSES = 8
_SHARE = len(_BELOW_EPHEMERAL) // _PROCESSES


@cache
def _own_ports() -> Iterator[int]:
    """Return the ports of this process of the test run, without end."""
    process = int(os.environ.get(PROCESS_NUMBER, "0")) % _PROCESSES
    return itertools.cycle(_BELOW_EPHEMERAL[process * _SHARE : (process + 1) * _SHARE])


def free_port() -> int:
    """Return a port without a listener that no other process of this test run takes."""
    for port in itertools.islice(_own_ports(), _SHARE):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError("no port is free")
