"""Tests of who may call which route: API keys, the admin token, signed links and nobody."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from imagegen import line_limit
from imagegen.app import CONNECTION, QUEUE
from imagegen.web.openapi.document import Operation
from imagegen.web.ops.key_routes import KEY_STORE
from imagegen.web.routes import ROUTES
from tests.support import ADMIN_TOKEN, AS_ADMIN, eventually, logged, over_rows
from tests.web.api_keys import KEYS, OTHER_SECRET, SECRET, bearer, make_key
from tests.web.conftest import Client, StartService

PARAMETERS = {
    "{version}": "0",
    "{taskId}": "0" * 32,
    "{index}": "0",
    "{modelId}": "m",
    "{name}": "nobody",
    "{file}": "none.css",
}

AS_WEB, AS_APP = bearer(SECRET), bearer(OTHER_SECRET)


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


async def first_line(client: Client, head: str) -> str:
    """Return the first line that the service sends for the head of a request."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(head.replace("\n", "\r\n").encode())
    try:
        return (await asyncio.wait_for(reader.readline(), 20)).decode()
    finally:
        writer.close()


EXPECTING = "POST {} HTTP/1.1\nHost: a\nContent-Type: {}\nContent-Length: {}\nExpect: 100-continue\n{}\n"


@over_rows(
    ("path", "media_type", "length", "more", "status"),
    [
        ("/api/images/generate", "application/json", 90_000_000, "", 413),
        ("/api/uploads", "image/png", 90_000_000, "", 413),
        ("/api/images/batch", "text/plain", 100, "", 415),
        ("/v1/images/generations", "application/json", 100, "Content-Encoding: gzip\n", 415),
        ("/v1/images/edits", "multipart/form-data", 100, "", 400),
        ("/mcp", "text/plain", 100, "", 415),
    ],
)
async def test_a_body_that_its_head_rules_out_is_not_requested(
    service: Client, path: str, media_type: str, length: int, more: str, status: int
) -> None:
    line = await first_line(service, EXPECTING.format(path, media_type, length, more))
    assert line.startswith(f"HTTP/1.1 {status} ")


@over_rows(
    ("path", "media_type", "length"),
    [
        ("/api/images/generate", "application/json", 100),
        ("/api/images/generate", "application/json", 500_000),
        ("/api/images/generate", "application/json", 2_000_000),
        ("/api/uploads", "image/png", 100),
        ("/v1/images/edits", "multipart/form-data; boundary=b", 100),
        ("/mcp", "application/json", 100),
    ],
)
async def test_a_body_is_requested_from_a_client_that_waits_with_it(
    service: Client, path: str, media_type: str, length: int
) -> None:
    line = await first_line(service, EXPECTING.format(path, media_type, length, ""))
    assert line == "HTTP/1.1 100 Continue\r\n"


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


async def test_many_commands_that_redis_refuses_are_a_few_lines_with_a_count(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_limit, "COUNTED_S", 2.0)
    connection, keys = service.app[CONNECTION], service.app[QUEUE].keys
    await connection.commands.delete(keys.api_keys)
    await connection.commands.rpush(keys.api_keys, "of another program")
    with logged("ERROR", "{message}") as lines:
        for _ in range(12):
            assert (await service.get("/api/admin/keys", headers=AS_ADMIN)).status == 503
        await eventually(lambda: "Redis refused 7 more commands of /api/admin/keys\n" in lines, within_s=20)
    assert sum("refused a command of /api/admin/keys" in line for line in lines) == 5
