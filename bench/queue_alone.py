"""The queue without HTTP and without a provider: this process submits, and loops claim, start and finish."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from msgspec.structs import replace

from imagegen.memory_tuning import tune_gc
from imagegen.queue.claim import StartResult
from imagegen.queue.dispatcher import CLAIMS_PER_SLOT
from imagegen.queue.instance import QueueConfig, QueueInstance, open_queue
from imagegen.redis_client.connection import Connection
from imagegen.tasks import transitions
from imagegen.tasks.cost import Cost
from imagegen.tasks.family import RequestFamily, ReusedImages
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.submission import Submission, TaskIdentity
from imagegen.tasks.task import Task

IN_FLIGHT = 50
WARM_UP = 200
_PICTURE = (StoredImage(0, "image/png", 1, 512, 512, "a" * 64),)
_TTL_S = 600.0
_numbers = itertools.count()
_PRICE_MICRO_USD = 708
_IDENTITY = TaskIdentity("together", "m", {}, None, estimate=lambda _request, _most: Cost(_PRICE_MICRO_USD))


def submissions(count: int) -> list[Submission]:
    """Make distinct submissions, as the service does."""
    one = GenerationRequest(prompt="", model="m", width=512, height=512, n=1)
    return [_IDENTITY.submission(replace(one, prompt=f"{next(_numbers)}"), None) for _ in range(count)]


async def no_images(_task_id: str, _family: RequestFamily, _finished: Sequence[Task]) -> ReusedImages:
    """Return no image to use again."""
    return ReusedImages()


class Work:
    """Work of the loops on a claim: none, or a wait of `takes_s`. started_at: when each task's attempt began."""

    def __init__(self, room: QueueInstance, takes_s: float) -> None:
        self._claims = room.worker_queue
        self.takes_s = takes_s
        self.started_at: dict[str, float] = {}
        self.finished = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    async def loop(self) -> None:
        claims = self._claims
        while (claim := await claims.claim()) is not None:
            if await claims.start(claim) is not StartResult.STARTED:
                raise RuntimeError("a claim was lost")
            self.started_at[claim.task.id] = time.perf_counter()
            if self.takes_s:
                await asyncio.sleep(self.takes_s)
            if claim.cost.slots:  # a budget holds it
                claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.paid(_PRICE_MICRO_USD))
            await claims.finish(claim, transitions.completed(claim.task, _PICTURE, (), now=time.time(), ttl_s=_TTL_S))
            self.finished += 1
            if self.finished >= self._wanted:
                self._reached.set()

    async def until_finished(self, count: int) -> None:
        self._wanted = count
        self._reached.clear()
        while self.finished < count:
            await self._reached.wait()


@asynccontextmanager
async def working(url: str, concurrency: int, takes_s: float = 0.0) -> AsyncIterator[tuple[QueueInstance, Work]]:
    """Run a queue with its background loops and workers, as the service does, and warm it up with 200 tasks."""
    tune_gc()
    connection = Connection(url)
    rules = QueueConfig(f"bench{next(_numbers)}", 30.0, _TTL_S, _TTL_S, max_queue=1_000_000, slots=concurrency)
    room = open_queue(connection, rules, instance="bench")
    work = Work(room, takes_s)
    loops = {asyncio.create_task(loop) for loop in room.loops().values()}
    loops |= {asyncio.create_task(work.loop()) for _ in range(CLAIMS_PER_SLOT * concurrency)}
    try:
        work.takes_s = 0.0
        await asyncio.gather(submit_all(room, submissions(WARM_UP)), work.until_finished(WARM_UP))
        work.finished, work.takes_s = 0, takes_s
        work.started_at.clear()
        yield room, work
    finally:
        while loops:  # again, since a wait_for that is just done swallows a cancel in Python 3.11
            for loop in loops:
                loop.cancel()
            _, loops = await asyncio.wait(loops, timeout=0.1)
        await connection.close()


async def submit_all(room: QueueInstance, wanted: Iterable[Submission]) -> None:
    """Submit all, IN_FLIGHT at once."""
    left = iter(wanted)

    async def submitter() -> None:
        for submission in left:
            await room.client_queue.submit(submission, no_images)

    await asyncio.gather(*(submitter() for _ in range(IN_FLIGHT)))
