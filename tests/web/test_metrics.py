from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientError, web
from aiohttp.test_utils import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pytest_aiohttp.plugin import AiohttpClient, AiohttpServer

from imagegen.accounts.alerts import Alerts
from imagegen.accounts.budget_watch import BudgetWatch
from imagegen.accounts.counts import Counts
from imagegen.app import CONNECTION
from imagegen.errors import AlreadyFinished
from imagegen.metrics import Meter, RecentRates
from imagegen.web.http.middleware import PIPELINE
from imagegen.web.ops import prometheus, stats
from imagegen.web.ops.telemetry import OBSERVED, ProviderLimits, Telemetry
from tests.conftest import Instance, MakeInstance
from tests.edge_server import edge_server
from tests.support import AS_ADMIN, eventually, over_rows, submission
from tests.web.conftest import Client, StartService

MetricsClient = TestClient[web.Request, Any]
Start = Callable[..., Awaitable[MetricsClient]]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def meter() -> Meter:
    return Meter(["flux"])


@pytest.fixture
async def instance(make_instance: MakeInstance, meter: Meter) -> Instance:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    return instance


@pytest.fixture
async def start(aiohttp_client: AiohttpClient, instance: Instance, meter: Meter) -> Start:
    async def start_app(*, blocked: tuple[str, float] | None = None) -> MetricsClient:
        app = web.Application()
        rules = ProviderLimits(5, 10.0, lambda: blocked)
        loops = ["loop-0", "loop-1", "reader"]
        alerts = Alerts(instance.connection, instance.keys, "one", enabled=False)
        app[OBSERVED] = Telemetry(
            meter,
            RecentRates(meter),
            instance.parts.monitor,
            rules,
            lambda: loops,
            max_queue=100,
            store_writable=lambda: True,
            key_accepted=lambda: True,
            budgets=BudgetWatch(alerts, instance.verbs, dict, time.time),
            spending=Counts(),
            paused_since=lambda: None,
            channels=tuple,
        )
        app[prometheus.SCRAPES] = prometheus.Scrapes(app[OBSERVED])
        app.router.add_get("/metrics", prometheus.get_metrics)
        app.router.add_get("/api/stats", stats.get_stats)
        app.router.add_get("/things/{thing_id}", things)
        return await aiohttp_client(edge_server(app, meter))

    return start_app


async def things(request: web.Request) -> web.StreamResponse:
    match request.match_info["thing_id"]:
        case "fault":
            raise AlreadyFinished
        case "stuck":
            await asyncio.Event().wait()
        case "stream":
            stream = web.StreamResponse()
            await stream.prepare(request)
            await stream.write(b"one")
            raise ConnectionResetError
    return web.Response(text="a thing")


async def scrape(client: MetricsClient) -> Samples:
    answer = await client.get("/metrics", headers=AS_ADMIN)
    assert answer.status == 200
    families = text_string_to_metric_families(await answer.text())
    return {(sample.name, frozenset(sample.labels.items())): sample.value for f in families for sample in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"imagegen_{name}", frozenset(labels.items())]


async def test_metrics_are_prometheus_text(start: Start) -> None:
    client = await start()
    answer = await client.get("/metrics", headers=AS_ADMIN)
    assert answer.content_type == "text/plain"
    text = await answer.text()
    assert "# TYPE imagegen_tasks_total counter" in text or "# TYPE imagegen_tasks counter" in text
    assert "process_resident_memory_bytes" in text


async def test_many_scrapes_at_once_take_a_small_part_of_the_event_loops_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s = list[float]()

    def choose(_accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
        def encode(registry: CollectorRegistry) -> bytes:
            began_at = time.monotonic()
            text = generate_latest(registry)
            took_s.append(time.monotonic() - began_at)
            return text

        return encode, "text/plain"

    monkeypatch.setattr(prometheus, "choose_encoder", choose)
    client, began_at = await start(), time.monotonic()
    answers = await asyncio.gather(*(client.get("/metrics", headers=AS_ADMIN) for _ in range(90)))
    assert {answer.status for answer in answers} == {200}
    assert sum(took_s) < (time.monotonic() - began_at) / 5 + max(took_s)


@over_rows(
    "accept",
    [
        "text/plain;version=a",
        "application/openmetrics-text;version=1.x",
        "application/openmetrics-text;version=1.1.\u00e9",
        "text/plain;version=" + "9" * 5_000,
        "text/plain;version=1.0.0;escaping=\u00fc",
        "*/*;q=0",
        ",;=,",
    ],
)
async def test_any_accept_header_gets_the_metrics(start: Start, accept: str) -> None:
    client = await start()
    answer = await client.get("/metrics", headers={**AS_ADMIN, "Accept": accept})
    assert answer.status == 200
    assert answer.headers["Content-Type"].isascii()
    assert "imagegen_uptime_seconds" in await answer.text()


async def test_metrics_are_openmetrics_if_requested(start: Start) -> None:
    client = await start()
    answer = await client.get("/metrics", headers=AS_ADMIN | {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.content_type == "application/openmetrics-text"
    assert (await answer.text()).endswith("# EOF\n")


async def test_requests_are_counted_by_route_template_and_status(start: Start) -> None:
    client = await start()
    for path in ("one", "two", "fault"):
        await client.get(f"/things/{path}")
    await client.get("/nowhere/4711")
    await client.request("PURGE", "/things/one")
    samples = await scrape(client)
    assert value(samples, "http_requests_total", method="GET", route="/things/{thing_id}", status="200") == 2
    assert value(samples, "http_requests_total", method="GET", route="/things/{thing_id}", status="409") == 1
    assert value(samples, "http_requests_total", method="*", route="unmatched", status="404") == 1
    assert value(samples, "http_requests_total", method="*", route="unmatched", status="405") == 1
    assert value(samples, "http_request_seconds_count", method="GET", route="/things/{thing_id}") == 3
    text = str(samples)
    assert "4711" not in text
    assert "PURGE" not in text


async def test_an_answer_that_broke_off_is_counted_as_499(start: Start, meter: Meter) -> None:
    client = await start()
    answer = await client.get("/things/stream")
    with pytest.raises(ClientError):
        await answer.read()
    key = ("GET", "/things/{thing_id}", 499)
    await eventually(lambda: meter.requests[key].count == 1)
    assert meter.open_requests == 0


async def test_open_requests_are_reported(start: Start, meter: Meter) -> None:
    client = await start()
    stuck = asyncio.create_task(client.get("/things/stuck"))
    await eventually(lambda: meter.open_requests == 1)
    assert value(await scrape(client), "http_requests_open") == 2
    stuck.cancel()


async def test_counts_of_the_meter_are_reported(start: Start, meter: Meter) -> None:
    meter.submits["HIT"] += 3
    meter.finished("failed", "upstream_timeout", "flux")
    meter.finished("failed", "upstream_timeout", "their own words")
    meter.observe_provider_call("upstream_timeout", 3.0, ambiguous=True)
    meter.attempts["failed"].observe(0.3)
    meter.waits.observe(0.002)
    meter.takeovers, meter.dead_letters, meter.vanished = 2, 1, 4
    meter.written_back["running"] += 3
    meter.images_stored([100, 200])
    meter.redis_commands_sent("submit", 7)
    samples = await scrape(await start())
    assert value(samples, "submits_total", kind="hit") == 3
    assert value(samples, "tasks_total", state="failed", code="upstream_timeout", model="flux") == 1
    assert value(samples, "tasks_total", state="failed", code="upstream_timeout", model="other") == 1
    assert value(samples, "upstream_calls_total", code="upstream_timeout") == 1
    assert value(samples, "upstream_call_seconds_sum", code="upstream_timeout") == 3.0
    assert value(samples, "ambiguous_calls_total") == 1
    assert value(samples, "attempt_seconds_bucket", outcome="failed", le="0.25") == 0
    assert value(samples, "attempt_seconds_bucket", outcome="failed", le="0.5") == 1
    assert value(samples, "attempt_seconds_bucket", outcome="failed", le="+Inf") == 1
    assert value(samples, "wait_seconds_count") == 1
    assert value(samples, "takeovers_total") == 2
    assert value(samples, "dead_letters_total") == 1
    assert value(samples, "redis_records_vanished_total") == 4
    assert value(samples, "redis_written_back_total", state="running") == 3
    assert value(samples, "image_bytes_total") == 300
    assert value(samples, "redis_commands_total", purpose="submit") == 7
    assert value(samples, "redis_commands_month_projected") > 0


async def test_the_queue_and_the_loops_are_reported(start: Start, instance: Instance) -> None:
    await instance.client_queue.submit(submission("a"))
    samples = await scrape(await start(blocked=("upstream_rate_limited", time.time() + 30)))
    assert value(samples, "queue_depth") == 1
    assert 0 <= value(samples, "queue_oldest_age_seconds") < 60
    assert value(samples, "loops", loop="loop") == 2
    assert value(samples, "loops", loop="reader") == 1
    assert value(samples, "instances") == 1
    assert value(samples, "redis_up") == 1
    assert value(samples, "asyncio_tasks") == len(asyncio.all_tasks()) + 1  # plus the request itself
    assert 0 < value(samples, "upstream_blocked_seconds") <= 30


async def test_scraping_an_instance_alone_costs_no_redis_command(start: Start, instance: Instance) -> None:
    client = await start()
    before = instance.connection.meter.commands.total()
    for _ in range(5):
        await scrape(client)
    assert instance.connection.meter.commands.total() == before


async def test_two_applications_do_not_share_their_numbers(
    start: Start, aiohttp_client: AiohttpClient, meter: Meter
) -> None:
    one = await start()
    await one.get("/things/one")
    other = web.Application()
    await (await aiohttp_client(edge_server(other))).get("/")
    samples = await scrape(one)
    assert value(samples, "http_requests_total", method="GET", route="/things/{thing_id}", status="200") == 1
    assert ("GET", "/", 404) not in meter.requests


async def test_stats_report_the_same_in_json(start: Start, instance: Instance, meter: Meter) -> None:
    await instance.client_queue.submit(submission("a"))
    meter.submits["MISS"] += 2
    meter.finished("completed", "", "flux")
    meter.finished("failed", "content_policy", "flux")
    meter.observe_provider_call("ok", 1.0)
    meter.redis_commands_sent("claim", 4)
    client = await start()
    await client.get("/things/one")
    answer = await client.get("/api/stats", headers=AS_ADMIN)
    assert answer.status == 200
    report = await answer.json()
    assert report["success"] is True
    assert report["instance"]["loops"] == {"loop": 2, "reader": 1}
    assert report["instance"]["name"] == instance.parts.monitor.instance
    assert (report["queue"]["depth"], report["queue"]["limit"], report["queue"]["inFlight"]) == (1, 100, 0)
    states = {"pending": 1, "processing": 0, "completed": 1, "failed": 1, "cancelled": 0}
    assert states.items() <= report["tasks"].items()
    assert report["tasks"]["errors"] == {"content_policy": 1}
    assert report["submits"] == {"miss": 2, "coalesced": 0, "hit": 0, "refresh": 0, "full": 0, "over_budget": 0}
    assert report["rates"]["submitsPerMinute"] > 0
    assert report["upstream"] == {
        "concurrency": 5,
        "ratePerMinute": 10.0,
        "blocked": None,
        "calls": {"ok": 1},
        "ambiguous": 0,
    }
    assert report["redis"]["commands"] == {"claim": 4}
    assert report["redis"]["commandsTotal"] == 4
    assert re.fullmatch(r"(valkey|redis) \d+\.\d+\.\d+", report["redis"]["server"])
    assert report["redis"]["monthProjected"] > 0
    assert report["redis"]["vanished"] == 0
    assert report["redis"]["writtenBack"] == {"waiting": 0, "running": 0, "finished": 0}
    assert report["deadLetters"] == {"sinceStart": 0, "kept": 0}
    assert report["http"] == {"open": 1, "byStatus": {"200": 1}}


async def test_stats_show_until_when_the_upstream_is_paused(start: Start) -> None:
    client = await start(blocked=("upstream_overloaded", 0.0))
    report = await (await client.get("/api/stats", headers=AS_ADMIN)).json()
    assert report["upstream"]["blocked"] == {"reason": "upstream_overloaded", "until": "1970-01-01T00:00:00.000Z"}


async def test_stats_show_the_stored_dead_letters(start: Start, instance: Instance) -> None:
    await instance.connection.commands.rpush(instance.keys.dead_letters, "x", "y")
    report = await (await (await start()).get("/api/stats", headers=AS_ADMIN)).json()
    assert report["deadLetters"] == {"sinceStart": 0, "kept": 2}


@over_rows("path", ["/metrics", "/api/stats", "/api/images"])
async def test_the_admin_routes_of_the_service_need_the_token_from_every_address(service: Client, path: str) -> None:
    for headers in ({}, {"X-Forwarded-For": "127.0.0.1"}, {"Authorization": "Bearer another-token-than-that"}):
        answer = await service.get(path, headers=headers)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (await service.get(path, headers=AS_ADMIN)).status == 200


async def test_stats_count_against_the_limit_of_the_api_and_metrics_do_not(start_service: StartService) -> None:
    service = await start_service(rate_limit_max=1)
    assert [(await service.get("/metrics", headers=AS_ADMIN)).status for _ in range(3)] == [200, 200, 200]
    assert [(await service.get("/api/stats", headers=AS_ADMIN)).status for _ in range(2)] == [200, 429]


async def billed(service: Client) -> tuple[int, int]:
    """Return the command counts of our meter and of the server."""
    stats = await service.app[CONNECTION].commands.info("commandstats")
    free = ("info", "ping", "hello", "client", "script", "config", "select", "auth")
    rows = {name.removeprefix("cmdstat_"): row for name, row in stats.items()}
    counted = sum(row["calls"] for name, row in rows.items() if name.split("|")[0] not in free)
    counted -= rows.get("evalsha", {"failed_calls": 0})["failed_calls"]
    return service.app[PIPELINE].meter.commands.total(), counted


async def test_a_service_counts_its_redis_commands_as_the_server_does(
    start_service: StartService, aiohttp_server: AiohttpServer
) -> None:
    hooked: list[str] = []

    async def hook(request: web.Request) -> web.Response:
        hooked.append((await request.json())["type"])
        return web.Response()

    app = web.Application()
    app.router.add_post("/", hook)
    address = str((await aiohttp_server(app)).make_url("/"))
    service = await start_service(webhook_allow_private=True)
    await eventually(lambda: service.app[PIPELINE].meter.commands["control"] >= 2)
    before = await billed(service)
    for number in range(20):
        body = {"prompt": f"number {number}", "webhook": {"url": address}} if number < 3 else {"prompt": f"{number}"}
        headers = {"Idempotency-Key": f"key-{number}", "Prefer": "wait=60"}
        answers = await asyncio.gather(
            service.post("/api/images/generate", json=body, headers=headers),
            service.post("/api/images/generate", json={"prompt": f"other {number}"}, headers={"Prefer": "wait=60"}),
        )
        assert [answer.status for answer in answers] == [200, 200]
    await eventually(lambda: len(hooked) == 3)
    await service.get("/api/images", headers=AS_ADMIN)

    async def agree() -> bool:
        report, counted = (after - earlier for after, earlier in zip(await billed(service), before, strict=True))
        return counted > 40 * 7 and abs(report - counted) <= 0.02 * counted

    await eventually(agree)
