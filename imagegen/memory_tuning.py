"""Settings of Python's garbage collector and of the C library's malloc for a process that serves for long."""

from __future__ import annotations

import ctypes
import gc

KEPT_BYTES = 16 * 1024 * 1024
"""Freed memory at the end of the heap that malloc keeps.

An image of 2 MB passes through buffers of as much in all. Each page of them that was returned to the system costs a
page fault when it is needed again, together 15 % of the image's CPU.
"""

MMAP_BYTES = 4 * 1024 * 1024
"""Larger blocks, such as the bodies of large images, are returned to the system when they are freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def tune_gc() -> None:
    """Exempt what stays anyway, such as modules, from garbage collection, which took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 5, 5)


def tune_malloc() -> bool:
    """Let malloc keep some freed memory; return False if the C library has no such setting (macOS, musl, Windows)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    is_trim_set, is_mmap_set = mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES), mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
    return bool(is_trim_set and is_mmap_set)
