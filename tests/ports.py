"""Loopback ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

_BELOW_EPHEMERAL = range(10_000, 32_000)
"""Linux takes the ports of outgoing connections from 32,768 on, so that none of them takes a server's port first."""

_PROCESSES = 8
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
_SHARE = len(_BELOW_EPHEMERAL) // _PROCESSES
_OWN = _BELOW_EPHEMERAL[_PROCESS * _SHARE : (_PROCESS + 1) * _SHARE]
_ports = itertools.cycle(_OWN)


def free_port() -> int:
    """Return a port without a listener that no other process of this test run takes."""
    for port in itertools.islice(_ports, _SHARE):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError("no port is free")
