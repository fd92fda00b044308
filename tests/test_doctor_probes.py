"""Tests of the probes of `imagegen doctor`: disk, provider key, clocks, public address, and the server of Redis."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from imagegen import disk_patience, doctor, doctor_probes
from imagegen.doctor_probes import (
    ClockReading,
    Probed,
    check_clocks,
    check_disk,
    probe_bucket,
    probe_provider,
    probe_public_url,
)
from imagegen.providers.model_table import load_table
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.server_info import ServerInfo
from imagegen.settings import Settings
from tests.ports import free_port
from tests.s3_server import S3Server, error_response
from tests.support import over_rows

KEY = "tgp_v1_a-key-that-nobody-may-see"
StartServer = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[StartServer]:
    """Start a server that gives every GET this response; return its address."""
    servers: list[TestServer] = []

    async def start(status: int, body: object = None, **headers: str) -> str:
        async def answer(_request: web.Request) -> web.Response:
            return web.json_response(body, status=status, headers=headers)

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        server = TestServer(app)
        servers.append(server)
        await server.start_server()
        return str(server.make_url("")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


def closed_address() -> str:
    return f"http://127.0.0.1:{free_port()}"


async def provider_at(url: str) -> Probed:
    settings = Settings(provider="together", together_api_key=KEY, together_api_url=url)
    return await probe_provider(settings)


async def test_a_key_that_the_provider_accepts_is_noted(serve: StartServer) -> None:
    probed = await provider_at(await serve(200, [{"id": "a", "type": "image"}]))
    assert (probed.findings, probed.notes) == ([], ["provider: together accepts the key and lists 1 models"])
    assert abs(probed.clocks[0].ahead_s) < 5
    assert (await probe_provider(Settings())).findings == []


@pytest.mark.parametrize(
    ("status", "start", "remedy", "fatal"),
    [
        (401, "TOGETHER_API_KEY: the provider refuses the key", "renew it", True),
        (403, "TOGETHER_API_KEY: the provider refuses the key", "renew it", True),
        (402, "TOGETHER_API_KEY: the account has no credit", "add credit", True),
        (404, "TOGETHER_API_KEY: the provider has no list", "make one image", False),
        (500, "TOGETHER_API_URL: the provider answers HTTP 500", "try again later", False),
    ],
)
async def test_a_provider_without_an_answer_is_a_finding_with_its_remedy(
    serve: StartServer, status: int, start: str, remedy: str, *, fatal: bool
) -> None:
    probed = await provider_at(await serve(status, {"error": {"message": f"no {KEY}"}}))
    (finding,) = probed.findings
    assert finding.text.startswith(start)
    assert remedy in finding.text
    assert KEY not in finding.text
    assert finding.fatal == fatal


async def test_a_provider_that_is_away_is_a_fault() -> None:
    (finding,) = (await provider_at(closed_address())).findings
    assert finding.fatal
    assert finding.text.startswith("TOGETHER_API_URL: ")
    assert "check TOGETHER_API_URL with its scheme" in finding.text


async def test_a_clock_ten_minutes_off_is_a_fault_with_its_remedy(serve: StartServer) -> None:
    late = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    probed = await provider_at(await serve(200, [], Date=late))
    probed.clocks.append(ClockReading("Redis", 0.5))
    (finding,) = check_clocks(probed.clocks)
    assert finding.fatal
    assert finding.text.startswith("clock: the clock of this machine is ")
    assert "s behind that of 127.0.0.1, and agrees with that of Redis" in finding.text
    assert "NTP" in finding.text


def test_a_clock_a_little_off_is_a_warning_and_a_right_one_none() -> None:
    (finding,) = check_clocks([ClockReading("Redis", -30.0)])
    assert "30 s ahead of that of Redis" in finding.text
    assert not finding.fatal
    assert list(check_clocks([ClockReading("Redis", 1.0), ClockReading("p", -4.0)])) == []


async def public(url: str) -> Probed:
    return await probe_public_url(Settings(public_url=url))


async def test_a_public_address_that_leads_here_is_noted(serve: StartServer) -> None:
    probed = await public(await serve(200, {"success": True, "message": "x", "timestamp": "t"}))
    assert (probed.findings, len(probed.notes), len(probed.clocks)) == ([], 1, 1)
    assert await probe_public_url(Settings()) == Probed()


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (301, None, "redirects to https://other.test/; set PUBLIC_URL"),
        (502, None, "its proxy does not reach the service"),
        (200, [], "is answered by another server"),
        (404, None, "is answered by another server (HTTP 404)"),
    ],
)
async def test_a_public_address_that_leads_elsewhere_is_found(
    serve: StartServer, status: int, body: object, remedy: str
) -> None:
    (finding,) = (await public(await serve(status, body, Location="https://other.test/"))).findings
    assert finding.text.startswith("PUBLIC_URL: ")
    assert remedy in finding.text


async def test_a_public_address_that_is_away_is_found() -> None:
    (finding,) = (await public(closed_address())).findings
    assert "can't be reached: no connection; start the service" in finding.text
    (finding,) = (await public("http://nothing.invalid")).findings
    assert "its name is not found; add it to DNS" in finding.text
    with socket.create_server(("127.0.0.1", 0)) as silent, patch.object(doctor_probes, "PUBLIC_TIMEOUT_S", 0.05):
        (finding,) = (await public(f"http://127.0.0.1:{silent.getsockname()[1]}")).findings
    assert "no answer within 0.05 s" in finding.text


def test_a_full_disk_is_a_fault_and_a_nearly_full_one_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path)
    assert list(check_disk(settings)) == []
    monkeypatch.setattr(doctor_probes, "LOW_BYTES", 2**62)
    (finding,) = check_disk(settings)
    assert "MiB free, and images may take 1024 MiB" in finding.text
    assert not finding.fatal

    def full(_number: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (finding,) = check_disk(settings)
    assert finding.fatal
    assert f"the disk of {tmp_path} is full" in finding.text
    assert "free space there" in finding.text
    assert list(tmp_path.iterdir()) == []


@over_rows(
    ("server", "latency_s", "text"),
    [
        (None, 0.0, "may not run INFO"),
        (ServerInfo(version="7.0.15", eviction_policy="allkeys-lru"), 0.0, "Set maxmemory-policy noeviction"),
        (ServerInfo(version="7.0.15", eviction_policy="noeviction"), 0.3, "answers in 300 ms"),
    ],
)
async def test_what_a_server_reports_about_itself_is_judged(
    server: ServerInfo | None, latency_s: float, text: str
) -> None:
    connection: Any = Connection("redis://127.0.0.1:1")
    connection.server = server
    (finding,) = doctor._judge_server(connection, latency_s).findings
    assert finding.text.startswith("REDIS_URL: ")
    assert text in finding.text
    await connection.close()


def test_what_is_in_order_is_noted(tmp_path: Path, redis_url: str) -> None:
    notes: list[str] = []
    settings = Settings(data_dir=tmp_path, redis_url=redis_url)
    assert list(doctor.check_all(settings, load_table("sandbox").checked, notes.append)) == []
    assert any(note.startswith("Redis: ") and "eviction policy noeviction, answers in" in note for note in notes)
    assert any(note.startswith("provider: the sandbox") for note in notes)


def bucket_settings(s3: S3Server, name: str, **changed: str) -> Settings:
    keys = {"s3_access_key_id": "a-key", "s3_secret_access_key": KEY}
    values: dict[str, Any] = {"image_store": "s3", "s3_endpoint": s3.url, "s3_bucket": name} | keys | changed
    return Settings(**values)


@pytest.fixture
def doctored(s3: S3Server) -> Iterator[str]:
    """Return the name of a bucket."""
    s3.buckets["doctored"] = {}
    yield "doctored"
    s3.refuses = lambda _request: None


async def test_a_bucket_that_takes_images_is_noted_and_left_as_it_was(s3: S3Server, doctored: str) -> None:
    probed = await probe_bucket(bucket_settings(s3, doctored))
    assert (probed.findings, probed.notes) == ([], ["bucket: doctored takes images"])
    assert s3.buckets[doctored] == {}
    assert await probe_bucket(Settings()) == Probed()


@pytest.mark.parametrize(
    ("code", "start"),
    [
        ("SignatureDoesNotMatch", "S3_SECRET_ACCESS_KEY: it does not belong to S3_ACCESS_KEY_ID"),
        ("InvalidAccessKeyId", "S3_ACCESS_KEY_ID: the service does not know this key"),
        ("NoSuchBucket", "S3_BUCKET, S3_ENDPOINT: there is no such bucket"),
        ("InvalidBucketName", "S3_BUCKET: the service accepts no such name"),
        ("NoSuchKey", "S3_ENDPOINT: it has a path, such as the name of the bucket"),
    ],
)
async def test_a_bucket_that_refuses_is_a_fault_that_names_the_setting(
    s3: S3Server, doctored: str, code: str, start: str
) -> None:
    s3.refuses = lambda _request: error_response(HTTPStatus.FORBIDDEN, code)
    (finding,) = (await probe_bucket(bucket_settings(s3, doctored))).findings
    assert finding.text.startswith(start)
    assert finding.fatal
    assert KEY not in finding.text


async def test_a_bucket_that_may_only_be_read_is_a_fault(s3: S3Server, doctored: str) -> None:
    s3.refuses = lambda request: (
        error_response(HTTPStatus.FORBIDDEN, "AccessDenied") if request.method == "PUT" else None
    )
    (finding,) = (await probe_bucket(bucket_settings(s3, doctored))).findings
    assert "it has to list, read, write and delete" in finding.text


async def test_a_bucket_that_is_away_is_a_fault_with_its_cause(s3: S3Server, doctored: str) -> None:
    (finding,) = (await probe_bucket(bucket_settings(s3, doctored, s3_endpoint=closed_address()))).findings
    assert finding.text.startswith("S3_ENDPOINT: the bucket doctored can't be used now (EndpointConnectionError")
    assert "check S3_ENDPOINT with its scheme" in finding.text
    assert finding.fatal


async def test_a_bucket_of_an_earlier_store_is_only_listed(s3: S3Server, doctored: str) -> None:
    s3.refuses = lambda request: (
        None if request.method == "GET" else error_response(HTTPStatus.FORBIDDEN, "AccessDenied")
    )
    probed = await probe_bucket(bucket_settings(s3, doctored, image_store="disk"))
    assert (probed.findings, probed.notes) == ([], ["bucket: doctored can be listed"])
    s3.refuses = lambda _request: error_response(HTTPStatus.FORBIDDEN, "AccessDenied")
    (finding,) = (await probe_bucket(bucket_settings(s3, doctored, image_store="disk"))).findings
    assert not finding.fatal


def test_a_data_folder_that_hangs_is_a_fault_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, calls = threading.Event(), list[int]()

    def wait(number: int) -> None:
        calls.append(number)
        answered.wait()

    monkeypatch.setattr(os, "fsync", wait)
    monkeypatch.setattr(disk_patience, "ANSWER_S", 0.2)
    try:
        (finding,) = check_disk(Settings(data_dir=tmp_path))
    finally:
        answered.set()
    assert finding.text.startswith(f"DATA_DIR: {tmp_path} does not answer within 0.2 s")
    assert finding.fatal
    assert len(calls) == 1
