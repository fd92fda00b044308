"""Tests of the input images of an attempt: opened once, before its first paid call, and at no cost if unusable."""

from __future__ import annotations

import pytest

from imagegen.errors import DownloadFailed, ImageRejected, QueueUnavailable, StoreUnavailable, UpstreamError
from imagegen.providers.protocol import Call, Edits, Reply
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import attempt
from imagegen.worker.inputs import InputOpener
from tests.support import eventually
from tests.worker.conftest import MakeHarness, failure, images
from tests.worker.input_fakes import DATA, LINK, UPLOAD, FakeFetcher, FakeSpool, FakeUploads


def opener(
    uploads: FakeUploads | None = None, fetcher: FakeFetcher | None = None, spool: FakeSpool | None = None
) -> InputOpener:
    return InputOpener(uploads or FakeUploads(), fetcher or FakeFetcher(), spool or FakeSpool())


async def sent_bytes(call: Call) -> dict[str, tuple[str, bytes]]:
    return {source: (image.content_type, await image.read_all()) for source, image in call.inputs.items()}


async def test_links_are_sent_as_links_to_a_provider_that_takes_them(make_harness: MakeHarness) -> None:
    fetcher = FakeFetcher()
    harness = make_harness(inputs=opener(fetcher=fetcher))
    (task,) = await harness.finished(await harness.submit(image_url=LINK, reference_images=[UPLOAD]))
    (call,) = harness.provider.calls
    assert (task.state, fetcher.fetched) == (State.COMPLETED, [])
    assert await sent_bytes(call) == {UPLOAD: ("image/png", DATA)}


async def test_a_link_is_fetched_once_for_all_calls_and_forgotten_at_the_end(make_harness: MakeHarness) -> None:
    fetcher, spool = FakeFetcher(), FakeSpool()
    seen: list[dict[str, tuple[str, bytes]]] = []

    async def answer(call: Call) -> Reply:
        seen.append(await sent_bytes(call))
        return images(call.count)

    harness = make_harness(default=answer, per_call=1, inputs=opener(fetcher=fetcher, spool=spool))
    harness.provider.editable = Edits(mask=True, links=False)
    (task,) = await harness.finished(await harness.submit(image_url=LINK, mask=UPLOAD, n=3))
    expected = {LINK: ("image/webp", DATA), UPLOAD: ("image/png", DATA)}
    assert (task.state, seen) == (State.COMPLETED, [expected] * 3)
    assert (fetcher.fetched, spool.discarded) == ([LINK], 1)


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (ImageRejected("The image's link is dead: x answered 404", lasting=True), False),
        (DownloadFailed("x answered 503"), True),
    ],
)
async def test_a_link_that_cannot_be_fetched_fails_the_task_without_a_call(
    make_harness: MakeHarness, error: Exception, retryable: bool
) -> None:
    harness = make_harness(inputs=opener(fetcher=FakeFetcher(error)))
    harness.provider.editable = Edits(links=False)
    (task,) = await harness.finished(await harness.submit(image_url=LINK))
    assert (task.state, failure(task).retryable, task.attempts) == (State.FAILED, retryable, 0)
    assert failure(task).code == "upstream_invalid_request"
    assert harness.provider.calls == []


async def test_images_that_came_before_a_link_that_fails_are_discarded(make_harness: MakeHarness) -> None:
    spool = FakeSpool()
    fetcher = FakeFetcher(DownloadFailed("x answered 503"), fails_at=2)
    harness = make_harness(inputs=opener(fetcher=fetcher, spool=spool))
    harness.provider.editable = Edits(links=False)
    (task,) = await harness.finished(await harness.submit(image_url=LINK, reference_images=[f"{LINK}?2"]))
    assert (failure(task).code, spool.discarded) == ("upstream_invalid_request", 1)


async def test_an_upload_that_is_gone_fails_the_task_without_a_call(make_harness: MakeHarness) -> None:
    harness = make_harness(inputs=opener(FakeUploads({})))
    (task,) = await harness.finished(await harness.submit(image_url=UPLOAD))
    assert (task.state, failure(task).code, harness.provider.calls) == (State.FAILED, "upstream_invalid_request", [])
    assert "upload it again" in failure(task).detail


async def test_an_edit_waits_for_an_upload_that_cannot_be_read_now(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "UNAVAILABLE_RETRY_S", 0.001)
    uploads = FakeUploads(faults=[StoreUnavailable()] * 40 + [QueueUnavailable()] * 40)
    harness = make_harness(inputs=opener(uploads))
    (task,) = await harness.finished(await harness.submit(image_url=UPLOAD))
    assert (task.state, task.attempts, len(harness.provider.calls)) == (State.COMPLETED, 1, 1)
    assert uploads.faults == []


async def test_an_edit_waits_until_its_store_can_hold_a_linked_image(make_harness: MakeHarness) -> None:
    fetcher = FakeFetcher(StoreUnavailable())
    harness = make_harness(inputs=opener(fetcher=fetcher))
    harness.provider.editable = Edits(links=False)
    harness.image_saver.health.mark_failed("ENOSPC")
    task_id = await harness.submit(image_url=LINK)
    await eventually(lambda: harness.task(task_id).reason is WaitReason.STORE_UNAVAILABLE)
    assert fetcher.fetched == []
    fetcher.error = None
    harness.image_saver.health.mark_ok()
    (task,) = await harness.finished(task_id)
    assert (task.state, fetcher.fetched, len(harness.provider.calls)) == (State.COMPLETED, [LINK], 1)


@pytest.mark.parametrize("name", ["image_url", "image", "mask"])
async def test_an_edit_is_never_made_without_its_images(make_harness: MakeHarness, name: str) -> None:
    refusal = UpstreamError("upstream_invalid_request", f"{name} is not supported", refused=(name,), status=400)
    harness = make_harness(refusal, inputs=opener())
    (task,) = await harness.finished(await harness.submit(image_url=UPLOAD))
    assert (task.state, failure(task).code, len(harness.provider.calls)) == (
        State.FAILED,
        "upstream_invalid_request",
        1,
    )


async def test_an_edit_falls_back_only_to_a_model_that_takes_images(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = UpstreamError("model_not_available", "no such model", status=404)
    harness = make_harness(gone, inputs=opener(), fallback_models=("no-edits", "edits"))
    monkeypatch.setattr(harness.provider, "edits", lambda model: None if model == "no-edits" else Edits())
    (task,) = await harness.finished(await harness.submit(image_url=UPLOAD))
    assert (task.state, harness.provider.models_called) == (State.COMPLETED, ["m", "edits"])
