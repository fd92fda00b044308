"""Tests of rate limits: exact, shared by all ids of a route, shown in headers, and safe against forged addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient

from imagegen.ratelimit.limits import Limits, RateLimits, networks
from imagegen.ratelimit.stores import LocalRateLimitStore, MemoryRateLimitStore
from imagegen.web.http.forwarded import client_address
from tests.edge_server import edge_server
from tests.support import Clock

Client = TestClient[web.Request, web.Application]
MakeClient = Callable[..., Awaitable[Client]]


async def fine(request: web.Request) -> web.Response:
    return web.Response(text="fine")


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    return response


@pytest.fixture
async def make_client(clock: Clock) -> AsyncIterator[MakeClient]:
    async with AsyncExitStack() as stack:

        async def make(
            general: int = 10,
            generation: int = 5,
            *,
            window_s: float = 60.0,
            hops: int = 0,
            units: int = 0,
            port: LocalRateLimitStore | None = None,
        ) -> Client:
            app = web.Application()
            rates = RateLimits(
                Limits(general, generation, window_s, units),
                port or MemoryRateLimitStore(clock),
                lambda request: client_address(request, hops),
            )

            async def batch(request: web.Request) -> web.Response:
                admission = await rates.admit(request, int(request.query["n"]))
                return web.json_response([admission.admitted, admission.retry_after_s])

            async def weigh(request: web.Request) -> web.Response:
                await rates.spend_units(request, int(request.query["units"]))
                return web.Response()

            app.router.add_post("/weigh", rates.generation(weigh).shared)
            app.router.add_post("/generate", rates.generation(fine).shared)
            app.router.add_get("/images/{task_id}", rates.general(fine).shared)
            app.router.add_get("/stream", rates.general(stream).shared)
            app.router.add_post("/batch", rates.general(batch).shared)
            app.router.add_get("/healthz", fine)
            rates.install(app)
            return await stack.enter_async_context(TestClient(edge_server(app)))

        yield make


async def statuses(requests: Sequence[Awaitable[ClientResponse]]) -> list[int]:
    return [answer.status for answer in await asyncio.gather(*requests)]


async def test_fifty_concurrent_requests_spend_five(make_client: MakeClient) -> None:
    client = await make_client()
    seen = await statuses([client.post("/generate") for _ in range(50)])
    assert (seen.count(200), seen.count(429)) == (5, 45)


async def test_a_refusal_is_the_seeds_body_with_every_header(make_client: MakeClient, clock: Clock) -> None:
    client = await make_client()
    for _ in range(5):
        await client.post("/generate")
        clock.now += 1
    answer = await client.post("/generate")
    body = await answer.json()
    assert (answer.status, body["success"], body["statusCode"], body["code"]) == (429, False, 429, "rate_limited")
    assert body["message"] == "请求频率过高，请稍后再试"
    assert answer.headers["Retry-After"] == "55"
    assert answer.headers["RateLimit-Policy"] == '"general";q=10;w=60, "generation";q=5;w=60'
    assert answer.headers["RateLimit"] == '"general";r=5;t=55, "generation";r=0;t=55'
    assert answer.headers["X-RateLimit-Limit"] == "5"
    assert answer.headers["X-RateLimit-Remaining"] == "0"
    assert answer.headers["X-RateLimit-Reset"] == "55"


async def test_an_admitted_response_shows_the_remaining_budget(make_client: MakeClient) -> None:
    client = await make_client()
    answer = await client.get("/images/a")
    assert answer.headers["RateLimit"] == '"general";r=9;t=60'
    assert answer.headers["X-RateLimit-Remaining"] == "9"
    assert "Retry-After" not in answer.headers


async def test_an_event_stream_has_the_headers_too_and_counts_once(make_client: MakeClient) -> None:
    client = await make_client()
    assert (await client.get("/stream")).headers["X-RateLimit-Remaining"] == "9"


async def test_twelve_ids_share_one_budget(make_client: MakeClient) -> None:
    client = await make_client()
    seen = await statuses([client.get(f"/images/{number}") for number in range(12)])
    assert (seen.count(200), seen.count(429)) == (10, 2)


async def test_a_rejected_generation_spends_no_general_budget(make_client: MakeClient) -> None:
    client = await make_client()
    await statuses([client.post("/generate") for _ in range(30)])
    seen = await statuses([client.get("/images/a") for _ in range(10)])
    assert (seen.count(200), seen.count(429)) == (5, 5)


async def test_a_generation_is_rejected_without_general_budget(make_client: MakeClient) -> None:
    client = await make_client()
    await statuses([client.get("/images/a") for _ in range(10)])
    answer = await client.post("/generate")
    assert (answer.status, answer.headers["X-RateLimit-Limit"]) == (429, "10")
    assert answer.headers["RateLimit"] == '"general";r=0;t=60, "generation";r=5;t=0'


async def test_the_window_moves_with_time(make_client: MakeClient, clock: Clock) -> None:
    client = await make_client(general=0, generation=2)
    assert (await client.post("/generate")).status == 200
    clock.now += 40
    assert await statuses([client.post("/generate") for _ in range(2)]) == [200, 429]
    clock.now += 20
    assert await statuses([client.post("/generate") for _ in range(2)]) == [200, 429]
    clock.now += 60
    assert await statuses([client.post("/generate") for _ in range(3)]) == [200, 200, 429]


async def test_a_window_may_be_shorter_than_a_second(make_client: MakeClient, clock: Clock) -> None:
    client = await make_client(general=1, generation=0, window_s=0.25)
    assert await statuses([client.get("/images/a") for _ in range(2)]) == [200, 429]
    clock.now += 0.25
    assert (await client.get("/images/a")).status == 200


async def test_a_forged_forwarding_header_buys_no_budget(make_client: MakeClient) -> None:
    client = await make_client()
    seen = await statuses([client.post("/generate", headers={"X-Forwarded-For": f"1.2.3.{n}"}) for n in range(9)])
    assert seen.count(200) == 5


async def test_behind_a_trusted_proxy_each_client_has_its_own_budget(make_client: MakeClient) -> None:
    client = await make_client(hops=1)
    for address in ("198.51.100.1", "198.51.100.2"):
        headers = {"X-Forwarded-For": f"6.6.6.6, {address}"}
        seen = await statuses([client.post("/generate", headers=headers) for _ in range(6)])
        assert seen.count(200) == 5


@pytest.mark.parametrize(("general", "generation", "admitted"), [(0, 5, 5), (10, 0, 10), (0, 0, 20)])
async def test_zero_turns_a_rule_off(make_client: MakeClient, general: int, generation: int, admitted: int) -> None:
    client = await make_client(general, generation)
    seen = await statuses([client.post("/generate") for _ in range(20)])
    assert seen.count(200) == admitted


def test_a_handler_without_rules_is_returned_unchanged() -> None:
    rates = RateLimits(Limits(0, 0, 60), MemoryRateLimitStore(), lambda _request: "client")
    app = web.Application()
    rates.install(app)
    assert rates.general(fine).shared is fine
    assert rates.generation(fine).shared is fine
    assert not app.on_response_prepare


async def test_an_unlimited_route_has_no_headers_and_spends_nothing(make_client: MakeClient) -> None:
    client = await make_client()
    answers = [await client.get("/healthz") for _ in range(20)]
    assert {answer.status for answer in answers} == {200}
    assert not any("RateLimit" in name for name in answers[0].headers)
    assert (await client.get("/images/a")).headers["X-RateLimit-Remaining"] == "9"


async def test_a_batch_gets_as_many_entries_as_the_generation_budget_holds(make_client: MakeClient) -> None:
    client = await make_client()
    assert await (await client.post("/batch?n=3")).json() == [3, 0]
    answer = await client.post("/batch?n=50")
    assert await answer.json() == [2, 60]
    assert answer.headers["RateLimit"] == '"general";r=8;t=60, "generation";r=0;t=60'
    assert await (await client.post("/batch?n=1")).json() == [0, 60]


async def test_a_batch_is_admitted_whole_without_a_generation_rule(make_client: MakeClient) -> None:
    client = await make_client(generation=0)
    assert await (await client.post("/batch?n=50")).json() == [50, 0]


async def test_a_generation_spends_its_units(make_client: MakeClient, clock: Clock) -> None:
    client = await make_client(general=0, generation=0, units=320)
    assert await statuses([client.post("/weigh?units=128") for _ in range(2)]) == [200, 200]
    clock.now += 10
    answer = await client.post("/weigh?units=65")
    assert (answer.status, answer.headers["Retry-After"]) == (429, "50")
    assert answer.headers["RateLimit-Policy"] == '"units";q=320;w=60'
    assert answer.headers["RateLimit"] == '"units";r=64;t=50'
    assert (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) == ("320", "64")
    assert (await client.post("/weigh?units=64")).status == 200


async def test_a_generation_over_the_whole_limit_needs_an_untouched_window(
    make_client: MakeClient, clock: Clock
) -> None:
    client = await make_client(general=0, generation=0, units=10)
    assert await statuses([client.post("/weigh?units=500"), client.post("/weigh?units=1")]) == [200, 429]
    clock.now += 60
    assert await statuses([client.post("/weigh?units=1"), client.post("/weigh?units=500")]) == [200, 429]


async def test_units_are_shown_beside_the_limits_of_requests(make_client: MakeClient) -> None:
    client = await make_client(general=10, generation=5, units=320)
    answer = await client.post("/weigh?units=318")
    assert answer.headers["RateLimit"] == '"general";r=9;t=60, "generation";r=4;t=60, "units";r=2;t=60'
    assert (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) == ("5", "4")
    refused = await client.post("/weigh?units=3")
    assert (refused.status, refused.headers["X-RateLimit-Limit"]) == (429, "320")


@pytest.mark.parametrize(
    ("network", "admitted"),
    [
        ("2001:db8:0:100:{0}::1", 5),
        ("2001:db8:0:1{0:02x}::1", 10),
        ("2001:db8:0:{0:02x}00::1", 20),
        ("2001:db8:{0}::1", 60),
    ],
)
async def test_wider_networks_of_ipv6_have_twice_the_limit_of_the_narrower(
    make_client: MakeClient, network: str, admitted: int
) -> None:
    client = await make_client(general=0, hops=1)
    addresses = [network.format(number) for number in range(60)]
    seen = await statuses([client.post("/generate", headers={"X-Forwarded-For": address}) for address in addresses])
    assert seen.count(200) == admitted


async def test_the_headers_show_the_strictest_network_of_a_client(make_client: MakeClient) -> None:
    client = await make_client(general=0, hops=1)
    for number in range(9):
        await client.post("/generate", headers={"X-Forwarded-For": f"2001:db8:0:1{number:02x}::1"})
    answer = await client.post("/generate", headers={"X-Forwarded-For": "2001:db8:0:1ff::1"})
    assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (200, "0")
    refused = await client.post("/generate", headers={"X-Forwarded-For": "2001:db8:0:1fe::1"})
    assert (refused.status, refused.headers["RateLimit"]) == (429, '"generation";r=0;t=60')


def test_only_an_ipv6_network_has_wider_networks() -> None:
    assert networks("2001:db8:1:203::/64") == (
        ("2001:db8:1:203::/64", 1),
        ("2001:db8:1:200::/56", 2),
        ("2001:db8:1::/48", 4),
    )
    for client in ("203.0.113.7", "unknown", "key:2001:db8::/64", "key:a"):
        assert networks(client) == ((client, 1),)
