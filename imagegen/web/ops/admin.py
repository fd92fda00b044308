"""Authentication of the admin routes by the admin token; callers of every address need it."""

from __future__ import annotations

import hmac

from aiohttp import web

from imagegen.accounts.api_keys import secret_digest


class AdminAuth:
    """The admin token, kept as its hash; every comparison takes the same time."""

    __slots__ = ("_hash",)

    def __init__(self, token: str) -> None:
        self._hash = secret_digest(token)

    def replace(self, token: str) -> None:
        """Let another token count from now on."""
        self._hash = secret_digest(token)

    def admits(self, token: str) -> bool:
        return hmac.compare_digest(secret_digest(token), self._hash)


ADMIN = web.AppKey("admin", AdminAuth)
