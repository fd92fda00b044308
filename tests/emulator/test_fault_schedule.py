"""Tests of faults by queue, by the prompt's marker and by default; the ledger records paid calls."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from imagegen.emulator import base_emulator, together_emulator
from imagegen.emulator.fault_schedule import Fault, Trigger, UnknownFault, parse_text
from imagegen.emulator.rate_limit import TokenBucket
from tests.emulator.conftest import Ask
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import Clock

HEADERS = {"Authorization": "Bearer any"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock of the emulator."""
    clock = Clock()
    for module in (base_emulator, together_emulator):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


async def statuses(ask: Ask, count: int, prompt: str = "a cat") -> list[int]:
    return [(await ask(prompt)).status for _ in range(count)]


async def test_queued_faults_apply_in_order_and_then_calls_succeed(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script("500", {"fault": "503", "times": 2}, "ok", "429")
    assert await statuses(ask, 6) == [500, 503, 503, 200, 429, 200]


async def test_a_queued_fault_may_wait_for_its_prompt(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "500", "match": "dog"}, {"fault": "503"})
    assert [(await ask(prompt)).status for prompt in ("a cat", "a cat", "a dog")] == [503, 200, 500]


async def test_a_queued_fault_may_last(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "500", "times": 0})
    assert await statuses(ask, 4) == [500] * 4
    upstream.clear()
    assert await statuses(ask, 1) == [200]


async def test_flapping_fails_every_other_call(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script("flapping")
    assert await statuses(ask, 4) == [500, 200, 500, 200]
    upstream.clear()
    assert await statuses(ask, 4, "{{fault:503 every=3}}") == [503, 200, 200, 503]


async def test_a_storm_ends_at_its_time(ask: Ask, upstream: EmulatedUpstream, clock: Clock) -> None:
    upstream.script({"fault": "storm", "for_s": 0.3})
    assert await statuses(ask, 2) == [429, 429]
    clock.now += 0.29
    assert await statuses(ask, 1) == [429]
    clock.now += 0.01
    assert await statuses(ask, 2) == [200, 200]


def test_a_fault_ends_after_its_time_its_count_or_both() -> None:
    turn = Trigger(Fault("429", {"for_s": 10, "times": 2}), 100.0, default_times=1)
    assert [turn.take(now) for now in (100, 105, 109)] == [True, True, False]
    turn = Trigger(Fault("429", {"for_s": 10}), 100.0, default_times=1)
    assert [turn.take(now) for now in (100, 109.9, 110)] == [True, True, False]


async def test_a_marker_counts_per_prompt(ask: Ask) -> None:
    assert await statuses(ask, 3, "a cat {{fault:500 times=2}}") == [500, 500, 200]
    assert await statuses(ask, 1, "a dog {{fault:500 times=2}}") == [500]


async def test_the_queue_precedes_the_marker(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script("ok")
    assert await statuses(ask, 2, "{{fault:500}}") == [200, 500]


async def test_options_are_read_as_in_a_shell() -> None:
    fault = parse_text("status status=418 delay_s=0.5 body='two words'")
    assert fault == Fault("status", {"status": 418, "delay_s": 0.5, "body": "two words"})
    for text in ("status body", "status body='"):
        with pytest.raises(UnknownFault):
            parse_text(text)


async def test_an_unknown_fault_is_reported(
    ask: Ask, upstream: EmulatedUpstream, session: aiohttp.ClientSession
) -> None:
    for prompt in ("{{fault:nonsense}}", "{{fault:}}", "{{fault:500 times=many}}"):
        response = await ask(prompt)
        assert (response.status, (await response.json())["error"]["message"][:9]) == (400, "emulator:")
    with pytest.raises(UnknownFault, match="nonsense"):
        upstream.script("500", "nonsense")
    async with session.post(upstream.url + "/_emulator/script", data=b'["nonsense"]') as refused:
        assert refused.status == 400
    assert await statuses(ask, 1) == [200]


async def test_the_script_and_the_ledger_are_driven_over_http(
    ask: Ask, upstream: EmulatedUpstream, session: aiohttp.ClientSession
) -> None:
    control = upstream.url + "/_emulator/"
    step = {"fault": "500", "times": 3, "match": "cat"}
    async with session.post(control + "script", json=[step]) as response:
        assert response.status == 204
    assert await statuses(ask, 1) == [500]
    async with session.get(control + "script") as response:
        assert await response.json() == [step]
    async with session.delete(control + "script") as response:
        assert response.status == 204
    assert await statuses(ask, 1) == [200]
    async with session.get(control + "ledger") as response:
        ledger = await response.json()
    assert (ledger["total"], ledger["paid"], ledger["in_flight"], ledger["peak_in_flight"]) == (2, 2, 0, 1)
    assert [call["outcome"] for call in ledger["calls"]] == [500, 200]
    async with session.delete(control + "ledger") as response:
        assert response.status == 204
    assert (upstream.ledger.total, len(upstream.ledger.calls)) == (0, 0)
    async with session.get(control + "faults") as response:
        assert {"hang", "429_model", "image_svg", "flapping"} <= set(await response.json())
    async with session.get(control + "nothing") as response:
        assert response.status == 404


async def test_a_ledger_row_records_the_request(ask: Ask, upstream: EmulatedUpstream) -> None:
    await ask("a cat", n=2, seed=7)
    await ask(seed=7, n=2, prompt="a cat", steps=None)
    await ask("a cat", n=2, seed=8)
    first, second, third = upstream.ledger.matching("cat")
    assert (first.prompt, first.n, first.seed, first.outcome, first.client_there) == ("a cat", 2, 7, 200, True)
    assert first.body["width"] == 64
    assert first.body_hash == second.body_hash != third.body_hash
    assert first.answered_at is not None


async def test_a_call_is_paid_if_it_was_read_and_not_rejected(ask: Ask, upstream: EmulatedUpstream) -> None:
    for prompt in ("{{fault:429}}", "{{fault:422}}", "{{fault:500}}", "{{fault:524}}", "{{fault:empty}}", "a cat"):
        await ask(prompt)
    await ask(headers={})
    paid = [(call.outcome, call.paid) for call in upstream.ledger.calls]
    assert paid == [(429, False), (422, False), (500, True), (524, True), (200, True), (200, True), (401, False)]
    assert (upstream.ledger.total, upstream.ledger.paid_total, len(upstream.ledger.paid)) == (7, 4, 4)


async def test_the_ledger_counts_concurrent_calls(ask: Ask, upstream: EmulatedUpstream) -> None:
    calls = [asyncio.ensure_future(ask("{{fault:ok held=1}}")) for _ in range(5)]
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 5)
    upstream.release()
    await asyncio.gather(*calls)
    assert (upstream.ledger.peak_in_flight, upstream.ledger.in_flight) == (5, 0)


async def test_a_held_call_is_answered_after_the_next_release(
    ask: Ask, upstream: EmulatedUpstream, session: aiohttp.ClientSession
) -> None:
    upstream.release()
    for number in (1, 2):
        call = asyncio.ensure_future(ask("{{fault:503 held=1}}"))
        await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 1)
        assert (await ask("a cat")).status == 200
        assert not call.done()
        async with session.post(upstream.url + "/_emulator/release") as response:
            assert response.status == 204
        assert (await call).status == 503
        assert upstream.ledger.total == 2 * number


async def test_a_client_that_leaves_a_held_call_has_paid(ask: Ask, upstream: EmulatedUpstream) -> None:
    call = asyncio.ensure_future(ask("{{fault:ok held=1}}"))
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 1)
    call.cancel()
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    upstream.release()
    assert [(call.paid, call.client_there) for call in upstream.ledger.calls] == [(True, False)]


async def test_waiting_for_the_ledger_has_a_deadline(upstream: EmulatedUpstream) -> None:
    with pytest.raises(TimeoutError):
        await upstream.ledger.wait_for(lambda ledger: ledger.total, timeout_s=0.05)


async def test_a_default_fault_affects_all_calls_until_cleared(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.set_fault("503")
    assert await statuses(ask, 2) == [503, 503]
    upstream.set_fault(None)
    assert await statuses(ask, 1) == [200]


async def test_the_same_seed_fails_the_same_share_of_calls(session: aiohttp.ClientSession) -> None:
    runs = []
    for _ in range(2):
        async with EmulatedUpstream(fault="500", fail_rate=0.3, seed=7, image="none") as upstream:
            for _ in range(100):
                request = {"model": "m", "prompt": "a cat"}
                async with session.post(upstream.url + "/images/generations", json=request, headers=HEADERS):
                    pass
            runs.append([call.outcome for call in upstream.ledger.calls])
    assert runs[0] == runs[1]
    assert 20 <= runs[0].count(500) <= 40


def test_the_rate_limit_holds_by_the_second() -> None:
    pace = TokenBucket(60)
    assert [pace.admit(now) for now in (0.0, 0.5, 0.99, 1.0, 1.1, 30.0, 30.1)] == [
        True,
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert pace.reset_s() == pytest.approx(0.9)
    assert pace.headers() == {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "0.900"}
    assert [TokenBucket(120).admit(0.0) for _ in range(2)] == [True, True]
    assert all(TokenBucket(None).admit(0.0) for _ in range(10))


async def test_a_burst_over_the_rate_limit_is_a_429_with_retry_after(
    session: aiohttp.ClientSession, clock: Clock
) -> None:
    async with EmulatedUpstream(rate_per_minute=120) as upstream:
        answers = []
        for _ in range(3):
            request = {"model": "m", "prompt": "a cat", "width": 64, "height": 64}
            async with session.post(upstream.url + "/images/generations", json=request, headers=HEADERS) as response:
                answers.append((response.status, await response.json(), response.headers["x-ratelimit-reset"]))
    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert "The maximum rate limit for this model is 120.0 queries per minute." in answers[2][1]["error"]["message"]
    assert float(answers[2][2]) == 0.5
    assert upstream.ledger.paid_total == 2
