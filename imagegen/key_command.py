"""The command `imagegen keys`: make, list, revoke and rotate API keys in the Redis of the settings."""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from imagegen.accounts.api_keys import ApiKey, fixed_keys
from imagegen.accounts.key_fields import NewKeyFields, RotationFields, parse_fields
from imagegen.accounts.key_store import KeyRing, KeyStore
from imagegen.command_redis import FAILED, connected_redis, fail, note, run_command
from imagegen.formats import rfc3339
from imagegen.redis_client.keys import Keys
from imagegen.settings import Settings
from imagegen.standard_streams import print_line, print_result
from imagegen.tasks.cost import dollars


def run(chosen: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda settings: _run(settings, chosen))


async def _run(settings: Settings, chosen: argparse.Namespace) -> int:
    async with _store(settings) as store:
        match chosen.action:
            case "create":
                names = [name for name in NewKeyFields.model_fields if getattr(chosen, name) is not None]
                fields = {name: getattr(chosen, name) for name in names}
                if "models" in fields:
                    fields["models"] = [model.strip() for model in chosen.models.split(",") if model.strip()]
                key, secret = await store.create(parse_fields(NewKeyFields, fields).to_key(time.time()))
                return _print_made(key, secret)
            case "rotate":
                fields = {} if chosen.grace is None else {"grace": chosen.grace}
                key, secret = await store.rotate(chosen.name, parse_fields(RotationFields, fields).grace_s)
                return _print_made(key, secret)
            case "revoke":
                await store.revoke(chosen.name)
                note(f"{chosen.name} is refused from now on")
                if not store.ring.has_keys:
                    note("No key is left: on loopback, the service needs none now")
            case _:
                await store.refresh()
                for key in store.ring.keys:
                    print_result(_line(key, fixed=key in store.ring.fixed))
    return 0


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[KeyStore]:
    """Connect to the Redis of the settings. Raises SettingsError."""
    async with connected_redis(settings) as connection:
        ring = KeyRing(fixed_keys(settings.api_keys))
        yield KeyStore(connection, Keys(settings.redis_prefix), ring)


def _print_made(key: ApiKey, secret: str) -> int:
    note(f"The secret of {key.name}; it is shown this once:")
    try:
        print_line(secret)
    except OSError as error:  # the key is in Redis, but its secret was not shown
        lost = f"stdout can't be written ({error.strerror}), so the secret is lost"
        return fail(f"{lost}: print another by `imagegen keys rotate {key.name} --grace 0`", FAILED)
    return 0


def _line(key: ApiKey, *, fixed: bool) -> str:
    """Return a key and its limits in one line."""
    limits = {
        "daily-usd": None if key.daily_micro_usd is None else f"{dollars(key.daily_micro_usd):g}",
        "rate": key.rate,
        "images-rate": key.images_rate,
        "open-tasks": key.open_tasks,
        "models": ",".join(key.models) or None,
        "max-megapixels": None if key.max_megapixels is None else f"{key.max_megapixels:g}",
        "expires": None if key.expires_at is None else rfc3339(key.expires_at),
        "secrets": len(key.secrets) if len(key.secrets) > 1 else None,
    }
    limit_texts = [f"{name}={value}" for name, value in limits.items() if value is not None]
    return "  ".join([key.name, *(["API_KEYS"] if fixed else []), *limit_texts])
