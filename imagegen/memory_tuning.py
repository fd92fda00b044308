"""Settings of Python's garbage collector and of the C library's malloc for a process that serves for long."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import math
import resource
from contextlib import suppress
from pathlib import Path

KEPT_BYTES = 16 * 1024 * 1024
"""Freed memory at the end of the heap that malloc keeps.

An image of 2 MB passes through buffers of as much in all. Each page of them that was returned to the system costs a
page fault when it is needed again, together 15 % of the image's CPU.
"""

MMAP_BYTES = 4 * 1024 * 1024
"""Larger blocks, such as the bodies of large images, are returned to the system when they are freed."""

RETURNED_BYTES = 16 * 1024 * 1024
"""Freed memory in the midst of the heap that is returned to the system.

malloc itself only returns what is at the end of the heap: one small block there keeps what a burst of requests took.
"""

RETURN_INTERVAL_S = 5.0

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


async def return_freed_memory(interval_s: float = RETURN_INTERVAL_S) -> None:
    """Return freed memory to the system whenever `RETURNED_BYTES` more of it are resident, without end.

    It takes 7 ms of another thread for 200 MiB, and nothing where the C library has no such call (macOS, musl).
    """
    try:
        library = ctypes.CDLL(None)
        trim, read_state = library.malloc_trim, library.mallinfo2
    except (OSError, TypeError, AttributeError):
        await asyncio.Event().wait()
        return
    read_state.restype = _HeapState

    def unused() -> int:
        """Return the resident bytes that malloc has not given out: freed ones, and those of others, such as code."""
        state = read_state()
        return resident_bytes() - int(state.uordblks) - int(state.hblkhd)

    least, in_vain = math.inf, 0
    while True:
        with suppress(OSError, RuntimeError):  # no descriptor or thread is left now, or there is no /proc
            now = unused()
            least = min(least, now)
            if now - least > RETURNED_BYTES:
                await asyncio.to_thread(trim, 0)
                after = unused()
                in_vain = in_vain + 1 if now - after < RETURNED_BYTES // 2 else 0
                if in_vain > 1:  # once may mean that as much was freed meanwhile
                    least, in_vain = after, 0
        await asyncio.sleep(interval_s)


class _HeapState(ctypes.Structure):
    """struct mallinfo2 of malloc.h of glibc. hblkhd, uordblks: bytes given out, in blocks of their own and in heaps."""

    _fields_ = (
        ("first", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("unused", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def resident_bytes() -> int:
    """Return the memory of this process in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
