"""Tests of who may call which route: API keys, the admin token, and what a caller without either gets."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from imagegen.app import CONNECTION, QUEUE
from imagegen.web.guard import GUARD
from imagegen.web.openapi.document import Operation
from imagegen.web.ops.key_routes import KEY_STORE
from imagegen.web.routes import ROUTES
from tests.support import ADMIN_TOKEN, AS_ADMIN, eventually, over_rows
from tests.web.conftest import Client, StartService

SECRET = "canary-key-of-web"
OTHER_SECRET = "canary-key-of-app"
KEYS = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("web", SECRET), ("app", OTHER_SECRET))}
BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}
PARAMETERS = {
    "{version}": "0",
    "{taskId}": "0" * 32,
    "{index}": "0",
    "{modelId}": "m",
    "{name}": "nobody",
    "{file}": "none.css",
}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


AS_WEB, AS_APP = bearer(SECRET), bearer(OTHER_SECRET)


@pytest.fixture
async def keyed(start_service: StartService) -> Client:
    """Start a service with two keys of the settings."""
    return await start_service(api_keys=KEYS)


def path_of(operation: Operation) -> str:
    path = operation.path
    for parameter, value in PARAMETERS.items():
        path = path.replace(parameter, value)
    assert "{" not in path
    return path


CALLERS: dict[str, tuple[dict[str, str], str]] = {
    "nobody": ({}, ""),
    "wrong": (bearer("canary-wrong"), ""),
    "no scheme": ({"Authorization": SECRET}, ""),
    "basic": ({"Authorization": f"Basic {SECRET}"}, ""),
    "longer": (bearer(SECRET + "x"), ""),
    "no UTF-8": (bearer("canary-\udcff"), ""),
    "query": ({}, f"?key={SECRET}&api_key={SECRET}&X-API-Key={SECRET}&authorization=Bearer%20{SECRET}"),
    "admin query": ({}, f"?token={ADMIN_TOKEN}&admin_token={ADMIN_TOKEN}"),
    "two keys": (AS_WEB | {"X-API-Key": OTHER_SECRET}, ""),
    "unsigned link": ({}, "?exp=9999999999&sig=AAAAAAAAAAAAAAAAAAAAAA"),
    "key": (AS_WEB, ""),
    "key in its own header": ({"X-API-Key": SECRET}, ""),
    "key twice": (AS_WEB | {"X-API-Key": SECRET}, ""),
    "admin": (AS_ADMIN, ""),
    "admin in the other header": ({"X-API-Key": ADMIN_TOKEN}, ""),
}
ADMITTED = {
    "none": set(CALLERS),
    "key": {caller for caller in CALLERS if caller.startswith(("key", "admin"))} - {"admin query"},
    "admin": {"admin", "admin in the other header"},
}
ADMITTED["link"] = ADMITTED["key"]


async def test_every_route_admits_exactly_those_who_have_what_it_needs(keyed: Client) -> None:
    assert {operation.needs for operation, _ in ROUTES} == {"none", "key", "admin", "link"}
    for operation, _ in ROUTES:
        for caller, (headers, query) in CALLERS.items():
            sent: dict[str, Any] = {"json": {}} if operation.method == "post" else {}
            answer = await keyed.request(
                operation.method, path_of(operation) + query, headers=headers, allow_redirects=False, **sent
            )
            place = f"{operation.method} {operation.path} as {caller}: {answer.status}"
            assert (answer.status != 401) == (caller in ADMITTED[operation.needs]), place
            if answer.status == 401:
                await check_refusal(answer, operation.envelope)
            await answer.read()


async def check_refusal(answer: Any, envelope: str) -> None:
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    body = await answer.json()
    if envelope == "openai":
        assert body["error"] == {
            "message": "A valid key is needed",
            "type": "authentication_error",
            "param": None,
            "code": "unauthorized",
        }
        assert answer.headers["x-should-retry"] == "false"
    elif answer.url.path == "/mcp":
        assert body["jsonrpc"] == "2.0"
        assert body["error"]["data"] == {"statusCode": 401, "code": "unauthorized", "retryable": False}
    else:
        assert (body["code"], body["statusCode"], body["retryable"]) == ("unauthorized", 401, False)


async def test_a_route_needs_a_key_unless_its_operation_states_otherwise() -> None:
    assert Operation("get", "/new", "new", "t", "s", "", ()).needs == "key"
    free = {operation.path for operation, _ in ROUTES if operation.needs == "none"}
    assert free == {
        "/",
        "/board",
        "/api/health",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/docs/{file}",
        "/assets/{version}/{file}",
    }


async def test_without_keys_every_caller_may_call_all_routes_but_those_of_the_admin(service: Client) -> None:
    for operation, _ in ROUTES:
        sent: dict[str, Any] = {"json": {}} if operation.method == "post" else {}
        for headers in ({}, bearer("any")):
            answer = await service.request(
                operation.method, path_of(operation), headers=headers, allow_redirects=False, **sent
            )
            for_admin = operation.needs == "admin" or operation.path == "/api/usage"
            assert (answer.status == 401) == for_admin, operation.path
            await answer.read()


async def test_an_unknown_route_is_not_found_without_a_key(keyed: Client) -> None:
    assert (await keyed.get("/api/nothing")).status == 404
    assert (await keyed.put("/api/models")).status == 405


# Refused requests


async def test_a_stranger_with_wrong_keys_is_limited_in_the_end_and_clients_are_not(
    start_service: StartService,
) -> None:
    client = await start_service(api_keys=KEYS, rate_limit_max=5)
    seen = [(await client.get("/api/images/x/0", headers=bearer(str(number)))).status for number in range(8)]
    assert seen == [401] * 5 + [429] * 3
    limited = await client.get("/v1/models")
    assert limited.status == 429
    assert int(limited.headers["Retry-After"]) > 0
    answer = await client.get("/v1/models", headers=AS_WEB)
    assert (answer.status, answer.headers["X-RateLimit-Remaining"]) == (200, "4")


async def refused(client: Client, head: str, body: bytes = b"") -> bytes:
    """Return everything that the service sends for a request, until it closes."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(head.replace("\n", "\r\n").encode() + body)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_a_refused_upload_is_answered_before_its_body_is_read(keyed: Client) -> None:
    for more in ("Content-Length: 10000000\n", "Transfer-Encoding: chunked\n"):
        answer = await refused(keyed, f"POST /api/uploads HTTP/1.1\nHost: a\nContent-Type: image/png\n{more}\n")
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nConnection: close\r\n" in answer


async def test_a_client_that_expects_100_continue_is_refused_at_once(keyed: Client) -> None:
    head = "POST /api/uploads HTTP/1.1\nHost: a\nContent-Type: image/png\nContent-Length: 100\nExpect: 100-continue\n"
    answer = await refused(keyed, head + "\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in answer
    reader, writer = await asyncio.open_connection(keyed.host, keyed.port)
    writer.write(f"{head}Authorization: Bearer {SECRET}\n\n".replace("\n", "\r\n").encode())
    assert await asyncio.wait_for(reader.readline(), 20) == b"HTTP/1.1 100 Continue\r\n"
    writer.close()


async def test_another_expectation_fails_for_every_caller(keyed: Client) -> None:
    head = f"GET /api/models HTTP/1.1\nHost: a\nExpect: much\nX-API-Key: {SECRET}\n\n"
    assert (await refused(keyed, head)).startswith(b"HTTP/1.1 417 ")


async def test_a_refused_small_body_leaves_the_connection_open(keyed: Client) -> None:
    reader, writer = await asyncio.open_connection(keyed.host, keyed.port)
    head = (
        b"POST /api/images/generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 6\r\n\r\n"
    )
    for _ in range(2):
        writer.write(head)
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 401 ")
        writer.write(b'{"a":1')
        lines = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        length = int(lines.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
    writer.close()


# While the keys in Redis are not known


async def test_until_the_keys_were_read_nobody_is_taken_for_allowed(start_service: StartService) -> None:
    client = await start_service(redis_url="redis://127.0.0.1:1")
    for headers in ({}, bearer("any")):
        answer = await client.get("/api/models", headers=headers)
        assert (answer.status, (await answer.json())["code"]) == (503, "queue_unavailable")
        assert answer.headers["Retry-After"]
    assert (await client.get("/api/models", headers=AS_ADMIN)).status == 200
    assert (await client.get("/healthz")).status == 200


async def test_with_keys_of_the_settings_a_caller_without_one_is_refused_also_then(start_service: StartService) -> None:
    client = await start_service(api_keys=KEYS, redis_url="redis://127.0.0.1:1")
    assert (await client.get("/api/models")).status == 401
    assert [(await client.get("/api/models", headers=headers)).status for headers in (AS_WEB, bearer("?"))] == [503] * 2


async def test_a_public_service_stays_closed_after_its_last_key_was_revoked(start_service: StartService) -> None:
    public = {"hosts": ("0.0.0.0",), "provider": "together", "together_api_key": "k"}
    local = await start_service()
    secret = await make_key(local, name="only")
    client = await start_service(**public)
    assert (await client.get("/api/images/x", headers=bearer(secret))).status == 404
    gone = await (await client.delete("/api/admin/keys/only", headers=AS_ADMIN)).json()
    assert gone == {"success": True, "name": "only"}
    assert (await client.get("/api/images/x", headers=bearer(secret))).status == 401
    assert (await client.get("/api/images/x")).status == 401


# Admin routes of the keys


async def make_key(client: Client, **fields: Any) -> str:
    answer = await client.post("/api/admin/keys", json=fields, headers=AS_ADMIN)
    assert answer.status == 201, await answer.text()
    return str((await answer.json())["secret"])


async def test_the_admin_makes_lists_rotates_and_revokes_keys(service: Client) -> None:
    made = await service.post(
        "/api/admin/keys",
        json={"name": "cli", "dailyUsd": 1.25, "rate": 60, "models": ["flux*"], "maxMegapixels": 2, "expires": "90d"},
        headers=AS_ADMIN,
    )
    body = await made.json()
    assert made.status == 201
    assert made.headers["Cache-Control"] == "no-store"
    shown = {name: body["key"][name] for name in ("name", "fixed", "dailyUsd", "rate", "models", "maxMegapixels")}
    assert shown == {
        "name": "cli",
        "fixed": False,
        "dailyUsd": 1.25,
        "rate": 60,
        "models": ["flux*"],
        "maxMegapixels": 2.0,
    }
    old = body["secret"]
    assert (await service.get("/api/models")).status == 401
    rotated = await (await service.post("/api/admin/keys/cli/rotate", json={"grace": "1h"}, headers=AS_ADMIN)).json()
    assert [(await service.get("/api/models", headers=bearer(each))).status for each in (old, rotated["secret"])] == [
        200,
        200,
    ]
    listed = await (await service.get("/api/admin/keys", headers=AS_ADMIN)).json()
    assert [len(each["secrets"]) for each in listed["keys"]] == [2]
    assert "sha256" not in json.dumps(listed)
    gone = await (await service.delete("/api/admin/keys/cli", headers=AS_ADMIN)).json()
    assert gone == {"success": True, "name": "cli", "open": True}
    assert (await service.get("/api/models")).status == 200


@over_rows(
    ("method", "path", "body", "status", "code"),
    [
        ("post", "", {"name": "web"}, 409, "key_is_fixed"),
        ("post", "", {}, 400, "invalid_request"),
        ("post", "", {"name": "a b"}, 400, "invalid_request"),
        ("post", "", {"name": "a", "rate": 0}, 400, "invalid_request"),
        ("post", "", {"name": "a", "rates": 1}, 400, "invalid_request"),
        ("post", "", {"name": "a", "expires": "soon"}, 400, "invalid_request"),
        ("post", "/web/rotate", {}, 409, "key_is_fixed"),
        ("post", "/nobody/rotate", {}, 404, "key_not_found"),
        ("post", "/web/rotate", {"grace": "-1"}, 400, "invalid_request"),
        ("delete", "/web", None, 409, "key_is_fixed"),
        ("delete", "/nobody", None, 404, "key_not_found"),
    ],
)
async def test_a_bad_change_of_a_key_is_an_error(
    keyed: Client, method: str, path: str, body: Any, status: int, code: str
) -> None:
    answer = await keyed.request(method, f"/api/admin/keys{path}", json=body, headers=AS_ADMIN)
    assert (answer.status, (await answer.json())["code"]) == (status, code)


async def test_a_name_is_taken_once(service: Client) -> None:
    await make_key(service, name="a")
    again = await service.post("/api/admin/keys", json={"name": "a"}, headers=AS_ADMIN)
    assert (again.status, (await again.json())["code"]) == (409, "key_exists")


async def test_a_revoked_key_is_refused_on_the_other_instance_and_its_streams_end(start_two: Any) -> None:
    one, two = await start_two(sandbox_delay_s=300.0)
    secret = await make_key(one, name="app")
    await eventually(lambda: two.app[GUARD].ring.has_keys)
    headers = bearer(secret)
    made = await (await two.post("/api/images/generate", json=BODY, headers=headers)).json()
    stream = await two.get(f"/api/images/{made['taskId']}/events", headers=headers)
    await stream.content.readline()
    waiting = asyncio.create_task(two.get(f"/api/images/{made['taskId']}?wait=60", headers=headers))
    await asyncio.sleep(0)
    assert (await one.delete("/api/admin/keys/app", headers=AS_ADMIN)).status == 200
    await asyncio.wait_for(stream.content.read(), 20)
    assert (await asyncio.wait_for(waiting, 20)).status in (200, 401)
    await eventually(lambda: not two.app[GUARD].ring.has_keys)


# Limits of a key


async def test_limits_count_by_key_and_a_keys_own_take_the_place_of_the_defaults(start_service: StartService) -> None:
    client = await start_service(rate_limit_max=4, image_rate_limit_max=2, sandbox_delay_s=0.0)
    secrets = {
        name: await make_key(client, name=name, **limits)
        for name, limits in {
            "plain": {},
            "other": {},
            "slow": {"rate": 1},
            "fast": {"rate": 100, "imagesRate": 3},
        }.items()
    }

    async def passed(name: str, *, generating: bool = False) -> int:
        statuses = []
        for number in range(6):
            if generating:
                body = BODY | {"prompt": f"{name} {number}"}
                answer = await client.post("/api/images/generate", json=body, headers=bearer(secrets[name]))
            else:
                answer = await client.get("/api/models", headers=bearer(secrets[name]))
            statuses.append(answer.status)
            assert answer.status in (200, 202, 429)
        return len([status for status in statuses if status != 429])

    assert [await passed(name) for name in ("plain", "other", "slow", "fast")] == [4, 4, 1, 6]
    assert [await passed(name, generating=True) for name in ("plain", "fast")] == [0, 3]


async def test_a_key_may_have_limits_where_all_others_have_none(service: Client) -> None:
    slow = bearer(await make_key(service, name="slow", rate=2, imagesRate=1))
    free = bearer(await make_key(service, name="free"))
    answers = [await service.get("/api/models", headers=slow) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[0].headers["X-RateLimit-Limit"] == "2"
    assert {(await service.get("/api/models", headers=free)).status for _ in range(5)} == {200}


async def test_a_model_or_size_outside_of_the_keys_is_not_allowed(start_service: StartService) -> None:
    client = await start_service(model_aliases={"cheap": "gpt-image-1", "flux-alias": "other"}, sandbox_delay_s=0.0)
    limited = bearer(await make_key(client, name="limited", models=["flux*", "other"], maxMegapixels=0.25))
    free = bearer(await make_key(client, name="free"))
    cases: list[tuple[dict[str, Any], int, list[str]]] = [
        ({"model": "flux-1"}, 202, []),
        ({"model": "flux-alias"}, 202, []),
        ({"model": "cheap"}, 403, ["model"]),
        ({}, 403, ["model"]),
        ({"model": "flux-1", "width": 1024, "height": 512}, 403, ["width", "height"]),
        (
            {"model": "gpt-image-1", "resolution": "2K", "width": None, "height": None},
            403,
            ["model", "width", "height"],
        ),
    ]
    for fields, status, names in cases:
        body = {**BODY, **fields}
        await client.post("/api/images/generate", json=body, headers=free)
        # The same bytes of another key are no way around it.
        answer = await client.post("/api/images/generate", json=body, headers=limited)
        assert answer.status == status, fields
        view = await answer.json()
        assert [each["field"] for each in view.get("details", [])] == names
        assert view.get("code", "not_allowed") == "not_allowed"
        batch = await client.post("/api/images/batch", json={"requests": [body]}, headers=limited)
        (entry,) = (await batch.json())["results"]
        assert entry["statusCode"] in ((403,) if status == 403 else (200, 202))
    v1 = await client.post("/v1/images/generations", json={"prompt": "a", "model": "flux-1"}, headers=limited)
    error = (await v1.json())["error"]
    assert (v1.status, error["code"], error["type"], error["param"]) == (
        403,
        "not_allowed",
        "permission_error",
        "size",
    )


async def test_a_fallback_model_outside_of_the_keys_is_never_called(start_paid: StartService, upstream: Any) -> None:
    client = await start_paid(fallback_models=("forbidden", "black-forest-labs/FLUX.1-schnell"))
    headers = bearer(await make_key(client, name="limited", models=["black-forest-labs/*"]))
    body = BODY | {"model": "black-forest-labs/FLUX.1-schnell-Free"}
    done = await (await client.post("/api/images/generate?wait=20", json=body, headers=headers)).json()
    assert done["status"] == "completed", done
    assert [call.body["model"] for call in upstream.ledger.calls] == [
        "black-forest-labs/FLUX.1-schnell-Free",
        "black-forest-labs/FLUX.1-schnell",
    ]


# Secrets


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Collect every line that is logged, with its fields and traces."""
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(f"{message}{message.record}"), level=0, diagnose=True)
    yield lines
    logger.remove(number)


async def test_no_secret_is_in_any_log_line_response_or_metric(start_service: StartService, log: list[str]) -> None:
    client = await start_service(api_keys=KEYS, log_level="TRACE", rate_limit_max=30)
    made = await make_key(client, name="cli")
    rotated = (await (await client.post("/api/admin/keys/cli/rotate", headers=AS_ADMIN)).json())["secret"]
    wrong = "canary-wrong"
    shown = []
    for secret in (SECRET, made, rotated, wrong, ADMIN_TOKEN):
        for path in ("/api/models", "/v1/models", "/api/images/none", f"/api/images/none?key={wrong}", "/metrics"):
            for headers in (bearer(secret), {"X-API-Key": secret}):
                answer = await client.get(path, headers=headers)
                shown.append(f"{dict(answer.headers)}{await answer.text()}")
    bad = await client.post("/api/admin/keys", data=b"{", headers=AS_ADMIN | {"Content-Type": "application/json"})
    shown += [await bad.text(), await (await client.get("/api/admin/keys", headers=AS_ADMIN)).text()]
    assert any("requestId" in line for line in shown)
    hashes = [hashlib.sha256(secret.encode()).hexdigest() for secret in (SECRET, made, rotated, ADMIN_TOKEN)]
    for text in (*log, *shown):
        for secret in (SECRET, OTHER_SECRET, made, rotated, ADMIN_TOKEN, *hashes):
            assert secret not in text
    assert not any(wrong in line for line in log if "key=" not in line)
    stored = await client.app[CONNECTION].commands.hgetall(client.app[KEY_STORE]._keys.api_keys)
    assert not any(secret.encode() in value for value in stored.values() for secret in (made, rotated))


async def test_keys_of_another_type_in_redis_are_unavailable_without_a_traceback(service: Client) -> None:
    key_store, texts = service.app[KEY_STORE], list[str]()
    connection, keys = service.app[CONNECTION], service.app[QUEUE].keys
    assert key_store.ring.is_loaded
    await connection.commands.delete(keys.api_keys)
    await connection.commands.rpush(keys.api_keys, "of another program")
    sink = logger.add(texts.append, level="ERROR", backtrace=True)
    try:
        answer = await service.get("/api/admin/keys", headers=AS_ADMIN)
    finally:
        logger.remove(sink)
    assert (answer.status, (await answer.json())["code"]) == (503, "queue_unavailable")
    (text,) = [text for text in texts if "/api/admin/keys" in text]  # the loop that reads the keys may report it too
    assert "WRONGTYPE" in text
    assert not any("Traceback" in text for text in texts)
