"""Processes of tests that end with the process that started them, however that ends: an interrupted run leaves none.

On Linux the kernel kills them. Elsewhere a forked process that tests run in watches a pipe, and services end with the
process that forks them, which reads its channel to the end.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_ON_LINUX = sys.platform == "linux"
_prctl: Callable[[int, int], int] | None = ctypes.CDLL(None).prctl if _ON_LINUX else None

_lifelines: list[int] = []
"""Writing ends of pipes, whose readers learn of the end of this process."""


def fork() -> int:
    """Fork, as `os.fork` does, a process that is killed when the thread that calls this ends."""
    parent = os.getpid()
    reading, writing = (-1, -1) if _prctl else os.pipe()
    if pid := os.fork():
        if not _prctl:
            os.close(reading)
            _lifelines.append(writing)
        return pid
    if _prctl:
        _end_with(parent)
    else:
        os.close(writing)
        threading.Thread(target=_end_after, args=(reading,), daemon=True).start()
    return 0


def end_started_programs() -> None:
    """Let programs that this process starts from its first thread by `subprocess` or asyncio end with it. Linux only.

    The kernel kills them when the *thread* that started them ends, so those of other threads stay as they are.
    """
    if _prctl is None:
        return
    start = subprocess.Popen.__init__

    @functools.wraps(start)
    def start_to_end(self: subprocess.Popen[Any], *args: Any, **options: Any) -> None:
        if options.get("preexec_fn") or threading.current_thread() is not threading.main_thread():
            start(self, *args, **options)
            return
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork of a process with threads; this one makes two system calls before its exec.
            warnings.simplefilter("ignore", DeprecationWarning)
            start(self, *args, **options | {"preexec_fn": functools.partial(_end_with, os.getpid())})

    subprocess.Popen.__init__ = start_to_end  # type: ignore[method-assign]


def _end_with(parent: int) -> None:
    assert _prctl
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended in between
        os._exit(1)


def _end_after(reading: int) -> None:
    """Kill this process when all writing ends of a pipe are closed."""
    os.read(reading, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def find_browser() -> str | None:
    """Return the program of Chromium or Chrome.

    Debian's commands are shell scripts with the browser as their child, which outlives them.
    """
    for name in ("chromium-headless-shell", "chromium", "google-chrome"):
        if path := shutil.which(name):
            program = Path("/usr/lib/chromium", name)
            return str(program) if program.is_file() else path
    return None
