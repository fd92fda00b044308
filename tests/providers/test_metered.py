from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import pytest

from imagegen.errors import UpstreamError
from imagegen.metrics import Meter
from imagegen.providers.metered import MeteredProvider
from imagegen.providers.protocol import Call, CallObserver, Reply, WithoutJobs
from imagegen.tasks import validation
from imagegen.tasks.request import GenerationRequest
from tests.emulated_jobs import Recorder
from tests.support import logged, over_rows

CALL = Call(validation.parse({"prompt": "a cat"}, default_model="m", aliases={}), 1)


class FakeProvider(WithoutJobs):
    """Provider that answers without images, or with an error."""

    name = "fake"
    max_images_per_call = 4
    images_inline = True
    own_hosts = frozenset({"here"})
    base_url = None

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.closed = False

    def edits(self, _model: str) -> None:
        """Return None: it takes no input images."""

    async def generate(self, _call: Call, _observer: CallObserver) -> Reply:
        if self.error:
            raise self.error
        return Reply(())

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return request

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return ({"id": "m"},)

    async def check_key(self) -> None:
        """Return None: there is no such request."""

    async def close(self) -> None:
        self.closed = True


def counted(meter: Meter) -> dict[str, int]:
    return {code: histogram.count for code, histogram in meter.calls.items()}


async def test_an_answered_call_is_counted_and_its_reply_passed_on() -> None:
    meter = Meter()
    assert await MeteredProvider(FakeProvider(), meter).generate(CALL, Recorder()) == Reply(())
    assert counted(meter) == {"ok": 1}


@over_rows("ambiguous", [True, False])
async def test_a_failed_call_is_counted_by_its_code(ambiguous: bool) -> None:
    meter = Meter()
    provider = MeteredProvider(FakeProvider(UpstreamError("upstream_timeout", "no", ambiguous=ambiguous)), meter)
    with pytest.raises(UpstreamError):
        await provider.generate(CALL, Recorder())
    assert counted(meter) == {"upstream_timeout": 1}
    assert meter.ambiguous == ambiguous


async def test_a_call_that_is_dropped_is_counted_as_abandoned() -> None:
    meter = Meter()
    with pytest.raises(asyncio.CancelledError):
        await MeteredProvider(FakeProvider(asyncio.CancelledError()), meter).generate(CALL, Recorder())
    assert counted(meter) == {"abandoned": 1}


async def test_other_calls_are_delegated() -> None:
    inner = FakeProvider()
    provider = MeteredProvider(inner, Meter())
    assert (provider.name, provider.max_images_per_call, provider.own_hosts) == ("fake", 4, frozenset({"here"}))
    assert await provider.models() == ({"id": "m"},)
    await provider.close()
    assert inner.closed


async def test_a_rejected_key_is_one_warning_until_a_call_succeeds() -> None:
    with logged() as lines:
        error = UpstreamError(
            "upstream_auth",
            "the operator must act",
            status=401,
            upstream_detail=f"Invalid API key ({CALL.request.prompt})",
        )
        provider = FakeProvider(error)
        provider.name = "together"
        now = [0.0]
        metered = MeteredProvider(provider, Meter(), clock=lambda: now[0])
        for fault, seconds in ((error, 0.0), (error, 90.0), (None, 91.0), (error, 92.0), (None, 93.0), (error, 100.0)):
            provider.error, now[0] = fault, seconds
            with suppress(UpstreamError):
                await metered.generate(CALL, Recorder())
    refused = "WARNING The provider refuses the key of TOGETHER_API_KEY: Invalid API key ([prompt])\n"
    assert lines == [refused, "INFO The provider accepts the key again\n", refused, lines[1]]


async def test_an_account_without_credit_is_one_warning() -> None:
    with logged() as lines:
        metered = MeteredProvider(FakeProvider(UpstreamError("upstream_billing", "no credit", status=402)), Meter())
        for _ in range(3):
            with suppress(UpstreamError):
                await metered.generate(CALL, Recorder())
    assert len(lines) == 1
    assert lines[0].startswith("WARNING")
