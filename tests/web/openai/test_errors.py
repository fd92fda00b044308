"""Tests that every error under `/v1` has OpenAI's envelope and shows whether a retry helps."""

from __future__ import annotations

import asyncio
import io
import os
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from imagegen.errors import ApiError, FieldError, InvalidRequest, QueueFull, QueueUnavailable, Unauthorized
from imagegen.web.handler_services import SERVICES
from imagegen.web.openai.error_responses import error_response, is_openai_path, retry_after
from tests.image_bytes import data_uri
from tests.support import over_rows
from tests.web.openai.conftest import Serve, Service

PATHS = ("/v1/images/generations", "/images/generations", "/v1/v1/images/generations")


def envelope(error: ApiError) -> dict[str, Any]:
    body = error_response(error, "id", "zh").body
    assert isinstance(body, bytes)
    (fields,) = orjson.loads(body).values()
    return dict(fields)


@over_rows("path", PATHS)
async def test_a_wrong_body_names_its_first_field_and_all_faults(service: Service, path: str) -> None:
    answer = await service.generate(path=path, size="large", n=0)
    assert answer.status == 400
    assert await answer.json() == {
        "error": {
            "message": "size: must be auto, or such as WIDTHxHEIGHT; n: must be greater than or equal to 1",
            "type": "invalid_request_error",
            "param": "size",
            "code": "invalid_request",
        }
    }
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"]


async def test_a_large_image_in_an_unknown_field_is_refused_with_the_fields_for_images(service: Service) -> None:
    answer = await service.generate(path=PATHS[0], image=data_uri(os.urandom(500_000)))
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_request", "image")
    assert "image_url, reference_images and mask" in error["message"]


@over_rows("path", PATHS)
async def test_invalid_bodies_are_rejected_in_the_envelope(service: Service, path: str) -> None:
    json = {"Content-Type": "application/json"}
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (400, "invalid_json", {"data": b"{", "headers": json}),
        (400, "invalid_json", {"data": b"[]", "headers": json}),
        (413, "body_too_large", {"data": io.BytesIO(b" " * 2_000_000), "headers": json}),
        (415, "unsupported_media_type", {"data": {"prompt": "a cat"}}),
    ]
    for status, code, options in cases:
        answer = await service.request("POST", path, **options)
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert error["message"].isascii()
        assert answer.headers["x-request-id"]


async def test_unknown_routes_and_methods_are_in_the_envelope(service: Service) -> None:
    for path in ("/v1", "/v1/nothing", "/v1/images/upscale", "/v1/images/nothing/"):
        answer = await service.request("POST", path)
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "route_not_found")
    wrong = await service.request("GET", "/v1/images/generations")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    assert (await wrong.json())["error"]["code"] == "method_not_allowed"


async def test_api_keeps_its_own_envelope(service: Service) -> None:
    for path in ("/api/nothing", "/nothing", "/v1x"):
        assert (await (await service.request("GET", path)).json())["code"] == "route_not_found"


@over_rows(
    ("path", "openai"),
    [
        ("/v1", True),
        ("/v1/models", True),
        ("/models", True),
        ("/models/a/b", True),
        ("/images/generations", True),
        ("/api/images/generate", False),
        ("/v10", False),
        ("/modelsx", False),
        ("/", False),
    ],
)
def test_the_path_decides_the_envelope(path: str, openai: bool) -> None:
    assert is_openai_path(path) is openai


async def test_the_generation_limit_is_429_with_retry_after(
    serve: Serve,
) -> None:
    service = await serve(rate_limit_max=10, image_rate_limit_max=1, rate_limit_window_s=300.0)
    assert (await service.generate()).status == 200
    status, headers, body = await _raw_post(service.url)
    assert status == 429
    assert headers["retry-after"] == "60"
    assert "x-should-retry" not in headers
    assert orjson.loads(body)["error"] == {
        "message": "Too many requests, please try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limited",
    }
    for _ in range(9):
        assert (await service.request("GET", "/v1/models")).status == 200
    assert (await service.request("GET", "/models")).status == 429


async def test_an_unavailable_queue_is_a_retryable_503(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_submission: object) -> None:
        raise QueueUnavailable

    monkeypatch.setattr(service.app[SERVICES].queue, "submit", away)
    status, headers, _ = await _raw_post(service.url)
    assert (status, headers["retry-after"], headers.get("x-should-retry")) == (503, "5", None)


async def test_an_unexpected_error_is_500_without_text_or_retry(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_submission: object) -> None:
        raise ValueError("hunter2")

    monkeypatch.setattr(service.app[SERVICES].queue, "submit", broken)
    answer = await service.generate()
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "hunter2" not in await answer.text()
    assert answer.headers["x-should-retry"] == "false"


def test_an_error_keeps_its_headers_and_its_meaning() -> None:
    full = error_response(QueueFull(headers={"Retry-After": "10"}), "id", "zh")
    assert (full.status, full.headers["retry-after"]) == (503, "10")
    unauthorized = error_response(Unauthorized(), "id", "zh")
    assert unauthorized.headers["www-authenticate"] == "Bearer"
    assert envelope(Unauthorized())["type"] == "authentication_error"
    assert envelope(InvalidRequest(details=[FieldError("n", "is odd")]))["param"] == "n"


@over_rows(("seconds", "text"), [(-5, "1"), (0, "1"), (0.2, "1"), (1.2, "2"), (60, "60"), (9e9, "60")])
def test_retry_after_is_what_both_clients_honour(seconds: float, text: str) -> None:
    assert retry_after(seconds) == text


async def _raw_post(url: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers with their raw names, and body."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    body = b'{"prompt": "another cat"}'
    writer.write(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, content
