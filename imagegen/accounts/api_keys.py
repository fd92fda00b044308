"""Records of API keys: a name with limits. Only hashes of the secrets are kept."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from fnmatch import fnmatchcase

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import FieldError, NotAllowed
from imagegen.tasks.request import GenerationRequest

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
"""Of a key that is made at run time. It begins with no dot: clients remove `.` and `..` from paths."""

SECRET_PREFIX = "ig_"  # noqa: S105 - by which scanners of leaked secrets find ours
MAX_SECRETS = 8
"""Live secrets of one key: the oldest ends if it is rotated more often within its grace."""

_SECRET_BYTES = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIXELS_PER_MEGAPIXEL = 1024**2
"""1024 x 1024 is one."""


class SecretHash(Struct, frozen=True, omit_defaults=True, gc=False):
    """SHA-256 of a secret in hex. ends_at: Unix seconds after which it is refused; None: never."""

    sha256: str
    ends_at: float | None = None


class ApiKey(Struct, frozen=True, omit_defaults=True, gc=False):
    """An API key and its limits; None turns a limit off.

    slot: number of its counter in the budgets; the counter 0 is that of all clients together.
    daily_micro_usd: budget of a UTC day. rate, images_rate: requests and generations a minute.
    open_tasks: unfinished tasks at once. models: patterns of the models that it may use, empty for all.
    max_megapixels: of one image. created_at, expires_at: Unix seconds.
    """

    name: str
    secrets: tuple[SecretHash, ...] = ()
    slot: int = 0
    daily_micro_usd: int | None = None
    rate: int | None = None
    images_rate: int | None = None
    open_tasks: int | None = None
    models: tuple[str, ...] = ()
    max_megapixels: float | None = None
    expires_at: float | None = None
    created_at: float | None = None

    @property
    def is_restricted(self) -> bool:
        """Return whether some requests are not allowed with it."""
        return bool(self.models) or self.max_megapixels is not None

    def allows_model(self, model: str) -> bool:
        """Return whether a model matches one of the patterns."""
        return not self.models or any(fnmatchcase(model.lower(), pattern.lower()) for pattern in self.models)

    def allows_size(self, width: int, height: int) -> bool:
        """Return whether an image of this size is allowed."""
        return self.max_megapixels is None or width * height <= self.max_megapixels * _PIXELS_PER_MEGAPIXEL

    def with_secret(self, sha256: str, now: float, grace_s: float) -> ApiKey:
        """Return the key with a further secret; the others end after `grace_s` seconds at the latest."""
        ends_at = now + grace_s
        old = (SecretHash(secret.sha256, min(ends_at, secret.ends_at or ends_at)) for secret in self.secrets)
        live = [secret for secret in old if secret.ends_at is not None and secret.ends_at > now]
        return replace(self, secrets=(SecretHash(sha256), *live[: MAX_SECRETS - 1]))


def check_allowed(key: ApiKey | None, request: GenerationRequest, *, sides: str = "width, height") -> None:
    """Raise NotAllowed if a key may not send a request. sides: the client's fields of the size."""
    if key is None or not key.is_restricted:
        return
    details = []
    if not key.allows_model(request.model):
        details.append(FieldError("model", f"{request.model} is not one of this key: {', '.join(key.models)}"))
    if not key.allows_size(request.width, request.height):
        rule = f"this key allows images of at most {key.max_megapixels:g} megapixels"
        details += [FieldError(side, rule) for side in sides.split(", ")]
    if details:
        raise NotAllowed(details=details)


def new_secret() -> str:
    """Return a new secret: the prefix and 43 characters."""
    return SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def secret_digest(secret: str) -> bytes:
    """Return the SHA-256 of a secret as it came in a header."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()


def fixed_keys(hashes: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """Return the keys of the settings. hashes: SHA-256 in hex, by name."""
    return tuple(ApiKey(name, (SecretHash(sha256),)) for name, sha256 in hashes.items())


_DECODER = msgspec.json.Decoder(ApiKey)


def encode_key(key: ApiKey) -> bytes:
    """Return a record without its slot, which is stored apart and outlives it."""
    return msgspec.json.encode(replace(key, slot=0))


def decode_key(record: bytes, name: str) -> ApiKey:
    """Return the key of a record. Raises ValueError if it can't be read, or is that of another name."""
    try:
        key = _DECODER.decode(record)
    except msgspec.MsgspecError as error:
        raise ValueError("no record of an API key") from error
    if key.name != name:
        raise ValueError("another name")
    if not all(_SHA256.fullmatch(secret.sha256) for secret in key.secrets):
        raise ValueError("no SHA-256")
    return key
