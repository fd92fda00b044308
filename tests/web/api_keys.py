"""API keys for tests: their secrets, headers and records."""

from __future__ import annotations

import hashlib
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient

from tests.support import AS_ADMIN

SECRET = "canary-key-of-web"
OTHER_SECRET = "canary-key-of-app"
KEYS = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("web", SECRET), ("app", OTHER_SECRET))}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def make_key(client: TestClient[web.Request, web.Application], **fields: Any) -> str:
    answer = await client.post("/api/admin/keys", json=fields, headers=AS_ADMIN)
    assert answer.status == 201, await answer.text()
    return str((await answer.json())["secret"])
