"""Records of API keys: a name with limits. Only hashes of the secrets are kept."""

from __future__ import annotations

from msgspec import Struct


class SecretHash(Struct, frozen=True, omit_defaults=True, gc=False):
    """SHA-256 of a secret in hex. ends_at: Unix seconds after which it is refused; None: never."""

    sha256: str
    ends_at: float | None = None


class ApiKey(Struct, frozen=True, omit_defaults=True, gc=False):
    """An API key and its limits; a limit that is None is off.

    slot: number of its counter in the budgets; the counter 0 is that of all clients together.
    daily_micro_usd: budget of a UTC day. rate, images_rate: requests and generations a minute.
    open_tasks: unfinished tasks at once. models: patterns of the models that it may use, empty for all.
    max_megapixels: of one image. expires_at: Unix seconds.
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
