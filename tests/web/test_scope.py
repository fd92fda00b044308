"""Tests of who sees what: tasks, links, uploads and webhooks of several API keys."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Any

import pytest
from yarl import URL

from imagegen.web.openapi.document import Operation
from imagegen.web.routes import ROUTES
from tests.image_bytes import image_file
from tests.support import AS_ADMIN
from tests.web.conftest import Client, StartService

SECRETS = {name: f"secret-of-the-key-{name}" for name in ("a", "b", "c")}
KEYS = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in SECRETS.items()}
AS_A, AS_B, AS_C = ({"Authorization": f"Bearer {text}"} for text in SECRETS.values())
BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}
UNKNOWN = "0123456789abcdef0123456789abcdef"

PARAMETERS = {"{index}": "0"}
WITHOUT_TASKS = {
    "/api/images/generate",
    "/api/images/batch",
    "/api/images",
    "/api/uploads",
    "/api/models",
    "/api/usage",
    "/api/stats",
    "/api/health",
    "/api/admin/keys",
    "/api/admin/keys/{name}",
    "/api/admin/keys/{name}/rotate",
    "/",
    "/healthz",
    "/readyz",
    "/mcp",
    "/metrics",
    "/openapi.json",
    "/board",
    "/api/channels",
    "/api/admin/board",
    "/api/admin/board/history",
    "/api/admin/pause",
    "/api/admin/resume",
    "/docs",
    "/docs/{file}",
    "/assets/{version}/{file}",
    *(
        f"{base}{path}"
        for base in ("/v1", "", "/v1/v1")
        for path in (
            "/images/generations",
            "/images/generations/async",
            "/images/edits",
            "/images/edits/async",
            "/images/variations",
            "/models",
            "/models/{modelId}",
        )
    ),
}
"""Routes that take no task id."""

PROBE = {"X-Request-Id": "a-probe"}
"""Makes the ids of the requests equal, which are in the responses."""


def paths_of(operation: Operation) -> list[str]:
    """Return what a route of tasks is called by, with `{}` for the id. Fails for a route that is in no table."""
    if operation.path == "/api/events":
        return ["/api/events?tasks={}", f"/api/events?tasks={'f' * 32},{{}}"]
    if "{taskId}" not in operation.path:
        assert operation.path in WITHOUT_TASKS, "a new route: does it take a task id?"
        return []
    path = operation.path.replace("{taskId}", "{}")
    for parameter, value in PARAMETERS.items():
        path = path.replace(parameter, value)
    queries = ["", "?wait=1"]
    if operation.path.endswith("{index}"):
        queries = ["", "?v=0123456789ab", "?size=64", "?size=63", "?exp=9999999999&sig=AAAAAAAAAAAAAAAAAAAAAA"]
    return [path + query for query in queries]


Seen = tuple[int, str, list[tuple[str, str]], bytes]
"""Status, reason, headers in their order, and body of a response."""


async def seen(client: Client, method: str, path: str, headers: dict[str, str]) -> Seen:
    """Return a whole response but for its time: status, headers in their order, and body."""
    answer = await client.request(method, path, headers=PROBE | headers, allow_redirects=False)
    shown = [(name, value) for name, value in answer.headers.items() if name != "Date"]
    return answer.status, answer.reason or "", shown, await answer.read()


async def submit(client: Client, headers: Mapping[str, str], query: str = "", **fields: Any) -> dict[str, Any]:
    answer = await client.post(f"/api/images/generate{query}", json=BODY | fields, headers=headers)
    body: dict[str, Any] = await answer.json()
    assert answer.status in (200, 202), body
    return body


def local(link: str) -> str:
    """Return a link without scheme and host."""
    return str(URL(link).relative())


async def test_a_task_of_another_key_is_answered_as_an_unknown_id_on_every_route(start_two: Any) -> None:
    owner, other = await start_two(api_keys=KEYS, sandbox_delay_s=0.4, v1_max_wait_s=1.0)
    done = await submit(owner, AS_A, "?wait=20")
    assert done["status"] == "completed"
    etag = (await owner.get(f"/api/images/{done['taskId']}", headers=AS_A)).headers["ETag"]
    running = await submit(owner, AS_A, n=16)
    cancelled = await submit(owner, AS_A, prompt="cancelled")
    assert (await owner.delete(f"/api/images/{cancelled['taskId']}", headers=AS_A)).status == 200
    extra = [{}, {"If-None-Match": etag}, {"If-None-Match": "*", "Last-Event-ID": etag[1:-1], "Prefer": "wait=2"}]
    tried = 0
    for operation, _ in ROUTES:
        for path in paths_of(operation):
            methods = [operation.method, "head"] if operation.method == "get" else [operation.method]
            for method in methods:
                for headers in extra:
                    for client in (owner, other):
                        expected = await seen(client, method, path.format(UNKNOWN), AS_B | headers)
                        for task in (done, running, cancelled):
                            task_id = task["taskId"]
                            shown = await seen(client, method, path.format(task_id), AS_B | headers)
                            assert _renamed(shown, task_id) == expected, f"{method} {path} {headers}"
                            tried += 1
    assert tried > 200
    for task, state in ((done, "completed"), (running, None), (cancelled, "cancelled")):
        for headers in (AS_A, AS_ADMIN):
            answer = await other.get(f"/api/images/{task['taskId']}", headers=headers)
            assert answer.status == 200
            status = (await answer.json())["status"]
            assert status == state or (state is None and status in ("pending", "processing", "completed"))


def _renamed(shown: tuple[object, ...], task_id: str) -> tuple[object, ...]:
    *rest, body = shown
    assert isinstance(body, bytes)
    return *rest, body.replace(task_id.encode(), UNKNOWN.encode())


async def test_misses_of_tasks_of_others_count_as_those_of_unknown_ids(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, rate_limit_max=4)
    done = await submit(client, AS_A, "?wait=20")

    timed = {"RateLimit", "X-RateLimit-Reset", "Retry-After"}

    async def probe(headers: dict[str, str], task_id: str) -> list[tuple[object, ...]]:
        shown = [await seen(client, "get", f"/api/images/{task_id}/0", headers) for _ in range(7)]
        return [
            (status, [(name, "" if name in timed else value) for name, value in headers], body)
            for status, _, headers, body in shown
        ]

    theirs, unknown = await probe(AS_B, done["taskId"]), await probe(AS_C, UNKNOWN)
    assert [status for status, *_ in theirs] == [404] * 4 + [429] * 3
    assert theirs == unknown
    assert (await client.get(local(done["data"][0]["url"]))).status == 200


async def test_equal_requests_of_two_keys_are_two_tasks_and_share_no_image(start_paid: Any, upstream: Any) -> None:
    client = await start_paid(api_keys=KEYS)
    first = await submit(client, AS_A, "?wait=20", n=2)
    again, theirs = await submit(client, AS_A), await submit(client, AS_B, "?wait=20")
    fewer = await submit(client, AS_A, "?wait=20", n=1)
    assert len({first["taskId"], theirs["taskId"], fewer["taskId"]}) == 3
    assert again["taskId"] == fewer["taskId"]
    assert (fewer["data"][0].get("reused"), theirs["data"][0].get("reused")) == (True, None)
    assert (await submit(client, AS_B))["cached"]
    assert len(upstream.ledger.paid) == 2
    retried = await client.post("/api/images/batch", json={"requests": [BODY]}, headers=AS_B | {"Idempotency-Key": "k"})
    other = await client.post("/api/images/batch", json={"requests": [BODY]}, headers=AS_A | {"Idempotency-Key": "k"})
    ids = [(await answer.json())["results"][0]["taskId"] for answer in (retried, other)]
    assert ids == [theirs["taskId"], fewer["taskId"]]


async def test_a_failed_task_is_queued_again_in_the_scope_of_its_key(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, sandbox_delay_s=30.0)
    for retries_as in (AS_A, AS_ADMIN):
        task_id = (await submit(client, AS_A))["taskId"]
        assert (await client.delete(f"/api/images/{task_id}", headers=AS_A)).status == 200
        answer = await client.post(f"/api/images/{task_id}/retry", headers=retries_as)
        assert (answer.status, (await answer.json())["taskId"]) == (202, task_id)
        assert (await client.get(f"/api/images/{task_id}", headers=AS_B)).status == 404
        assert (await client.get(f"/api/images/{task_id}", headers=AS_A)).status == 200


# Links


@pytest.fixture
async def keyed(start_service: StartService) -> Client:
    return await start_service(api_keys=KEYS, cache_scope="key")


async def test_a_signed_link_needs_no_key(keyed: Client) -> None:
    submitted = await submit(keyed, AS_A)
    events = await keyed.get(local(submitted["eventsUrl"]))
    assert (events.status, b"event: completed" in await events.read()) == (200, True)
    done = await (await keyed.get(local(submitted["statusUrl"]), headers=AS_A)).json()
    link = local(done["data"][0]["url"])
    for headers in ({}, AS_B, {"Authorization": "Bearer wrong"}, AS_A, AS_ADMIN):
        answer = await keyed.get(link, headers=headers)
        assert answer.status == 200, headers
        assert answer.headers["Cache-Control"].startswith("private, max-age=")
    assert (await keyed.get(f"{link}&size=64")).content_type == "image/webp"
    assert (await keyed.head(link)).status == 200
    assert (await keyed.get(link.replace("v=", "v=0"))).status == 410
    for changed in (link.split("?")[0], link.replace("/0?", "/1?"), link.replace("exp=1", "exp=2"), f"{link}x"):
        assert (await keyed.get(changed)).status == 401, changed
    for path in ("statusUrl", "cancelUrl"):
        assert "sig=" not in submitted[path]
        assert (await keyed.get(f"{local(submitted['statusUrl'])}?{URL(link).query_string}")).status == 401


async def test_links_of_v1_and_of_webhooks_are_signed_too(keyed: Client) -> None:
    sent = {"prompt": "a lighthouse", "size": "64x64"}
    body = await (await keyed.post("/v1/images/generations", json=sent, headers=AS_A)).json()
    accepted = await keyed.post("/v1/images/generations/async", json=sent | {"seed": 1}, headers=AS_A)
    poll = local((await accepted.json())["poll_url"])
    task_id = poll.partition("?")[0].rpartition("/")[2]
    await keyed.get(f"/api/images/{task_id}?wait=30", headers=AS_A)
    task = await (await keyed.get(poll, headers=AS_A)).json()
    for link in (body["data"][0]["url"], task["image_url"], task["result"]["data"][0]["url"]):
        assert (await keyed.get(local(link))).status == 200
    preferred = await keyed.post(
        "/v1/images/generations", json=sent | {"seed": 2}, headers=AS_A | {"Prefer": "respond-async"}
    )
    assert (await keyed.get(local((await preferred.json())["events_url"]))).status == 200


async def test_the_events_of_several_tasks_open_by_the_signatures_of_all(keyed: Client) -> None:
    tasks = [await submit(keyed, headers, prompt=name) for name, headers in (("x", AS_A), ("y", AS_B))]
    queries = [URL(task["eventsUrl"]).query for task in tasks]
    exp, sig = (",".join(query[name] for query in queries) for name in ("exp", "sig"))
    ids = ",".join(task["taskId"] for task in tasks)
    answer = await keyed.get(f"/api/events?tasks={ids}&exp={exp}&sig={sig}")
    text = await answer.text()
    assert answer.status == 200
    assert all(f'"taskId":"{task["taskId"]}"' in text for task in tasks)
    assert text.count("event: completed") == 2
    only = queries[0]
    for query in (f"exp={only['exp']}&sig={only['sig']}", f"exp={exp}&sig={sig[:-1]}", ""):
        assert (await keyed.get(f"/api/events?tasks={ids}&{query}")).status == 401


@pytest.mark.parametrize("secret", [{}, {"admin_token": None}], ids=["a setting", "redis"])
async def test_an_instance_opens_the_links_of_another(start_two: Any, secret: dict[str, Any]) -> None:
    client_a, client_b = await start_two(api_keys=KEYS, **secret)
    done = await submit(client_a, AS_A, "?wait=20")
    task_id = done["taskId"]
    assert (await client_b.get(local(done["data"][0]["url"]))).status == 200
    here, there = [await (await one.get(f"/api/images/{task_id}", headers=AS_A)).json() for one in (client_a, client_b)]
    assert URL(here["data"][0]["url"]).query == URL(there["data"][0]["url"]).query


async def test_without_keys_links_have_no_signature_and_images_are_public(service: Client) -> None:
    done = await submit(service, {}, "?wait=20")
    link = done["data"][0]["url"]
    assert list(URL(link).query) == ["v"]
    assert (await service.get(local(link))).headers["Cache-Control"].startswith("public")


# Tasks that all keys share


async def test_no_cache_makes_a_variant_of_the_client_where_tasks_are_shared(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, cache_scope="shared")
    shared = await submit(client, AS_A, "?wait=20")
    assert (await submit(client, AS_B))["taskId"] == shared["taskId"]
    by_admin = await submit(client, AS_ADMIN | {"Cache-Control": "no-cache"})
    fresh = await submit(client, AS_B | {"Cache-Control": "no-cache"}, "?wait=20")
    assert len({by_admin["taskId"], fresh["taskId"], shared["taskId"]}) == 3
    assert (await client.get(local(shared["data"][0]["url"]))).status == 200
    assert (await (await client.get(f"/api/images/{shared['taskId']}", headers=AS_A)).json())["data"] == shared["data"]
    statuses = [
        (await client.get(f"/api/images/{fresh['taskId']}", headers=headers)).status
        for headers in (AS_A, AS_B, AS_ADMIN)
    ]
    assert statuses == [404, 200, 200]
    again = await client.post("/api/images/generate", json=BODY, headers=AS_B | {"Cache-Control": "no-cache"})
    assert (again.headers["X-Cache"], (await again.json())["taskId"]) == ("REFRESH", fresh["taskId"])
    assert (await submit(client, AS_B))["taskId"] == shared["taskId"]


async def test_a_client_sees_its_own_webhooks_of_a_shared_task(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, cache_scope="shared", sandbox_delay_s=1.5)
    tasks = []
    for headers, host in ((AS_A, "a.example.com"), (AS_B, "b.example.com"), (AS_B, "b2.example.com")):
        tasks.append(await submit(client, headers, webhook={"url": f"https://{host}/secret"}))
    path = f"/api/images/{tasks[-1]['taskId']}"
    for _ in range(2):
        shown = [
            [hook["url"] for hook in (await (await client.get(path, headers=headers)).json()).get("webhook", [])]
            for headers in (AS_A, AS_B, AS_C, AS_ADMIN)
        ]
        hosts = ["https://a.example.com", "https://b.example.com", "https://b2.example.com"]
        assert shown == [hosts[:1], hosts[1:], [], hosts]
        by_link = await (await client.get(local(tasks[-1]["eventsUrl"]))).text()  # lasts until the task is finished
        assert "example.com" not in by_link


async def test_a_client_can_not_fill_the_webhooks_of_another(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, cache_scope="shared", sandbox_delay_s=60.0)

    async def add(headers: Mapping[str, str], number: int) -> int:
        body = BODY | {"webhook": {"url": f"https://example.com/{number}"}}
        return (await client.post("/api/images/generate", json=body, headers=headers)).status

    assert [await add(AS_A, number) for number in range(21)] == [202] * 20 + [400]
    assert await add(AS_B, 0) == 202


# Uploads


async def test_the_hash_of_an_image_does_not_open_an_upload_of_another_key(keyed: Client) -> None:
    data = image_file()
    sent = await keyed.post("/api/uploads", data=data, headers=AS_A | {"Content-Type": "image/png"})
    upload_id = (await sent.json())["uploadId"]
    edit = BODY | {"imageUrl": upload_id}
    unknown = BODY | {"imageUrl": f"upload:{secrets.token_hex(32)}"}

    async def answer_of(body: Mapping[str, Any], headers: dict[str, str]) -> tuple[int, bytes]:
        answer = await keyed.post("/api/images/generate", json=body, headers=PROBE | headers)
        return answer.status, await answer.read()

    refused = await answer_of(edit, AS_B)
    assert refused[0] == 400
    assert refused == await answer_of(unknown, AS_B)
    on_v1 = await keyed.post("/v1/images/edits", json={"prompt": "p", "images": [{"file_id": upload_id}]}, headers=AS_B)
    assert (on_v1.status, (await on_v1.json())["error"]["code"]) == (400, "upload_not_found")
    assert [(await answer_of(edit, headers))[0] for headers in (AS_A, AS_ADMIN)] == [202, 202]
    theirs = await keyed.post("/api/uploads", data=data, headers=AS_B | {"Content-Type": "image/png"})
    assert (theirs.status, (await theirs.json())["uploadId"]) == (201, upload_id)
    assert (await answer_of(edit, AS_B))[0] == 202


async def test_keys_that_share_tasks_share_uploads(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, cache_scope="shared")
    sent = await client.post("/api/uploads", data=image_file(), headers=AS_A | {"Content-Type": "image/png"})
    await submit(client, AS_B, imageUrl=(await sent.json())["uploadId"])


# Webhooks that the operator's secret signs


async def test_with_keys_a_webhook_needs_its_own_secret_or_a_named_host(
    start_service: StartService,
) -> None:
    own = "whsec_" + "A" * 32
    client = await start_service(api_keys=KEYS, webhook_secret=own, webhook_sign_hosts=("hooks.example.com",))
    for url, secret, status in (
        ("https://hooks.example.com/x", None, 202),
        ("https://other.example.com/x", own, 202),
        ("https://other.example.com/x", None, 400),
    ):
        body = BODY | {"webhook": {"url": url, "secret": secret}}
        for path, sent in (("generate", body), ("batch", {"requests": [body]})):
            answer = await (await client.post(f"/api/images/{path}", json=sent, headers=AS_A)).json()
            answer = answer["results"][0] if path == "batch" else answer
            if status == 400:
                assert [error["field"].rpartition("]")[2].lstrip(".") for error in answer["details"]] == [
                    "webhook.secret"
                ]
            else:
                assert answer["success"]
