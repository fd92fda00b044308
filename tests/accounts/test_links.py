"""Tests of signed links: what a signature opens, for how long, and on which instances."""

from __future__ import annotations

import asyncio
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Callable

import pytest
from multidict import MultiDict
from yarl import URL

from imagegen.accounts.links import LinkKey, Links, derive_key
from imagegen.errors import QueueUnavailable
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.server_info import ServerInfo
from imagegen.tasks.task import Task
from tests.support import eventually, over_rows

NOW = 1_000_000.0
TASK = Task("ab" * 16, 1, 1, "digest", "model", b"{}", NOW, expires_at=NOW + 60.5)
OTHER = Task("cd" * 16, 1, 1, "digest", "model", b"{}", NOW)
IMAGE, EVENTS = f"/api/images/{TASK.id}/0", f"/api/images/{TASK.id}/events"


def links(key: bytes | None = b"k" * 32, *, now: float = NOW, life_s: float = 100.0) -> Links:
    return Links(key, is_on=lambda: True, task_life_s=life_s, clock=lambda: now)


def query_of(text: str) -> MultiDict[str]:
    return MultiDict(URL(f"/?{text}").query)


def test_a_signature_opens_its_own_path_with_any_size_and_version() -> None:
    signed = links().sign(IMAGE, TASK, "v=0123456789ab")
    assert signed.startswith("v=0123456789ab&exp=1000061&sig=")
    assert links().verify(IMAGE, query_of(signed))
    assert links().verify(IMAGE, query_of(f"{signed}&size=256".replace("v=0123", "v=9999")))


@over_rows("path", [f"/api/images/{TASK.id}/1", EVENTS, f"/api/images/{OTHER.id}/0", f"/{IMAGE}", ""])
def test_a_signature_opens_no_other_path(path: str) -> None:
    assert not links().verify(path, query_of(links().sign(IMAGE, TASK)))


def _forged(change: Callable[[MultiDict[str]], object]) -> MultiDict[str]:
    query = query_of(links().sign(IMAGE, TASK))
    change(query)
    return query


@over_rows(
    "change",
    [
        lambda query: query.pop("sig"),
        lambda query: query.pop("exp"),
        lambda query: query.update(exp="1000062"),
        lambda query: query.update(exp="01000061"),
        lambda query: query.update(exp="\u0661000061"),
        lambda query: query.update(exp="9" * 5_000),
        lambda query: query.update(exp=""),
        lambda query: query.update(sig=query["sig"][:-1]),
        lambda query: query.update(sig=query["sig"] + "=="),
        lambda query: query.update(sig=query["sig"].swapcase()),
        lambda query: query.update(sig="\u00e9" * 22),
        lambda query: query.update(sig=""),
        lambda query: query.add("sig", query["sig"]),
        lambda query: query.add("exp", query["exp"]),
    ],
)
def test_a_changed_signature_is_refused(change: Callable[[MultiDict[str]], object]) -> None:
    assert not links().verify(IMAGE, _forged(change))


def test_the_signature_is_the_start_of_an_hmac() -> None:
    whole = hmac.digest(b"k" * 32, f"{IMAGE}\n1000061".encode(), "sha256")
    assert links().sign(IMAGE, TASK).endswith("&sig=" + urlsafe_b64encode(whole[:16]).decode().rstrip("="))


def test_a_link_of_a_finished_task_expires_with_it() -> None:
    signed = query_of(links().sign(IMAGE, TASK))
    assert links(now=NOW + 60.9).verify(IMAGE, signed)
    assert not links(now=NOW + 61).verify(IMAGE, signed)


def test_a_link_of_an_unfinished_task_outlives_the_task() -> None:
    signed = query_of(links(life_s=7_200.0).sign(EVENTS, Task(TASK.id, 1, 1, "digest", "model", b"{}", NOW)))
    assert links(now=NOW + 7_200.0).verify(EVENTS, signed)
    assert not links(now=NOW + 100_000.0).verify(EVENTS, signed)


def test_instances_with_one_secret_make_equal_links_and_others_refuse_them() -> None:
    first, second, other = (links(derive_key(secret)) for secret in ("s" * 16, "s" * 16, "t" * 16))
    assert first.sign(IMAGE, TASK) == second.sign(IMAGE, TASK)
    assert not other.verify(IMAGE, query_of(first.sign(IMAGE, TASK)))
    assert derive_key("s" * 16) != b"s" * 16


def test_the_events_of_several_tasks_need_the_signature_of_each() -> None:
    signer = links()
    parts = [query_of(signer.sign(f"/api/images/{task.id}/events", task)) for task in (TASK, OTHER)]
    exp, sig = (",".join(part[name] for part in parts) for name in ("exp", "sig"))
    both = f"{TASK.id},{OTHER.id}"
    assert signer.verify("/api/events", MultiDict(tasks=both, exp=exp, sig=sig))
    for tasks in (f"{OTHER.id},{TASK.id}", f"{both},{both}", TASK.id, "", f"{TASK.id},{'ef' * 16}"):
        assert not signer.verify("/api/events", MultiDict(tasks=tasks, exp=exp, sig=sig)), tasks
    assert not signer.verify(
        "/api/events", MultiDict([("tasks", TASK.id), ("tasks", OTHER.id), ("exp", exp), ("sig", sig)])
    )
    assert not signer.verify("/api/events", MultiDict(exp="", sig="", tasks=""))


def test_without_a_key_a_link_is_neither_made_nor_judged() -> None:
    signed = query_of(links().sign(IMAGE, TASK))
    with pytest.raises(QueueUnavailable):
        links(None).sign(IMAGE, TASK)
    with pytest.raises(QueueUnavailable):
        links(None).verify(IMAGE, signed)
    assert not links(None).verify(IMAGE, MultiDict())


@pytest.mark.parametrize("loss", ["none", "noticed", "unnoticed"])
async def test_instances_share_a_random_key_by_redis_also_after_it_lost_it(
    redis_url: str, prefix: str, loss: str
) -> None:
    connection, keys = Connection(redis_url), Keys(prefix)
    first, second = links(None), links(None)
    sharing: list[asyncio.Task[None]] = []

    async def share(instance: Links) -> LinkKey:
        key = LinkKey(connection, keys, instance)
        sharing.append(asyncio.create_task(key.share_forever()))
        await eventually(lambda: instance.key)
        return key

    async def is_stored() -> bool:
        return bool(await connection.commands.exists(keys.link_key))

    key = await share(first)
    if loss != "none":
        await connection.commands.delete(keys.link_key)
    if loss == "noticed":
        before = first.key
        key.on_new_server(ServerInfo(), ServerInfo())
        await eventually(is_stored)
        assert first.key == before
    await share(second)
    if loss == "unnoticed":
        key.on_peer()
    await eventually(lambda: first.key == second.key)
    assert len(first.key or b"") == 32
    for task in sharing:
        task.cancel()
    await asyncio.gather(*sharing, return_exceptions=True)
    await connection.close()
