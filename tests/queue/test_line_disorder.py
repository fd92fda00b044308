"""Random submits, cancels, losses and deaths: each task of a line ends once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random

import pytest

from imagegen.tasks import transitions
from imagegen.tasks.task import TaskError
from tests.conftest import Instance, MakeInstance
from tests.queue.line_tasks import finish, is_at_rest, start_soon, submission_of
from tests.support import eventually


class Disorder:
    """Random use of two instances, of which one dies now and then, by clients with more tasks than their windows."""

    def __init__(self, make_instance: MakeInstance, seed: int) -> None:
        self._make_instance = make_instance
        self.random = Random(seed)
        self.instances = [self._make(), self._make()]
        self.starts: Counter[tuple[str, int]] = Counter()
        self.cut_off: set[tuple[str, int]] = set()
        self.accepted: set[str] = set()

    def _make(self) -> Instance:
        return self._make_instance(slots=1, lease_s=0.4)

    async def submit(self) -> None:
        instance, client = self.random.choice(self.instances), self.random.choice("ab")
        names = self.random.sample(range(25), 6)
        for answer in await asyncio.gather(
            *(instance.client_queue.submit(submission_of(client, name)) for name in names)
        ):
            self.accepted.add(answer.task.id)

    async def cancel(self) -> None:
        if self.accepted:
            task_id = self.random.choice(sorted(self.accepted))
            await self.random.choice(self.instances).client_queue.cancel(task_id)

    async def run(self, *, fails: bool = False) -> bool:
        instance = self.random.choice(self.instances)
        claim = await start_soon(instance, 0.05)
        if claim is None:
            return False
        self.starts[claim.task.id, claim.task.epoch] += 1
        if fails:
            error = TaskError("upstream_error", "no", retryable=True)
            await instance.worker_queue.finish(claim, transitions.failed(claim.task, error, now=time.time(), ttl_s=60))
        else:
            await finish(instance, claim)
        return True

    async def kill(self) -> None:
        """Kill an instance, perhaps while it runs a task."""
        killed = self.random.randrange(2)
        claim = await start_soon(self.instances[killed], 0.05) if self.random.random() < 0.5 else None
        if claim is not None:
            self.starts[claim.task.id, claim.task.epoch] += 1
            self.cut_off.add((claim.task.id, claim.task.epoch))
        await self.instances[killed].crash()
        self.instances[killed] = self._make()

    async def are_all_final(self) -> bool:
        await self.run()
        instance = self.instances[0]
        tasks = [await instance.client_queue.read(task_id) for task_id in self.accepted]
        return all(task is not None and task.state.is_final for task in tasks)


@pytest.mark.parametrize("seed", range(3))
async def test_each_task_ends_and_starts_once_in_any_disorder(make_instance: MakeInstance, seed: int) -> None:
    disorder = Disorder(make_instance, seed)
    steps: list[Callable[[], Awaitable[object]]] = [
        disorder.submit,
        disorder.cancel,
        disorder.run,
        disorder.run,
        partial(disorder.run, fails=True),
    ]
    for step in range(60):
        await (disorder.kill() if step in (20, 40) else disorder.random.choice(steps)())
    await eventually(disorder.are_all_final, 30)
    started_twice = {task for task, count in disorder.starts.items() if count > 1}
    assert started_twice <= disorder.cut_off
    await eventually(lambda: is_at_rest(disorder.instances[0]))
