"""Checks for the command `imagegen doctor`: each finding names what to do, and whether the service can work with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

from msgspec import Struct

from imagegen import start_checks
from imagegen.accounts.key_ring import KeyRing
from imagegen.accounts.key_store import KeyStore
from imagegen.errors import QueueUnavailable, SettingsError
from imagegen.providers.model_table import MAX_AGE, ModelTable, load_table
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.server_binary import find_binary
from imagegen.redis_client.server_info import eviction_warning
from imagegen.settings import Settings

REDIS_TIMEOUT_S = 10.0


class Finding(Struct, frozen=True):
    """One result. fatal: the service can't do its work with it."""

    text: str
    fatal: bool = False


def check_all(settings: Settings, today: date) -> Iterator[Finding]:
    """Yield the findings about the settings, the data folder, who may call, the models and Redis."""
    yield from (Finding(line) for line in start_checks.warnings(settings))
    yield from _fault_of(partial(start_checks.check_alert_webhook, settings))
    yield from _fault_of(partial(start_checks.check_data_dir, settings.data_dir))
    try:
        table = load_table(settings.provider, settings.models_file)
    except SettingsError as error:
        yield Finding(str(error), fatal=True)
    else:
        yield from check_table(table, today)
        yield from check_models(settings, table, today)
    if settings.redis_url is not None:
        yield from asyncio.run(_check_redis(settings, settings.redis_url))
    else:
        yield from _fault_of(partial(find_binary, settings.redis_server))
        for finding in _exposure(settings, has_keys=bool(settings.api_keys)):
            yield Finding(f"{finding.text}. Keys in the embedded Redis are not read here: see `imagegen keys list`")


def _exposure(settings: Settings, *, has_keys: bool) -> list[Finding]:
    return list(_fault_of(partial(start_checks.check_exposure, settings, has_keys=has_keys)))


def _fault_of(check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except SettingsError as error:
        yield Finding(str(error), fatal=True)


def embedded_server(settings: Settings) -> str | None:
    """Return the program and version of the embedded server; None if there is none here, or REDIS_URL names another."""
    if settings.redis_url is not None:
        return None
    try:
        binary = find_binary(settings.redis_server)
    except SettingsError:
        return None
    return f"{binary} ({binary.path})"


def check_table(table: ModelTable, today: date) -> Iterator[Finding]:
    """Yield what the maintainers of the table must look at: its age, and models that ended since it was checked."""
    age = today - table.checked
    if age > MAX_AGE:
        yield Finding(
            f"the model table was checked on {table.checked}, {age.days} days ago: prices and limits may have changed; "
            "install a newer version, or set `checked` in MODELS_FILE after you compared its rows with their sources"
        )
    for row in table.all_rows:
        if row.ends is not None and table.checked <= row.ends <= today:
            successor = f"its successor is {row.successor}" if row.successor else "no successor is listed"
            yield Finding(
                f"{row.id} ({row.provider}) ended on {row.ends}, after the model table was checked; {successor}: "
                "compare the table with its sources, and set `checked`"
            )


def check_models(settings: Settings, table: ModelTable, today: date) -> Iterator[Finding]:
    """Yield the models of the settings that end soon or have ended, each with its remedy."""
    named = [("DEFAULT_MODEL", settings.model_aliases.get(settings.default_model, settings.default_model), True)]
    named += [(f"MODEL_ALIASES ({alias})", model, True) for alias, model in settings.model_aliases.items()]
    named += [("FALLBACK_MODELS", model, False) for model in settings.fallback_models]
    for name, model, needed in named:
        row = table.describe(model)
        notice = row.end_notice(today) if row else None
        if row is None or row.ends is None or notice is None:
            continue
        remedy = f"set it to {row.successor}" if row.successor else "set it to another model"
        yield Finding(f"{name}: {notice}; {remedy}", fatal=needed and row.ends <= today)


async def _check_redis(settings: Settings, url: str) -> list[Finding]:
    """Return the findings about a server, and about a service that others can reach without a key in it."""
    ring = KeyRing()
    try:
        connection = Connection(url, prefix=settings.redis_prefix)
    except SettingsError as error:
        return [Finding(str(error), fatal=True)]
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            await check_server(connection, settings.redis_prefix)
            reachable = await connection.is_reachable()
            if reachable:
                await KeyStore(connection, Keys(settings.redis_prefix), ring).refresh()
    except SettingsError as error:
        return [Finding(str(error), fatal=True)]
    except (TimeoutError, QueueUnavailable):
        reachable = False
    finally:
        await connection.close()
    if not reachable:
        remedy = "start it, or check the address and the network"
        return [Finding(f"REDIS_URL: Redis does not answer within {REDIS_TIMEOUT_S:g} s; {remedy}", fatal=True)]
    policy = connection.server.eviction_policy if connection.server else ""
    warning = eviction_warning(policy)
    findings = [Finding(f"REDIS_URL: {warning}")] if warning else []
    return findings + _exposure(settings, has_keys=bool(settings.api_keys) or ring.has_keys)
