"""Faults of a scripted provider, and steps around an attempt that the pool makes otherwise."""

from __future__ import annotations

from imagegen.errors import UpstreamError
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.retry import Outcome, Retry
from tests.worker.conftest import WorkerHarness


def no_parameter(name: str) -> UpstreamError:
    return UpstreamError("upstream_invalid_request", f"Unsupported use of '{name}'", refused=(name,), status=400)


async def stored_checkpoint(harness: WorkerHarness, claim: Claim) -> Checkpoint | None:
    (value,) = await harness.instance.verbs.read_checkpoints([claim.task.id])
    return None if value is None else decode_checkpoint(value)[1]


async def settled(harness: WorkerHarness, claim: Claim, outcome: Outcome) -> None:
    """Settle the outcome as the pool does; return when the claim is offered again."""
    await harness.pool._report(claim, outcome)
    if isinstance(outcome, Retry):
        assert await harness.instance.claim() is claim
