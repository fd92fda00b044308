"""What tests of event streams share: tasks, the streams of a service, and their text in blocks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse

from imagegen.web.handler_services import SERVICES
from tests.web.conftest import Client

SMALL = {"width": 64, "height": 64}
UNKNOWN = "0" * 32


@dataclass(frozen=True)
class Block:
    """Text between two blank lines of a stream."""

    fields: dict[str, str]
    comment: str

    @property
    def id(self) -> str:
        return self.fields.get("id", "")

    @property
    def event(self) -> str:
        return self.fields.get("event", "")

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.fields["data"]))


async def blocks(response: ClientResponse) -> AsyncIterator[Block]:
    fields: dict[str, str] = {}
    comment = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\r\n")
        name, _, value = line.partition(":")
        if not line:
            yield Block(fields, comment)
            fields, comment = {}, ""
        elif name:
            fields[name] = value.removeprefix(" ")
        else:
            comment = value.strip()


async def read_events(response: ClientResponse) -> list[Block]:
    """Return the events of a stream to its end."""
    return [block async for block in blocks(response) if "data" in block.fields]


async def post(client: Client, prompt: str, **fields: object) -> str:
    answer = await client.post("/api/images/generate", json={"prompt": prompt, **SMALL, **fields})
    assert answer.status in {200, 202}, await answer.text()
    task_id: str = (await answer.json())["taskId"]
    return task_id


async def finished(client: Client, task_id: str) -> dict[str, Any]:
    body: dict[str, Any] = await (await client.get(f"/api/images/{task_id}?wait=10")).json()
    assert body["status"] in {"completed", "failed", "cancelled"}
    return body


async def follow(client: Client, task_id: str, last: str | int | None = None) -> ClientResponse:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    return await client.get(f"/api/images/{task_id}/events", headers=headers)


def streams(client: Client) -> int:
    return client.app[SERVICES].feed.count


async def read_blocks(response: ClientResponse) -> list[Block]:
    return [block async for block in blocks(response)]
