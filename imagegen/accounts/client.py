"""The client of a request."""

from __future__ import annotations

from msgspec import Struct

from imagegen.accounts.keys import ApiKey

_KEY_ID = "key:"
"""No address begins so."""


class Client(Struct, frozen=True, gc=False):
    """Who sent a request.

    address: as limits count it. key: its API key, None without one. scope: name of the key whose tasks alone it sees;
    None if it sees the tasks that are shared. is_admin: it sees and may do everything.
    """

    address: str
    key: ApiKey | None = None
    scope: str | None = None
    is_admin: bool = False

    @property
    def id(self) -> str:
        """Name by which limits, idempotency keys and repeated calls are kept."""
        return self.address if self.key is None else _KEY_ID + self.key.name

    @property
    def name(self) -> str:
        """Name of the key, empty without one."""
        return "" if self.key is None else self.key.name
