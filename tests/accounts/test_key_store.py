"""Tests of API keys in Redis: changes reach every instance, and a loss of data opens nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.accounts import key_store
from imagegen.accounts.api_keys import ApiKey, decode_key, encode_key, fixed_keys, secret_digest
from imagegen.accounts.key_store import Fields, KeyRing, KeyStore
from imagegen.errors import ApiKeyExists, ApiKeyIsFixed, ApiKeyNotFound
from tests.conftest import Instance, MakeInstance
from tests.support import eventually

FIXED = fixed_keys({"web": secret_digest("web-secret").hex()})


class InstanceKeys(KeyStore):
    """Keys of an instance of the queue, connected to its channel if it has started."""

    def __init__(self, instance: Instance, fixed: tuple[ApiKey, ...]) -> None:
        super().__init__(instance.connection, instance.keys, KeyRing(fixed), instance.notifier)
        self.instance = instance
        instance.notifier.on_join.append(self.on_joined)
        instance.notifier.handlers[key_store.CHANGED] = self.on_changed


MakeStore = Callable[..., InstanceKeys]


@pytest.fixture
async def make_store(make_instance: MakeInstance) -> AsyncIterator[MakeStore]:
    """Make stores of instances that share one Redis, each connected to its channel: `make_store(fixed=())`."""
    loops = []

    def make(fixed: tuple[ApiKey, ...] = (), *, start: bool = True) -> InstanceKeys:
        store = InstanceKeys(make_instance(start=start), fixed)
        if start:
            loops.append(asyncio.create_task(store.read_forever()))
        return store

    yield make
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)


def accepts(store: KeyStore, secret: str) -> bool:
    return store.ring.find(secret_digest(secret)) is not None


def commands(store: InstanceKeys) -> int:
    return store.instance.connection.meter.commands["keys"]


async def test_a_key_works_on_all_instances_until_it_is_revoked(make_store: MakeStore) -> None:
    one, two = make_store(), make_store()
    await eventually(lambda: one.ring.is_loaded and two.ring.is_loaded)
    made, secret = await one.create(ApiKey("app", rate=5))
    assert (made.name, made.rate, made.slot) == ("app", 5, 1)
    assert made.created_at
    assert accepts(one, secret)
    await eventually(lambda: accepts(two, secret))
    await two.revoke("app")
    assert not accepts(two, secret)
    await eventually(lambda: not accepts(one, secret))


async def test_a_rotated_key_has_a_second_secret_everywhere(make_store: MakeStore) -> None:
    one, two = make_store(), make_store()
    _, old = await one.create(ApiKey("app", daily_micro_usd=5))
    changed, new = await two.rotate("app", 60.0)
    assert changed.daily_micro_usd == 5
    assert accepts(two, old)
    assert accepts(two, new)
    await eventually(lambda: accepts(one, new))
    await one.rotate("app", 0.0)
    assert not accepts(one, old)
    assert not accepts(one, new)


async def test_a_change_decodes_no_other_key(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, decoded = make_store(), make_store(), []
    secrets = [(await one.create(ApiKey(f"key-{number}")))[1] for number in range(20)]
    await two.refresh()

    def counted(record: bytes, name: str) -> ApiKey:
        decoded.append(record)
        return decode_key(record, name)

    monkeypatch.setattr(key_store, "decode_key", counted)
    made, new = await one.create(ApiKey("new"))
    await eventually(lambda: accepts(two, new))
    assert decoded == [encode_key(replace(made, slot=0))] * 2
    await two.revoke("key-0")
    await eventually(lambda: not accepts(one, secrets[0]))
    assert len(decoded) == 2
    assert all(accepts(store, secret) for store in (one, two) for secret in [*secrets[1:], new])


async def test_a_name_is_given_once_and_keeps_its_budget_slot_for_ever(make_store: MakeStore) -> None:
    one, two = make_store(FIXED), make_store(FIXED)
    await one.start()
    await two.start()
    assert [ring.fixed[0].slot for ring in (one.ring, two.ring)] == [1, 1]
    first, _ = await one.create(ApiKey("a"))
    other, _ = await two.create(ApiKey("b"))
    assert [first.slot, other.slot] == [2, 3]
    with pytest.raises(ApiKeyExists):
        await two.create(ApiKey("a"))
    await one.revoke("a")
    again, _ = await two.create(ApiKey("a"))
    assert again.slot == 2


async def test_keys_of_the_settings_are_changed_there_only(make_store: MakeStore) -> None:
    store = make_store(FIXED)
    for change in (store.create(ApiKey("web")), store.rotate("web", 1.0), store.revoke("web")):
        with pytest.raises(ApiKeyIsFixed):
            await change
    for change in (store.rotate("other", 1.0), store.revoke("other")):
        with pytest.raises(ApiKeyNotFound):
            await change


async def test_simultaneous_creations_of_one_name_make_one_key(make_store: MakeStore) -> None:
    stores = [make_store(start=False) for _ in range(3)]
    results = await asyncio.gather(*(store.create(ApiKey("a")) for store in stores), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["ApiKeyExists", "ApiKeyExists", "tuple"]


async def test_simultaneous_rotations_lose_no_secret(make_store: MakeStore) -> None:
    stores = [make_store(start=False) for _ in range(3)]
    await stores[0].create(ApiKey("a"))
    rotated = await asyncio.gather(*(store.rotate("a", 60.0) for store in stores))
    await stores[0].refresh()
    assert all(accepts(stores[0], secret) for _, secret in rotated)


async def test_nothing_is_read_while_nothing_changes(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store, joined, reads = make_store(), asyncio.Event(), []
    refresh = store.refresh

    async def read() -> None:
        reads.append("begins")
        await refresh()
        reads.append("ends")

    monkeypatch.setattr(store, "refresh", read)
    store.instance.notifier.on_join.append(joined.set)
    await joined.wait()
    await eventually(lambda: not store._needed.is_set() and reads and reads[-1] == "ends")
    before = commands(store)
    assert store.is_current
    await store.instance.client_queue.get("0" * 32)
    assert commands(store) == before


async def test_without_the_channel_requests_read_the_keys_once_a_second_at_most(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_store, "MAX_STALE_S", 60.0)
    monkeypatch.setattr(key_store, "WAIT_FOR_READ_S", 60.0)
    blind, other = make_store(start=False), make_store(start=False)
    assert (blind.is_current, commands(blind)) == (False, 0)
    await asyncio.gather(*(blind.update() for _ in range(20)))
    assert (blind.is_current, commands(blind)) == (True, 1)
    _, secret = await other.create(ApiKey("a"))
    assert not accepts(blind, secret)
    monkeypatch.setattr(key_store, "MAX_STALE_S", 0.0)
    assert not blind.is_current
    await blind.update()
    assert accepts(blind, secret)


async def test_a_lost_database_is_written_back(make_store: MakeStore) -> None:
    store = make_store(FIXED, start=False)
    await store.start()
    _, secret = await store.create(ApiKey("a"))
    redis, name = store.instance.connection.commands, store.instance.keys.api_keys
    await redis.delete(name)
    await store.refresh()
    assert accepts(store, secret)
    other = make_store(FIXED, start=False)
    await other.start()
    assert accepts(other, secret)
    assert (await other.create(ApiKey("b")))[0].slot == 3


async def test_an_instance_that_starts_after_the_loss_gets_the_keys_back(make_store: MakeStore) -> None:
    old = make_store(start=False)
    _, secret = await old.create(ApiKey("a"))
    await old.instance.connection.commands.delete(old.instance.keys.api_keys)
    new, joined = make_store(), asyncio.Event()
    new.instance.notifier.on_join.append(joined.set)
    await joined.wait()
    await eventually(lambda: new.ring.is_loaded)
    assert not new.ring.has_keys
    await old.refresh()
    await eventually(lambda: accepts(new, secret))


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_a_value_of_another_type_is_replaced_by_an_instance_that_has_the_keys(
    make_store: MakeStore, kind: str
) -> None:
    old = make_store()
    _, secret = await old.create(ApiKey("a"))
    redis, name = old.instance.connection.commands, old.instance.keys.api_keys
    await (redis.set(f"{name}:other", "x") if kind == "string" else redis.rpush(f"{name}:other", "x"))
    await redis.rename(f"{name}:other", name)
    new = make_store()
    await eventually(lambda: accepts(new, secret))
    assert await redis.exists(f"{name}:aside") == 1
    assert (await new.create(ApiKey("b")))[0].name == "b"


async def test_a_value_of_another_type_lets_nobody_in_while_no_instance_has_the_keys(make_store: MakeStore) -> None:
    store = make_store(FIXED, start=False)
    await store.instance.connection.commands.set(store.instance.keys.api_keys, "foreign")
    await store.start()
    assert not store.ring.is_loaded


async def test_lost_changes_are_written_back(make_store: MakeStore) -> None:
    store = make_store(start=False)
    _, secret = await store.create(ApiKey("a"))
    redis, name = store.instance.connection.commands, store.instance.keys.api_keys
    snapshot: dict[Any, Any] = await redis.hgetall(name)
    await store.revoke("a")
    await redis.hset(name, mapping=snapshot)
    await store.refresh()
    assert not accepts(store, secret)
    assert b"key:a" not in await redis.hgetall(name)


async def test_a_read_that_ends_after_a_later_one_is_no_loss(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(start=False)
    read, has_read, may_end = store._read, asyncio.Event(), asyncio.Event()

    async def read_late() -> Fields:
        fields = await read()
        has_read.set()
        await may_end.wait()
        return fields

    monkeypatch.setattr(store, "_read", read_late)
    late = asyncio.create_task(store.refresh())
    await has_read.wait()
    monkeypatch.setattr(store, "_read", read)
    await store.create(ApiKey("a"))
    before = commands(store)
    may_end.set()
    await late
    assert commands(store) == before, "nothing was written back"
    assert [key.name for key in store.ring.stored] == ["a"]


async def test_a_record_that_can_not_be_read_is_no_key(make_store: MakeStore) -> None:
    store = make_store(start=False)
    _, secret = await store.create(ApiKey("a"))
    await store.instance.connection.commands.hset(store.instance.keys.api_keys, "key:b", "{")
    await store.refresh()
    assert accepts(store, secret)
    assert [key.name for key in store.ring.stored] == ["a"]


@pytest.mark.parametrize("value", [b"", b"x", b"\xff\xfe", b"-1", b"1.5", b"9223372036854775807", b"9" * 5000])
async def test_foreign_values_among_the_keys_cost_no_other_key(make_store: MakeStore, value: bytes) -> None:
    store = make_store(FIXED, start=False)
    await store.start()
    made, secret = await store.create(ApiKey("a"))
    redis, name = store.instance.connection.commands, store.instance.keys.api_keys
    foreign = ("version", "slots", "slot:web", "slot:a", "slot:b", "key:b", b"key:\xff", b"slot:\xff")
    await redis.hset(name, mapping=dict.fromkeys(foreign, value))
    other = make_store(FIXED, start=False)
    await other.start()
    assert accepts(other, secret)
    assert accepts(other, "web-secret")
    created, _ = await other.create(ApiKey("c"))
    slots = [key.slot for key in other.ring.keys]
    assert len(set(slots)) == len(slots) == 3
    assert created.slot in slots
    await store.refresh()
    assert accepts(store, secret)
    with pytest.raises(ApiKeyNotFound):
        await other.rotate("b", 1)
    await other.revoke("b")
    assert (await other.rotate("a", 1))[0].name == made.name


async def test_a_repeated_change_is_made_once(make_store: MakeStore) -> None:
    """A script whose reply was lost is sent again."""
    store = make_store(start=False)
    made, _ = await store.create(ApiKey("a"))
    record = encode_key(replace(made, rate=9))
    old = encode_key(made)
    assert [await store._change("a", old, record) for _ in range(2)] == [True, True]
    assert not await store._change("a", old, old + b" ")
