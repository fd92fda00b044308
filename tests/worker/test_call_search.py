"""Calls with a lost answer: their job is searched for at the provider before anything is paid again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.queue.checkpoint import decode_checkpoint
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import Failed, Outcome, Retry, Succeeded
from imagegen.worker.call_routes import Routes
from tests.conftest import Instance, MakeInstance
from tests.emulated_jobs import Recorder
from tests.support import eventually, over_rows
from tests.worker.conftest import ScriptedProvider, images, loss, only_route
from tests.worker.lost_calls import HANDLE, ListingProvider, cut_off, hang, harness_of, taken_over


@pytest.fixture
async def pair(make_instance: MakeInstance) -> tuple[Instance, Instance]:
    return make_instance(), make_instance(start=False)


async def test_a_job_that_is_found_takes_the_place_of_a_call_that_was_cut_off(pair: tuple[Instance, Instance]) -> None:
    one, other = harness_of(pair[0], hang), harness_of(pair[1], found=[HANDLE])
    taken = await taken_over(pair[1], await cut_off(one, seed=5))
    assert (taken.checkpoint.ambiguous_calls, taken.cost.charged, taken.cost.unsure) == (1, 700, 700)
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert (other.provider.resumed, other.provider.calls) == ([HANDLE], [])
    assert (taken.checkpoint.billed_again, taken.cost.charged, taken.cost.unsure) == (0, 700, 0)
    assert pair[1].connection.meter.ambiguous == 0


async def test_the_search_is_for_the_call_as_it_was_sent(pair: tuple[Instance, Instance]) -> None:
    one, other = harness_of(pair[0], images(), hang), harness_of(pair[1], found=[HANDLE])
    refusal = UpstreamError("upstream_invalid_request", "no steps", refused=("steps",), status=400)
    one.provider.steps.insert(0, refusal)
    taken = await taken_over(pair[1], await cut_off(one, calls=3, n=2, seed=5, steps=4))
    assert isinstance(await other.attempts.run(taken), Succeeded)
    ((call, sent_at),) = other.provider.searched
    assert call == one.provider.calls[-1]
    assert (call.seed, call.first_index, call.without) == (6, 1, frozenset({"steps"}))
    assert 0 <= asyncio.get_running_loop().time() - one.provider.times[-1] < 60
    assert taken.checkpoint.started_at == pytest.approx(sent_at, abs=60)


async def test_a_job_that_is_found_is_stored_before_it_is_polled(pair: tuple[Instance, Instance]) -> None:
    one, other = harness_of(pair[0], hang), harness_of(pair[1], found=[HANDLE])
    taken = await taken_over(pair[1], await cut_off(one))
    await other.attempts.run(taken)
    stored = await pair[1].stored(pair[1].keys.checkpoint(taken.task.id))
    run = decode_checkpoint(stored)[1]
    assert run.job is not None
    assert (run.job.handle, run.sent, run.begun_jobs) == (HANDLE, None, ("task_1",))


async def test_a_call_without_a_job_is_repeated_once_and_recorded(pair: tuple[Instance, Instance]) -> None:
    one, other = harness_of(pair[0], hang), harness_of(pair[1])
    taken = await taken_over(pair[1], await cut_off(one))
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert (len(other.provider.searched), len(other.provider.calls)) == (1, 1)
    assert (taken.checkpoint.billed_again, taken.cost.charged, taken.cost.unsure) == (1, 1_400, 700)
    assert pair[1].connection.meter.ambiguous == 1


async def test_a_list_that_can_not_be_read_is_read_again_and_costs_no_attempt(pair: tuple[Instance, Instance]) -> None:
    down = UpstreamError("upstream_overloaded", "busy", retryable=True, status=503)
    one, other = harness_of(pair[0], hang), harness_of(pair[1], found=[down, HANDLE])
    taken = await taken_over(pair[1], await cut_off(one))
    outcome = await other.run(taken, Retry)
    attempts = taken.checkpoint.attempts
    await pair[1].worker_queue.retry(taken, outcome)
    assert taken.checkpoint.attempts == attempts
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert (other.provider.resumed, other.provider.calls) == ([HANDLE], [])


async def test_a_list_that_is_refused_is_no_reason_to_wait(pair: tuple[Instance, Instance]) -> None:
    one = harness_of(pair[0], hang)
    other = harness_of(pair[1], found=[UpstreamError("upstream_auth", "no", status=401)])
    taken = await taken_over(pair[1], await cut_off(one))
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert taken.checkpoint.billed_again == 1


@pytest.mark.parametrize(("found", "kind"), [(HANDLE, Succeeded), (None, Failed)])
async def test_a_task_that_may_not_be_called_for_again_is_searched_for_all_the_same(
    pair: tuple[Instance, Instance], found: JobHandle | None, kind: type[Outcome]
) -> None:
    one, other = harness_of(pair[0], loss(), hang), harness_of(pair[1], found=[found])
    claim = await one.claim()
    await pair[0].worker_queue.retry(claim, await one.run(claim, Retry))
    attempt = asyncio.ensure_future(one.attempts.run(claim))
    await eventually(lambda: len(one.provider.calls) == 2)
    attempt.cancel()
    await asyncio.wait([attempt])
    taken = await taken_over(pair[1], claim)
    assert taken.checkpoint.ambiguous_calls == 2
    assert isinstance(await other.attempts.run(taken), kind)
    assert other.provider.calls == []


async def test_the_next_attempt_searches_for_a_call_that_lost_its_answer(make_instance: MakeInstance) -> None:
    instance = make_instance()
    harness = harness_of(instance, loss(), found=[HANDLE])
    claim = await harness.claim()
    await instance.worker_queue.retry(claim, await harness.run(claim, Retry))
    assert (claim.checkpoint.billed_again, harness.route.counts.spent) == (1, 700)
    assert isinstance(await harness.attempts.run(claim), Succeeded)
    assert harness.route.counts.spent == 700
    assert (len(harness.provider.calls), claim.checkpoint.billed_again, claim.cost.unsure) == (1, 0, 0)


async def test_what_a_key_has_spent_never_falls_when_a_lost_call_is_found(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = make_instance()
    seen: list[int] = []
    harness = harness_of(instance, loss(), found=[HANDLE])

    async def refused(_handle: JobHandle, _watcher: CallObserver) -> Reply:
        seen.append(harness.route.counts.spent)
        raise UpstreamError("content_policy", "no", status=200)

    monkeypatch.setattr(harness.provider, "resume", refused)
    claim = await harness.claim()
    await instance.worker_queue.retry(claim, await harness.run(claim, Retry))
    assert isinstance(await harness.attempts.run(claim), Failed)
    assert (seen, harness.route.counts.spent, claim.cost.charged) == ([700], 700, 0)


async def test_a_call_that_a_shutdown_cut_off_is_searched_for(make_instance: MakeInstance) -> None:
    instance = make_instance()
    harness = harness_of(instance, hang, found=[HANDLE])
    claim = await cut_off(harness)
    await instance.worker_queue.release([claim])
    again = await instance.claim()
    assert isinstance(await harness.attempts.run(again), Succeeded)
    assert (len(harness.provider.calls), harness.provider.resumed) == (1, [HANDLE])
    assert (again.checkpoint.billed_again, again.cost.charged, again.cost.unsure) == (0, 700, 0)
    assert instance.connection.meter.ambiguous == 0


async def found_by_two_keys(*found: JobHandle | Exception) -> JobHandle | None:
    one, other = (only_route(ListingProvider(found=[each])) for each in found)
    request = GenerationRequest(prompt="a", model="m", width=64, height=64, n=1)
    return await replace(one, others=(other,)).find(Call(request, 1), 0.0)


@over_rows(("second", "taken"), [(HANDLE, HANDLE), (JobHandle("scripted", "task_2"), None)])
async def test_a_job_that_several_keys_of_one_account_list_is_one_job(
    second: JobHandle, taken: JobHandle | None
) -> None:
    assert await found_by_two_keys(HANDLE, second) == taken


async def test_a_refused_key_does_not_hide_a_job_that_another_key_lists() -> None:
    refused = UpstreamError("upstream_auth", "401", status=401)
    assert await found_by_two_keys(refused, HANDLE) == HANDLE
    with pytest.raises(UpstreamError, match="busy"):
        await found_by_two_keys(HANDLE, UpstreamError("upstream_overloaded", "busy", retryable=True, status=503))
    with pytest.raises(UpstreamError, match="401"):
        await found_by_two_keys(refused, refused)


@dataclass
class PolledProvider(ScriptedProvider):
    """Provider with polls that fail, or a job that is done."""

    fails: bool = False

    async def resume(self, _handle: JobHandle, observer: CallObserver) -> Reply:
        if self.fails:
            observer.polls_failed(FailedPolls(1))
            raise UpstreamError("upstream_auth", "no", status=401, ambiguous=True)
        return images()


async def test_the_next_key_of_the_account_is_polled_at_once_when_polls_with_one_fail() -> None:
    refused, good = (only_route(PolledProvider(fails=fails)) for fails in (True, False))
    watcher = Recorder()
    assert (await replace(good, others=(refused,)).resume(HANDLE, watcher)).images
    assert watcher.failed == []
    with pytest.raises(UpstreamError, match="no"):
        await replace(refused, others=(refused,)).resume(HANDLE, watcher)
    assert watcher.failed == [FailedPolls(1)]


async def test_a_search_for_the_job_of_an_earlier_call_keeps_no_slot(
    pair: tuple[Instance, Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    async def find(*_: object) -> JobHandle:
        kept.append(taken.occupies_slot)
        return HANDLE

    other = harness_of(pair[1])
    taken = await taken_over(pair[1], await cut_off(harness_of(pair[0], hang)))
    taken.occupies_slot = True
    monkeypatch.setattr(ListingProvider, "find", find)
    assert isinstance(await other.attempts.run(taken), Succeeded)
    assert kept == [False]


@pytest.mark.parametrize(("found", "code"), [(HANDLE, None), (None, "upstream_timeout")])
async def test_the_last_call_of_a_task_is_searched_for_before_the_task_fails(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, found: JobHandle | None, code: str | None
) -> None:
    monkeypatch.setattr(Routes, "lists_jobs", lambda _self, _channel: True)
    instance = make_instance()
    harness = harness_of(instance, loss(), found=[found], max_attempts=1)
    claim = await harness.claim()
    await instance.worker_queue.retry(claim, await harness.run(claim, Retry))
    outcome = await harness.attempts.run(claim)
    assert (outcome.error.code if isinstance(outcome, Failed) else None) == code
    assert (len(harness.provider.calls), len(harness.provider.resumed)) == (1, int(found is not None))


async def test_a_lost_call_of_a_provider_without_a_list_ends_its_task_at_once(make_instance: MakeInstance) -> None:
    harness = harness_of(make_instance(), loss(), max_attempts=1)
    assert isinstance(await harness.attempts.run(await harness.claim()), Failed)
