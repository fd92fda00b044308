"""Errors of invalid requests over HTTP, as docs/api.md lists them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Answer, Service
from tests.service.wire import JSON, connect, head, over_the_wire

GENERATE = "/api/images/generate"


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_paid(service: Service, upstream: EmulatorProcess) -> Iterator[None]:
    yield
    assert {call["prompt"] for call in upstream.ledger()["calls"]} <= {"good", "x" * 4000}


def post(service: Service, body: bytes, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return service.request("POST", GENERATE, body, headers=named)


NOT_JSON = {
    "no JSON": b"prompt=a cat",
    "empty": b"",
    "cut": b'{"prompt": "a cat"',
    "an array": b'[{"prompt": "a cat"}]',
    "a text": b'"a cat"',
    "null": b"null",
    "33 levels": b'{"prompt": ' + b"[" * 32 + b"]" * 32 + b"}",
    "very many levels": b"[" * 100_000,
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a cat"}',
    "UTF-16": '{"prompt": "a cat"}'.encode("utf-16"),
    "a key that comes twice": b'{"prompt": "a cat", "prompt": "a dog"}',
    "an inner key that comes twice": b'{"prompt": "a cat", "webhook": {"url": "a", "url": "b"}}',
    "a key that comes twice by an escape": b'{"prompt": "a cat", "pro\\u006dpt": "a dog"}',
    "NaN": b'{"prompt": "a cat", "guidanceScale": NaN}',
    "Infinity": b'{"prompt": "a cat", "guidanceScale": -Infinity}',
    "an infinite number": b'{"prompt": "a cat", "guidanceScale": 1e999}',
    "an over-long number": b'{"prompt": "a cat", "seed": ' + b"1" * 5000 + b"}",
    "an over-long fraction": b'{"prompt": "a cat", "guidanceScale": 1.' + b"1" * 5000 + b"}",
    "a lone surrogate": b'{"prompt": "\\ud800"}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_body_other_than_a_json_object_is_invalid_json(service: Service, body: bytes) -> None:
    assert post(service, body).error == (400, "invalid_json")


WRONG: dict[str, tuple[str, Any]] = {
    "an empty prompt": ("prompt", ""),
    "a blank prompt": ("prompt", " \n\t "),
    "a long prompt": ("prompt", "x" * 32_001),
    "a number as prompt": ("prompt", 7),
    "null as prompt": ("prompt", None),
    "NUL in the prompt": ("prompt", "a\0cat"),
    "escape in the prompt": ("prompt", "a\x1b[31mcat"),
    "an empty model": ("model", ""),
    "a blank model": ("model", "  "),
    "a low width": ("width", 56),
    "a high width": ("width", 2056),
    "an odd width": ("width", 513),
    "a fraction": ("width", 512.5),
    "a boolean for a number": ("width", True),
    "a word for a number": ("width", "wide"),
    "a list for a number": ("width", [512]),
    "a low height": ("height", 0),
    "a huge height": ("height", 10**15),
    "no steps": ("steps", 0),
    "too many steps": ("steps", 101),
    "no image": ("n", 0),
    "seventeen images": ("n", 17),
    "a negative seed": ("seed", -2),
    "a large seed": ("seed", 2**63),
    "a boolean seed": ("seed", False),
    "a number as negative prompt": ("negativePrompt", 1),
    "a text as scale": ("guidanceScale", "much"),
    "a boolean as scale": ("guidanceScale", True),
    "an unknown format": ("outputFormat", "gif"),
    "a number as link": ("imageUrl", 1),
    "a text for a list": ("referenceImages", "https://images.example/a.png"),
    "an object for a text": ("prompt", {"text": "a cat"}),
}


@pytest.mark.parametrize(("field", "value"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_named(service: Service, field: str, value: object) -> None:
    answer = service.submit(**{"prompt": "a cat"} | {field: value})
    assert answer.error == (400, "invalid_request")
    (detail,) = answer.json["details"]
    assert set(detail) == {"field", "message"}
    assert detail["field"] == field
    assert detail["message"]
    assert answer.json["retryable"] is False


def test_a_missing_prompt_is_named(service: Service) -> None:
    answer = service.submit(width=512)
    assert answer.error == (400, "invalid_request")
    assert [detail["field"] for detail in answer.json["details"]] == ["prompt"]


def test_all_faults_are_reported_at_once(service: Service) -> None:
    answer = service.submit(prompt="", width=1, height=2, n=0, steps=0, seed=-2, outputFormat="bmp", sede=1)
    faulty = {"prompt", "width", "height", "n", "steps", "seed", "outputFormat", "sede"}
    assert {detail["field"] for detail in answer.json["details"]} == faulty


def test_at_most_fifty_faults_are_reported(service: Service) -> None:
    answer = service.submit(prompt="a cat", **{f"field{number}": 1 for number in range(200)})
    assert answer.error == (400, "invalid_request")
    assert len(answer.json["details"]) == 50


@pytest.mark.parametrize(("field", "near"), [("promt", "prompt"), ("heigth", "height"), ("negativeprompt", "negative")])
def test_an_unknown_field_is_named_with_the_nearest_valid_one(service: Service, field: str, near: str) -> None:
    answer = service.submit(**{"prompt": "a cat", field: 1})
    assert answer.error == (400, "invalid_request")
    (detail,) = answer.json["details"]
    assert detail["field"] == field
    assert near in detail["message"]


def test_both_spellings_of_a_field_are_a_fault(service: Service) -> None:
    answer = service.submit(prompt="a cat", negativePrompt="a dog", negative_prompt="a dog")
    assert answer.error == (400, "invalid_request")


def test_a_prompt_may_have_tabs_and_newlines_and_4000_characters(service: Service) -> None:
    assert service.submit(prompt="x" * 4000).status == 202
    assert service.submit(prompt="good").status == 202
    assert service.submit(prompt="\tgood\n").json["taskId"] == service.submit(prompt="good").json["taskId"]


TYPES = {
    "a form": {"Content-Type": "application/x-www-form-urlencoded"},
    "plain text": {"Content-Type": "text/plain"},
    "no type": {"Content-Type": ""},
    "another charset": {"Content-Type": "application/json; charset=latin-1"},
    "gzip": {"Content-Encoding": "gzip"},
    "identity": {"Content-Encoding": "identity"},
}


@pytest.mark.parametrize("headers", TYPES.values(), ids=TYPES.keys())
def test_only_plain_json_is_read(service: Service, headers: dict[str, str]) -> None:
    answer = service.request("POST", GENERATE, {"prompt": "a cat"}, headers=headers)
    assert answer.error == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json;charset=utf-8", "Application/JSON; Charset=UTF-8"]
)
def test_json_in_utf8_may_be_named_in_any_way(service: Service, kind: str) -> None:
    assert service.request("POST", GENERATE, {"prompt": "good"}, headers={"Content-Type": kind}).status in (200, 202)


CLOSED = {
    "a declared length": (head(JSON, f"Content-Length: {2**26}"), 413, "body_too_large"),
    "chunks": (
        head(JSON, "Transfer-Encoding: chunked") + b"%x\r\n" % (2**20 + 1) + b" " * (2**20 + 1) + b"\r\n0\r\n\r\n",
        413,
        "body_too_large",
    ),
    "a bad Host": (head("Host: a b", JSON, "Content-Length: 2") + b"{}", 400, "bad_request"),
    "an evil Host": (head('Host: a"><script>', JSON, "Content-Length: 2") + b"{}", 400, "bad_request"),
    "no request line": (b"what is this canary\r\n\r\n", 400, "bad_request"),
    "a bad header": (head("canary"), 400, "bad_request"),
    "two framings": (head(JSON, "Content-Length: 2", "Transfer-Encoding: chunked") + b"{}", 400, "bad_request"),
    "a bad chunk": (head(JSON, "Transfer-Encoding: chunked") + b"canary\r\n{}\r\n", 400, "bad_request"),
    "a long header": (head(f"X-Canary: {'canary' * 5000}"), 431, "headers_too_large"),
    "an expectation": (head(JSON, "Expect: canary", "Content-Length: 2") + b"{}", 417, "expectation_failed"),
}


@pytest.mark.parametrize(("sent", "status", "code"), CLOSED.values(), ids=CLOSED.keys())
def test_a_malformed_request_gets_json_and_a_closed_connection(
    service: Service, sent: bytes, status: int, code: str
) -> None:
    answer = over_the_wire(service, sent)
    assert answer.error == (status, code)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["Connection"].lower() == "close"
    assert not any(text in answer.body for text in (b"canary", b"<script>", b"Traceback"))


HEAD_FAULTS = {
    "a long header": (CLOSED["a long header"][0], 431, "headers_too_large"),
    "many headers": (head(*[f"X-{number}: canary" for number in range(300)]), 431, "headers_too_large"),
    "many long headers": (head(*[f"X-{number}: {'canary' * 1000}" for number in range(30)]), 431, "headers_too_large"),
    "a bad header": (head("canary"), 400, "bad_request"),
    "a bad Host": (head("Host: a b"), 400, "bad_request"),
}
OPENAI_TARGETS = ("/v1/images/generations", "/v1//images/edits?a=canary", "http://h/v1/models", f"/models/{'x' * 300}")


@pytest.mark.parametrize("target", OPENAI_TARGETS)
@pytest.mark.parametrize(("sent", "status", "code"), HEAD_FAULTS.values(), ids=HEAD_FAULTS.keys())
def test_a_refused_head_has_the_error_of_openai_on_its_routes(
    service: Service, target: str, sent: bytes, status: int, code: str
) -> None:
    answer = over_the_wire(service, sent.replace(GENERATE.encode(), target.encode(), 1))
    error = answer.json["error"]
    assert (answer.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["Connection"].lower() == "close"
    assert b"canary" not in answer.body


@pytest.mark.parametrize(("sent", "status", "code"), HEAD_FAULTS.values(), ids=HEAD_FAULTS.keys())
def test_a_refused_head_has_an_error_of_json_rpc_on_mcp(service: Service, sent: bytes, status: int, code: str) -> None:
    answer = over_the_wire(service, sent.replace(GENERATE.encode(), b"/mcp", 1))
    assert (answer.status, answer.json["jsonrpc"], answer.json["error"]["data"]["code"]) == (status, "2.0", code)


@pytest.mark.parametrize("kib", [30, 200, 800])
def test_a_client_that_still_sends_a_refused_head_reads_the_whole_response(service: Service, kib: int) -> None:
    with connect(service) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: a\r\nA: {'x' * 1024 * kib}".encode())
        response = b"".join(iter(lambda: connection.recv(4096), b""))
        connection.sendall(b"\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 431 ")
    assert response.endswith(b"}")


def test_a_body_of_exactly_the_limit_is_read(service: Service) -> None:
    body = json.dumps({"prompt": "good"}).encode()
    assert post(service, body + b" " * (2**20 - len(body))).status in (200, 202)


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing/here"), ("GET", "/api/nope"), ("GET", "//x")])
def test_an_unknown_route(service: Service, method: str, path: str) -> None:
    assert service.request(method, path).error == (404, "route_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", GENERATE, "POST"),
        ("PATCH", f"/api/images/{'0' * 32}", "GET"),
        ("DELETE", "/api/health", "GET"),
        ("POST", "/healthz", "GET"),
    ],
)
def test_a_wrong_method_gets_the_allowed_ones(service: Service, method: str, path: str, allowed: str) -> None:
    answer = service.request(method, path)
    assert answer.error == (405, "method_not_allowed")
    assert allowed in answer.headers["Allow"]


def test_messages_are_chinese_or_english_if_preferred(service: Service) -> None:
    def refused(language: str | None) -> dict[str, Any]:
        return post(service, b"[]", **({"Accept_Language": language} if language else {})).json

    for language in (None, "zh", "fr", "en;q=0.5, zh", "*"):
        assert not refused(language)["message"].isascii()
    english = refused("en-US,en;q=0.9")
    assert english["message"].isascii()
    assert english["code"] == "invalid_json"


def test_every_response_has_a_request_id(service: Service) -> None:
    ids = [service.get(path).headers["X-Request-Id"] for path in ("/healthz", "/readyz", "/", "/nope", "/api/health")]
    assert len(set(ids)) == len(ids)
    assert all(ids)
    assert service.get("/nope", X_Request_Id="my-own.1_2").headers["X-Request-Id"] == "my-own.1_2"
    assert post(service, b"{", X_Request_Id="my-own").json["requestId"] == "my-own"
    assert service.get("/nope", X_Request_Id="<b>" + "x" * 200).headers["X-Request-Id"].isalnum()


def test_a_secret_in_a_refused_request_is_not_logged(service: Service) -> None:
    service.request("POST", GENERATE, {"prompt": "a long prompt of my own " * 20, "width": 1})
    over_the_wire(service, head("Authorization: Bearer my-canary", "canary"))
    assert "my own" not in service.log
    assert "my-canary" not in service.log
