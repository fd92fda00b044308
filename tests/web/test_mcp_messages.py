"""Tests of messages to POST /mcp that are malformed, of other versions or from other sites: errors, never faults."""

from __future__ import annotations

import base64
import itertools
from typing import Any

from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import LEGACY, TASKS, call, headers_of, message, modern, result, send
from tests.web.conftest import Client, StartService

PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%b}'
JSON = {"Content-Type": "application/json"}
NO_OBJECTS = (-32700, -32600)


def with_id(text: bytes) -> bytes:
    return PING.replace(b'"id":1', b'"id":' + text)


def deep(levels: int) -> bytes:
    nested = b'{"a":' * levels + b"1" + b"}" * levels
    return CALL % (b'{"name":"generate_image","arguments":{"prompt":"a","extra":%b}}' % nested)


MALFORMED = (
    b"",
    b"   ",
    b"\x00",
    b"{",
    b"{}",
    b"null",
    b"true",
    b"1",
    b'"text"',
    b"[]",
    b"[{}]",
    b"[" + PING + b"]",
    b"[" + PING + b"," + PING + b"]",
    b"[" + PING + b",1,null]",
    b'[{"jsonrpc":"2.0","method":"notifications/initialized"}]',
    b"\xff\xfe",
    b"\xef\xbb\xbf" + PING,
    b"\xef\xbb\xbf{}",
    PING.decode().encode("utf-16"),
    PING.decode().encode("utf-16-le"),
    PING.decode().encode("utf-32"),
    b'{"jsonrpc":"2.0","id":1,"method":"\xc0\xaf"}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"\xff"}}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"\\ud800"}}',
    with_id(b'"\\ud800"'),
    b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}',
    b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
    b'{"jsonrpc":2,"id":1,"method":"ping"}',
    b'{"jsonrpc":2.0,"id":1,"method":"ping"}',
    b'{"id":1,"method":"ping"}',
    *map(with_id, (b"null", b"1.5", b"1.0", b"1e3", b"true", b"false", b"{}", b"[1]", b"NaN", b"01", b"0x1")),
    with_id(b'"' + b"x" * 1_001 + b'"'),
    *map(with_id, (b"18446744073709551616", b"-9223372036854775809", b"9" * 5_000, b"1e999")),
    b'{"jsonrpc":"2.0","id":1}',
    b'{"jsonrpc":"2.0","id":1,"method":7}',
    b'{"jsonrpc":"2.0","id":1,"method":null}',
    b'{"jsonrpc":"2.0","id":1,"method":["ping"]}',
    *(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%b}' % text for text in (b"[]", b"null", b"7", b'"x"')),
    b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}',
    b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/list"}',
    CALL % b'{"name":"list_image_models","name":"generate_image"}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"a","prompt":"b"}}',
    b'{"jsonrpc":"2.0","id":1,"result":{}}',
    b'{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":""}}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"a","maxCostUsd":NaN}}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"a","maxCostUsd":1e999}}',
    CALL % b'{"name":"generate_image","arguments":{"prompt":"a","maxCostUsd":-Infinity}}',
    deep(40),
    deep(5_000),
    b"[" * 20_000,
    b'{"jsonrpc":"2.0","method":"x","params":' + b"[" * 20_000,
    PING + b" trailing",
    PING + PING,
    PING + b"\n" + PING,
    b"/* a comment */" + PING,
    PING.replace(b'"', b"'"),
    PING[:-1] + b",}",
)


async def test_a_malformed_message_is_an_error_of_json_rpc(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    for body in MALFORMED:
        response = await service.post("/mcp", data=body, headers=JSON)
        answer = await response.json()
        assert (response.status, answer["jsonrpc"]) == (400, "2.0"), body[:80]
        assert answer["error"]["code"] in NO_OBJECTS, body[:80]
        assert answer["id"] in (None, 1), body[:80]
        assert len(await response.read()) < 500, body[:80]
    assert not upstream.ledger.calls


async def test_a_batch_is_refused_in_words(service: Client) -> None:
    response = await service.post("/mcp", data=b"[" + PING + b"]", headers=JSON)
    assert "batches are not supported" in (await response.json())["error"]["message"]


async def test_each_valid_id_comes_back_unchanged(service: Client) -> None:
    ids = (0, -1, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), "", "a", "ü€", "x" * 1_000, "null", '"quoted"')
    for sent, method in itertools.product(ids, ("ping", "nothing/here")):
        body = {"jsonrpc": "2.0", "id": sent, "method": method}
        answer = await (await service.post("/mcp", json=body)).json()
        assert (answer["id"], type(answer["id"])) == (sent, type(sent))


WRONG_CALLS: tuple[Any, ...] = (
    {},
    {"name": None},
    {"name": 7},
    {"name": []},
    {"name": "no_tool"},
    {"name": "GENERATE_IMAGE"},
    {"name": " generate_image"},
    {"name": "ｇenerate_image"},
    {"name": "x" * 100_000},
    {"name": "generate_image\u0000"},
    {"name": "generate_image", "arguments": []},
    {"name": "generate_image", "arguments": "x"},
    {"name": "generate_image", "arguments": 7},
    {"name": "generate_image", "arguments": False},
)


async def test_a_call_of_no_tool_is_an_error_of_its_parameters(service: Client) -> None:
    for params in WRONG_CALLS:
        for body in (message("tools/call", **params), modern("tools/call", **params)):
            headers = headers_of(body | {"method": "x"}) | {"Mcp-Method": "tools/call"} if "_meta" in params else JSON
            response = await service.post("/mcp", json=body, headers=headers)
            answer = await response.json()
            assert response.status in (200, 400)
            assert answer["error"]["code"] in (-32602, -32020), params
            assert len(await response.read()) < 500


async def test_a_notification_has_no_effect_and_no_answer(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    for method in ("notifications/initialized", "notifications/cancelled", "tools/call", "ping", "nothing/here", ""):
        params = {"name": "generate_image", "arguments": {"prompt": "a"}, "requestId": {}}
        body = {"jsonrpc": "2.0", "method": method, "params": params}
        response = await service.post("/mcp", json=body)
        assert (response.status, await response.read()) == (202, b"")
    assert not upstream.ledger.calls


async def test_only_post_is_taken(service: Client) -> None:
    for method in ("GET", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"):
        response = await service.request(method, "/mcp", headers={"Accept": "text/event-stream"})
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_pages_of_other_sites_are_refused(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    own = str(service.make_url("/")).rstrip("/")
    port = int(service.make_url("/").port or 0)
    for origin in (
        "null",
        "https://evil.example",
        f"{own}.evil.example",
        f"http://evil.example:{port}",
        f"http://localhost:{port + 1}",
        f"{own}/",
        f"{own}, {own}",
        "file://",
        "chrome-extension://abc",
        "vscode-webview://abc",
        "http://[::1]",
    ):
        status, answer = await send(service, call("generate_image", prompt="a"), {"Origin": origin})
        assert (status, answer["error"]["data"]["code"]) == (403, "cross_site"), origin
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
        assert (await send(service, call("generate_image", prompt="a"), headers))[0] == 403
    assert not upstream.ledger.calls
    for origin in (own, own.upper()):
        assert (await send(service, call("list_image_models"), {"Origin": origin}))[0] == 200


async def test_a_site_of_the_operator_is_served(start_service: StartService) -> None:
    service = await start_service(cors_origins=("https://app.example",))
    assert (await send(service, call("list_image_models"), {"Origin": "https://app.example"}))[0] == 200
    assert (await send(service, call("list_image_models"), {"Origin": "https://app.example.evil"}))[0] == 403


def encoded(text: str) -> str:
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


async def test_headers_that_are_not_the_body_are_refused(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    body = call("generate_image", prompt="a")
    changes: tuple[dict[str, str | None], ...] = (
        {"Mcp-Method": None},
        {"Mcp-Method": ""},
        {"Mcp-Method": "tools/list"},
        {"Mcp-Method": "TOOLS/CALL"},
        {"Mcp-Method": "tools/call, tools/call"},
        {"Mcp-Method": encoded("tools/call")},
        {"Mcp-Name": None},
        {"Mcp-Name": ""},
        {"Mcp-Name": "edit_image"},
        {"Mcp-Name": "Generate_Image"},
        {"Mcp-Name": encoded("edit_image")},
        {"Mcp-Name": "=?base64?!!?="},
        {"Mcp-Name": "=?base64?/w==?="},
        {"Mcp-Name": encoded("generate_image").replace("base64", "BASE64")},
        {"MCP-Protocol-Version": None},
        {"MCP-Protocol-Version": ""},
        {"MCP-Protocol-Version": LEGACY},
        {"MCP-Protocol-Version": "2027-01-01"},
        {"MCP-Protocol-Version": "draft"},
    )
    for changed in changes:
        headers = {name: value for name, value in (headers_of(body) | changed).items() if value is not None}
        response = await service.post("/mcp", json=body, headers=headers)
        answer = await response.json()
        assert (response.status, answer["error"]["code"], answer["id"]) == (400, -32020, body["id"]), changed
    for name in ("Mcp-Method", "Mcp-Name", "MCP-Protocol-Version"):
        twice = [*headers_of(body).items(), (name, headers_of(body)[name])]
        assert (await service.post("/mcp", json=body, headers=twice)).status == 400
    assert not upstream.ledger.calls
    assert (await send(service, call("list_image_models"), {"Mcp-Name": encoded("list_image_models")}))[0] == 200


async def test_wrong_versions_are_answered_with_those_that_are_supported(service: Client) -> None:
    for version in ("2027-01-01", "2026-07-27", "1.0", "x" * 500):
        response = await service.post("/mcp", json=message("tools/list"), headers={"MCP-Protocol-Version": version})
        answer = await response.json()
        assert (response.status, answer["error"]["code"]) == (400, -32022)
        assert (answer["error"]["data"]["requested"], "2026-07-28" in answer["error"]["data"]["supported"]) == (
            version,
            True,
        )
    status, answer = await send(service, message("tools/list"))
    assert (status, answer["error"]["code"]) == (400, -32602), "a request of 2026-07-28 without its _meta"
    body = modern("tools/list")
    body["params"]["_meta"]["io.modelcontextprotocol/clientCapabilities"] = []
    assert (await send(service, body))[1]["error"]["code"] == -32602


async def test_methods_of_the_other_wire_are_unknown(service: Client) -> None:
    for method in ("initialize", "ping", "tasks/list", "tasks/result", "resources/list", "logging/setLevel"):
        status, answer = await send(service, modern(method, capabilities=TASKS))
        assert (status, answer["error"]["code"]) == (404, -32601), method
    for method in ("server/discover", "tasks/get", "tasks/cancel", "tasks/list", "tasks/result", "prompts/list"):
        response = await service.post("/mcp", json=message(method), headers={"MCP-Protocol-Version": LEGACY})
        assert (response.status, (await response.json())["error"]["code"]) == (200, -32601), method


async def test_the_extension_of_tasks_refuses_what_is_no_task(service: Client) -> None:
    for method in ("tasks/get", "tasks/cancel", "tasks/update"):
        for task_id in ("0" * 32, "x", "", "../x", "0" * 100_000):
            body = modern(method, taskId=task_id, capabilities=TASKS)
            status, answer = await send(service, body, {"Mcp-Name": encoded(task_id[:100])})
            assert (status, answer["error"]["code"]) == (400, -32602 if len(task_id) <= 100 else -32020)
        for params in ({}, {"taskId": None}, {"taskId": 7}, {"taskId": ["0" * 32]}):
            body = modern(method, capabilities=TASKS, **params)
            headers = headers_of(modern("tools/list")) | {"Mcp-Method": method}
            response = await service.post("/mcp", json=body, headers=headers)
            assert (response.status, (await response.json())["error"]["code"]) == (400, -32602)
        capabilities: Any
        for capabilities in ({}, {"extensions": []}, {"extensions": {}}, {"extensions": None}, {"tasks": {}}):
            body = modern(method, taskId="0" * 32, capabilities=capabilities)
            assert (await send(service, body))[1]["error"]["code"] == -32021


async def test_a_wrong_token_of_progress_is_none(service: Client) -> None:
    token: Any
    for token in (1.5, True, None, {}, [], [1]):
        body = call("generate_image", prompt="a", width=64, height=64, meta={"progressToken": token})
        response = await service.post("/mcp", json=body, headers=headers_of(body))
        assert response.headers["Content-Type"].startswith("application/json"), token
        assert (await response.json())["result"]["structuredContent"]["status"] == "completed"


async def test_a_limit_that_is_no_sum_is_named(service: Client) -> None:
    limit: Any
    for limit in ("NaN", "-1", -0.5, 1e9, True, [], {}, "1 USD", "  "):
        for tool in ("generate_image", "quote_image"):
            found = await result(service, call(tool, prompt="a", maxCostUsd=limit))
            assert found["structuredContent"]["error"]["details"][0].startswith("maxCostUsd: must be")
            assert "maxCostUsd" in found["content"][0]["text"]
