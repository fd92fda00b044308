"""All API keys in memory: authentication of requests without a Redis command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from hmac import compare_digest
from typing import NamedTuple

from msgspec.structs import replace

from imagegen.accounts.keys import ApiKey


class _Secret(NamedTuple):
    digest: bytes
    key: ApiKey
    ends_at: float | None


class KeyRing:
    """Keys of the settings, and those that were made at run time once Redis was read.

    Attributes:
        fixed: keys of the settings.
        stored: keys that were made at run time.
        loaded: set once the keys in Redis were read; until then no request may be taken for allowed.
        on_change: called after the keys were replaced.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, fixed: Iterable[ApiKey] = (), *, clock: Callable[[], float] = time.time) -> None:
        self.fixed: tuple[ApiKey, ...] = tuple(fixed)
        self.stored: tuple[ApiKey, ...] = ()
        self.loaded = asyncio.Event()
        self.on_change: list[Callable[[], None]] = []
        self._clock = clock
        self._secrets: dict[bytes, _Secret] = {}
        self._by_name: dict[str, ApiKey] = {}
        self._index()

    @property
    def is_loaded(self) -> bool:
        """Return whether the keys in Redis were read once."""
        return self.loaded.is_set()

    @property
    def has_keys(self) -> bool:
        """Return whether there is a key, expired ones too: the last key's end never opens the service."""
        return bool(self._by_name)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """Return all keys."""
        return (*self.fixed, *self.stored)

    def use_clock(self, clock: Callable[[], float]) -> None:
        """Read the time from another clock from now on, such as that of Redis once it is connected."""
        self._clock = clock

    def replace_stored(self, stored: Iterable[ApiKey], slots: Mapping[str, int]) -> None:
        """Replace the keys that were made at run time. slots: numbers of the budget counters by name of a key."""
        before = self.keys
        self.fixed = tuple(replace(key, slot=slots.get(key.name, 0)) for key in self.fixed)
        self.stored = tuple(replace(key, slot=slots.get(key.name, 0)) for key in stored)
        self.loaded.set()
        if self.keys != before:
            self._index()
            for callback in self.on_change:
                callback()

    def find(self, digest: bytes) -> ApiKey | None:
        """Return the key of a secret, by the secret's SHA-256; None if it is unknown or has expired."""
        secret = self._secrets.get(digest)
        if secret is None or not compare_digest(secret.digest, digest):
            return None
        if secret.ends_at is not None and self._clock() >= secret.ends_at:
            return None
        return secret.key

    def by_name(self, name: str) -> ApiKey | None:
        """Return a key that exists and has not expired."""
        key = self._by_name.get(name)
        return None if key is None or _has_ended(key.expires_at, self._clock()) else key

    def open_limit_of(self, name: str) -> int | None:
        """Return how many unfinished tasks a key may have, None without a limit."""
        key = self._by_name.get(name)
        return None if key is None else key.open_tasks

    def allows_model(self, name: str, model: str) -> bool:
        """Return whether a task of a key may use a model. A revoked key allows none; a task without a key uses all."""
        if not name:
            return True
        key = self._by_name.get(name)
        return key is not None and key.allows_model(model)

    def _index(self) -> None:
        self._by_name = {key.name: key for key in (*self.stored, *self.fixed)}
        self._secrets = {
            digest: _Secret(digest, key, _earlier(secret.ends_at, key.expires_at))
            for key in (*self.stored, *self.fixed)
            for secret in key.secrets
            for digest in [bytes.fromhex(secret.sha256)]
        }


def _has_ended(ends_at: float | None, now: float) -> bool:
    return ends_at is not None and now >= ends_at


def _earlier(first: float | None, second: float | None) -> float | None:
    times = [each for each in (first, second) if each is not None]
    return min(times, default=None)
