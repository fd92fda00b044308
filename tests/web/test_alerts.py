"""Alerts for the operator, from what happened to the receiver of ALERT_WEBHOOK."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from loguru import logger
from redis.exceptions import ResponseError
from standardwebhooks import Webhook as Verifier

from imagegen.accounts import alert_sources, budget_watch
from imagegen.accounts.alerts import Alerts
from imagegen.app import ALERT_DELIVERIES, ALERTS, CONNECTION, LEDGER, QUEUE, STORE, SUPERVISOR
from imagegen.metrics import Meter
from imagegen.worker.alert_dispatcher import MAX_DELIVERING, AlertDispatcher
from imagegen.worker.webhooks import ReceiverResponse, WebhookSender, webhook_session
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import AS_ADMIN, eventually
from tests.web.conftest import Client, StartService, StartTwo

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
PRICE_MICRO_USD = 708
"""0.0027 dollars a megapixel, rounded up."""

KEY = "tgp_v1_a-key-that-nobody-may-see"


@dataclass
class Receiver:
    """Receiver that answers by `script` in order, then 200."""

    url: str = ""
    script: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.read()))
        return web.Response(status=self.script.pop(0) if self.script else 200)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.received]


async def deliver_alerts(*services: Client) -> None:
    """Wait until these services have delivered their alerts."""
    for service in services:
        dispatcher = service.app[ALERT_DELIVERIES]
        assert dispatcher
        await dispatcher.drain(20)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/alerts", receiver.take)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/alerts")) + "?token=a-secret-of-the-address"
        yield receiver


@pytest.fixture
def settings(receiver: Receiver) -> dict[str, Any]:
    return {"alert_webhook": receiver.url, "webhook_allow_private": True, "webhook_secret": SECRET}


async def test_a_refused_provider_key_is_an_alert_that_is_signed_and_has_no_secret(
    start_paid: StartService, upstream: EmulatedUpstream, receiver: Receiver, settings: dict[str, Any]
) -> None:
    lines: list[str] = []
    handler = logger.add(lines.append, level="TRACE")
    service = await start_paid(**settings | {"together_api_key": KEY})
    upstream.script({"fault": "401", "times": 3})
    for number in range(3):
        await service.post("/api/images/generate?wait=30", json={"prompt": f"refused {number}"})
    await eventually(lambda: receiver.received)
    await deliver_alerts(service)
    logger.remove(handler)
    ((headers, body),) = receiver.received
    assert Verifier(SECRET).verify(body, headers)["type"] == "provider.key_refused"
    (event,) = receiver.events()
    assert event["data"] == {
        "instance": service.app[QUEUE].monitor.instance,
        "setting": "TOGETHER_API_KEY",
        "code": "upstream_auth",
    }
    for secret in (KEY, SECRET.removeprefix("whsec_"), "a-secret-of-the-address"):
        assert secret.encode() not in body
        assert not any(secret in line for line in lines)
    metrics = await (await service.get("/metrics", headers=AS_ADMIN)).text()
    assert 'imagegen_alerts_total{outcome="delivered",type="provider.key_refused"} 1.0' in metrics
    assert "imagegen_provider_key_accepted 0.0" in metrics


async def test_a_store_that_cannot_write_and_a_dead_loop_are_alerts(
    start_service: StartService, receiver: Receiver, settings: dict[str, Any]
) -> None:
    service = await start_service(**settings)
    health = service.app[STORE].health
    for _ in range(2):  # the second time is too soon
        health.mark_failed("ENOSPC No space left on device")
        health.mark_ok()

    async def die() -> None:
        raise RuntimeError("a bug")

    service.app[SUPERVISOR].run("some-loop", die())
    await eventually(lambda: len(receiver.received) == 2)
    shown = [(event["type"], event["data"].get("cause"), event["data"].get("loop")) for event in receiver.events()]
    assert sorted(shown, key=str) == [
        ("store.unavailable", "ENOSPC No space left on device", None),
        ("workers.dead", None, "some-loop"),
    ]


async def test_an_alert_of_all_instances_is_sent_by_one(
    start_two: StartTwo, receiver: Receiver, settings: dict[str, Any]
) -> None:
    one, other = await start_two(**settings)
    for service in (one, other):
        service.app[ALERTS].report("budget.warning", "a day", life_s=60.0, shared=True, used=8)
    await deliver_alerts(one, other)
    assert len(receiver.received) == 1


async def test_a_failed_alert_is_sent_again_a_few_times(
    start_service: StartService, receiver: Receiver, settings: dict[str, Any]
) -> None:
    service, meter = await start_service(**settings | {"alert_webhook": None}), Meter()
    alerts = Alerts(service.app[CONNECTION], service.app[QUEUE].keys, "an instance", enabled=True)
    async with webhook_session(private=True) as session:
        sender = WebhookSender(session, lambda _task, _webhook: {}, allow_private=True)
        dispatcher = AlertDispatcher(alerts, sender, receiver.url, None, meter, delays_s=(0.01, 0.01))
        delivering = asyncio.create_task(dispatcher.deliver_forever())
        receiver.script = [500, 404]
        alerts.report("store.unavailable", "disk", life_s=60.0)
        await eventually(lambda: meter.alerts["store.unavailable", "delivered"])
        assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
        assert len(receiver.received) == 3
        assert "webhook-signature" not in receiver.received[0][0]
        receiver.script = [500] * 5
        alerts.report("workers.dead", "a loop", life_s=60.0)
        await eventually(lambda: meter.alerts["workers.dead", "failed"])
        assert len(receiver.received) == 6
        delivering.cancel()


async def test_no_command_and_no_call_without_alerts(start_service: StartService) -> None:
    service = await start_service()
    service.app[ALERTS].report("workers.dead", "a loop", life_s=60.0)
    assert service.app[ALERT_DELIVERIES] is None
    assert service.app[CONNECTION].meter.commands["alerts"] == 0


async def test_budgets_warn_at_80_and_100_percent_once_over_all_instances(
    start_paid: StartService, receiver: Receiver, settings: dict[str, Any]
) -> None:
    keys = {"ann": hashlib.sha256(b"a-secret-of-ann-1").hexdigest()}
    limits = {"budget_daily_micro_usd": 5 * PRICE_MICRO_USD, "api_keys": keys}
    services = [await start_paid(**settings | limits) for _ in range(2)]
    headers = {"X-API-Key": "a-secret-of-ann-1"}

    async def submit(number: int) -> int:
        body = {"prompt": f"image {number}", "width": 512, "height": 512}
        response = await services[number % 2].post("/api/images/generate?wait=30", json=body, headers=headers)
        return response.status

    async def drained(count: int) -> list[tuple[str, Any, Any, Any]]:
        """Return the alerts once there are `count`, and after another check."""
        await eventually(lambda: len(receiver.received) >= count)
        await asyncio.sleep(budget_watch.CHECK_DELAY_S * 1.5)
        await deliver_alerts(*services)
        data = [(event["type"], event["data"]) for event in receiver.events()]
        return [(kind, shown["key"], shown["limit"], shown["used"]) for kind, shown in data]

    assert [await submit(number) for number in range(3)] == [200] * 3
    assert await drained(0) == []
    assert await submit(3) == 200
    limit, used = 5 * PRICE_MICRO_USD / 1e6, 4 * PRICE_MICRO_USD / 1e6
    assert await drained(1) == [("budget.warning", None, limit, used)]
    assert await submit(4) == 200
    assert [await submit(number) for number in (5, 6)] == [402, 402]
    assert await drained(2) == [("budget.warning", None, limit, used), ("budget.exhausted", None, limit, limit)]

    metrics = await (await services[0].get("/metrics", headers=AS_ADMIN)).text()
    assert f'imagegen_budget_used_usd{{key="(all)"}} {limit}' in metrics
    assert 'imagegen_budget_left_usd{key="(all)"} 0.0' in metrics
    later = await start_paid(**settings | limits)
    (shown,) = (await (await later.get("/api/stats", headers=AS_ADMIN)).json())["budgets"]
    assert (shown["key"], shown["limit"], shown["used"], shown["left"]) == (None, limit, limit, 0)
    usage = await (await later.get("/api/usage", headers=AS_ADMIN)).json()
    spent = [service.app[LEDGER].total.spent for service in services]
    assert (sum(spent), usage["total"]["spent"]) == (5 * PRICE_MICRO_USD, 0), "written within a minute"
    for service in services:
        await service.app[LEDGER].write()
    usage = await (await later.get("/api/usage?by=key", headers=AS_ADMIN)).json()
    assert [(row["key"], row["spent"], row["ambiguous"]) for row in usage["rows"]] == [("ann", limit, 0)]


async def test_redis_that_refuses_commands_or_is_away_for_long_is_an_alert(
    start_service: StartService, receiver: Receiver, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alert_sources, "REDIS_OUTAGE_S", 0.1)
    refusing, away = [await start_service(**settings) for _ in range(2)]
    refusing.app[CONNECTION].health.failed(ResponseError("OOM command not allowed when used memory > 'maxmemory'"))
    health = away.app[CONNECTION].health
    health.failed(ConnectionError())
    health.succeeded()
    await eventually(lambda: receiver.received)
    await asyncio.sleep(0.2)
    assert [event["data"]["cause"] for event in receiver.events()] == ["Redis refuses commands"], (
        "a short outage is none"
    )
    health.failed(ConnectionError())
    while len(receiver.received) < 2:
        health.failed(ConnectionError())
        await asyncio.sleep(0.01)
    causes = {(event["type"], event["data"]["store"], event["data"]["cause"]) for event in receiver.events()}
    assert ("store.unavailable", "queue", "Redis does not answer") in causes


async def test_short_outages_of_redis_one_after_another_are_no_alert(
    start_service: StartService, receiver: Receiver, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(**settings)
    loop, health = asyncio.get_running_loop(), service.app[CONNECTION].health
    monkeypatch.setattr(alert_sources, "REDIS_OUTAGE_S", 0.2)
    health.failed(ConnectionError())
    health.succeeded()
    monkeypatch.setattr(alert_sources, "REDIS_OUTAGE_S", 60.0)
    for _ in range(100):
        health.failed(ConnectionError())
        health.succeeded()
    end = loop.time() + 0.4
    while loop.time() < end:
        health.failed(ConnectionError())
        await asyncio.sleep(0.01)
    health.succeeded()
    await deliver_alerts(service)
    assert not receiver.received


async def test_a_receiver_that_does_not_answer_holds_a_bounded_number_of_alerts(start_service: StartService) -> None:
    service, meter = await start_service(), Meter()
    alerts = Alerts(service.app[CONNECTION], service.app[QUEUE].keys, "an instance", enabled=True)
    posted, answers = list[str](), asyncio.Event()

    class SilentReceiver:
        async def post(self, _address: str, message: str, _body: bytes, _secret: str | None) -> ReceiverResponse:
            posted.append(message)
            await answers.wait()
            return ReceiverResponse(200)

    dispatcher = AlertDispatcher(alerts, cast(WebhookSender, SilentReceiver()), "http://silent", None, meter)
    delivering = asyncio.create_task(dispatcher.deliver_forever())
    for number in range(MAX_DELIVERING * 3):
        alerts.report("budget.warning", f"{number}", life_s=60.0)
        await asyncio.sleep(0)
    await eventually(lambda: len(posted) >= MAX_DELIVERING)
    assert len(posted) == MAX_DELIVERING
    answers.set()
    await eventually(lambda: meter.alerts["budget.warning", "delivered"] == MAX_DELIVERING * 3)
    delivering.cancel()
