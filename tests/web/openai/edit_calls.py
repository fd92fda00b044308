"""Edits on `/v1` as forms and as JSON."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from aiohttp import FormData, MultipartWriter

from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import image_file
from tests.web.openai.conftest import Service

EDITOR = "an-edit-model"
SIZE = {"size": "64x64"}
MASK = image_file((0, 0, 0, 0), mode="RGBA")


def upload_id(data: bytes) -> str:
    return f"upload:{hashlib.sha256(data).hexdigest()}"


def form(*parts: tuple[str, bytes | str], **fields: str) -> FormData:
    """Return a form; bytes are files."""
    data = FormData(default_to_multipart=True)
    for name, value in parts:
        if isinstance(value, bytes):
            data.add_field(name, io.BytesIO(value), filename=f"{name}.png", content_type="image/png")
        else:
            data.add_field(name, value)
    for name, value in ({"prompt": "a cat", "model": EDITOR} | SIZE | fields).items():
        data.add_field(name, value)
    return data


async def post(
    service: Service, data: FormData | MultipartWriter, path: str = "/v1/images/edits", **headers: str
) -> tuple[int, Any]:
    response = await service.request("POST", path, data=data, headers=headers)
    return response.status, await response.json()


async def post_json(service: Service, **body: Any) -> tuple[int, Any]:
    body = {"prompt": "a cat", "model": EDITOR} | SIZE | body
    data, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
    response = await service.request("POST", "/v1/images/edits", data=data, headers=headers)
    return response.status, await response.json()


def received(emulator: EmulatedUpstream) -> list[tuple[str, str]]:
    (paid,) = emulator.ledger.paid
    return [(file.field, f"upload:{file.sha256}") for file in paid.inputs]
