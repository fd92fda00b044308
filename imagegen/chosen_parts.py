"""Parts of the service that the settings choose, for the composition root: shared image store, limits, identity."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
from loguru import logger
from msgspec import Struct

from imagegen.accounts.links import LinkKey, Links, derive_key
from imagegen.byte_budget import ByteBudget
from imagegen.errors import SettingsError, StoreUnavailable
from imagegen.images.cached import CACHE_MAX_BYTES, BlobStore, CachedStore, cache_health
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.fetch import ImageFetcher
from imagegen.images.folder_mark import mark_of
from imagegen.images.image_links import Origin
from imagegen.images.needed_uploads import NeededUploads, nothing_needed
from imagegen.images.redis_blobs import RedisBlobStore
from imagegen.images.s3 import S3BlobStore
from imagegen.images.s3_client import Bucket
from imagegen.images.saver import LinkOnlySaver, StoringSaver
from imagegen.images.spool import Spool
from imagegen.images.store import ImageStore
from imagegen.images.store_health import StoreHealth
from imagegen.images.thumbnails import Thumbnails
from imagegen.images.upload_records import UploadRecords
from imagegen.images.upload_rights import UploadRights
from imagegen.images.uploads import Uploads
from imagegen.providers.model_rules import EditRules, ModelRules, ModelTable
from imagegen.providers.post import MAX_RESPONSE_HEAD_BYTES, UpstreamConnector
from imagegen.providers.served_models import ServedModels
from imagegen.proxies import Proxies, ProxyConnector
from imagegen.queue.instance import QueueInstance
from imagegen.queue.notifier import FLAT_FILE_NAMES
from imagegen.ratelimit.limits import Limits, RateLimits
from imagegen.ratelimit.stores import MemoryRateLimitStore
from imagegen.redis_client.connection import Connection
from imagegen.resolver import Resolver
from imagegen.settings import Settings
from imagegen.ssrf import guarded_connector
from imagegen.supervisor import Supervisor
from imagegen.tasks.submission import TaskIdentity
from imagegen.web.guard import client_of
from imagegen.web.http.cross_origin import CrossOriginPolicy
from imagegen.worker.attempt_limits import SeedSupport
from imagegen.worker.call_routes import Routes
from imagegen.worker.inputs import InputOpener
from imagegen.worker.peer_channels import PeerChannels
from imagegen.worker.unserved import OtherInstances

INPUT_TIMEOUT_S = 30.0
"""For one linked input image; no one pays for it, and its client waits."""

PAID_KEEPALIVE_S = 1.5
"""Shorter than servers keep idle connections by default (gunicorn 2 s; Node, uvicorn, Apache 5 s): a request on one
that the upstream closes at that moment counts as sent, and is paid again."""

POLL_KEEPALIVE_S = 15.0
"""Of polls, which are repeated at once then. It is longer than the time between two of them."""

NO_CAP_BYTES = 2**62
"""Of a former store: nothing is saved there any more."""

FORMER_START_S = 5.0
"""Time for a bucket that is only read from, after which the start goes on."""

UNITS_PER_GENERATION = 64
"""Default of IMAGE_UNITS_PER_MINUTE for each request of IMAGE_RATE_LIMIT_MAX: 4 images of 2048 x 2048 pixels."""


def create_rate_limits(settings: Settings) -> RateLimits:
    """Return limits that this process counts; the queue replaces the store if Redis counts them."""
    window_s, by_generations = settings.rate_limit_window_s, settings.image_units_per_min is None
    units = settings.image_rate_limit_max * UNITS_PER_GENERATION
    if settings.image_units_per_min is not None:
        units = math.ceil(settings.image_units_per_min * window_s / 60)
    limits = Limits(
        settings.rate_limit_max,
        settings.image_rate_limit_max,
        window_s,
        units,
        UNITS_PER_GENERATION if by_generations else 0,
    )
    return RateLimits(limits, MemoryRateLimitStore(), lambda request: client_of(request).id)


def create_cross_origin_policy(settings: Settings) -> CrossOriginPolicy:
    """Return the rules for requests of web pages."""
    return CrossOriginPolicy(
        frozenset(settings.cors_origins),
        settings.public_url,
        settings.trusted_proxy_hops,
        loopback_only=settings.is_loopback,
    )


def create_blob_store(settings: Settings, queue: QueueInstance, needed: NeededUploads) -> BlobStore | None:
    """Return the store that all instances share, None if each one keeps its own images."""
    clock, max_bytes = queue.connection.clock, settings.image_store_max_bytes
    if settings.image_store == "redis":
        return RedisBlobStore(queue.connection, queue.keys, max_bytes, clock=clock, find_needed=needed.among)
    if settings.image_store == "s3" and (bucket := bucket_of(settings)):
        life_s = longest_life_s(settings)
        return S3BlobStore(bucket, max_bytes=max_bytes, life_s=life_s, clock=clock, find_needed=needed.among)
    return None


def bucket_of(settings: Settings) -> Bucket | None:
    """Return the bucket of the settings, None if they lack a part of it."""
    key, secret, name = settings.s3_access_key_id, settings.s3_secret_access_key, settings.s3_bucket
    if not (key and secret and name):
        return None
    return Bucket(name, key, secret, settings.s3_endpoint, settings.s3_region, settings.redis_prefix)


def create_disk_store(settings: Settings, queue: QueueInstance, needed: NeededUploads, *, is_cache: bool) -> DiskStore:
    """Return the store in `DATA_DIR`. is_cache: it is the cache in front of the store that all instances share."""
    return DiskStore(
        settings.data_dir / ("cache" if is_cache else "images"),
        min(settings.image_store_max_bytes, CACHE_MAX_BYTES if is_cache else settings.image_store_max_bytes),
        life_s=longest_life_s(settings),
        health=cache_health() if is_cache else None,
        clock=queue.connection.clock,
        lookups=DiskLookups(
            others_live=lambda: not queue.notifier.alone,
            find_needed=nothing_needed if is_cache else needed.among,
            may_be_flat=lambda: queue.notifier.all_can(FLAT_FILE_NAMES),
            meet_peers=queue.notifier.meet_peers,
            is_cache=is_cache,
        ),
    )


@asynccontextmanager
async def open_formers(
    settings: Settings, queue: QueueInstance, supervisor: Supervisor, disk: DiskStore
) -> AsyncIterator[list[ImageStore]]:
    """Yield the stores that an earlier `IMAGE_STORE` may have filled. disk: in `DATA_DIR`, started."""
    clock = queue.connection.clock
    async with AsyncExitStack() as stack:
        stores: list[ImageStore] = []
        if (folder := _former_folder(settings, queue, disk)) is not None:
            await folder.start()
            stack.push_async_callback(folder.close)
            supervisor.run("former-image-sweeper", folder.sweep())
            supervisor.run("former-image-disk-watch", folder.watch())
            stores.append(folder)
        if settings.image_store != "redis":
            blobs = RedisBlobStore(queue.connection, queue.keys, NO_CAP_BYTES, clock=clock)
            stores.append(CachedStore(blobs, disk, clock=clock))
        if bucket := await _former_bucket(settings, queue, stack):
            stores.append(CachedStore(bucket, disk, clock=clock))
        yield stores


async def _former_bucket(settings: Settings, queue: QueueInstance, stack: AsyncExitStack) -> S3BlobStore | None:
    """Return the bucket that an earlier `IMAGE_STORE=s3` filled, None without its settings, or if it refuses us."""
    if settings.image_store == "s3" or (bucket := bucket_of(settings)) is None:
        return None
    life_s, clock = longest_life_s(settings), queue.connection.clock
    try:
        blobs = S3BlobStore(bucket, max_bytes=NO_CAP_BYTES, life_s=life_s, clock=clock)
        stack.push_async_callback(blobs.close)
        await _start_former(blobs)
    except SettingsError as error:
        logger.warning("Images that IMAGE_STORE=s3 left in the bucket are not served: {}", error)
        return None
    return blobs


async def _start_former(blobs: S3BlobStore) -> None:
    """Start a bucket, or log that it does not answer: it may when an image is requested. Raises SettingsError."""
    try:
        async with asyncio.timeout(FORMER_START_S):
            await blobs.start_reading()
    except (StoreUnavailable, TimeoutError):
        logger.warning("The bucket that IMAGE_STORE=s3 filled does not answer: its images are a 503 until it does")


def _former_folder(settings: Settings, queue: QueueInstance, cache: DiskStore) -> DiskStore | None:
    """Return the store of the images that an earlier `IMAGE_STORE=disk` or `upstream` left in `DATA_DIR`, if any.

    cache: in the same folder; it was started.
    """
    folder = settings.data_dir / "images"
    if settings.image_store not in ("redis", "s3"):
        return None
    hangs = cache.spool_folder is None  # such a disk may have images
    if not hangs and not mark_of(folder).exists():
        return None
    health, clock = StoreHealth(f"the former folder {folder}", "it is only read from"), queue.connection.clock
    return DiskStore(folder, NO_CAP_BYTES, life_s=longest_life_s(settings), health=health, clock=clock)


def image_ttl_s(settings: Settings) -> float:
    """Return the lifetime of an image, which is stored before its task is finished. Seconds."""
    return settings.result_ttl_s + 2 * settings.upstream_timeout_s


def reused_image_ttl_s(settings: Settings) -> float:
    """Return the lifetime of an image that a task has before its first call. Seconds."""
    return image_ttl_s(settings) + settings.task_deadline_s


def longest_life_s(settings: Settings) -> float:
    """Return the longest lifetime of an image or an upload in the store. Seconds."""
    return max(reused_image_ttl_s(settings), settings.upload_ttl_s, 2 * settings.task_deadline_s)


def create_uploads(settings: Settings, queue: QueueInstance, store: ImageStore, needed: NeededUploads) -> Uploads:
    """Return the uploads of a store. needed: shared with the store."""
    records = UploadRecords(queue.connection, queue.keys, queue.connection.clock)
    rights = UploadRights(queue.connection, queue.keys, queue.connection.clock)
    return Uploads(store, records, rights, needed, life_s=settings.upload_ttl_s, max_bytes=settings.upload_max_bytes)


def create_links(settings: Settings, queue: QueueInstance, supervisor: Supervisor, is_on: Callable[[], bool]) -> Links:
    """Return the signed links, with a key that follows from a secret of the settings, else a key that Redis shares."""
    secret = settings.task_id_secret or settings.admin_token
    life_s = settings.task_deadline_s + settings.result_ttl_s
    key = derive_key(secret) if secret else None
    links = Links(key, is_on=is_on, task_life_s=life_s, clock=queue.connection.clock)
    if key is None:
        shared = LinkKey(queue.connection, queue.keys, links)
        queue.connection.on_new_server.append(shared.on_new_server)
        queue.notifier.on_peer.append(shared.on_peer)
        supervisor.run("link-key", shared.share_forever())
    return links


def create_thumbnails(settings: Settings, queue: QueueInstance, store: ImageStore) -> Thumbnails:
    """Return the thumbnails of a store's images."""
    connection, life_s = queue.connection, image_ttl_s(settings)
    return Thumbnails(store, connection, queue.keys, life_s=life_s, clock=connection.clock)


def other_instances(queue: QueueInstance) -> OtherInstances:
    """Return the other instances, as the channel of the instances shows them."""
    notifier = queue.notifier
    channels = PeerChannels(
        lambda: {peer: notifier.greetings.get(peer) for peer in notifier.peers},
        lambda: notifier.silent or not notifier.has_met_peers,
    )
    return OtherInstances(
        lambda: notifier.alone,
        channels,
        queue.handover.give,
        notifier.ping_peers,
        greet=lambda: notifier.publish("here"),
    )


def shared_values(settings: Settings, store_id: str) -> Mapping[str, object]:
    """Return the values in which the instances of one Redis must agree: on ids, keys of links and webhooks, images.

    store_id: of the folder with the images; empty if all instances read them, or while it is unknown.
    """
    return {
        "TASK_ID_SECRET": settings.task_id_secret or "",
        "ADMIN_TOKEN": None if settings.task_id_secret else settings.admin_token or "",
        "WEBHOOK_SECRET": settings.webhook_secret or "",
        "CACHE_SCOPE": settings.cache_scope or "",
        "DEFAULT_MODEL": settings.default_model,
        "MODEL_ALIASES": sorted(settings.model_aliases.items()),
        "BUDGET_DAILY_USD": settings.budget_daily_micro_usd or 0,
        "IMAGE_STORE": settings.image_store,
        "DATA_DIR": store_id or None,
    }


def task_identity(settings: Settings, routes: Routes, table: ModelTable, peers: PeerChannels) -> TaskIdentity:
    """Return how requests become tasks: with the edits of the channels, and the models' limits unless those are off.

    peers: channels of the other instances.
    """

    def elsewhere(model: str) -> bool:
        return peers.may_serve(model, sandbox=routes.channels.is_sandbox(model))

    if settings.model_rules:
        rules = EditRules(routes.edits, ModelRules(table))
    else:
        rules = EditRules(lambda model: routes.edits("") or routes.edits(model))  # what any model may take
    provider, model = routes.identity(settings.default_model), settings.default_model
    aliases, secret = settings.model_aliases, settings.task_id_secret
    if routes.only and not settings.file_channels:
        estimate = routes.only.pricing.estimate
        return TaskIdentity(provider, model, aliases, secret, rules, routes.only.provider.plain.sent_request, estimate)
    adjust = ServedModels(routes.channels, settings.fallback_models, elsewhere, rules)
    return TaskIdentity(provider, model, aliases, secret, adjust, routes.sent_request, routes.estimate, routes.identity)


def seed_support(routes: Routes, table: ModelTable) -> SeedSupport:
    """Return which models take a seed: by what the channels carry, and by the table."""

    def published(model: str) -> bool | None:
        row = table.find(model)
        return None if row is None else row.seed

    return SeedSupport(routes.sends_seed, published)


class Upstream(Struct, frozen=True):
    """The routes of calls, what saves their images, and what opens the input images of attempts."""

    routes: Routes
    image_saver: StoringSaver | LinkOnlySaver
    inputs: InputOpener


@asynccontextmanager
async def open_upstream(
    settings: Settings,
    routes_with: Callable[[aiohttp.ClientSession], Routes],
    store: ImageStore,
    uploads: Uploads,
    *,
    resolver: Resolver,
    connection: Connection,
) -> AsyncIterator[Upstream]:
    """Yield the parts that talk to the providers, with their connections. routes_with: returns the routes."""
    proxies = Proxies(settings.http_proxy, settings.https_proxy, settings.no_proxy)
    if proxies:
        logger.info("Upstream calls and image links go through the proxy {}", proxies.masked)
    jar = aiohttp.DummyCookieJar()
    async with (
        ProxyConnector(proxies, limit=0, keepalive_timeout=PAID_KEEPALIVE_S, resolver=resolver) as paid,
        aiohttp.ClientSession(
            connector=UpstreamConnector(paid, proxies, limit=0, keepalive_timeout=POLL_KEEPALIVE_S, resolver=resolver),
            cookie_jar=jar,
            max_line_size=MAX_RESPONSE_HEAD_BYTES,
            max_field_size=MAX_RESPONSE_HEAD_BYTES,
        ) as session,
    ):
        routes = routes_with(session)
        async with aiohttp.ClientSession(
            connector=guarded_connector(routes.own_hosts, inner=resolver, proxies=proxies), cookie_jar=jar
        ) as links:
            spool = Spool(store, ByteBudget())
            origin = Origin(routes.own_hosts, routes.base_url, resolver)
            saver = StoringSaver(
                ImageFetcher(links, spool, origin, timeout_s=settings.upstream_timeout_s),
                spool,
                store,
                image_ttl_s(settings),
                embed_metadata=settings.embed_metadata and settings.image_store != "upstream",
                clock=connection.clock,
            )
            origin_of_inputs = Origin(routes.own_hosts, None, resolver)  # a client's link to loopback is no upstream's
            inputs = _input_fetcher(settings, links, spool, origin_of_inputs)
            image_saver = LinkOnlySaver(saver) if settings.image_store == "upstream" else saver
            opener = InputOpener(uploads, inputs, spool)
            yield Upstream(routes, image_saver, opener)
            await opener.fetches.close()
            await routes.close()


def _input_fetcher(settings: Settings, links: aiohttp.ClientSession, spool: Spool, origin: Origin) -> ImageFetcher:
    return ImageFetcher(
        links,
        spool,
        origin,
        timeout_s=min(INPUT_TIMEOUT_S, settings.upstream_timeout_s),
        max_bytes=settings.upload_max_bytes,
        subject="The input image",
    )
