"""Owns which of several implementations the settings choose."""

from __future__ import annotations

from functools import partial

import aiohttp
from yarl import URL

from imagegen.images.redis_blobs import RedisBlobStore
from imagegen.images.s3 import Bucket, S3BlobStore
from imagegen.providers.a1111 import A1111Provider
from imagegen.providers.openai import OpenAICompatibleProvider, dialect_of
from imagegen.providers.protocol import Provider
from imagegen.providers.sandbox import SandboxProvider
from imagegen.providers.together import TogetherProvider
from imagegen.queue.instance import QueueInstance
from imagegen.ratelimit.limits import Limits, RateLimits
from imagegen.ratelimit.stores import MemoryRateLimitStore
from imagegen.settings import Settings
from imagegen.web.http.forwarded import client_address


def rate_limits(settings: Settings) -> RateLimits:
    """Counted in this process, until the app says otherwise."""
    limits = Limits(settings.rate_limit_max, settings.image_rate_limit_max, settings.rate_limit_window_s)
    return RateLimits(limits, MemoryRateLimitStore(), partial(client_address, hops=settings.trusted_proxy_hops))


def shared_bytes(settings: Settings, room: QueueInstance) -> RedisBlobStore | S3BlobStore | None:
    """Where the pictures of all instances lie together, if anywhere."""
    if settings.image_store == "redis":
        return RedisBlobStore(room.connection, room.keys, settings.image_store_max_bytes, clock=room.connection.clock)
    key, secret, bucket = settings.s3_access_key_id, settings.s3_secret_access_key, settings.s3_bucket
    if settings.image_store == "s3" and key and secret and bucket:
        where = Bucket(bucket, key, secret, settings.s3_endpoint, settings.s3_region, settings.redis_prefix)
        life_s, clock = image_life_s(settings), room.connection.clock
        return S3BlobStore(where, max_bytes=settings.image_store_max_bytes, life_s=life_s, clock=clock)
    return None


def image_life_s(settings: Settings) -> float:
    """A picture is kept from when it is stored, a task from when it is finished, which is later."""
    return settings.result_ttl_s + 2 * settings.upstream_timeout_s


def call_slots(settings: Settings) -> int:
    """Return how many calls this instance makes at once: WORKER_CONCURRENCY, or the provider's own limit if lower.

    What is more waits in the stream, where it runs into no time limit and other instances can take it.
    """
    most: int | None = None
    match settings.provider:
        case "a1111":
            most = A1111Provider.max_concurrent_calls
        case "openai" if settings.openai_api_url:
            most = dialect_of(URL(settings.openai_api_url)).max_concurrent_calls
    return settings.worker_concurrency if most is None else min(most, settings.worker_concurrency)


def provider(settings: Settings, session: aiohttp.ClientSession) -> Provider:
    """The sandbox where no other is set."""
    timeout_s = settings.upstream_timeout_s
    match settings.provider:
        case "together" if settings.together_api_key:
            key, url = settings.together_api_key, settings.together_api_url
            return TogetherProvider(session, api_key=key, base_url=url, timeout_s=timeout_s)
        case "openai" if settings.openai_api_url:
            key_or_none, url = settings.openai_api_key, settings.openai_api_url
            return OpenAICompatibleProvider(session, base_url=url, api_key=key_or_none, timeout_s=timeout_s)
        case "a1111" if settings.a1111_url:
            url, model = settings.a1111_url, settings.default_model
            return A1111Provider(session, base_url=url, timeout_s=timeout_s, default_model=model)
        case _:
            return SandboxProvider(settings.sandbox_delay_s)
