"""Standard streams of a process: its parent may have closed them, or they lead to a full disk or an ended program."""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO


def open_standard_streams() -> None:
    """Open what the parent has closed of descriptors 0, 1 and 2, so that no socket or file becomes one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # noqa: FBT003 - takes no keyword


def flush_standard_streams() -> None:
    """Flush standard output and error; drop what can't be written, which Python would make the exit code 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if the parent closed its descriptor
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def open_null() -> TextIO:
    """Return a stream that drops everything."""
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for the life of the process


def print_line(text: str) -> None:
    """Print a line on stdout, and write it at once. Raises OSError, after which stdout drops everything."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open_null()  # Python would write the rest at the end, fail again, and make that the exit code
        error.filename = "stdout"
        raise


def print_result(text: str) -> None:
    """Print a line on stdout. A reader that is gone, as `head`, is no error. Raises OSError."""
    try:
        print_line(text)
    except BrokenPipeError:
        return
