"""Tests of requests for unknown tasks: few Redis commands, and a rate limit."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from imagegen.app import CONNECTION, QUEUE
from imagegen.tasks.validation import parse
from imagegen.web.handler_services import SERVICES
from tests.support import eventually
from tests.web.conftest import Client, StartTwo, wait_until_discovered

BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


def commands(service: Client) -> int:
    """Return the number of commands for task reads and limits; background commands are excluded."""
    spent = service.app[CONNECTION].meter.commands
    return spent["read"] + spent["limits"]


def random_id() -> str:
    return secrets.token_hex(16)


def id_of(service: Client, body: dict[str, Any]) -> str:
    identity = service.app[SERVICES].identity
    request = parse(body, default_model=identity.default_model, aliases={})
    return identity.submission(request, None).task_id


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_only_missing_images_count_against_the_limit(start_service: Any, store: str) -> None:
    service = await start_service(rate_limit_max=4, rate_limit_store=store)
    done = await (await service.post("/api/images/generate?wait=10", json=BODY)).json()
    link = done["data"][0]["url"].removeprefix(str(service.make_url("")).rstrip("/"))
    before = commands(service)
    statuses = [(await service.get(f"/api/images/{random_id()}/0")).status for _ in range(8)]
    assert statuses == [404, 404, 404, 429, 429, 429, 429, 429]
    assert commands(service) - before <= 4
    for _ in range(6):
        assert (await service.get(link)).status == 200
    refused = await service.get(f"/api/images/{random_id()}/0")
    assert int(refused.headers["Retry-After"]) > 0
    assert (await refused.json())["code"] == "rate_limited"
    assert (await service.get(f"/api/images/{done['taskId']}")).status == 429


async def test_misses_are_not_limited_without_a_limit(service: Client) -> None:
    assert {(await service.get(f"/api/images/{random_id()}/0")).status for _ in range(20)} == {404}


@pytest.mark.parametrize("path", ["/api/images/{}", "/api/images/{}/0", "/api/images/{}/events"])
async def test_an_unknown_id_costs_one_command_for_many_requests(service: Client, path: str) -> None:
    unknown = path.format(random_id())
    await eventually(lambda: service.app[QUEUE].notifier.alone)
    before = commands(service)
    for _ in range(10):
        assert (await service.get(unknown)).status == 404
    assert commands(service) - before == 1


async def test_a_cached_miss_ends_when_the_task_is_submitted(service: Client) -> None:
    task_id = id_of(service, BODY)
    assert (await service.get(f"/api/images/{task_id}")).status == 404
    assert (await service.post("/api/images/generate", json=BODY)).status == 202
    assert (await service.get(f"/api/images/{task_id}")).status == 200


async def test_a_cached_miss_ends_when_another_instance_takes_the_task(start_two: Any) -> None:
    client_a, client_b = await start_two()
    task_id = id_of(client_a, BODY)
    assert (await client_a.get(f"/api/images/{task_id}")).status == 404
    assert (await client_b.post("/api/images/generate", json=BODY)).status == 202
    assert (await client_a.get(f"/api/images/{task_id}")).status == 200


async def test_a_cached_miss_ends_when_a_new_instance_takes_the_task(start_service: Any) -> None:
    client_a = await start_service()
    task_id = id_of(client_a, BODY)
    assert (await client_a.get(f"/api/images/{task_id}")).status == 404
    client_b = await start_service()
    await wait_until_discovered(client_a, client_b)
    assert (await client_b.post("/api/images/generate", json=BODY)).status == 202
    assert (await client_a.get(f"/api/images/{task_id}")).status == 200


async def test_documents_and_unknown_routes_cost_no_redis_command(start_service: Any) -> None:
    service = await start_service(rate_limit_max=2, rate_limit_store="redis")
    before = commands(service)
    for _ in range(3):
        for path in ("/openapi.json", "/docs", "/docs/docs.js", "/", "/nothing", "/api/health", "/healthz"):
            assert (await service.get(path, allow_redirects=False)).status in (200, 302, 404)
    assert commands(service) == before


async def test_a_task_that_a_peer_may_end_by_writing_back_has_no_missing_image_and_no_cancel(
    start_two: StartTwo,
) -> None:
    services = await start_two(sandbox_delay_s=30.0)
    task_id = (await (await services[0].post("/api/images/generate", json=BODY)).json())["taskId"]
    await eventually(lambda: any(task_id in service.app[QUEUE].dispatcher.claimed for service in services))
    other = next(service for service in services if task_id not in service.app[QUEUE].dispatcher.claimed)
    assert (await other.get(f"/api/images/{task_id}/0")).status == 404
    other.app[QUEUE].task_lookup.is_recovering = lambda: True
    for answer in (await other.get(f"/api/images/{task_id}/0"), await other.delete(f"/api/images/{task_id}")):
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
