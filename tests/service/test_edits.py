"""Edits through the real service: memory while large images pass, and what happens when something breaks meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.image_bytes import png_file
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually

MIB = 2**20
BOUNDARY = "a-boundary"
MAX_GROWTH_BYTES = 20 * MIB


def png_of(size_bytes: int) -> bytes:
    """Return a whole PNG of random pixels."""
    side = int((size_bytes / 3) ** 0.5)
    rows = b"".join(b"\0" + os.urandom(side * 3) for _ in range(side))
    return png_file(side, side, zlib.compress(rows, 0))


def form(files: list[tuple[str, bytes]], **fields: str) -> list[bytes]:
    """Return the pieces of a form."""
    pieces = []
    for name, value in fields.items():
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        pieces.append(head.encode())
    for name, data in files:
        disposition = f'form-data; name="{name}"; filename="a.png"'
        head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\nContent-Type: image/png\r\n\r\n"
        pieces += [head.encode(), data, b"\r\n"]
    return [*pieces, f"--{BOUNDARY}--\r\n".encode()]


def send(service: Service, pieces: list[bytes]) -> tuple[int, dict[str, Any]]:
    host, port = service.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=120)
    headers = {
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        "Content-Length": str(sum(map(len, pieces))),
    }
    try:
        connection.request("POST", "/v1/images/edits", _sliced(pieces), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def _sliced(pieces: list[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), 2**16):
            yield piece[at : at + 2**16]


def paid_inputs(upstream: EmulatorProcess, prompt: str) -> list[list[str]]:
    calls = [call for call in calls_about(upstream, prompt) if call["prompt"] == prompt and call["paid"]]
    return [[file["sha256"] for file in call["inputs"]] for call in calls]


def edits_by(upstream: EmulatorProcess) -> dict[str, str]:
    return {"PROVIDER": "openai", "OPENAI_API_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": "k"}


def test_sixteen_images_of_5_mib_pass_through_little_memory(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(**edits_by(upstream))
    fields = {"prompt": "sixteen", "model": "an-edit-model", "size": "64x64"}
    assert send(service, form([("image", png_of(1_000))], **fields))[0] == 200
    images = [png_of(5 * MIB) for _ in range(16)]
    service.forget_peak()
    before = service.memory("VmRSS")
    status, body = send(service, form([("image[]", image) for image in images], **fields))
    grown = service.memory("VmHWM") - before
    assert status == 200, body
    call = next(call for call in upstream.ledger()["calls"] if len(call["inputs"]) == 16)
    assert [file["sha256"] for file in call["inputs"]] == [hashlib.sha256(image).hexdigest() for image in images]
    print(f"memory grew by {grown / MIB:.1f} MiB")
    assert grown < MAX_GROWTH_BYTES, f"{grown / MIB:.1f} MiB"


def test_a_link_of_a_client_to_loopback_does_not_lead_to_the_upstream(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(**edits_by(upstream))
    fields = {"prompt": "from within", "model": "an-edit-model", "imageUrl": "http://localhost:1/ledger"}
    answer = service.request("POST", "/api/images/generate?wait=30", json.dumps(fields).encode())
    assert (answer.json["status"], answer.json["attempts"]) == ("failed", 0)
    assert "is this machine; send the image itself, as an upload or a data: URI" in answer.json["message"]
    assert paid_inputs(upstream, "from within") == []


def test_an_edit_of_a_killed_instance_is_made_again_from_whole_images(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(**edits_by(upstream), LEASE_SECONDS="1")
    image = png_of(3 * MIB)
    upstream.script({"fault": "hang", "match": "killed", "times": 1})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(
            send, service, form([("image", image)], prompt="killed", model="an-edit-model", size="64x64")
        )
        eventually(lambda: paid_inputs(upstream, "killed"))
        service.kill()
        with pytest.raises((OSError, HTTPException)):
            call.result()
    restarted = start_service(**edits_by(upstream), LEASE_SECONDS="1")
    status, body = send(
        restarted, form([("image", image)], prompt="killed", model="an-edit-model", size="64x64", variant="0")
    )
    assert status == 200, body
    assert paid_inputs(upstream, "killed") == [[hashlib.sha256(image).hexdigest()]] * 2


def test_a_form_that_stalls_or_breaks_off_is_given_up_and_leaves_nothing(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(**edits_by(upstream))
    pieces = form([("image", png_of(MIB))], prompt="broken", model="m")
    host, port = service.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {sum(map(len, pieces))}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as stalled:
        stalled.sendall(head.encode() + b"".join(pieces)[:700_000])
        with socket.create_connection((host, int(port))) as broken:
            broken.sendall(head.encode() + b"".join(pieces)[:700_000])
        answer = stalled.recv(65_536).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"body_timeout"' in answer
    data = Path(service.settings["DATA_DIR"])
    eventually(lambda: not [path for path in data.rglob("*.part") if path.is_file()])  # a thread removes it
    assert paid_inputs(upstream, "broken") == []
