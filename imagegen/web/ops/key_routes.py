"""Routes of the API keys: the admin lists, makes, rotates and revokes them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, NotRequired

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict

from imagegen.accounts.api_keys import NAME, ApiKey
from imagegen.accounts.key_fields import NewKeyFields, RotationFields, parse_fields
from imagegen.accounts.key_store import KeyRing, KeyStore
from imagegen.formats import rfc3339
from imagegen.tasks.cost import dollars
from imagegen.web.api.schemas import Timestamp
from imagegen.web.guard import GUARD
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body import check_type, parse_object, read_body
from imagegen.web.http.body_admission import BODY_ADMISSION, QUICK_BODY_BYTES, HeldMemory
from imagegen.web.http.error_responses import MAX_BODY_BYTES
from imagegen.web.http.responses import json_response

KEY_STORE = web.AppKey("key_store", KeyStore)

KeyName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class SecretView(TypedDict):
    """A live secret of a key; the secret itself is not stored."""

    endsAt: Annotated[Timestamp | None, Field(description="Null: it lives as long as its key.")]


class KeyView(TypedDict):
    """An API key. A limit that is null is off."""

    name: KeyName
    fixed: Annotated[bool, Field(description="It is set in `API_KEYS`, and is changed there only.")]
    createdAt: Timestamp | None
    expiresAt: Timestamp | None
    dailyUsd: Annotated[float | None, Field(description="Budget of a UTC day in US dollars.")]
    rate: Annotated[int | None, Field(description="Requests a minute.")]
    imagesRate: Annotated[int | None, Field(description="Generations a minute.")]
    openTasks: Annotated[int | None, Field(description="Unfinished tasks at once.")]
    models: Annotated[list[str] | None, Field(description="Patterns of the models that it may use; null: all.")]
    maxMegapixels: Annotated[float | None, Field(description="Of one image; 1024 x 1024 pixels are one.")]
    secrets: Annotated[list[SecretView], Field(description="The newest first.")]


class KeyListView(TypedDict):
    """All API keys."""

    success: Literal[True]
    keys: list[KeyView]


class MadeKeyView(TypedDict):
    """A key with a new secret, which is shown this once."""

    success: Literal[True]
    key: KeyView
    secret: Annotated[str, Field(pattern="^ig_[A-Za-z0-9_-]{43}$")]


class RevokedKeyView(TypedDict):
    """A key that is refused from now on."""

    success: Literal[True]
    name: KeyName
    open: NotRequired[Annotated[Literal[True], Field(description="No key is left, so that no client needs one.")]]


def key_view(key: ApiKey, *, fixed: bool = False) -> KeyView:
    """Return what the admin sees of a key."""
    return {
        "name": key.name,
        "fixed": fixed,
        "createdAt": _time(key.created_at),
        "expiresAt": _time(key.expires_at),
        "dailyUsd": None if key.daily_micro_usd is None else dollars(key.daily_micro_usd),
        "rate": key.rate,
        "imagesRate": key.images_rate,
        "openTasks": key.open_tasks,
        "models": list(key.models) or None,
        "maxMegapixels": key.max_megapixels,
        "secrets": [{"endsAt": _time(secret.ends_at)} for secret in key.secrets],
    }


async def list_keys(request: web.Request) -> web.StreamResponse:
    """Return all keys. Raises QueueUnavailable."""
    store = request.app[KEY_STORE]
    await store.refresh()
    body: KeyListView = {"success": True, "keys": await asyncio.to_thread(_views, store.ring)}  # of 5,000 in 0.05 s
    return json_response(body)


def _views(ring: KeyRing) -> list[KeyView]:
    return [key_view(key, fixed=True) for key in ring.fixed] + [key_view(key) for key in ring.stored]


async def create_key(request: web.Request) -> web.StreamResponse:
    """Make a key. Raises InvalidRequest, ApiKeyExists, ApiKeyIsFixed, QueueUnavailable."""
    fields = parse_fields(NewKeyFields, await _receive_object(request))
    key, secret = await request.app[KEY_STORE].create(fields.to_key(request.app[SERVICES].queue.clock()))
    body: MadeKeyView = {"success": True, "key": key_view(key), "secret": secret}
    return json_response(body, status=201)


async def rotate_key(request: web.Request) -> web.StreamResponse:
    """Give a key a second secret. Raises InvalidRequest, ApiKeyNotFound, ApiKeyIsFixed, QueueUnavailable."""
    fields = RotationFields()
    if request.can_read_body:
        fields = parse_fields(RotationFields, await _receive_object(request))
    key, secret = await request.app[KEY_STORE].rotate(request.match_info["name"], fields.grace_s)
    body: MadeKeyView = {"success": True, "key": key_view(key), "secret": secret}
    return json_response(body)


async def revoke_key(request: web.Request) -> web.StreamResponse:
    """Remove a key. Raises ApiKeyNotFound, ApiKeyIsFixed, QueueUnavailable."""
    store, name = request.app[KEY_STORE], request.match_info["name"]
    await store.revoke(name)
    body: RevokedKeyView = {"success": True, "name": name}
    if not request.app[GUARD].needs_keys():
        body["open"] = True
    return json_response(body)


async def _receive_object(request: web.Request) -> dict[str, Any]:
    """Return the JSON object of the body. Raises what `read_body` and `parse_object` raise, and TooManyConnections."""
    check_type(request)
    length = request.content_length
    admission = request.app[BODY_ADMISSION]
    memory = HeldMemory(admission)
    try:
        if length is None or QUICK_BODY_BYTES < length <= MAX_BODY_BYTES:
            await memory.begin(length or MAX_BODY_BYTES)
        body = await read_body(request)
        await admission.turn(len(body))
        return parse_object(body)
    finally:
        memory.end()


def _time(unix_s: float | None) -> str | None:
    return None if unix_s is None else rfc3339(unix_s)
