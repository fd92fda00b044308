"""All API keys: in memory, and in Redis, where they are made, rotated and revoked at run time.

Requests are authenticated without a Redis command. All instances read the keys again after each change.

One hash has all records. It is read at the start, after each connection to the channel of the instances, and after each
message there. Where that channel is not usable it is read while requests come, at most once a second.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from hmac import compare_digest
from typing import NamedTuple, cast

import orjson
from loguru import logger
from msgspec.structs import replace

from imagegen.accounts.api_keys import ApiKey, SecretHash, decode_key, encode_key, new_secret, secret_digest
from imagegen.backoff import Backoff
from imagegen.errors import ApiKeyExists, ApiKeyIsFixed, ApiKeyNotFound, FieldError, InvalidRequest, QueueUnavailable
from imagegen.queue.notifier import Message, Notifier
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg, Script
from imagegen.redis_client.redis_errors import RedisError, ResponseError, shown, wrong_type

CHANGED = "keys"
"""Kind of the message on the channel of the instances."""

MAX_STALE_S = 1.0
"""Longest age of the records while no message would announce a change."""

WAIT_FOR_READ_S = 0.5
"""A request that needs fresh records waits this long; then the records in memory count."""

MAX_KEYS = 10_000

MAX_SLOT, MAX_VERSION = 1_000_000, 2**53
"""A budget is eight bytes of a string for each slot. Numbers of Lua are exact up to the other one."""

_CHANGE, _ASSIGN, _RESTORE = (
    load_script(__package__, "key_numbers", name) for name in ("change_key", "assign_slots", "restore_keys")
)
_VERSION, _KEY, _SLOT = b"version", b"key:", b"slot:"
_WRITE_COMMANDS = 8
_RETRY_S, _MAX_RETRY_S = 1.0, 60.0

Fields = Mapping[bytes, bytes]


class _Secret(NamedTuple):
    digest: bytes
    key: ApiKey
    ends_at: float | None


class KeyRing:
    """Keys of the settings, and those that were made at run time once Redis was read.

    Attributes:
        fixed: keys of the settings.
        stored: keys that were made at run time.
        loaded, is_loaded: set once the keys in Redis were read; until then no request may be taken for allowed.
        has_keys: whether there is a key, expired ones too: the last key's end never opens the service.
        on_change: called after the keys were replaced.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(self, fixed: Iterable[ApiKey] = (), *, clock: Callable[[], float] = time.time) -> None:
        self.fixed: tuple[ApiKey, ...] = tuple(fixed)
        self.stored: tuple[ApiKey, ...] = ()
        self.loaded, self.is_loaded = asyncio.Event(), False
        self.on_change: list[Callable[[], None]] = []
        self._clock = clock
        self._secrets: dict[bytes, _Secret] = {}
        self._secrets_by_key: dict[int, list[_Secret]] = {}
        self._by_name: dict[str, ApiKey] = {}
        self.has_keys = False
        self._index()

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
        self.fixed = tuple(_with_slot(key, slots) for key in self.fixed)
        self.stored = tuple(_with_slot(key, slots) for key in stored)
        self.is_loaded = True
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
        """Index the keys; the secrets of those that are the same objects as before are not parsed again."""
        keys, known = (*self.stored, *self.fixed), self._secrets_by_key
        self._by_name = {key.name: key for key in keys}
        self.has_keys = bool(self._by_name)
        self._secrets_by_key = {id(key): known.get(id(key)) or _secrets_of(key) for key in keys}
        self._secrets = {secret.digest: secret for secrets in self._secrets_by_key.values() for secret in secrets}


def _with_slot(key: ApiKey, slots: Mapping[str, int]) -> ApiKey:
    slot = slots.get(key.name, 0)
    return key if key.slot == slot else replace(key, slot=slot)


def _secrets_of(key: ApiKey) -> list[_Secret]:
    return [
        _Secret(bytes.fromhex(secret.sha256), key, _earlier(secret.ends_at, key.expires_at)) for secret in key.secrets
    ]


def _has_ended(ends_at: float | None, now: float) -> bool:
    return ends_at is not None and now >= ends_at


def _earlier(first: float | None, second: float | None) -> float | None:
    times = [time_s for time_s in (first, second) if time_s is not None]
    return min(times, default=None)


class KeyStore:
    """Keys in Redis, and the ring that has them in memory.

    notifier: None for a process that serves no requests, and needs no messages about changes.
    """

    def __init__(self, connection: Connection, keys: Keys, ring: KeyRing, notifier: Notifier | None = None) -> None:
        self.ring = ring
        self._connection = connection
        self._keys = keys
        self.notifier = notifier
        self._fields: Fields = {}
        self._needed = asyncio.Event()
        self._needed.set()
        self._reading: asyncio.Task[None] | None = None
        self._read_at = -MAX_STALE_S
        self._reported = ""

    async def create(self, key: ApiKey) -> tuple[ApiKey, str]:
        """Store a new key; return it and its secret. Raises ApiKeyExists, ApiKeyIsFixed, QueueUnavailable."""
        if key.name in {fixed.name for fixed in self.ring.fixed}:
            raise ApiKeyIsFixed
        secret = new_secret()
        created = replace(key, secrets=(_hash(secret),), created_at=self._connection.clock())
        await self.refresh()
        if len(self.ring.stored) >= MAX_KEYS:
            raise InvalidRequest(details=[FieldError("name", f"is one too many: there are {MAX_KEYS} keys")])
        if not await self._change(key.name, b"", encode_key(created)):
            raise ApiKeyExists
        return await self._stored(key.name), secret

    async def rotate(self, name: str, grace_s: float) -> tuple[ApiKey, str]:
        """Add a secret to a key; its others live for `grace_s` seconds. Raises ApiKeyNotFound, QueueUnavailable."""
        secret = new_secret()
        while True:
            await self.refresh()
            record = self._record(name)
            try:
                key = decode_key(record, name)
            except ValueError:
                raise ApiKeyNotFound from None
            changed = key.with_secret(_hash(secret).sha256, self._connection.clock(), grace_s)
            if await self._change(name, record, encode_key(changed)):
                return await self._stored(name), secret

    async def revoke(self, name: str) -> None:
        """Remove a key. Raises ApiKeyNotFound, ApiKeyIsFixed, QueueUnavailable."""
        while True:
            await self.refresh()
            if await self._change(name, self._record(name), b""):
                await self.refresh()
                return

    def on_joined(self) -> None:
        """Read the records soon: a message may have been missed."""
        self._needed.set()

    def on_changed(self, _message: Message) -> None:
        """Read the records that another process changed."""
        self._needed.set()

    async def start(self) -> None:
        """Read the records once; if Redis is away, `read_forever` reads them when it is back."""
        try:
            await self.refresh()
            self._needed.clear()
        except QueueUnavailable:
            return
        except RedisError as error:
            self._report(error)

    async def read_forever(self) -> None:
        """Read the records whenever they may have changed."""
        refusals = Backoff(_RETRY_S, _MAX_RETRY_S)
        while True:
            await self._needed.wait()
            self._needed.clear()
            try:
                await self._connection.retry_until_available(self.refresh)
                refusals.reset()
            except RedisError as error:
                self._report(error)
                if wrong_type(error):  # an instance that has the keys in memory writes them back
                    await self._publish()
                self._needed.set()
                await asyncio.sleep(refusals.next_s())

    @property
    def is_current(self) -> bool:
        """Return whether no change in Redis can have been missed."""
        return (
            self.notifier is None
            or self.notifier.is_informed
            or time.monotonic() - self._read_at < MAX_STALE_S
            or self._connection.health.down_since is not None
        )

    async def update(self) -> None:
        """Read the records where no message would announce a change; requests at the same time share one read."""
        if self._reading is None or self._reading.done():
            self._read_at = time.monotonic()
            self._reading = asyncio.create_task(self._try_refresh(), name="read-keys")
        await asyncio.wait([self._reading], timeout=WAIT_FOR_READ_S)

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except QueueUnavailable:
            return
        except RedisError as error:
            self._report(error)

    async def refresh(self) -> None:
        """Read the records now, and write them back if Redis lost some. Raises QueueUnavailable, RedisError."""
        version_before = _version(self._fields)  # records that are read at the same time may be newer
        try:
            fields = await self._read()
        except ResponseError as error:
            if not (wrong_type(error) and version_before):
                raise
            fields = {}
        if _version(fields) < version_before:
            logger.warning("Redis lost changes of API keys; they are written back")
            flat = [part for pair in self._fields.items() for part in pair]
            await self._run(_RESTORE, [_version(self._fields), *flat], 3, f"{self._keys.api_keys}:aside")
            await self._publish()  # an instance that has just started may have read the lost state
            fields = await self._read()
        if missing := self._without_slot(fields):
            await self._run(_ASSIGN, missing, 6 * len(missing))
            fields = await self._read()
        if _version(fields) < _version(self._fields):  # a read that began earlier may end later
            return
        if fields != self._fields or not self.ring.is_loaded:
            before, self._fields = self._fields, fields
            self._fill_ring(before)

    async def _read(self) -> Fields:
        async with self._connection.deadline():
            reply = await cast(Awaitable[Fields], self._connection.commands.hgetall(self._keys.api_keys))
        self._count(1)
        return reply

    def _fill_ring(self, before: Fields) -> None:
        """Put the records into the ring. Only those are decoded that changed, since thousands take 50 ms."""
        stored, unreadable, known = [], 0, {key.name: key for key in self.ring.stored}
        for name, value in _named(self._fields, _KEY):
            key = known.get(name) if before.get(_KEY + name.encode()) == value else None
            try:
                stored.append(key or decode_key(value, name))
            except ValueError:
                unreadable += 1
        if unreadable:
            logger.warning("{} records of API keys in Redis can't be read, and their keys are refused", unreadable)
        self.ring.replace_stored(sorted(stored, key=lambda key: key.name), _slots(self._fields))

    def _without_slot(self, fields: Fields) -> list[str]:
        """Return the names of keys that have no counter in the budgets, or an unreadable number of it."""
        slots = _slots(fields)
        names = [key.name for key in self.ring.fixed] + [name for name, _ in _named(fields, _KEY)]
        return [name for name in names if name not in slots]

    def _record(self, name: str) -> bytes:
        record = self._fields.get(_KEY + name.encode())
        if record is not None:
            return record
        raise ApiKeyIsFixed if name in {key.name for key in self.ring.fixed} else ApiKeyNotFound

    async def _stored(self, name: str) -> ApiKey:
        """Return a key that was just changed, from memory."""
        await self.refresh()
        return next((key for key in self.ring.stored if key.name == name), ApiKey(name))

    async def _change(self, name: str, expected: bytes, record: bytes) -> bool:
        """Write a record and notify the instances; return False if another one is there than expected."""
        existing = await self._run(_CHANGE, [name, expected, record], _WRITE_COMMANDS)
        if existing is not None:
            return False
        await self._publish()
        return True

    async def _publish(self) -> None:
        """Publish that the keys changed. Instances without the channel poll."""
        message = orjson.dumps({"from": "", "kind": CHANGED})
        try:  # without the guard of the connection: missing rights for the channel are no outage
            await self._connection.commands.publish(self._keys.notifications, message)
        except (RedisError, OSError, TimeoutError) as error:
            logger.debug("The change of the keys can't be published: {}", error)
        self._count(1)

    async def _run(self, script: Script, args: Sequence[Arg], commands: int, *more_keys: str) -> object:
        keys = [self._keys.api_keys, *more_keys]
        async with self._connection.deadline():
            reply: object = await self._connection.commands.run_script(script, keys, args)
        self._count(1 + commands)
        return reply

    def _count(self, commands: int) -> None:
        self._connection.meter.redis_commands_sent("keys", commands)

    def _report(self, error: RedisError) -> None:
        text = shown(error)
        if text != self._reported:
            self._reported = text
            logger.error("The API keys can't be read from Redis, so that requests are refused: {}", text)


def _hash(secret: str) -> SecretHash:
    return SecretHash(secret_digest(secret).hex())


def _named(fields: Fields, prefix: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the names and values of the fields of one kind, without those that are no text."""
    for field, value in fields.items():
        if field.startswith(prefix):
            name = field.removeprefix(prefix).decode(errors="replace")
            if "\ufffd" not in name:
                yield name, value


def _slots(fields: Fields) -> dict[str, int]:
    """Return the number of each name's counter in the budgets, without those that another program wrote."""
    numbers = {name: _number(value, MAX_SLOT) for name, value in _named(fields, _SLOT)}
    return {name: number for name, number in numbers.items() if number}


def _version(fields: Fields) -> int:
    """Return the number of changes, 0 if it can't be read: then an instance that has the keys writes them back."""
    return _number(fields.get(_VERSION, b""), MAX_VERSION)


def _number(value: bytes, limit: int) -> int:
    """Return a number between 1 and a limit, 0 for any other value. `key_numbers.lua` has the same rule."""
    return int(value) if re.fullmatch(rb"[1-9][0-9]{0,15}", value) and int(value) <= limit else 0
