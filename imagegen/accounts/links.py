"""Signed links: who has the link of an image or of an event stream opens it without a key, until it expires.

A link carries `exp`, a Unix time in seconds, and `sig`, an HMAC-SHA256 over path and expiry. Other parts of the query
are not signed: `v` and `size` choose nothing that the path alone does not give.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from typing import Any

from loguru import logger
from multidict import MultiMapping

from imagegen.errors import QueueUnavailable
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import ResponseError
from imagegen.redis_client.server_info import ServerInfo
from imagegen.tasks.task import Task

SIGNATURE_BYTES = 16

MARGIN_S = 3600.0
"""A link of an unfinished task lives longer than the task can by this."""

_PURPOSE = b"imagegen: key of signed links, 1"
"""Separates this use of a secret from its others."""

_BLOCK_BYTES = 64
_INNER, _OUTER = (bytes(byte ^ mask for byte in range(256)) for mask in (0x36, 0x5C))
"""https://datatracker.ietf.org/doc/html/rfc2104#section-2"""

_EXPIRY = re.compile(r"[1-9][0-9]{0,11}")
_MANY = "/api/events"


def derive_key(secret: str) -> bytes:
    """Return the key of signatures that follows from another secret."""
    return hmac.digest(secret.encode(), _PURPOSE, "sha256")


class Links:
    """Signer and verifier of links.

    Args:
        key: of the signatures; None until `LinkKey` has it.
        is_on: returns whether clients need a key, so that links must be signed.
        task_life_s: the longest time from a submit to the expiry of its result.
        clock: Unix time.
    """

    def __init__(
        self, key: bytes | None, *, is_on: Callable[[], bool], task_life_s: float, clock: Callable[[], float]
    ) -> None:
        self.key: bytes | None = None
        self._hashes: tuple[Any, Any] | None = None
        if key is not None:
            self.use(key)
        self.is_on = is_on
        self._task_life_s = task_life_s + MARGIN_S
        self._clock = clock

    def use(self, key: bytes) -> None:
        """Use a key of at most 64 bytes from now on.

        An HMAC from hashes that have begun takes a third of the time of `hmac.digest`.
        """
        self.key = key
        padded = key.ljust(_BLOCK_BYTES, b"\0")
        self._hashes = hashlib.sha256(padded.translate(_INNER)), hashlib.sha256(padded.translate(_OUTER))

    def sign(self, path: str, task: Task, query: str = "") -> str:
        """Return a query with the signature of a path of a task. Raises QueueUnavailable while there is no key.

        It is the same on all instances, and expires with the task. One of an unfinished task outlives it.
        """
        expires_at = task.created_at + self._task_life_s if task.expires_at is None else task.expires_at
        expiry = str(math.ceil(expires_at))
        return f"{query}{'&' if query else ''}exp={expiry}&sig={self._signature(path, expiry)}"

    def verify(self, path: str, query: MultiMapping[str]) -> bool:
        """Return whether a request's path is signed by its query. Raises QueueUnavailable while there is no key.

        The events of several tasks need the `exp` and `sig` of each, with commas between, in the order of `tasks`.
        """
        expiries, signatures = query.getall("exp", []), query.getall("sig", [])
        if len(expiries) != 1 or len(signatures) != 1:
            return False
        if path != _MANY:
            return self._is_valid(path, expiries[0], signatures[0])
        tasks, expiries, signatures = query.getall("tasks", []), expiries[0].split(","), signatures[0].split(",")
        ids = tasks[0].split(",") if len(tasks) == 1 else []
        if not len(ids) == len(expiries) == len(signatures):
            return False
        return all(map(self._is_valid, _event_paths(ids), expiries, signatures))

    def _is_valid(self, path: str, expiry: str, signature: str) -> bool:
        if not _EXPIRY.fullmatch(expiry) or not signature.isascii():
            return False
        return hmac.compare_digest(self._signature(path, expiry), signature) and int(expiry) > self._clock()

    def _signature(self, path: str, expiry: str) -> str:
        if self._hashes is None:
            raise QueueUnavailable(headers={"Retry-After": "2"})
        inner, outer = self._hashes[0].copy(), self._hashes[1].copy()
        inner.update(f"{path}\n{expiry}".encode())
        outer.update(inner.digest())
        return urlsafe_b64encode(outer.digest()[:SIGNATURE_BYTES])[:-2].decode()


class LinkKey:
    """Key of signed links that all instances share by Redis, where no setting has a secret that it follows from."""

    def __init__(self, connection: Connection, keys: Keys, links: Links) -> None:
        self._connection = connection
        self._name = keys.link_key
        self._links = links
        self._unshared = asyncio.Event()

    def on_new_server(self, _known: ServerInfo, _new: ServerInfo) -> None:
        """Share the key again: another server may have none."""
        self._unshared.set()

    def on_peer(self) -> None:
        """Share the key again: Redis may have lost it unnoticed, and a new instance has made another."""
        if self._links.is_on():
            self._unshared.set()

    async def share_forever(self) -> None:
        """Take the key that Redis has, or give it ours: at the start, and when either may have changed."""
        while True:
            self._unshared.clear()
            await self._connection.retry_until_available(self._share)
            await self._unshared.wait()

    async def _share(self) -> None:
        own = self._links.key or secrets.token_bytes(32)
        try:
            existing = await self._connection.multiplexer.execute("SET", self._name, own.hex(), "NX", "GET")
            self._links.use(bytes.fromhex(existing.decode()) if existing else own)
        except (ResponseError, ValueError) as error:
            logger.error("The key of signed links can't be shared, so other instances refuse our links: {}", error)
            self._links.use(own)
        self._connection.meter.redis_commands_sent("other", 1)


def _event_paths(ids: list[str]) -> Iterator[str]:
    return (f"/api/images/{task_id}/events" for task_id in ids)
