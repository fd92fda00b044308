"""System calls for the files of one folder: in the event loop where they are quick, else in a thread with a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from imagegen.errors import StoreUnavailable
from imagegen.images.disk_watch import DiskWatch, limit_s
from imagegen.images.store import file_threads, in_file_thread

P = ParamSpec("P")
T = TypeVar("T")


class DiskCalls:
    """Calls for files on a disk that `watch` watches. All of them raise StoreUnavailable in place of OSError."""

    def __init__(self, watch: DiskWatch) -> None:
        self._watch = watch

    async def quick(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call of some microseconds in the event loop's own thread: another one would cost a hundred.

        Where the disk may block, as one of a network does while its server is away, another thread makes it.
        """
        if not self._watch.is_quick:
            return await self.repeatable(0, function, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise StoreUnavailable from error

    async def repeatable(self, size_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that may be made again, in a thread. Raises StoreUnavailable also if the disk does not answer.

        size_bytes: of the image that is read.
        """
        if self._watch.hangs:  # nothing more is queued for it
            raise StoreUnavailable
        try:
            return await file_threads.run_within(limit_s(size_bytes), function, *args, **kwargs)
        except OSError as error:
            raise StoreUnavailable from error

    @staticmethod
    async def unlimited(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call in a thread, and wait for its end."""
        try:
            return await in_file_thread(function, *args, **kwargs)
        except OSError as error:
            raise StoreUnavailable from error
