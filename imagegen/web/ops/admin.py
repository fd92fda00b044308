"""Authentication of the admin routes by the admin token, for callers of every address."""

from __future__ import annotations

import hashlib
import hmac

from aiohttp import web


class AdminAuth:
    """The admin token, kept as its hash; every comparison takes the same time."""

    __slots__ = ("_hash",)

    def __init__(self, token: str) -> None:
        self._hash = _sha256(token)

    def admits(self, token: str) -> bool:
        return hmac.compare_digest(_sha256(token), self._hash)


ADMIN = web.AppKey("admin", AdminAuth)


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
