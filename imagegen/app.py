"""Composition root of the service."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp import web
from loguru import logger

from imagegen import log
from imagegen.account_parts import create_budgets, create_guard, open_key_store
from imagegen.accounts.admin_token import AdminToken, load_admin_token
from imagegen.accounts.alert_sources import AlertSources
from imagegen.accounts.alerts import Alerts
from imagegen.accounts.budget_watch import BudgetWatch
from imagegen.accounts.budgets import Budgets
from imagegen.accounts.ledger import Ledger
from imagegen.accounts.ledger_recovery import open_ledger
from imagegen.accounts.links import Links
from imagegen.board_parts import open_board
from imagegen.channel_parts import call_slots, create_permits, create_routes, load_tables
from imagegen.chosen_parts import (
    create_blob_store,
    create_cross_origin_policy,
    create_disk_store,
    create_links,
    create_rate_limits,
    create_thumbnails,
    create_uploads,
    open_formers,
    open_upstream,
    other_instances,
    reused_image_ttl_s,
    seed_support,
    shared_values,
    task_identity,
)
from imagegen.images.cached import CachedStore
from imagegen.images.former_stores import StoreWithFormer
from imagegen.images.link_store import UpstreamStore
from imagegen.images.needed_uploads import NeededUploads
from imagegen.images.reuse import ImageReuse
from imagegen.images.saver import LinkOnlySaver, StoringSaver
from imagegen.images.store import ImageStore
from imagegen.images.thumbnails import Thumbnails
from imagegen.images.uploads import Uploads
from imagegen.lifecycle import Lifecycle
from imagegen.metrics import Meter, RecentRates
from imagegen.own_addresses import ForeignResolver, OwnAddresses
from imagegen.providers.model_rules import ModelTable
from imagegen.proxies import Proxies
from imagegen.queue.command_check import check_server
from imagegen.queue.instance import QueueConfig, QueueInstance, open_queue
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.ratelimit.redis import RedisRateLimitStore
from imagegen.ratelimit.stores import FallbackRateLimitStore, MemoryRateLimitStore
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.resolver import Resolver
from imagegen.settings import Settings
from imagegen.start_checks import check_exposure
from imagegen.supervisor import Supervisor
from imagegen.tasks.retry import RetryPolicy
from imagegen.tasks.task import Task
from imagegen.tasks.webhook import Webhook
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.api.serializers import TaskLinks, task_view
from imagegen.web.guard import GUARD
from imagegen.web.handler_services import SERVICES, OpenAIOptions, Readiness, Services
from imagegen.web.http.forwarded import LinkBase, public_prefix
from imagegen.web.http.image_sending import ImageSender
from imagegen.web.http.middleware import RequestPipeline, install_pipeline
from imagegen.web.input_images import InputImages
from imagegen.web.ops.admin import ADMIN, AdminAuth
from imagegen.web.ops.board import BOARD
from imagegen.web.ops.channels import CHANNELS
from imagegen.web.ops.key_routes import KEY_STORE
from imagegen.web.ops.prometheus import SCRAPES, Scrapes
from imagegen.web.ops.telemetry import OBSERVED, ProviderLimits, Telemetry
from imagegen.web.routes import add_routes
from imagegen.worker.alert_dispatcher import AlertDispatcher
from imagegen.worker.attempt import AttemptRunner
from imagegen.worker.attempt_limits import MIN_JOB_WAIT_S, AttemptLimits, ImageCounts
from imagegen.worker.call_routes import Routes
from imagegen.worker.channel_report import ChannelReport
from imagegen.worker.dead_models import DeadModels
from imagegen.worker.inputs import InputOpener
from imagegen.worker.payments import PaymentRules
from imagegen.worker.peer_channels import served_by
from imagegen.worker.peer_settings import PeerSettings
from imagegen.worker.permits import PermitLine
from imagegen.worker.pool import Pool
from imagegen.worker.webhooks import WebhookDispatcher, WebhookSender, webhook_session

SETTINGS = web.AppKey("settings", Settings)
ADMIN_TOKEN = web.AppKey("admin_token", AdminToken)
SUPERVISOR = web.AppKey("supervisor", Supervisor)
OWN_ADDRESSES = web.AppKey("own", OwnAddresses)
RESOLVER = web.AppKey("resolver", Resolver)
CONNECTION = web.AppKey("connection", Connection)
EMBEDDED = web.AppKey[EmbeddedRedis | None]("embedded")
QUEUE = web.AppKey("queue", QueueInstance)
LEDGER = web.AppKey("ledger", Ledger)
ALERTS = web.AppKey("alerts", Alerts)
ALERT_SOURCES = web.AppKey("alert_sources", AlertSources)
STORE = web.AppKey("store", ImageStore)
INPUTS = web.AppKey("inputs", InputOpener)
THUMBNAILS = web.AppKey("thumbnails", Thumbnails)
SIGNING = web.AppKey("signing", OperatorSecret)
LINKS = web.AppKey("links", Links)
UPLOADS = web.AppKey("uploads", Uploads)
ROUTES = web.AppKey("routes", Routes)
IMAGE_SAVER = web.AppKey[StoringSaver | LinkOnlySaver]("image_saver")
LIFECYCLE = web.AppKey("lifecycle", Lifecycle)
PEER_SETTINGS = web.AppKey("peer_settings", PeerSettings)
DELIVERIES = web.AppKey("deliveries", WebhookDispatcher)
ALERT_DELIVERIES = web.AppKey[AlertDispatcher | None]("alert_deliveries")
METER = web.AppKey("meter", Meter)
MODEL_TABLE = web.AppKey("model_table", ModelTable)
TABLES = web.AppKey[Mapping[str, ModelTable]]("tables")
PERMITS = web.AppKey[PermitLine]("permits")
BUDGETS = web.AppKey("budgets", Budgets)
BUDGET_WATCH = web.AppKey("budget_watch", BudgetWatch)


def create_app(settings: Settings, listening: Sequence[tuple[str, int]] = ()) -> web.Application:
    """Return the whole service. Its parts start in this order and end in reverse: the pool first, while Redis lives.

    listening: addresses and ports of its sockets.
    """
    app = web.Application()
    app[SETTINGS] = settings
    app[OWN_ADDRESSES] = OwnAddresses(listening, settings.public_url)
    app[SUPERVISOR] = Supervisor()
    app[MODEL_TABLE], app[TABLES] = load_tables(settings)
    app[ADMIN_TOKEN] = load_admin_token(settings.admin_token, settings.data_dir)
    app[ADMIN] = AdminAuth(app[ADMIN_TOKEN].secret)
    app[METER] = Meter([settings.default_model, *settings.model_aliases.values(), *settings.fallback_models])
    prefix, origins = public_prefix(settings.public_url), create_cross_origin_policy(settings)
    install_pipeline(app, RequestPipeline(app[METER], log.is_enabled("INFO"), prefix, origins))
    app[RATE_LIMITS] = create_rate_limits(settings)
    app[RATE_LIMITS].install(app)
    app[GUARD] = create_guard(settings, app[ADMIN], app[RATE_LIMITS])
    app[BUDGETS] = create_budgets(settings, app[GUARD].ring)
    add_routes(app, app[RATE_LIMITS], app[GUARD])
    app.cleanup_ctx.extend([_supervision, _resolver, _redis, _queue, _alerts, _ledger, _board])
    app.cleanup_ctx.extend([_images, _upstream, _pool, _webhooks, _services])
    return app


async def _supervision(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[SUPERVISOR].stop()


async def _resolver(app: web.Application) -> AsyncIterator[None]:
    app[RESOLVER] = Resolver()
    yield
    await app[RESOLVER].close()


async def _redis(app: web.Application) -> AsyncIterator[None]:
    settings, url, embedded = app[SETTINGS], app[SETTINGS].redis_url, None
    if url is None:
        embedded = EmbeddedRedis(settings.data_dir, settings.redis_server)
        await embedded.start()
        url = embedded.url
    connection = Connection(url, app[METER], prefix=settings.redis_prefix)
    await check_server(connection, settings.redis_prefix)
    app[CONNECTION] = connection
    app[EMBEDDED] = embedded
    watching = []
    if embedded:
        watching.append(asyncio.create_task(embedded.watch(), name="embedded-redis"))
        watching.append(asyncio.create_task(embedded.watch_folder(), name="embedded-folder"))
    app[SUPERVISOR].watch(watching)
    yield
    await connection.close()
    if embedded:
        await app[SUPERVISOR].stop(watching)
        await embedded.stop()


async def _queue(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    config = QueueConfig(
        settings.redis_prefix,
        settings.lease_s,
        settings.result_ttl_s,
        record_life_s=settings.task_deadline_s + settings.result_ttl_s,
        max_queue=settings.max_queue,
        slots=call_slots(settings),
        deadline_s=settings.task_deadline_s,
        window=settings.fair_window,
        open_limit_of=app[GUARD].ring.open_limit_of,
        limits=app[BUDGETS].limits,
    )
    instance = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    queue = open_queue(app[CONNECTION], config, instance=instance)
    app[QUEUE] = queue
    await queue.pause.start()
    app[KEY_STORE] = await open_key_store(queue, app[GUARD], app[SUPERVISOR])
    ring = app[GUARD].ring  # before the pool starts, so that no call is paid for and lost
    check_exposure(settings, has_keys=ring.has_keys or not ring.is_loaded)
    app[LINKS] = create_links(settings, queue, app[SUPERVISOR], app[GUARD].needs_keys)
    app[SIGNING] = OperatorSecret(settings.webhook_secret, settings.webhook_sign_hosts, app[LINKS].is_on)
    if settings.rate_limit_store == "redis":
        shared = RedisRateLimitStore(queue.connection, queue.keys)
        app[RATE_LIMITS].use(FallbackRateLimitStore(shared, MemoryRateLimitStore()))
    yield


async def _alerts(app: web.Application) -> AsyncIterator[None]:
    queue, enabled = app[QUEUE], app[SETTINGS].alert_webhook is not None
    app[ALERTS] = Alerts(app[CONNECTION], queue.keys, queue.monitor.instance, enabled=enabled)
    app[ALERT_SOURCES] = AlertSources(app[ALERTS])
    app[SUPERVISOR].on_death = app[ALERT_SOURCES].on_loop_died
    app[ALERT_SOURCES].watch_redis(app[CONNECTION].health)
    app[BUDGET_WATCH] = BudgetWatch(app[ALERTS], queue.verbs, lambda: app[BUDGETS].all, app[CONNECTION].clock)
    await app[BUDGET_WATCH].refresh()
    yield


async def _ledger(app: web.Application) -> AsyncIterator[None]:
    async with open_ledger(app[QUEUE], app[SUPERVISOR]) as app[LEDGER]:
        yield


async def _board(app: web.Application) -> AsyncIterator[None]:
    async with open_board(app[QUEUE], app[LEDGER], app[SUPERVISOR]) as app[BOARD]:
        yield


async def _images(app: web.Application) -> AsyncIterator[None]:
    settings, supervisor, clock = app[SETTINGS], app[SUPERVISOR], app[CONNECTION].clock
    needed = NeededUploads(app[CONNECTION], app[QUEUE].keys)
    shared = create_blob_store(settings, app[QUEUE], needed)
    disk = create_disk_store(settings, app[QUEUE], needed, is_cache=shared is not None)
    store: ImageStore = disk
    if shared:
        store = CachedStore(shared, disk, clock=clock)
    elif settings.image_store == "upstream":
        store = UpstreamStore(disk)
    await store.start()
    supervisor.run("image-sweeper", disk.sweep())
    supervisor.run("image-disk-watch", disk.watch())
    if isinstance(store, CachedStore):
        supervisor.run("image-store-watch", store.watch())
    for name, loop in (shared.loops if shared else {}).items():
        supervisor.run(name, loop())
    others_live, others_differ = (
        lambda: not app[QUEUE].notifier.alone,
        lambda: app[PEER_SETTINGS].differs("IMAGE_STORE"),
    )
    async with open_formers(settings, app[QUEUE], supervisor, disk) as formers:
        app[STORE] = store = StoreWithFormer(store, formers, others_live, others_differ)
        app[ALERT_SOURCES].watch_store(settings.image_store, store.health)
        app[UPLOADS] = create_uploads(settings, app[QUEUE], store, needed)
        app[THUMBNAILS] = create_thumbnails(settings, app[QUEUE], store)
        app[IMAGE_SENDER] = ImageSender()
        yield
        await app[THUMBNAILS].close()
    await store.close()


async def _upstream(app: web.Application) -> AsyncIterator[None]:
    def routes_with(session: aiohttp.ClientSession) -> Routes:
        return create_routes(app[SETTINGS], session, app[TABLES], app[METER], app[ALERT_SOURCES].on_key_refused)

    async with open_upstream(
        app[SETTINGS],
        routes_with,
        app[STORE],
        app[UPLOADS],
        resolver=app[RESOLVER],
        connection=app[CONNECTION],
    ) as upstream:
        app[ROUTES], app[IMAGE_SAVER], app[INPUTS] = upstream.routes, upstream.image_saver, upstream.inputs
        canceller = app[QUEUE].client_queue.canceller
        canceller.cancel_upstream, canceller.lists_jobs = upstream.routes.cancel, upstream.routes.lists_jobs
        yield
        await canceller.close()


async def _pool(app: web.Application) -> AsyncIterator[None]:
    settings, queue, supervisor = app[SETTINGS], app[QUEUE], app[SUPERVISOR]
    policy = RetryPolicy(settings.max_attempts, settings.retry_base_s)
    job_wait_s = max(settings.upstream_timeout_s, MIN_JOB_WAIT_S)
    clock, allows = queue.connection.clock, app[GUARD].ring.allows_model
    deadline_s, fallbacks = settings.task_deadline_s, settings.fallback_models
    limits = AttemptLimits(policy, deadline_s, fallbacks, job_wait_s, allows, clock.after_jumps)
    permits = create_permits(app[ROUTES], queue.worker_queue.slots, wall=clock)
    dead = DeadModels(permits, other_instances(queue))
    app[STORE].health.on_change(dead.on_store)
    attempts = AttemptRunner(
        queue.worker_queue,
        app[ROUTES],
        app[IMAGE_SAVER],
        limits,
        permits,
        PaymentRules(app[BUDGETS].limits_of_slots),
        app[INPUTS],
        clock=clock,
        counts=ImageCounts(app[MODEL_TABLE].max_images_per_call),
        seeds=seed_support(app[ROUTES], app[MODEL_TABLE]),
        began_at=clock(),
        dead=dead,
    )
    pool = Pool(queue.worker_queue, attempts, permits, result_ttl_s=settings.result_ttl_s, clock=clock)
    permits.on_release = pool.parking.wake
    served = served_by(app[ROUTES], settings.fallback_models)
    app[PEER_SETTINGS] = peer_settings = PeerSettings(
        lambda: shared_values(settings, app[STORE].store_id), queue.notifier
    )
    queue.notifier.greeting = lambda: {**served, **peer_settings.greeting(), **dead.greeting()}
    queue.notifier.on_peer.append(peer_settings.on_peer)
    queue.notifier.handlers["here"] = peer_settings.on_answer
    app[PERMITS] = permits
    app[CHANNELS] = ChannelReport(app[ROUTES], permits, wall=clock).channels
    app[LIFECYCLE] = Lifecycle(queue, pool, supervisor)
    app[LIFECYCLE].start()
    yield
    await app[LIFECYCLE].stop()
    peer_settings.close()


async def _webhooks(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    private = settings.webhook_allow_private
    if settings.webhook_proxy:
        logger.info("Webhooks go through the proxy {}", Proxies(https=settings.webhook_proxy).masked)

    def body_of(task: Task, webhook: Webhook) -> Mapping[str, Any]:
        noticed = app[MODEL_TABLE].with_notices(task, app[CONNECTION].clock())
        return task_view(
            noticed,
            TaskLinks(webhook.link_base_url, app[LINKS]).image,
            language="zh",
            max_attempts=settings.max_attempts,
        )

    resolver = ForeignResolver(app[OWN_ADDRESSES], app[RESOLVER])
    async with webhook_session(private=private, resolver=resolver, proxy=settings.webhook_proxy) as session:
        sender = WebhookSender(
            session, body_of, app[SIGNING], allow_private=private, check_own=app[OWN_ADDRESSES].check
        )
        app[DELIVERIES] = WebhookDispatcher(app[QUEUE].outbox, sender, clock=app[CONNECTION].clock)
        delivering = [asyncio.create_task(app[DELIVERIES].deliver_forever(), name="webhooks")]
        app[ALERT_DELIVERIES] = None
        if settings.alert_webhook:
            alerting = AlertDispatcher(app[ALERTS], sender, settings.alert_webhook, settings.webhook_secret, app[METER])
            app[ALERT_DELIVERIES] = alerting
            delivering.append(asyncio.create_task(alerting.deliver_forever(), name="alerts"))
        app[SUPERVISOR].watch(delivering)
        yield
        await app[SUPERVISOR].stop(delivering)


def _readiness(app: web.Application) -> Readiness:
    async def causes() -> list[str]:
        images, embedded = app[STORE].health, app[EMBEDDED]
        reachable, has_met_peers = await app[CONNECTION].is_reachable(), app[QUEUE].notifier.has_met_peers
        failing = {
            "a loop of the service died": not app[SUPERVISOR].alive,
            "the service is about to stop": readiness.draining,
            "Redis does not answer": not reachable,
            "the other instances have not answered yet": not has_met_peers and reachable,
            "the data folder of the embedded Redis is gone": embedded is not None and not embedded.intact,
            f"images can't be saved: {images.cause}": not images.writable,
        }
        return [cause for cause, fails in failing.items() if fails]

    readiness = Readiness(causes, lambda: app[QUEUE].pause.since is not None)
    return readiness


def _telemetry(app: web.Application) -> Telemetry:
    settings, supervisor = app[SETTINGS], app[SUPERVISOR]
    return Telemetry(
        app[METER],
        RecentRates(app[METER]),
        app[QUEUE].monitor,
        ProviderLimits(
            call_slots(settings),
            settings.upstream_rate_per_min,
            lambda: app[PERMITS].blocked(settings.default_model),
        ),
        loops=lambda: supervisor.names,
        max_queue=settings.max_queue,
        store_writable=lambda: app[STORE].health.writable,
        key_accepted=lambda: app[ROUTES].key_accepted,
        budgets=app[BUDGET_WATCH],
        spending=app[LEDGER].total,
        channels=app[CHANNELS],
        paused_since=lambda: app[QUEUE].pause.since,
    )


async def _services(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    reuse = ImageReuse(app[STORE], reused_image_ttl_s(settings), clock=app[CONNECTION].clock)
    app[SERVICES] = Services(
        queue=app[QUEUE].client_queue,
        lost_calls=app[QUEUE].lost_calls,
        open_calls=app[QUEUE].open_calls,
        ledger=app[LEDGER],
        feed=app[QUEUE].feed,
        store=app[STORE],
        inputs=InputImages(app[UPLOADS], settings.task_deadline_s, app[CONNECTION].clock),
        thumbnails=app[THUMBNAILS],
        identity=task_identity(settings, app[ROUTES], app[MODEL_TABLE], other_instances(app[QUEUE]).channels),
        links=app[LINKS],
        readiness=_readiness(app),
        link_base=LinkBase(settings.public_url, settings.trusted_proxy_hops),
        max_attempts=settings.max_attempts,
        models=app[MODEL_TABLE],
        channels=app[ROUTES].channels,
        list_models=app[ROUTES].models,
        fallbacks=settings.fallback_models,
        reuse_images=reuse.reuse,
        count_reusable=reuse.count,
        private_webhooks=settings.webhook_allow_private,
        openai=OpenAIOptions(
            settings.v1_reuse, settings.v1_max_wait_s, settings.v1_keepalive, settings.v1_response_format
        ),
        own=app[OWN_ADDRESSES],
        signing=app[SIGNING],
        shares_tasks=settings.cache_scope == "shared",
    )
    app[OBSERVED] = _telemetry(app)
    app[SCRAPES] = Scrapes(app[OBSERVED])
    yield
