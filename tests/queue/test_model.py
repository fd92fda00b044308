"""The Lua scripts against a small model: Redis and the model agree after any sequence of operations."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from imagegen.queue.claim import Claim, StartResult, take_over_state
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.instance import QueueConfig, QueueInstance, open_queue
from imagegen.redis_client.connection import Connection
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, TaskError
from tests.support import submission

Result = TypeVar("Result")
NAMES = st.sampled_from(["a", "b", "c"])
WHO = st.integers(0, 1)
IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
_numbers = itertools.count()


@dataclass
class ModelTask:
    """A task in the model: the state of its epoch, the claiming instance and the entry."""

    state: State
    epoch: int
    sequence: int
    claimed_by: int | None = None
    entry_id: str = ""


@dataclass(eq=False)
class Held:
    """A claim that an instance holds, perhaps a stale one."""

    name: str
    who: int
    claim: Claim
    epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.epoch = self.claim.task.epoch


class TwoInstances(RuleBasedStateMachine):
    url: str
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        prefix = f"model{next(_numbers)}"
        self.connection = Connection(self.url)
        rules = QueueConfig(prefix, lease_s=30.0, result_ttl_s=60.0, record_life_s=60.0, max_queue=100)
        self.instances = [open_queue(self.connection, rules, instance=f"i{n}") for n in range(2)]
        for instance in self.instances:
            instance.notifier.silent = True  # else a read of a task of the other one waits a second for its greeting
        self.known: dict[str, ModelTask] = {}
        self.run(self.instances[0].verbs.create_group())

    def teardown(self) -> None:
        self.run(self.connection.close())
        self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(coroutine)

    async def stream_length(self) -> int:
        return await self.connection.commands.xlen(self.instances[0].keys.stream)

    def fresh_instance(self, who: int, name: str) -> QueueInstance:
        """Return an instance with an empty cache, so that it reads the task from Redis."""
        instance = self.instances[who]
        instance.task_cache.forget(submission(name).task_id)
        return instance

    @rule(name=NAMES, who=WHO)
    def submit(self, name: str, who: int) -> None:
        answer = self.run(self.fresh_instance(who, name).client_queue.submit(submission(name)))
        known = self.known.get(name)
        if known is None or known.state in (State.FAILED, State.CANCELLED):
            assert answer.cached is CacheResult.MISS
            assert known is None or answer.task.sequence > known.sequence
            self.known[name] = ModelTask(State.PENDING, answer.task.epoch, answer.task.sequence)
        else:
            assert answer.cached is (CacheResult.HIT if known.state is State.COMPLETED else CacheResult.COALESCED)

    @rule(target=held, who=WHO)
    def read(self, who: int) -> MultipleResults[Held]:
        instance = self.instances[who]
        entries = self.run(instance.verbs.read_entries(instance.dispatcher.instance, 1, 0.001))
        unclaimed = {n for n, known in self.known.items() if not known.state.is_final and known.claimed_by is None}
        assert bool(entries) == bool(unclaimed)
        claims, unreadable = instance.dispatcher.hold(entries)
        assert unreadable == []
        return multiple(*[self._hold(claim, who) for claim in claims])

    @rule(target=held, who=WHO)
    def take_over(self, who: int) -> MultipleResults[Held]:
        """Expire all leases of the other instance and take over."""
        instance, other = self.instances[who], self.instances[1 - who]
        rows = [row for row in self.run(instance.verbs.pending_entries()) if row.consumer == other.dispatcher.instance]
        if not rows:
            return multiple()
        entries = self.run(
            instance.verbs.claim_expired(instance.dispatcher.instance, [row.entry_id for row in rows], 0.0)
        )
        assert len(entries) == len(rows)
        for row in rows:  # a renewal found it lost before
            if stale := instance.dispatcher.held.get(row.entry_id):
                instance.dispatcher.forget(stale)
        claims, _ = instance.dispatcher.hold(entries)
        runs = self.run(instance.verbs.read_checkpoints([claim.task.id for claim in claims]))
        for claim, checkpoint in zip(claims, runs, strict=True):
            take_over_state(claim, checkpoint, 0.0, 30.0)
        return multiple(*[self._hold(claim, who) for claim in claims])

    @rule(item=held)
    def start(self, item: Held) -> None:
        known = self.known[item.name]
        live = known.epoch == item.epoch and not known.state.is_final and known.claimed_by == item.who
        came = self.run(self.instances[item.who].worker_queue.start(item.claim))
        if came is StartResult.INHERITED:
            came = self.run(self.instances[item.who].worker_queue.start(item.claim))
        if came is StartResult.STARTED and known.epoch == item.epoch and not known.state.is_final:
            known.state = State.PROCESSING
            known.sequence = max(known.sequence, item.claim.task.sequence)
        if live and not item.claim.lost:
            assert came is StartResult.STARTED

    @rule(item=consumes(held), succeeds=st.booleans())
    def finish(self, item: Held, succeeds: bool) -> None:
        known, now, task = self.known[item.name], time.time(), item.claim.task
        if succeeds:
            final = transitions.completed(task, [IMAGE], [], now=now, ttl_s=60)
        else:
            final = transitions.failed(task, TaskError("upstream_error", "no", retryable=True), now=now, ttl_s=60)
        stored = self.run(self.instances[item.who].worker_queue.finish(item.claim, final))
        if known.epoch == item.epoch and not known.state.is_final:
            assert stored.state is final.state
            assert stored.sequence >= known.sequence
            known.state, known.sequence = final.state, stored.sequence
        elif known.state.is_final:
            assert stored.state is known.state

    @rule(name=NAMES, who=WHO)
    def cancel(self, name: str, who: int) -> None:
        task = self.run(self.fresh_instance(who, name).client_queue.cancel(submission(name).task_id))
        known = self.known.get(name)
        assert (task is None) is (known is None)
        if task is None or known is None:
            return
        if known.state.is_final:
            assert task.state is known.state
        else:
            assert task.state is State.CANCELLED
            assert task.sequence > known.sequence
            known.state, known.sequence = State.CANCELLED, task.sequence

    @rule(item=consumes(held))
    def release(self, item: Held) -> None:
        known = self.known[item.name]
        ours = known.epoch == item.epoch and not known.state.is_final and known.claimed_by == item.who
        self.run(self.instances[item.who].worker_queue.release([item.claim]))
        if ours and not item.claim.lost and known.entry_id == item.claim.entry_id:
            known.state, known.claimed_by, known.entry_id = State.PENDING, None, ""

    @invariant()
    def redis_agrees(self) -> None:
        instance = self.instances[0]
        unfinished = {name: known for name, known in self.known.items() if not known.state.is_final}
        assert self.run(self.stream_length()) == len(unfinished)
        pending = self.run(instance.verbs.pending_entries())
        assert len(pending) == sum(known.claimed_by is not None for known in unfinished.values())
        for name, known in self.known.items():
            task = self.run(instance.client_queue.read(submission(name).task_id))
            assert task is not None
            assert task.epoch == known.epoch
            assert task.state.is_final == known.state.is_final
            if known.state.is_final:
                assert task.state is known.state

    def _hold(self, claim: Claim, who: int) -> Held:
        name = next(n for n in ("a", "b", "c") if submission(n).task_id == claim.task.id)
        known = self.known[name]
        assert not known.state.is_final
        assert known.epoch == claim.task.epoch
        known.claimed_by, known.entry_id = who, claim.entry_id
        return Held(name, who, claim)


@pytest.mark.filterwarnings("ignore:unclosed")
def test_two_instances_and_the_model_agree(redis_url: str) -> None:
    TwoInstances.url = redis_url
    run_state_machine_as_test(
        TwoInstances,
        settings=settings(
            max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
