"""Documentation of the routes of the API keys."""

from __future__ import annotations

from imagegen.accounts.api_keys import ApiKey, SecretHash
from imagegen.accounts.key_fields import NewKeyFields, RotationFields
from imagegen.errors import ApiKeyExists, ApiKeyIsFixed, ApiKeyNotFound, QueueUnavailable
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi.document import Body, Operation, ResponseDoc, Route
from imagegen.web.ops import key_routes

KEYS = "API keys"

_AT = 1_767_225_600.0
_KEY = ApiKey(
    "web",
    (SecretHash(""),),
    daily_micro_usd=5_000_000,
    rate=60,
    models=("black-forest-labs/*",),
    expires_at=_AT + 90 * 86_400,
    created_at=_AT,
)
_SECRET = "ig_" + "x" * 43
_VIEW = key_routes.key_view(_KEY)
_NEW = {"name": "web", "dailyUsd": 5, "rate": 60, "models": ["black-forest-labs/*"], "expires": "90d"}
_MADE = {"made": {"success": True, "key": _VIEW, "secret": _SECRET}}

LIST = Operation(
    "get",
    "/api/admin/keys",
    "listKeys",
    KEYS,
    "List the API keys",
    "Secrets are not stored, and never shown again.",
    (ResponseDoc(200, "All keys.", key_routes.KeyListView, {"one": {"success": True, "keys": [_VIEW]}}),),
    (named.LANGUAGE,),
    errors=(QueueUnavailable,),
    needs="admin",
)

CREATE = Operation(
    "post",
    "/api/admin/keys",
    "createKey",
    KEYS,
    "Make an API key",
    "The response holds its secret, which is shown this once. All instances accept it within a second. As soon as one "
    "key exists, every client needs one.",
    (ResponseDoc(201, "The key and its secret.", key_routes.MadeKeyView, _MADE),),
    (named.LANGUAGE,),
    Body(NewKeyFields, {"with limits": _NEW}),
    errors=(ApiKeyExists, ApiKeyIsFixed, QueueUnavailable),
    needs="admin",
)

ROTATE = Operation(
    "post",
    "/api/admin/keys/{name}/rotate",
    "rotateKey",
    KEYS,
    "Give an API key a second secret",
    "The secrets from before live for `grace` longer (24 hours if absent), so that clients can change over.",
    (ResponseDoc(200, "The key and its new secret.", key_routes.MadeKeyView, _MADE),),
    (named.KEY_NAME, named.LANGUAGE),
    Body(RotationFields, {"an hour": {"grace": "1h"}}, required=False),
    errors=(ApiKeyNotFound, ApiKeyIsFixed, QueueUnavailable),
    needs="admin",
)

REVOKE = Operation(
    "delete",
    "/api/admin/keys/{name}",
    "revokeKey",
    KEYS,
    "Revoke an API key",
    "All instances refuse it within a second. Its tasks go on; its name keeps its budget of the day.",
    (
        ResponseDoc(
            200, "It is refused from now on.", key_routes.RevokedKeyView, {"gone": {"success": True, "name": "web"}}
        ),
    ),
    (named.KEY_NAME, named.LANGUAGE),
    errors=(ApiKeyNotFound, ApiKeyIsFixed, QueueUnavailable),
    needs="admin",
)

ROUTES: tuple[Route, ...] = (
    (LIST, key_routes.list_keys),
    (CREATE, key_routes.create_key),
    (ROTATE, key_routes.rotate_key),
    (REVOKE, key_routes.revoke_key),
)
