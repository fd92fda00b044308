"""The client of a request."""

from __future__ import annotations

from msgspec import Struct

from imagegen.accounts.keys import ApiKey

_KEY_ID = "key:"
"""No address begins so."""

_ADMIN_SCOPE = "(admin)"
"""No key has this name."""


class Client(Struct, frozen=True, gc=False):
    """Who sent a request.

    address: as limits count it. key: its API key, None without one. scope: name of the key whose tasks alone it sees;
    None if it sees the tasks that are shared. is_admin: it sees and may do everything.
    has_link: a signed link of the request's path is all that it showed; it gives the tasks of this path.
    """

    address: str
    key: ApiKey | None = None
    scope: str | None = None
    is_admin: bool = False
    has_link: bool = False

    @property
    def id(self) -> str:
        """Name by which limits, idempotency keys and repeated calls are kept."""
        return self.address if self.key is None else _KEY_ID + self.key.name

    @property
    def name(self) -> str:
        """Name of the key, empty without one."""
        return "" if self.key is None else self.key.name

    @property
    def own_scope(self) -> str | None:
        """Scope of tasks that it alone sees; None without a key."""
        return _ADMIN_SCOPE if self.is_admin else self.name or None

    def may_see(self, scope: str | None) -> bool:
        """Return whether it may see the tasks of a scope."""
        if scope == self.scope or self.is_admin or self.has_link:
            return True
        return scope is not None and scope == self.name
