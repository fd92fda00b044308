"""Tests of what a client may see."""

from __future__ import annotations

from imagegen.accounts.api_keys import ApiKey
from imagegen.web.guard import Client
from tests.support import over_rows

KEY = ApiKey("a")
CLIENTS = {
    "without keys": Client("1.2.3.4"),
    "own tasks": Client.with_key(KEY, owns_tasks=True),
    "shared tasks": Client.with_key(KEY, owns_tasks=False),
    "admin": Client("1.2.3.4", is_admin=True),
    "link": Client("1.2.3.4", has_link=True),
}


@over_rows(
    ("name", "shared", "own", "others"),
    [
        ("without keys", True, False, False),
        ("own tasks", False, True, False),
        ("shared tasks", True, True, False),
        ("admin", True, True, True),
        ("link", True, True, True),
    ],
)
def test_a_client_sees_the_tasks_of_its_scope(name: str, shared: bool, own: bool, others: bool) -> None:
    client = CLIENTS[name]
    assert [client.may_see(scope) for scope in (None, "a", "b")] == [shared, own, others]
