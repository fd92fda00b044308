"""Uploads from the view of a client: memory, crashes, full disks, and a task's images until its end."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.image_bytes import data_uri, image_file, png_chunk, png_file
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Answer, Service, calls_about, eventually, redis_server

MIB = 2**20
MAX_GROWTH_BYTES = 8 * MIB
STALL_S = 0.5
EDITS = "black-forest-labs/FLUX.1-kontext-dev"


@cache
def noise() -> bytes:
    return os.urandom(21 * MIB)


def png_of(size_bytes: int) -> bytes:
    """Return a whole PNG of exactly this size, with pixels of its own."""
    stream = zlib.compress(os.urandom(3 * 64 * 64 + 64))
    missing = size_bytes - len(png_file(64, 64, stream, before=png_chunk(b"teST", b"")))
    return png_file(64, 64, stream, before=png_chunk(b"teST", noise()[:missing]))


def upload(service: Service, data: bytes) -> dict[str, Any]:
    answer = service.request("POST", "/api/uploads", data, headers={"Content-Type": "image/png"}, timeout_s=60)
    assert answer.status in (200, 201), answer.body
    return answer.json


def in_json(data: bytes, prompt: str = "in autumn") -> bytes:
    fields = json.dumps({"prompt": prompt, "width": 64, "height": 64})
    return f'{fields[:-1]},"imageUrl":"{data_uri(data)}"}}'.encode()  # json.dumps takes 0.1 s for 27 MB


def spooled(service: Service) -> list[Path]:
    """Return the files of images on their way."""
    folder = Path(service.settings["DATA_DIR"]) / "spool"
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_proc
@pytest.mark.parametrize("way", ["bytes", "form", "data: URI"])
def test_an_image_of_20_mib_takes_less_than_8_mib_of_memory(start_service: StartService, way: str) -> None:
    service = start_service(UPSTREAM_RATE="1/hour")
    service.made(prompt="uses the only call of this hour")

    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    ways: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
        "bytes": ("/api/uploads", bytes, "image/png"),
        "form": ("/api/uploads", lambda data: head + data + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        "data: URI": ("/api/images/generate", in_json, "application/json"),
    }
    route, encoded, kind = ways[way]

    def send(data: bytes) -> int:
        return service.request("POST", route, encoded(data), headers={"Content-Type": kind}, timeout_s=60).status

    assert send(png_of(2 * MIB)) in (201, 202)
    service.forget_peak()
    before = service.memory("VmRSS")
    assert send(png_of(20 * MIB)) in (201, 202)
    grown = service.memory("VmHWM") - before
    print(f"{way}: {grown / MIB:.1f} MiB")
    assert grown < MAX_GROWTH_BYTES
    assert send(png_of(20 * MIB + 1)) == 413


@needs_proc
def test_six_large_bodies_at_once_stall_no_other_client(start_service: StartService) -> None:
    service = start_service(UPSTREAM_RATE="1/hour")
    service.made(prompt="uses the only call of this hour")
    bodies = [in_json(png_of(15 * MIB), f"{number}") for number in range(6)]
    before = service.memory("VmRSS")
    waits_s, blocked_s = [], []
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(service.request, "POST", "/api/images/generate", body, timeout_s=120) for body in bodies]
        while not all(each.done() for each in sent):
            began, ran_s = time.monotonic(), service.loop_s()
            assert service.get("/healthz").status == 200
            waits_s.append(time.monotonic() - began)
            blocked_s.append(service.loop_s() - ran_s)
            time.sleep(0.02)
    assert [each.result().status for each in sent] == [202] * 6
    grown = service.memory("VmHWM") - before
    figures = f"{max(waits_s) * 1e3:.0f} ms, {max(blocked_s) * 1e3:.0f} ms of them the loop's"
    print(f"{grown / MIB:.1f} MiB, longest wait of another client {figures}")
    assert grown < 64 * MIB
    assert max(blocked_s) < max(STALL_S, 20 * median(blocked_s))  # the machine may pause any process
    assert median(waits_s) < STALL_S
    eventually(lambda: not spooled(service))


def test_a_declared_length_over_the_limit_is_refused_unread(start_service: StartService) -> None:
    service = start_service(SANDBOX_DELAY="0")
    host, port = service.url.removeprefix("http://").split(":")
    for route, kind, length in (
        ("/api/uploads", "image/png", 21 * MIB),
        ("/api/images/generate", "application/json", 30 * MIB),
        ("/api/images/batch", "application/json", 30 * MIB),
        ("/v1/images/generations", "application/json", 30 * MIB),
    ):
        with socket.create_connection((host, int(port)), timeout=30) as client:
            head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
            client.sendall(head.encode())
            assert b" 413 " in client.recv(4_096)


def test_a_crash_in_an_upload_leaves_nothing_for_ever(start_service: StartService) -> None:
    service = start_service(SANDBOX_DELAY="0")
    host, port = service.url.removeprefix("http://").split(":")
    data = png_of(6 * MIB)
    with socket.create_connection((host, int(port)), timeout=30) as client:
        head = f"POST /api/uploads HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data[: 4 * MIB])
        eventually(lambda: [path for path in spooled(service) if path.stat().st_size])
        service.kill()
    assert spooled(service)
    again = start_service(SANDBOX_DELAY="0")
    eventually(lambda: not spooled(again))
    upload(again, data)


@pytest.mark.parametrize("store", ["disk", "redis", "upstream"])
def test_a_task_keeps_its_upload_over_a_crash_and_beyond_its_expiry(
    start_service: StartService, upstream: EmulatorProcess, store: str
) -> None:
    settings = {"IMAGE_STORE": store, "UPLOAD_TTL": "5", "WORKER_CONCURRENCY": "1"}
    service = start_service(upstream.url, **settings)
    prompt, data = f"kept beyond its expiry in {store}", png_of(3 * MIB)
    uploaded = upload(service, data)
    image, expires_at = uploaded["uploadId"], datetime.fromisoformat(uploaded["expiresAt"])
    upstream.script({"fault": "503", "retry_after": 2, "match": prompt, "times": 1})
    task = service.accepted(prompt=prompt, imageUrl=image, model=EDITS)
    eventually(lambda: calls_about(upstream, prompt))
    service.kill()
    eventually(lambda: datetime.now(UTC) > expires_at)
    again = start_service(upstream.url, **settings)
    assert again.submit(prompt="another", imageUrl=image, model=EDITS).error == (400, "upload_not_found")
    assert again.completed(task, within_s=30)
    sent = calls_about(upstream, prompt)
    assert len(sent) == 2
    assert hashlib.sha256(data).hexdigest() in json.dumps(sent[-1])


def test_a_task_without_its_upload_fails_and_costs_nothing(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    service = start_service(upstream.url, UPSTREAM_RATE="1/minute")
    service.made(prompt="uses the only call of this minute")
    image = upload(service, image_file("gold"))["uploadId"]
    task = service.accepted(prompt="its upload is gone", imageUrl=image, model=EDITS)
    service.end()
    for file in (tmp_path / "data" / "images").rglob("*0-*.png"):
        file.unlink()
    again = start_service(upstream.url)
    failed = again.finished(task)
    assert failed["status"] == "failed"
    assert "upload" in failed["message"]
    assert not calls_about(upstream, "its upload is gone")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_an_upload_is_a_503_and_nothing_is_lost(
    start_service: StartService, small_disk: Path, tmp_path: Path
) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        service = start_service(DATA_DIR=str(small_disk / "data"), REDIS_URL=f"redis://127.0.0.1:{port}")
        files = [png_of(7 * MIB) for _ in range(4)]

        def post(data: bytes) -> Answer:
            return service.request("POST", "/api/uploads", data, headers={"Content-Type": "image/png"})

        answers = [post(files[0])]
        while answers[-1].status == 201:
            answers.append(post(files[len(answers)]))
        *kept, _ = files[: len(answers)]
        answer = answers[-1]
        assert kept
        assert answer.error == (503, "store_unavailable")
        assert answer.headers["Retry-After"]
        eventually(lambda: not spooled(service))
        subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
        eventually(lambda: service.get("/readyz").status == 200)
        for data in kept:
            assert post(data).status == 200, "it is still there"
        assert upload(service, files[-1])
