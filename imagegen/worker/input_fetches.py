"""Fetches of the input images of tasks, which go on while their tasks wait without a slot for a slow host."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loguru import logger

from imagegen.errors import forget_frames
from imagegen.images.store import VerifiedImage

SLOT_WAIT_S = 1.0
"""How long a task waits in its slot for its input images. Ten tasks with links to a host that never answers would hold
the five slots of a service for a minute, and each further ten again."""

MIN_RETRY_S, MAX_RETRY_S = 0.5, 5.0
"""Delay until a task that waits without a slot looks for its images: half of the fetch's age within these bounds."""

MAX_SLOW = 64
"""Fetches of tasks that wait without a slot; a further task waits in its slot."""

KEPT_S = 300.0
"""How long images are kept that no attempt takes: the task may wait for a slot, or may have been cancelled."""

LOOK_S = 1.0
"""Interval of the looks whether the task of a fetch, which waits without a slot, was cancelled or taken over."""

TASK_NAME = "input-fetch"

Images = Sequence[VerifiedImage]


class SlowInputs(Exception):
    """The input images did not come in time: the attempt gives its slot up for `delay_s`."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(delay_s)
        self.delay_s = delay_s


@dataclass(eq=False, slots=True)
class _Fetch:
    """Fetch of the images of one task.

    discard: forgets an image. is_wanted: returns whether the task may still take the images. gave_slot_up: whether it
    waits without a slot. timer: ends the fetch if it is not wanted any more; kept_until_s: latest loop time for that.
    """

    running: asyncio.Task[Images]
    discard: Callable[[VerifiedImage], None]
    is_wanted: Callable[[], bool]
    began_at_s: float
    kept_until_s: float = math.inf
    gave_slot_up: bool = False
    timer: asyncio.TimerHandle | None = None


class InputFetches:
    """Fetches that are under way or not taken yet, by their task and its links."""

    def __init__(self) -> None:
        self._fetches: dict[tuple[str, ...], _Fetch] = {}

    async def images(
        self,
        key: tuple[str, ...],
        fetch_all: Callable[[], Coroutine[Any, Any, Images]],
        discard: Callable[[VerifiedImage], None],
        is_wanted: Callable[[], bool],
    ) -> Images:
        """Return the images of a task, which are the caller's from then on.

        Args:
            key: the task's id and its links.
            fetch_all: fetches the images, unless that was begun before.
            discard: forgets an image, without blocking.
            is_wanted: returns whether the task may still take the images.

        Raises SlowInputs, and what `fetch_all` raises.
        """
        loop, patience_s = asyncio.get_running_loop(), 0.0
        if (fetch := self._fetches.get(key)) is None:
            running, patience_s = loop.create_task(fetch_all(), name=TASK_NAME), SLOT_WAIT_S
            fetch = self._fetches[key] = _Fetch(running, discard, is_wanted, loop.time())
            fetch.running.add_done_callback(partial(self._ended, key, fetch))
        try:
            await asyncio.wait([fetch.running], timeout=patience_s)
            if not fetch.running.done():
                if fetch.gave_slot_up or sum(each.gave_slot_up for each in self._fetches.values()) < MAX_SLOW:
                    fetch.gave_slot_up, fetch.is_wanted = True, is_wanted
                    self._look_later(key, fetch)
                    raise SlowInputs(min(max((loop.time() - fetch.began_at_s) / 2, MIN_RETRY_S), MAX_RETRY_S))
                await asyncio.wait([fetch.running])
        except asyncio.CancelledError:
            self._end(key, fetch)
            raise
        self._pop(key, fetch)
        return fetch.running.result()

    async def close(self) -> None:
        """End all fetches, and forget the images that were not taken."""
        fetches = list(self._fetches.items())
        for _, fetch in fetches:
            fetch.running.cancel()
        await asyncio.gather(*(fetch.running for _, fetch in fetches), return_exceptions=True)
        for key, fetch in fetches:
            self._forget(key, fetch)

    def _ended(self, key: tuple[str, ...], fetch: _Fetch, running: asyncio.Task[Images]) -> None:
        if running.cancelled():
            self._forget(key, fetch)
            return
        if error := running.exception():
            forget_frames(error)
        fetch.kept_until_s = asyncio.get_running_loop().time() + KEPT_S
        self._look_later(key, fetch)

    def _look_later(self, key: tuple[str, ...], fetch: _Fetch) -> None:
        if fetch.timer is not None:
            fetch.timer.cancel()
        fetch.timer = asyncio.get_running_loop().call_later(LOOK_S, self._look, key, fetch)

    def _look(self, key: tuple[str, ...], fetch: _Fetch) -> None:
        if fetch.is_wanted() and asyncio.get_running_loop().time() < fetch.kept_until_s:
            self._look_later(key, fetch)
        else:
            self._end(key, fetch)

    def _end(self, key: tuple[str, ...], fetch: _Fetch) -> None:
        """End a fetch that is not wanted, without its images."""
        if fetch.running.cancel():
            self._pop(key, fetch)  # the task's next attempt may come before this fetch has ended
        else:
            self._forget(key, fetch)

    def _forget(self, key: tuple[str, ...], fetch: _Fetch) -> None:
        """Forget a fetch that has ended, and discard its images."""
        if not self._pop(key, fetch) or fetch.running.cancelled() or fetch.running.exception() is not None:
            return
        logger.bind(taskId=key[0]).debug("Fetched input images were not taken")
        for image in fetch.running.result():
            fetch.discard(image)

    def _pop(self, key: tuple[str, ...], fetch: _Fetch) -> bool:
        """Take a fetch out, and return whether it was there: no other one of the same task."""
        if fetch.timer is not None:
            fetch.timer.cancel()
        is_there = self._fetches.get(key) is fetch
        if is_there:
            del self._fetches[key]
        return is_there
