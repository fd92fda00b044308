"""Checks for the command `imagegen doctor`: each finding names what to do, and whether the service can work with it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

from imagegen import start_checks
from imagegen.accounts.key_store import KeyRing, KeyStore
from imagegen.channel_parts import load_tables
from imagegen.doctor_probes import (
    ClockReading,
    Finding,
    Probed,
    check_clocks,
    check_disk,
    probe_bucket,
    probe_provider,
    probe_public_url,
)
from imagegen.errors import QueueUnavailable, SettingsError
from imagegen.providers.model_rules import ModelTable
from imagegen.providers.model_table import MAX_AGE
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.server_binary import find_binary
from imagegen.redis_client.server_info import eviction_warning
from imagegen.settings import Settings

REDIS_TIMEOUT_S = 10.0
PINGS = 5

SLOW_REDIS_S = 0.05
"""Round trip to Redis that an operator must look at: each submit waits for at least one."""

__all__ = ["Finding", "check_all", "check_models", "check_table", "embedded_server"]


def check_all(settings: Settings, today: date, note: Callable[[str], object] = lambda _text: None) -> Iterator[Finding]:
    """Yield findings about settings, data folder, callers, models, Redis, bucket, provider, clocks and public address.

    note: called with a line about each part that is in order.
    """
    yield from (Finding(line) for line in start_checks.warnings(settings))
    yield from _fault_of(partial(start_checks.check_alert_webhook, settings))
    yield from (wrong := list(_fault_of(partial(start_checks.check_data_dir, settings.data_dir))))
    yield from () if wrong else check_disk(settings)
    table = None
    try:
        table = load_tables(settings)[0]
    except SettingsError as error:
        yield Finding(str(error), fatal=True)
    else:
        yield from check_age(table, today)
        yield from check_models(settings, table, today)
    probed = asyncio.run(_probe_network(settings, table))
    for line in probed.notes:
        note(line)
    yield from probed.findings
    yield from check_clocks(probed.clocks)
    if settings.redis_url is None:
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


def check_age(table: ModelTable, today: date) -> Iterator[Finding]:
    """Yield a finding if the table has not been checked for long."""
    age = today - table.checked
    if age > MAX_AGE:
        yield Finding(
            f"the model table was checked on {table.checked}, {age.days} days ago: prices and limits may have changed; "
            "install a newer version, or set `checked` in MODELS_FILE after you compared its rows with their sources"
        )


def check_table(table: ModelTable, today: date) -> Iterator[Finding]:
    """Yield what the maintainers of the table must look at: its age, and models that ended since it was checked."""
    yield from check_age(table, today)
    for row in table.all_rows:
        if row.ends is not None and table.checked <= row.ends <= today:
            successor = f"its successor is {row.successor}" if row.successor else "no successor is listed"
            yield Finding(
                f"{row.id} ({row.provider}) ended on {row.ends}, after the model table was checked; {successor}: "
                "compare the table with its sources, and set `checked`"
            )


def check_models(settings: Settings, table: ModelTable, today: date) -> Iterator[Finding]:
    """Yield the models of the settings that end soon or have ended, each with its remedy."""
    models = [("DEFAULT_MODEL", settings.model_aliases.get(settings.default_model, settings.default_model), True)]
    models += [(f"MODEL_ALIASES ({alias})", model, True) for alias, model in settings.model_aliases.items()]
    models += [("FALLBACK_MODELS", model, False) for model in settings.fallback_models]
    for name, model, needed in models:
        row = table.describe(model)
        notice = row.end_notice(today) if row else None
        if row is None or row.ends is None or notice is None:
            continue
        remedy = f"set it to {row.successor}" if row.successor else "set it to another model"
        yield Finding(f"{name}: {notice}; {remedy}", fatal=needed and row.ends <= today)


async def _probe_network(settings: Settings, table: ModelTable | None) -> Probed:
    """Return the results of all probes over the network, which run at the same time."""
    probes = [probe_public_url(settings), probe_bucket(settings)]
    if settings.redis_url is not None:
        probes.append(_probe_redis(settings, settings.redis_url))
    if table is not None:
        probes.append(probe_provider(settings))
    everything = Probed()
    for probed in await asyncio.gather(*probes):
        everything.add(probed)
    return everything


async def _probe_redis(settings: Settings, url: str) -> Probed:
    """Return the findings about a server, and about a service that others can reach without a key in it."""
    ring, latency_s = KeyRing(), 0.0
    try:
        connection = Connection(url, prefix=settings.redis_prefix)
    except SettingsError as error:
        return Probed([Finding(str(error), fatal=True)])
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            await check_server(connection, settings.redis_prefix)
            reachable = await connection.is_reachable()
            if reachable:
                latency_s = await _latency_s(connection)
                await KeyStore(connection, Keys(settings.redis_prefix), ring).refresh()
    except SettingsError as error:
        return Probed([Finding(str(error), fatal=True)])
    except (TimeoutError, QueueUnavailable):
        reachable = False
    finally:
        await connection.close()
    if not reachable:
        return Probed([Finding(f"REDIS_URL: {_unreachable(connection)}", fatal=True)])
    probed = _judge_server(connection, latency_s)
    probed.findings += _exposure(settings, has_keys=bool(settings.api_keys) or ring.has_keys)
    return probed


def _unreachable(connection: Connection) -> str:
    cause = f" ({connection.health.cause})" if connection.health.cause else ""
    if connection.health.refused:
        return f"Redis refuses commands now{cause}; tasks wait until it takes them again"
    remedy = "start it, or check the address, its scheme (redis:// or rediss://) and the network"
    return f"Redis does not answer within {REDIS_TIMEOUT_S:g} s{cause}; {remedy}"


async def _latency_s(connection: Connection) -> float:
    """Return the median of a few round trips. Raises QueueUnavailable."""
    times_s = []
    for _ in range(PINGS):
        began_at = time.perf_counter()
        async with connection.deadline():
            await connection.ping()
        times_s.append(time.perf_counter() - began_at)
    return statistics.median(times_s)


def _judge_server(connection: Connection, latency_s: float) -> Probed:
    """Return what the server reported about itself, and how fast it answers."""
    probed, server = Probed(), connection.server
    if server is None:
        user = connection.servers.user
        remedy = f"allow it: ACL SETUSER {user} +info"
        text = f"user {user} may not run INFO, so version, eviction policy and clock are not checked; {remedy}"
        probed.findings.append(Finding(f"REDIS_URL: {text}"))
    else:
        policy = server.eviction_policy or "unknown"
        described = f"{server.program or 'Redis'}, eviction policy {policy}"
        probed.notes.append(f"Redis: {described}, answers in {latency_s * 1000:.1f} ms")
        if server.time is not None:
            probed.clocks.append(ClockReading("Redis", connection.clock() - time.time()))
        if warning := eviction_warning(server.eviction_policy):
            probed.findings.append(Finding(f"REDIS_URL: {warning}"))
    if latency_s > SLOW_REDIS_S:
        remedy = "run the service and Redis in one region"
        text = f"Redis answers in {latency_s * 1000:.0f} ms, and each submit waits for that"
        probed.findings.append(Finding(f"REDIS_URL: {text}; {remedy}"))
    return probed
