"""Which calls of a lost claim must be recorded, since the instance that has the task now can't know of them."""

from __future__ import annotations

from unittest.mock import AsyncMock, Mock

import pytest
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.lost_claims import LostClaims, uncounted_calls
from imagegen.tasks.image import StoredImage
from imagegen.tasks.provider_job import AcceptedJob, JobHandle, SentCall
from imagegen.tasks.task import State, Task
from tests.support import over_rows

pytestmark = pytest.mark.unit

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
JOB = AcceptedJob(JobHandle("service", "7"), (0,))
OURS = Checkpoint("us", starts=1, attempts=1)
THEIRS = Checkpoint("them", starts=1, attempts=1)
LOST_ONE = replace(OURS, ambiguous_calls=1)
POLLS = replace(OURS, job=JOB, begun_jobs=("7",))
COLLECTED = replace(OURS, begun_jobs=("7",))
TASK = Task("a" * 32, 1, 1, "d" * 32, "m", b'{"prompt":"p"}', 1.0, State.PROCESSING)


@over_rows(
    ("ours", "state", "theirs", "count"),
    [
        pytest.param(OURS, State.PROCESSING, THEIRS, 1, id="they began without our checkpoint"),
        pytest.param(LOST_ONE, State.PROCESSING, replace(THEIRS, ambiguous_calls=1), 2, id="they know the first call"),
        pytest.param(OURS, State.PROCESSING, replace(THEIRS, ambiguous_calls=1), 0, id="they counted our call"),
        pytest.param(OURS, State.PROCESSING, None, 1, id="they have the claim, and no checkpoint of it"),
        pytest.param(OURS, State.COMPLETED, replace(THEIRS, starts=2), 0, id="they continued, and completed it"),
        pytest.param(OURS, State.COMPLETED, THEIRS, 1, id="they completed it without our checkpoint"),
        pytest.param(OURS, State.COMPLETED, OURS, 1, id="its result of another server was written back"),
        pytest.param(LOST_ONE, State.COMPLETED, None, 1, id="a call that we counted completed it"),
        pytest.param(OURS, State.CANCELLED, OURS, 0, id="it was cancelled"),
        pytest.param(OURS, State.PROCESSING, OURS, 0, id="only our checkpoint is known"),
        pytest.param(POLLS, State.PROCESSING, THEIRS, 1, id="they do not know our job"),
        pytest.param(POLLS, State.PROCESSING, replace(THEIRS, begun_jobs=("7",)), 0, id="they poll our job"),
        pytest.param(COLLECTED, State.PROCESSING, THEIRS, 1, id="they do not know the job that we have collected"),
        pytest.param(COLLECTED, State.PROCESSING, replace(THEIRS, begun_jobs=("7",)), 0, id="they collect it too"),
    ],
)
def test_a_call_is_recorded_unless_the_other_instance_counted_it(
    ours: Checkpoint, state: State, theirs: Checkpoint | None, count: int
) -> None:
    assert uncounted_calls(ours, replace(TASK, state=state), theirs) == count


@over_rows(
    ("saved", "found", "started_at", "count"),
    [
        pytest.param(IMAGE, IMAGE, None, 0, id="they found it in the store"),
        pytest.param(IMAGE, IMAGE, 5.0, 1, id="they made the same one"),
        pytest.param(IMAGE, replace(IMAGE, sha256="b" * 64), None, 1, id="they found another one"),
        pytest.param(replace(IMAGE, reused=True), IMAGE, None, 1, id="ours was reused, and not of our call"),
    ],
)
def test_a_call_is_not_recorded_if_its_saved_image_completed_the_task(
    saved: StoredImage, found: StoredImage, started_at: float | None, count: int
) -> None:
    completed = replace(TASK, state=State.COMPLETED, images=(found,), started_at=started_at)
    assert uncounted_calls(replace(OURS, images=(saved,)), completed, None) == count


def test_a_further_call_is_recorded_if_the_images_before_it_completed_the_task() -> None:
    completed = replace(TASK, state=State.COMPLETED, images=(IMAGE,), started_at=None)
    ours = replace(OURS, images=(IMAGE,), sent=SentCall((1,), None, "m", 1.0, 700))
    assert uncounted_calls(ours, completed, None) == 1


async def test_a_parked_call_is_recorded_after_an_outage_without_its_claim() -> None:
    verbs, dispatcher = Mock(), Mock()
    verbs.read = AsyncMock(side_effect=[QueueUnavailable, (None, None, None)])
    lost_claims, claim = (
        LostClaims(verbs, dispatcher, Mock()),
        Mock(lost=False, recorded=False, task=TASK, checkpoint=POLLS),
    )
    with pytest.raises(QueueUnavailable):
        await lost_claims.abandon([claim])
    await lost_claims.abandon([])
    assert [call.args for call in verbs.read.await_args_list] == [(TASK.id,), (TASK.id,)]
    dispatcher.abandon.assert_called_once_with(claim)
