"""The command `imagegen keys`: make, list, revoke and rotate API keys in the Redis of the settings.

Without REDIS_URL it is the embedded server: that of the running service, else a server that runs for the command.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from imagegen import log
from imagegen.accounts.key_fields import NewKeyFields, RotationFields, parse_fields
from imagegen.accounts.key_ring import KeyRing
from imagegen.accounts.key_store import KeyStore
from imagegen.accounts.keys import ApiKey, fixed_keys
from imagegen.errors import ApiError, QueueUnavailable, SettingsError
from imagegen.formats import rfc3339
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.keys import Keys
from imagegen.settings import Settings

FAILED, USAGE = 1, 2
"""Exit codes."""

_MICRO = 1_000_000


def run(chosen: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    log.configure("ERROR", "text")
    try:
        return asyncio.run(_run(Settings.load(), chosen))
    except SettingsError as error:
        return _fail(str(error), USAGE)
    except QueueUnavailable:
        return _fail("Redis does not answer: start it, or check REDIS_URL and the network", FAILED)
    except ApiError as error:
        wrong = [f"{_option(each.field)}: {each.message}" for each in error.details]
        return _fail("\n".join(wrong) or error.message("en"), USAGE if wrong else FAILED)


async def _run(settings: Settings, chosen: argparse.Namespace) -> int:
    async with _store(settings) as store:
        match chosen.action:
            case "create":
                names = [name for name in NewKeyFields.model_fields if getattr(chosen, name) is not None]
                fields = {name: getattr(chosen, name) for name in names}
                if "models" in fields:
                    fields["models"] = [each.strip() for each in chosen.models.split(",") if each.strip()]
                key, secret = await store.create(parse_fields(NewKeyFields, fields).to_key(time.time()))
                _print_made(key, secret)
            case "rotate":
                fields = {} if chosen.grace is None else {"grace": chosen.grace}
                key, secret = await store.rotate(chosen.name, parse_fields(RotationFields, fields).grace_s)
                _print_made(key, secret)
            case "revoke":
                await store.revoke(chosen.name)
                _note(f"{chosen.name} is refused from now on")
                if not store.ring.has_keys:
                    _note("No key is left: on loopback, the service needs none now")
            case _:
                await store.refresh()
                for key in store.ring.keys:
                    print(_line(key, fixed=key in store.ring.fixed))
    return 0


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[KeyStore]:
    """Connect to the Redis of the settings. Raises SettingsError."""
    url, embedded = settings.redis_url, None
    if url is None:
        embedded = EmbeddedRedis(settings.data_dir, settings.redis_server)
        await embedded.start()
        url = embedded.url
    try:
        connection = Connection(url, prefix=settings.redis_prefix)
        try:
            await check_server(connection, settings.redis_prefix)
            ring = KeyRing(fixed_keys(settings.api_keys))
            yield KeyStore(connection, Keys(settings.redis_prefix), ring)
        finally:
            await connection.close()
    finally:
        if embedded:
            await embedded.stop()


def _print_made(key: ApiKey, secret: str) -> None:
    _note(f"The secret of {key.name}; it is shown this once:")
    print(secret)


def _line(key: ApiKey, *, fixed: bool) -> str:
    """Return a key and its limits in one line."""
    limits = {
        "daily-usd": None if key.daily_micro_usd is None else f"{key.daily_micro_usd / _MICRO:g}",
        "rate": key.rate,
        "images-rate": key.images_rate,
        "open-tasks": key.open_tasks,
        "models": ",".join(key.models) or None,
        "max-megapixels": None if key.max_megapixels is None else f"{key.max_megapixels:g}",
        "expires": None if key.expires_at is None else rfc3339(key.expires_at),
        "secrets": len(key.secrets) if len(key.secrets) > 1 else None,
    }
    shown = [f"{name}={value}" for name, value in limits.items() if value is not None]
    return "  ".join([key.name, *(["API_KEYS"] if fixed else []), *shown])


def _option(field: str) -> str:
    """Return the option of a field, as `--images-rate` of `imagesRate`."""
    if field == "name":
        return "NAME"
    return "--" + "".join(f"-{char.lower()}" if char.isupper() else char for char in field)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _fail(text: str, code: int) -> int:
    _note(text)
    return code
