"""Tests of `webhook` in a submit: its faults, and its delivery in the task's view."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import orjson
from standardwebhooks import Webhook as Verifier
from yarl import URL

from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.conftest import Client, Receiver, StartService, StartTwo

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
ASKED = {"prompt": "a lighthouse", "webhook": {"url": "https://hooks.invalid/a?token=1"}}


async def post(service: Client, body: Any, path: str = "/api/images/generate") -> tuple[int, Any]:
    async with service.post(path, json=body) as response:
        return response.status, await response.json()


async def test_webhook_faults_and_request_faults_are_reported_together(service: Client) -> None:
    status, answer = await post(service, {"prompt": "", "n": 99, "webhook": {"url": "http://127.0.0.1/", "event": 1}})
    assert (status, answer["code"]) == (400, "invalid_request")
    assert {fault["field"] for fault in answer["details"]} == {"prompt", "n", "webhook.event"}


@over_rows("url", ["http://example.com/", "https://127.0.0.1/", "https://u:p@example.com/", "x"])
async def test_a_malformed_or_private_address_is_a_400_that_names_it(service: Client, url: str) -> None:
    status, answer = await post(service, ASKED | {"webhook": {"url": url}})
    assert status == 400
    assert [fault["field"] for fault in answer["details"]] == ["webhook.url"]


@over_rows(
    ("webhook", "faults"),
    [
        ({"url": ""}, {"webhook.url": "must not be empty"}),
        ({"url": "https://example.com:99999/"}, {"webhook.url": "is not a valid address"}),
        ({"url": 5}, {"webhook.url": "must be a string"}),
        ({"events": []}, {"webhook.url": "is required", "webhook.events": "must not be empty"}),
        (
            {"url": "https://example.com/", "events": ["done"]},
            {"webhook.events[0]": "must be 'image.completed', 'image.failed' or 'image.cancelled'"},
        ),
    ],
)
async def test_a_fault_of_a_webhook_is_told_once_and_in_the_words_of_the_api(
    service: Client, webhook: dict[str, Any], faults: dict[str, str]
) -> None:
    _, answer = await post(service, ASKED | {"webhook": webhook})
    assert {fault["field"]: fault["message"] for fault in answer["details"]} == faults


async def test_an_entry_of_a_batch_names_its_webhook(service: Client) -> None:
    entries = [ASKED, ASKED | {"webhook": {"url": "http://example.com/"}}]
    _, answer = await post(service, {"requests": entries}, "/api/images/batch")
    assert [result["statusCode"] for result in answer["results"]] == [202, 400]
    assert answer["results"][1]["details"][0]["field"] == "requests[1].webhook.url"


async def test_a_webhook_is_not_part_of_the_task_id(service: Client) -> None:
    _, plain = await post(service, {"prompt": "a lighthouse"})
    for webhook in (ASKED["webhook"], None):
        assert (await post(service, ASKED | {"webhook": webhook}))[1]["taskId"] == plain["taskId"]


async def test_a_misspelled_field_gets_a_suggestion(service: Client) -> None:
    _, answer = await post(service, {"prompt": "a lighthouse", "webhok": ASKED["webhook"]})
    assert answer["details"][0]["message"].endswith("did you mean webhook?")


async def test_the_view_shows_the_delivery_state_and_hides_path_and_query(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=60.0)
    task_id = (await post(service, ASKED))[1]["taskId"]
    await post(service, ASKED | {"webhook": {"url": "https://hooks.invalid/b"}})
    async with service.get(f"/api/images/{task_id}") as response:
        view = await response.json()
    assert (
        view["webhook"]
        == [{"url": "https://hooks.invalid", "status": "pending", "attempts": 0, "lastStatus": None}] * 2
    )


async def test_the_twenty_first_webhook_of_a_task_is_a_400(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=60.0)
    statuses = [(await post(service, ASKED))[0] for _ in range(21)]
    assert statuses == [202] * 20 + [400]


async def test_a_receiver_gets_the_signed_body_with_links_of_its_client(
    start_service: StartService, receiver: Receiver
) -> None:
    service = await start_service(webhook_allow_private=True, webhook_secret=SECRET)
    task_id = (await post(service, {"prompt": "a lighthouse", "webhook": {"url": receiver.url}}))[1]["taskId"]
    await receiver.wait_for(1)
    headers, body = receiver.received[0]
    event = Verifier(SECRET).verify(body, headers)
    view = await delivered_view(service, task_id)
    assert view.pop("webhook") == [
        {"url": str(URL(receiver.url).origin()), "status": "delivered", "attempts": 1, "lastStatus": 200}
    ]
    assert event == {"type": "image.completed", "timestamp": view["finishedAt"], "data": view}
    assert view["data"][0]["url"].startswith(str(service.make_url("/")))


async def test_with_keys_a_webhook_has_signed_links_and_the_chosen_signature(
    start_service: StartService, receiver: Receiver
) -> None:
    key = {"Authorization": "Bearer a-key-of-a-client"}
    keys = {"a": hashlib.sha256(b"a-key-of-a-client").hexdigest()}
    own = "whsec_" + base64.b64encode(b"o" * 32).decode()
    for number, (hosts, secret, verifier) in enumerate([((), own, own), (("127.0.0.1",), None, SECRET)]):
        service = await start_service(
            webhook_allow_private=True, webhook_secret=SECRET, webhook_sign_hosts=hosts, api_keys=keys
        )
        hook = {"url": receiver.url, "secret": secret}
        body = {"prompt": f"a lighthouse {number}", "webhook": hook}
        assert (await service.post("/api/images/generate", json=body, headers=key)).status == 202
        await receiver.wait_for(number + 1)
        headers, sent = receiver.received[number]
        link = URL(Verifier(verifier).verify(sent, headers)["data"]["data"][0]["url"])
        assert (await service.get(str(link.relative()))).status == 200
        assert (await service.get(link.path)).status == 401
        await service.close()


async def delivered_view(service: Client, task_id: str) -> dict[str, Any]:
    async def view() -> dict[str, Any]:
        async with service.get(f"/api/images/{task_id}") as response:
            shown: dict[str, Any] = await response.json()
            return shown

    async def is_delivered() -> bool:
        webhooks = (await view()).get("webhook", ())  # an instance learns of another one's webhook by a message
        return bool(webhooks) and all(webhook["status"] == "delivered" for webhook in webhooks)

    await eventually(is_delivered)
    return await view()


async def test_a_cancel_and_the_following_retry_call_the_same_webhook(
    start_paid: StartService, upstream: EmulatedUpstream, receiver: Receiver
) -> None:
    service = await start_paid(webhook_allow_private=True)
    upstream.set_fault("hang")
    task_id = (await post(service, {"prompt": "a lighthouse", "webhook": {"url": receiver.url}}))[1]["taskId"]
    await post(service, None, f"/api/images/{task_id}/cancel")
    await receiver.wait_for(1)
    upstream.set_fault(None)
    await post(service, None, f"/api/images/{task_id}/retry")
    await receiver.wait_for(2)
    assert [orjson.loads(body)["type"] for _, body in receiver.received] == ["image.cancelled", "image.completed"]
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 2


async def test_a_cache_hit_on_another_instance_is_delivered_immediately(
    start_two: StartTwo, receiver: Receiver
) -> None:
    client_a, client_b = await start_two(webhook_allow_private=True)
    task_id = (await post(client_a, {"prompt": "a lighthouse"}, "/api/images/generate?wait=10"))[1]["taskId"]
    status, answer = await post(client_b, {"prompt": "a lighthouse", "webhook": {"url": receiver.url}})
    assert (status, answer["cached"]) == (200, True)
    for service in (client_b, client_a):
        assert len((await delivered_view(service, task_id))["webhook"]) == 1
    assert len(receiver.received) == 1


async def test_this_service_is_rejected_as_receiver(start_service: StartService) -> None:
    anywhere = {"webhook_allow_private": True, "hosts": ("0.0.0.0",)}
    service = await start_service(**anywhere, public_url="https://images.example.com")
    own, host = str(service.make_url("/api/images/x/retry")), f"Other.example:{service.port}"
    for url, headers in (
        (own, {}),
        ("http://images.example.com/hook", {}),
        ("https://IMAGES.example.com./hook", {}),
        (f"http://other.example:{service.port}/hook", {"Host": host}),
        ("https://proxied.example/hook", {"Host": "proxied.example"}),
        ("https://proxied.example/hook", {"X-Forwarded-Host": "proxied.example"}),
    ):
        submission = {"prompt": "a lighthouse", "webhook": {"url": url}}
        async with service.post("/api/images/generate", json=submission, headers=headers) as response:
            assert response.status == 400, url
            assert [fault["field"] for fault in (await response.json())["details"]] == ["webhook.url"]


async def test_a_webhook_delivery_of_imagegen_is_rejected_as_submit(service: Client) -> None:
    headers = {"webhook-id": "msg_1", "User-Agent": "imagegen/1.0"}
    async with service.post("/api/images/generate", json={"prompt": "a lighthouse"}, headers=headers) as response:
        assert (response.status, (await response.json())["code"]) == (403, "forbidden")


async def test_a_retry_calls_only_the_webhooks_of_its_client(
    start_paid: StartService, upstream: EmulatedUpstream, receiver: Receiver
) -> None:
    service = await start_paid(webhook_allow_private=True, trusted_proxy_hops=1)
    upstream.set_fault("hang")
    submission = {"prompt": "a lighthouse", "webhook": {"url": receiver.url}}
    theirs, ours = {"X-Forwarded-For": "93.184.215.14"}, {"X-Forwarded-For": "93.184.215.15"}
    async with service.post("/api/images/generate", json=submission, headers=theirs) as response:
        task_id = (await response.json())["taskId"]
    await service.post(f"/api/images/{task_id}/cancel", headers=theirs)
    await receiver.wait_for(1)
    upstream.set_fault(None)
    async with service.post(f"/api/images/{task_id}/retry", headers=ours) as response:
        assert response.status == 202
    async with service.get(f"/api/images/{task_id}?wait=10") as response:
        view = await response.json()
    assert (view["status"], view.get("webhook", [])) == ("completed", [])
    assert len(receiver.received) == 1
