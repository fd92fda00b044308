"""Program `python forked_command.py SOCKET ARGUMENTS…`: what `python ARGUMENTS…` does, by a process that is forked.

`forked.command` returns its command line. It has its own streams, folder and environment, as any program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType


def main() -> int:
    """Let the program run and wait for its end; return its exit code, or end by its signal."""
    address, *arguments = sys.argv[1:]
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(address)
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all else here
    request = json.dumps({"arguments": arguments, "cwd": folder, "env": dict(os.environ)}).encode()
    socket.send_fds(channel, [len(request).to_bytes(4, "big")], [1, 2, 0])
    channel.sendall(request)
    replies = channel.makefile("rb")
    pid = int(replies.readline())

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for stream in range(3):  # the end of a pipe is that of the forked process alone
        os.close(stream)
    code = int(replies.read())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(main())
