"""`webhook` in a submit: its faults beside those of the request, and what the task's view says of it."""

from __future__ import annotations

from typing import Any

import pytest

ASKED = {"prompt": "a lighthouse", "webhook": {"url": "https://hooks.invalid/a?token=1"}}


async def post(service, body: Any, path: str = "/api/images/generate") -> tuple[int, Any]:
    async with service.post(path, json=body) as response:
        return response.status, await response.json()


async def test_the_faults_of_the_webhook_and_of_the_request_are_told_together(service) -> None:
    status, answer = await post(service, {"prompt": "", "n": 99, "webhook": {"url": "http://127.0.0.1/", "event": 1}})
    assert (status, answer["code"]) == (400, "invalid_request")
    assert {fault["field"] for fault in answer["details"]} == {"prompt", "n", "webhook.event"}


@pytest.mark.parametrize("url", ["http://example.com/", "https://127.0.0.1/", "https://u:p@example.com/", "x"])
async def test_an_address_that_is_wrong_by_its_looks_is_a_400_that_names_it(service, url: str) -> None:
    status, answer = await post(service, ASKED | {"webhook": {"url": url}})
    assert status == 400
    assert [fault["field"] for fault in answer["details"]] == ["webhook.url"]


async def test_an_entry_of_a_batch_names_its_webhook(service) -> None:
    entries = [ASKED, ASKED | {"webhook": {"url": "http://example.com/"}}]
    _, answer = await post(service, {"requests": entries}, "/api/images/batch")
    assert [result["statusCode"] for result in answer["results"]] == [202, 400]
    assert answer["results"][1]["details"][0]["field"] == "requests[1].webhook.url"


async def test_a_webhook_is_no_part_of_the_tasks_id(service) -> None:
    _, plain = await post(service, {"prompt": "a lighthouse"})
    for webhook in (ASKED["webhook"], None):
        assert (await post(service, ASKED | {"webhook": webhook}))[1]["taskId"] == plain["taskId"]


async def test_a_near_miss_is_told_the_fields_name(service) -> None:
    _, answer = await post(service, {"prompt": "a lighthouse", "webhok": ASKED["webhook"]})
    assert answer["details"][0]["message"].endswith("did you mean webhook?")


async def test_the_view_says_how_far_a_delivery_is_and_hides_the_query(start_service) -> None:
    service = await start_service(sandbox_delay_s=5.0)
    task_id = (await post(service, ASKED))[1]["taskId"]
    await post(service, ASKED | {"webhook": {"url": "https://hooks.invalid/b"}})
    async with service.get(f"/api/images/{task_id}") as response:
        view = await response.json()
    assert view["webhook"] == [
        {"url": f"https://hooks.invalid/{path}", "status": "pending", "attempts": 0, "lastStatus": None}
        for path in ("a", "b")
    ]


async def test_the_twenty_first_webhook_of_a_task_is_a_400(start_service) -> None:
    service = await start_service(sandbox_delay_s=5.0)
    statuses = [(await post(service, ASKED))[0] for _ in range(21)]
    assert statuses == [202] * 20 + [400]
