"""Tests of DashScope's jobs: how they are kept, polled, collected, charged and cancelled."""

from __future__ import annotations

import time

import pytest

from imagegen.emulator.dashscope import DashScopeEmulator
from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.dashscope import DashScopeProvider
from tests.emulated_jobs import Recorder, quick_polls
from tests.providers.conftest import MakeCall, details_of
from tests.providers.dashscope_calls import (
    MESSAGE,
    OLD,
    SYNC,
    MakeProvider,
    emulated_dashscope,
    prompted,
    provider_maker,
)

quick = pytest.fixture(quick_polls)
upstream = pytest.fixture(emulated_dashscope)
make_provider = pytest.fixture(provider_maker)


@pytest.mark.parametrize("model", [OLD, MESSAGE])
async def test_a_job_is_kept_before_its_first_poll_and_any_key_collects_it(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str
) -> None:
    observer = Recorder(lambda: upstream.ledger.jobs[0].polls)
    reply = await make_provider().generate(prompted(make_call, model=model, n=2), observer)
    (handle,) = observer.handles
    assert (observer.noted, handle.provider) == ([0], "dashscope")
    assert "sk-a-key" not in repr(handle)
    assert len(reply.images) == 2
    assert (await make_provider("sk-other").resume(handle, Recorder())).images == reply.images
    sums = upstream.ledger.sums()
    assert (sums["submitted"], sums["charged"], sums["cost_usd"]) == (1, 1, 0.06)


async def test_a_model_that_answers_at_once_begins_no_job(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    observer = Recorder()
    reply = await make_provider().generate(prompted(make_call, model=SYNC), observer)
    assert (len(reply.images), observer.handles) == (1, [])
    usage = details_of(reply).usage
    assert usage is not None
    assert usage["output_image_count"] == 1


async def test_a_partial_job_is_charged_for_what_it_made(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    reply = await make_provider().generate(prompted(make_call, "job end=partial", n=4), Recorder())
    assert len(reply.images) == 3
    assert reply.warnings[0].startswith("1 of 4 images failed")
    assert details_of(reply).usage == {"image_count": 3}
    assert upstream.ledger.sums()["cost_usd"] == 0.09


@pytest.mark.parametrize("switch", ["job unknown_s=0.3", "job polls=3", "job polls=2 poll_fault=429"])
async def test_a_job_is_collected_despite_a_fault_that_passes(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, switch: str
) -> None:
    reply = await make_provider().generate(prompted(make_call, switch), Recorder())
    assert len(reply.images) == 1


@pytest.mark.parametrize("model", [OLD, MESSAGE, SYNC])
@pytest.mark.parametrize(
    ("switch", "code"),
    [
        ("job end=failed", "upstream_error"),
        ("job end=failed code=InvalidParameter", "upstream_invalid_request"),
        ("job end=moderated", "content_policy"),
        ("400", "upstream_invalid_request"),
        ("400_arrearage", "upstream_billing"),
        ("400_model", "model_not_available"),
        ("400_policy", "content_policy"),
        ("401", "upstream_auth"),
        ("403_free", "upstream_billing"),
        ("403_unpurchased", "upstream_auth"),
        ("429", "upstream_rate_limited"),
        ("429_quota", "upstream_rate_limited"),
        ("500", "upstream_error"),
        ("503", "upstream_overloaded"),
        ("200_throttling", "upstream_rate_limited"),
    ],
)
async def test_each_switch_of_the_emulator_has_its_code(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, model: str, switch: str, code: str
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await make_provider().generate(prompted(make_call, switch, model), Recorder())
    assert caught.value.code == code
    assert upstream.ledger.sums()["charged"] == 0


async def test_a_job_that_has_expired_is_forgotten(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_polling, "UNKNOWN_GRACE_S", 0.0)
    with pytest.raises(UpstreamError, match="does not find the job"):
        await make_provider().generate(prompted(make_call, "job end=expired"), Recorder())


async def test_only_a_job_that_waits_is_cancelled(
    make_provider: MakeProvider, make_call: MakeCall, upstream: DashScopeEmulator
) -> None:
    provider, handles = make_provider(), Recorder()
    await upstream_job(upstream, provider, make_call, handles, "job job_s=60 pending=1")
    assert await provider.cancel(handles.handles[0]) is True
    await upstream_job(upstream, provider, make_call, handles, "job job_s=60 pending=0")
    assert await provider.cancel(handles.handles[1]) is False
    sums = upstream.ledger.sums()
    assert (sums["cancelled"], sums["charged"]) == (1, 1)


async def upstream_job(
    upstream: DashScopeEmulator, provider: DashScopeProvider, make_call: MakeCall, observer: Recorder, switch: str
) -> None:
    """Begin a job and leave it."""
    call = prompted(make_call, switch)
    form = provider.submit_form(call)
    answer = await provider._client.submit(form.path, form.fields, observer, form.headers)
    observer.handles.append(provider.handle_of(provider.read_acceptance(answer), time.time()))
