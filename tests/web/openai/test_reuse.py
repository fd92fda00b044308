"""Tests of equal calls on `/v1`: a repeat joins the call that it repeats, any other call is another image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import ClientResponse

from imagegen.app import METER, QUEUE
from imagegen.queue.open_calls import QUERY
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.ratelimit.stores import MemoryRateLimitStore
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import MAX_VARIANT
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import Clock, eventually
from tests.web.conftest import WaitForDiscovery
from tests.web.openai.conftest import Client, Serve, Service

SDK = {"x-stainless-retry-count": "0", "x-stainless-read-timeout": "60"}
IMPATIENT = {"x-stainless-retry-count": "0", "x-stainless-read-timeout": "0.3"}
REPEAT = {"x-stainless-retry-count": "1"}
HELD = {"fault": "ok", "held": 1}


async def id_of(answer: ClientResponse) -> str:
    assert answer.status == 200, await answer.text()
    return str((await answer.json())["id"])


async def task_of(answer: ClientResponse) -> str:
    return answer.headers["Location"].rpartition("/")[2] if answer.status == 503 else await id_of(answer)


async def release(upstream: EmulatedUpstream, calls: int = 1) -> None:
    """Let the upstream answer the calls that it holds, once it has so many of them."""
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == calls)
    upstream.release()


async def hang_up(service: Service, upstream: EmulatedUpstream, calls: int = 1, **body: object) -> None:
    """Start a call without marks, and leave once it has reached the upstream."""
    async with aiohttp.ClientSession() as session:
        leaving = asyncio.create_task(
            session.post(f"{service.url}/v1/images/generations", json={"prompt": "a cat"} | body)
        )
        await upstream.ledger.wait_for(lambda ledger: ledger.total == calls)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    await eventually(lambda: service.app[METER].open_requests == 0)


@pytest.fixture
def two(
    start_paid: Callable[..., Awaitable[Client]], wait_for_discovery: WaitForDiscovery
) -> Callable[..., Awaitable[tuple[Service, Service]]]:
    """Start two services that have discovered each other."""

    async def start() -> tuple[Service, Service]:
        clients = await start_paid(), await start_paid()
        await wait_for_discovery(*clients)
        return Service(clients[0]), Service(clients[1])

    return start


async def test_four_equal_calls_at_once_are_four_images(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.1, "times": 4})
    answers = await asyncio.gather(*(service.generate(SDK) for _ in range(4)))
    assert len({await id_of(answer) for answer in answers}) == 4
    assert upstream.ledger.paid_total == 4


async def test_repeats_of_answers_that_a_proxy_lost_pay_nothing(service: Service, upstream: EmulatedUpstream) -> None:
    first = [await id_of(await service.generate(SDK)) for _ in range(2)]
    again = [await id_of(await service.generate({"x-stainless-retry-count": n})) for n in ("1", "1", "2", "4", "4")]
    assert (sorted(again[:2]), set(again), upstream.ledger.paid_total) == (sorted(first), set(first), 2)


async def test_a_call_after_a_delivered_answer_is_another_image(service: Service, upstream: EmulatedUpstream) -> None:
    ids = [await id_of(await service.generate(headers)) for headers in ({}, SDK, {"Cache-Control": "no-cache"})]
    assert (len(set(ids)), upstream.ledger.paid_total) == (3, 3)


async def test_a_repeat_after_a_hang_up_joins_and_pays_nothing(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script(HELD)
    await hang_up(service, upstream)
    upstream.release()
    repeated = await id_of(await service.generate())
    assert upstream.ledger.total == 1
    assert await id_of(await service.generate()) != repeated
    assert upstream.ledger.total == 2


async def test_a_repeat_after_the_503_joins_even_if_it_is_not_marked(
    service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script(HELD)
    early = await service.generate(IMPATIENT)
    assert early.status == 503
    await release(upstream)
    assert early.headers["Location"].endswith(await id_of(await service.generate()))
    assert upstream.ledger.total == 1


async def test_four_calls_that_time_out_are_four_images(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script(HELD | {"times": 4})
    early = await asyncio.gather(*(service.generate(IMPATIENT) for _ in range(4)))
    assert {answer.status for answer in early} == {503}
    await release(upstream, 4)
    answers = await asyncio.gather(*(service.generate(SDK | REPEAT) for _ in range(4)))
    assert len({await id_of(answer) for answer in answers}) == 4
    assert upstream.ledger.total == 4


async def test_a_marked_repeat_of_a_call_that_is_open_joins_it(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script(HELD)
    first = asyncio.create_task(service.generate(SDK))
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    repeat = asyncio.create_task(service.generate(SDK | REPEAT))
    await eventually(lambda: service.app[METER].open_requests == 2)
    await release(upstream)
    assert await id_of(await repeat) == await id_of(await first)
    assert upstream.ledger.total == 1


async def test_a_call_over_the_rate_limit_comes_again_as_a_new_image(serve: Serve, upstream: EmulatedUpstream) -> None:
    clock = Clock()
    service = await serve(image_rate_limit_max=1, rate_limit_window_s=2)
    service.app[RATE_LIMITS].use(MemoryRateLimitStore(clock))
    answers = await asyncio.gather(service.generate(SDK), service.generate(SDK))
    first, refused = sorted(answers, key=lambda answer: answer.status)
    assert refused.status == 429
    assert (await service.generate(SDK | REPEAT)).status == 429
    clock.now += 2
    assert await id_of(await service.generate(SDK | REPEAT)) != await id_of(first)
    assert upstream.ledger.paid_total == 2


async def test_an_idempotency_key_names_one_image(service: Service, upstream: EmulatedUpstream) -> None:
    keyed = {"Idempotency-Key": "order-1"}
    answers = await asyncio.gather(*(service.generate(keyed) for _ in range(3)))
    assert len({await id_of(answer) for answer in answers}) == 1
    other = await id_of(await service.generate({"Idempotency-Key": "order-2"}))
    assert other != await id_of(answers[0])
    mismatch = await service.generate(keyed, prompt="a dog")
    assert (mismatch.status, (await mismatch.json())["error"]["code"]) == (422, "idempotency_mismatch")
    assert upstream.ledger.paid_total == 2


async def test_a_keyed_call_has_a_variant_that_no_client_can_name(service: Service) -> None:
    task_id = await id_of(await service.generate({"Idempotency-Key": "order-1"}))
    task = await service.app[QUEUE].client_queue.read(task_id)
    assert task is not None
    assert GenerationRequest.from_json(task.request_json).variant > MAX_VARIANT


async def test_a_keyed_repeat_of_a_failure_gets_it_again(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(max_attempts=1)
    upstream.script("500")
    answers = [await service.generate({"Idempotency-Key": "order-1"}) for _ in range(2)]
    assert [answer.status for answer in answers] == [502, 502]
    assert upstream.ledger.total == 1


async def test_an_sdk_without_marks_gets_the_same_failure_for_a_while(serve: Serve, upstream: EmulatedUpstream) -> None:
    """LiteLLM's proxy repeats a failed call by a new call of the SDK."""
    service = await serve(max_attempts=1)
    upstream.script({"fault": "500", "times": 10})
    answers = [await service.generate(SDK) for _ in range(3)]
    assert [answer.status for answer in answers] == [502] * 3
    assert upstream.ledger.total == 1


async def test_a_repeat_after_a_restart_joins_the_task(serve: Serve, upstream: EmulatedUpstream) -> None:
    upstream.script("hang")
    first = await serve(upstream_timeout_s=60, drain_s=0.1, lease_s=1)
    early = await first.generate(IMPATIENT)
    assert early.status == 503
    await first.close()
    second = await serve(lease_s=1)
    repeat = await second.generate(IMPATIENT | REPEAT)
    assert await task_of(repeat) == await task_of(early)


async def test_a_repeat_without_a_mark_after_a_restart_joins_the_task(serve: Serve, upstream: EmulatedUpstream) -> None:
    upstream.script("hang", "hang")
    first = await serve(upstream_timeout_s=60, drain_s=0.1, lease_s=1)
    early = await first.generate(IMPATIENT)
    await first.close()
    second = await serve(lease_s=1, upstream_timeout_s=60, drain_s=0.1)
    await eventually(lambda: second.app[QUEUE].notifier.subscribed)
    repeat = await second.generate(IMPATIENT)
    assert await task_of(repeat) == await task_of(early)


async def test_a_new_call_after_a_restart_is_another_image(serve: Serve, upstream: EmulatedUpstream) -> None:
    first = await serve()
    ids = [await id_of(await first.generate()) for _ in range(2)]
    await first.close()
    second = await serve()
    ids.append(await id_of(await second.generate()))
    assert (len(set(ids)), upstream.ledger.paid_total) == (3, 3)


async def test_equal_calls_to_two_instances_are_different_images(
    two: Callable[[], Awaitable[tuple[Service, Service]]], upstream: EmulatedUpstream
) -> None:
    services = await two()
    upstream.script({"fault": "ok", "delay_s": 0.2, "times": 4})
    answers = await asyncio.gather(*(service.generate() for service in services * 2))
    assert len({await id_of(answer) for answer in answers}) == 4
    assert upstream.ledger.paid_total == 4


async def test_an_equal_call_on_another_instance_after_a_202_is_another_image(
    two: Callable[[], Awaitable[tuple[Service, Service]]], upstream: EmulatedUpstream
) -> None:
    services = await two()
    upstream.script(HELD | {"times": 4})
    answers = [await each.generate(path="/v1/images/generations/async") for each in services * 2]
    assert len({(await answer.json())["id"] for answer in answers}) == 4


async def test_many_equal_calls_on_two_instances_ask_each_other_once_for_each_call(
    two: Callable[[], Awaitable[tuple[Service, Service]]],
    upstream: EmulatedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services, questions = await two(), list[str]()
    for each in services:
        notifier = each.app[QUEUE].notifier

        async def request(kind: str, _request: Any = notifier.request, **content: Any) -> int | None:
            questions.append(kind)
            return cast(int | None, await _request(kind, **content))

        monkeypatch.setattr(notifier, "request", request)
    upstream.script({"fault": "ok", "delay_s": 0.3, "times": 12})
    answers = await asyncio.gather(*(each.generate() for each in services * 6))
    assert len({await id_of(answer) for answer in answers}) == 12
    assert 0 < len(questions) <= 12


async def test_an_equal_call_beside_an_instance_that_does_not_answer_is_another_image(
    two: Callable[[], Awaitable[tuple[Service, Service]]], upstream: EmulatedUpstream
) -> None:
    """As those of earlier versions do not."""
    first, second = await two()
    del first.app[QUEUE].notifier.handlers[QUERY]
    upstream.script(HELD)
    open_call = asyncio.create_task(first.generate())
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 1)
    other = await id_of(await second.generate())
    upstream.release()
    assert await id_of(await open_call) != other
    assert upstream.ledger.total == 2


@pytest.mark.parametrize("headers", [{}, REPEAT])
async def test_a_repeat_on_another_instance_joins_the_task(
    two: Callable[[], Awaitable[tuple[Service, Service]]], upstream: EmulatedUpstream, headers: dict[str, str]
) -> None:
    first, second = await two()
    await first.generate()
    upstream.script(HELD)
    early = await first.generate(IMPATIENT)
    await release(upstream)
    assert early.headers["Location"].endswith(await id_of(await second.generate(headers)))
    assert upstream.ledger.total == 2
    assert await id_of(await second.generate()) not in early.headers["Location"]
    assert upstream.ledger.total == 3


async def test_equal_calls_on_one_instance_cost_no_more_commands_than_different_ones(
    service: Service, upstream: EmulatedUpstream
) -> None:
    meter = service.app[QUEUE].connection.meter

    async def commands(**body: Any) -> int:
        before = meter.commands.total()
        await service.generate(**body)
        await eventually(lambda: not service.app[QUEUE].dispatcher.claimed)
        return meter.commands.total() - before

    await commands(prompt="warm")
    different, equal = list[int](), list[int]()
    for row in range(3):  # loops of the service may send commands too, but not in each row
        different.append(sum([await commands(prompt=f"cat {row} {number}") for number in range(4)]))
        equal.append(sum([await commands(prompt=f"cat {row}") for _ in range(4)]))
    assert min(equal) <= min(different) + 2
