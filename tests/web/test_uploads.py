"""Tests of POST /api/uploads: forms and bare bytes, their limits, and what is kept."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import FormData

from imagegen.app import STORE
from imagegen.web.handler_services import SERVICES
from imagegen.web.http import body_stream
from tests.image_bytes import image_file, png_file
from tests.support import eventually, over_rows
from tests.web.conftest import Client

BOUNDARY = "a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
PNG = {"Content-Type": "image/png"}


def form(*parts: tuple[str, bytes], end: bytes = b"--") -> bytes:
    """Return a form of parts, each with its head and its bytes."""
    encoded = [f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts]
    return b"".join(encoded) + b"--" + BOUNDARY.encode() + end + b"\r\n"


def file_part(data: bytes, name: str = "file") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: image/png', data


def kept_files(client: Client) -> list[str]:
    """Return the names of all files of images, saved or on their way."""
    spool = client.app[STORE].spool_folder
    assert spool
    folder = spool.parent.parent
    return [
        path.name
        for part in ("images", "spool")
        for path in (folder / part).rglob("*")
        if path.is_file() and path.name != "lock"
    ]


@over_rows("kind", ["PNG", "JPEG", "WEBP"])
async def test_bare_bytes_are_uploaded_once(service: Client, kind: str) -> None:
    data = image_file(kind=kind)
    first = await service.post("/api/uploads", data=data, headers={"Content-Type": f"image/{kind.lower()}"})
    again = await service.post("/api/uploads", data=data, headers={"Content-Type": "application/octet-stream"})
    assert (first.status, again.status) == (201, 200)
    shown = await first.json()
    assert shown.pop("expiresAt").endswith("Z")
    assert shown == {
        "success": True,
        "uploadId": f"upload:{hashlib.sha256(data).hexdigest()}",
        "contentType": f"image/{kind.lower()}",
        "bytes": len(data),
        "width": 24,
        "height": 16,
    }
    assert (await again.json())["uploadId"] == shown["uploadId"]


async def test_a_form_is_the_same_upload(service: Client) -> None:
    data = image_file(size=(900, 700))
    fields = FormData()
    fields.add_field("file", data, filename="cat.png", content_type="image/png")
    formed = await service.post("/api/uploads", data=fields)
    bare = await service.post("/api/uploads", data=data)
    assert (formed.status, bare.status) == (201, 200)
    assert (await formed.json())["uploadId"] == (await bare.json())["uploadId"]


PAGE = b"<!DOCTYPE html><html><script>alert(1)</script></html>"


@over_rows("in_form", [False, True])
@over_rows(
    ("data", "status", "code"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image"),
        (image_file(kind="WEBP")[:-3], 415, "unsupported_image"),
        (image_file() + PAGE, 415, "unsupported_image"),
        (image_file(kind="GIF"), 415, "unsupported_image"),
        (b"", 415, "unsupported_image"),
        (b'{"prompt":"a cat"}', 415, "unsupported_image"),
        (png_file(16_000, 16_000, zlib.compress(bytes(100_000))), 400, "image_too_large"),
    ],
)
async def test_another_file_is_refused_and_not_kept(
    service: Client, data: bytes, status: int, code: str, in_form: bool
) -> None:
    body, headers = (form(file_part(data)), FORM) if in_form else (data, PNG)
    response = await service.post("/api/uploads", data=body, headers=headers)
    shown = await response.json()
    assert (response.status, shown["code"]) == (status, code)
    assert [detail["field"] for detail in shown["details"]] == ["file"]
    await eventually(lambda: not kept_files(service))  # a thread removes them


@over_rows(
    ("body", "status", "code", "field"),
    [
        (form(), 400, "invalid_request", "file"),
        (form(file_part(b"x", "picture")), 400, "invalid_request", "picture"),
        (form(file_part(image_file()), file_part(image_file())), 400, "invalid_request", "file"),
        (form(*[file_part(image_file())] * 3), 400, "invalid_request", "file"),
        (form((file_part(b"")[0] + "\r\nContent-Transfer-Encoding: base64", b"iVBO")), 400, "invalid_request", "file"),
        (form((file_part(b"")[0] + "\r\nX-A: b" * 30, b"x")), 400, "bad_request", "body"),
        (form((file_part(b"")[0] + "\r\nX-A: " + "b" * 5_000, b"x")), 400, "bad_request", "body"),
        (form(("Content-Type: image/png", image_file())), 400, "invalid_request", "body"),
        (form(('Content-Type: multipart/mixed; boundary="inner"', b"--inner--\r\n")), 400, "bad_request", "body"),
        (form(file_part(image_file()), end=b"")[:-30], 415, "unsupported_image", "file"),
        (b"no form at all", 400, "bad_request", "body"),
        (b"--a-boundary", 400, "invalid_request", "body"),
    ],
)
async def test_a_form_that_is_not_one_file_is_refused(
    service: Client, body: Any, status: int, code: str, field: str
) -> None:
    response = await service.post("/api/uploads", data=body, headers=FORM)
    shown = await response.json()
    assert (response.status, shown["code"]) == (status, code), shown
    assert [detail["field"] for detail in shown["details"]] == [field]


@over_rows("route", ["/api/uploads", "/v1/images/edits"])
@over_rows("encoding", [b"", b"Content-Transfer-Encoding: base64\r\n"])
async def test_a_part_with_a_name_that_is_not_utf_8_is_refused(service: Client, route: str, encoding: bytes) -> None:
    head = encoding + b'Content-Disposition: form-data; name="im\xff\xfeage"'
    body = b"--a-boundary\r\n" + head + b"\r\n\r\nx\r\n--a-boundary--\r\n"
    response = await service.post(route, data=body, headers=FORM)
    shown = await response.json()
    assert (response.status, shown.get("code") or shown["error"]["code"]) == (400, "invalid_request")


async def test_a_form_without_a_boundary_is_refused(service: Client) -> None:
    response = await service.post("/api/uploads", data=b"x", headers={"Content-Type": "multipart/form-data"})
    assert (response.status, (await response.json())["code"]) == (400, "bad_request")


async def test_a_compressed_body_is_refused_without_a_demand_for_json(service: Client) -> None:
    headers = PNG | {"Content-Encoding": "gzip", "Accept-Language": "en"}
    response = await service.post("/api/uploads", data=zlib.compress(image_file(), wbits=31), headers=headers)
    shown = await response.json()
    assert (response.status, shown["code"]) == (415, "unsupported_media_type")
    assert "Content-Encoding" in shown["message"]
    assert "JSON" not in shown["message"]


@pytest.mark.parametrize("headers", [PNG, FORM])
async def test_a_declared_length_over_the_limit_is_refused_before_the_body(
    start_service: Any, headers: dict[str, str]
) -> None:
    client = await start_service(upload_max_bytes=1_000)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    lines = ["POST /api/uploads HTTP/1.1", "Host: localhost", "Content-Length: 70000"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = await asyncio.wait_for(reader.read(), 20)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"body_too_large" in answer
    writer.close()


@pytest.mark.parametrize("in_form", [False, True])
async def test_more_bytes_than_allowed_are_refused_while_they_come(start_service: Any, in_form: bool) -> None:
    client = await start_service(upload_max_bytes=100_000)

    async def endless() -> AsyncIterator[bytes]:
        start = form(file_part(image_file() + b"x"))
        yield start.rpartition(b"\r\n--")[0] if in_form else image_file()
        for _ in range(200):
            yield bytes(4_096)

    try:
        response = await client.post("/api/uploads", data=endless(), headers=FORM if in_form else PNG)
    except aiohttp.ClientConnectionError:
        pass  # the connection was closed while the client wrote
    else:
        assert (response.status, (await response.json())["code"]) == (413, "body_too_large")
    await eventually(lambda: not kept_files(client))  # a thread removes them


async def test_a_body_that_stalls_is_a_408_and_nothing_is_kept(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_stream, "STALL_S", 0.2)
    reader, writer = await asyncio.open_connection(service.host, service.port)
    data = image_file(size=(800, 800))
    writer.write(b"POST /api/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\n" + data[:600])
    answer = await asyncio.wait_for(reader.read(), 20)
    assert b" 408 " in answer.split(b"\r\n")[0]
    await eventually(lambda: not kept_files(service))  # a thread removes them
    writer.close()


async def test_uploads_count_against_the_general_limit(start_service: Any) -> None:
    client = await start_service(rate_limit_max=2, image_rate_limit_max=1)
    statuses = [(await client.post("/api/uploads", data=image_file())).status for _ in range(3)]
    assert statuses == [201, 200, 429]


async def test_a_draining_service_takes_no_uploads(service: Client) -> None:
    service.app[SERVICES].readiness.draining = True
    response = await service.post("/api/uploads", data=image_file())
    assert (response.status, (await response.json())["code"]) == (503, "draining")


async def test_a_full_store_is_a_503(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    health = service.app[STORE].health
    monkeypatch.setattr(health, "mark_ok", lambda: None)  # the loop that watches the disk finds space on it
    health.mark_failed("ENOSPC No space left on device")
    response = await service.post("/api/uploads", data=image_file())
    assert (response.status, (await response.json())["code"]) == (503, "store_unavailable")
    assert "Retry-After" in response.headers
