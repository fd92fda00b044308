"""Tests of claims that wait for a paused channel, before an attempt and during it."""

from __future__ import annotations

import asyncio

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, Reply, UpstreamLimits
from imagegen.queue.claim import Claim
from imagegen.tasks.retry import ClaimLost, Failed, NotStarted, Retry, Succeeded
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import permit_waiting
from imagegen.worker.circuit_breaker import BreakerConfig
from imagegen.worker.dead_models import DeadModels
from tests.support import eventually
from tests.worker.attempt_steps import stored_checkpoint
from tests.worker.conftest import MakeHarness, WorkerHarness, fault, images, refused

SLOW = BreakerConfig(first_probe_s=60.0, probe_s=60.0)


async def pause(harness: WorkerHarness, model: str = "m", retry_after_s: float = 60.0) -> None:
    """Pause a model by a rate limit of the upstream."""
    turn = harness.pacing.try_acquire(model)
    assert turn is not None
    with turn:
        harness.pacing.failed(turn, fault(429, retry_after_s=retry_after_s), unfinished=None)


async def test_a_waiting_claim_is_pending_with_a_reason_at_no_command(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    began = harness.attempts.clock()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.task(claim.task.id).reason is WaitReason.UPSTREAM_RATE_LIMITED)
    task = harness.task(claim.task.id)
    assert (task.state, task.attempts, task.sequence) == (State.PENDING, 0, task.epoch + 1)
    assert task.retry_at is not None
    assert began + 59.0 < task.retry_at < harness.attempts.clock() + 61.0
    assert await stored_checkpoint(harness, claim) is None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_waiting_claim_starts_at_its_turn(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    await pause(harness, retry_after_s=0.05)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert (claim.task.attempts, claim.task.reason, claim.task.retry_at) == (1, None, None)


async def test_a_lost_claim_ends_its_wait_at_once(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert not harness.pacing.waiters
    assert harness.provider.calls == []


async def test_quiet_leaves_a_waiting_claim_unstarted(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, tempo=SLOW)
    claim = await harness.claim()
    await pause(harness)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    harness.pacing.quiet()
    assert isinstance(await asyncio.wait_for(running, 20), NotStarted)


@pytest.mark.parametrize(
    ("error", "code"), [(fault(429, retry_after_s=60.0), "upstream_rate_limited"), (refused(), "upstream_overloaded")]
)
async def test_the_deadline_ends_a_wait_and_reports_its_reason(
    make_harness: MakeHarness, error: UpstreamError, code: str
) -> None:
    harness = make_harness(pool=False, tempo=SLOW, deadline_s=15.0)
    claim = await harness.claim()
    for _ in range(2):
        if turn := harness.pacing.try_acquire("m"):
            with turn:
                harness.pacing.failed(turn, error, unfinished=None)
    running = asyncio.create_task(harness.run(claim, Failed))
    await eventually(lambda: harness.pacing.waiters)
    await harness.pass_time(15)
    outcome = await asyncio.wait_for(running, 20)
    assert outcome.error.code == code
    assert "within 15 s" in outcome.error.detail
    assert harness.provider.calls == []


async def test_a_pause_during_an_attempt_ends_it_and_preserves_its_images(
    make_harness: MakeHarness,
) -> None:
    async def then_pause(call: Call) -> Reply:
        await pause(harness)
        return images(call.count)

    harness = make_harness(then_pause, per_call=1, pool=False, tempo=SLOW)
    claim, began = await harness.claim(n=2), harness.attempts.clock()
    outcome = await harness.run(claim, Retry)
    assert (outcome.reason, outcome.counts_as_attempt) == (WaitReason.UPSTREAM_RATE_LIMITED, False)
    assert 59.0 - (harness.attempts.clock() - began) < outcome.delay_s < 61.0
    assert len(claim.checkpoint.images) == 1


async def test_a_short_pause_during_an_attempt_is_waited_out(make_harness: MakeHarness) -> None:
    full = images(1, limits=UpstreamLimits(remaining=0, reset_s=0.1))
    harness = make_harness(full, per_call=1, pool=False, tempo=BreakerConfig(step_s=1.0))
    claim = await harness.claim(n=2)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    first, second = harness.provider.times
    assert second - first >= 0.09
    assert claim.checkpoint.starts == 1


async def test_quiet_ends_a_wait_during_an_attempt_without_a_count(make_harness: MakeHarness) -> None:
    harness = make_harness(per_call=1, pool=False, rate_per_min=1)
    claim = await harness.claim(n=2)
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.pacing.waiters)
    assert claim.task.state is State.PROCESSING
    harness.pacing.quiet()
    assert await asyncio.wait_for(running, 20) == Retry(0.0, WaitReason.DRAINING, counts_as_attempt=False)


@pytest.mark.parametrize("has_other", [True, False])
async def test_a_claim_that_waits_for_the_store_goes_to_an_instance_that_can_save_images(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch, has_other: bool
) -> None:
    offered: list[Claim] = []

    def give(_dead: DeadModels, claim: Claim) -> bool:
        offered.append(claim)
        return has_other

    monkeypatch.setattr(permit_waiting, "STORE_CHECK_S", 0.01)
    monkeypatch.setattr(DeadModels, "give", give)
    harness = make_harness(pool=False)
    harness.image_saver.health.mark_failed("the disk is full")
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: len(offered) == (1 if has_other else 3))
    if not has_other:
        harness.image_saver.health.mark_ok()
    outcome = await asyncio.wait_for(running, 10.0)
    assert isinstance(outcome, NotStarted if has_other else Succeeded)
    assert len(harness.provider.calls) == (0 if has_other else 1)
    assert set(offered) == {claim}
