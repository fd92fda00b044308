"""Channels of the settings, and the parts built from them: providers, prices, model tables, routes, permits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import aiohttp
from msgspec.structs import replace
from yarl import URL

from imagegen.channels_file import EVERY_MODEL, KINDS, SANDBOX, Channel, ChannelKey, Channels
from imagegen.metrics import Meter
from imagegen.providers.a1111 import A1111Provider
from imagegen.providers.bfl import BflProvider
from imagegen.providers.channel_models import ChannelModelTable
from imagegen.providers.chat_images import ChatImagesProvider, is_chat_address
from imagegen.providers.dashscope import DashScopeProvider
from imagegen.providers.fal import FalProvider
from imagegen.providers.gemini import create_gemini, shapes_of
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.metered import MeteredProvider
from imagegen.providers.model_rules import ModelTable, Pricing
from imagegen.providers.model_table import load_table
from imagegen.providers.openai import OpenAICompatibleProvider, dialect_of
from imagegen.providers.protocol import Provider
from imagegen.providers.replicate import ReplicateProvider
from imagegen.providers.sandbox import SandboxProvider
from imagegen.providers.siliconflow import SiliconFlowProvider
from imagegen.providers.together import InputField, TogetherProvider, input_field_by_name
from imagegen.settings import Settings
from imagegen.tasks.provider_job import key_fingerprint
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.pacing import Pacing
from imagegen.worker.permits import PermitLine
from imagegen.worker.router import Router

_JOB_APIS: Mapping[str, type[JobApiProvider]] = {
    "fal": FalProvider,
    "replicate": ReplicateProvider,
    "bfl": BflProvider,
    "dashscope": DashScopeProvider,
}
"""Providers that answer a call with a job."""


def channels_of(settings: Settings) -> Channels:
    """Return the channels of the file, or the channel of the simple settings, with the limits that apply."""
    return Channels([_with_limits(channel, settings) for channel in settings.file_channels or (_simple(settings),)])


def _with_limits(channel: Channel, settings: Settings) -> Channel:
    rate_per_min = channel.rate_per_min or settings.upstream_rate_per_min
    return replace(channel, rate_per_min=rate_per_min, concurrency=_concurrency(channel))


def _simple(settings: Settings) -> Channel:
    """Return the channel of PROVIDER, named after it."""
    name, kind = settings.provider, KINDS[settings.provider]
    secret, url = settings.text_of(kind.key_setting), settings.text_of(kind.url_setting)
    keys = (ChannelKey(secret, kind.key_setting if secret else ""),)
    return Channel(name, name, keys, EVERY_MODEL, base_url=url)


def call_slots(settings: Settings) -> int:
    """Return how many calls this instance makes at once: WORKER_CONCURRENCY, or the limits of all channels if lower.

    Further tasks wait in the stream, where no time limit runs and other instances can take them.
    """
    limits = [channel.concurrency for channel in channels_of(settings).all]
    if any(limit is None for limit in limits):
        return settings.worker_concurrency
    return min(settings.worker_concurrency, sum(limit or 0 for limit in limits))


def _concurrency(channel: Channel) -> int | None:
    """Return how many calls a channel takes at once, by the file or by its provider; None without a limit."""
    match channel.provider:
        case "a1111":
            own: int | None = A1111Provider.max_concurrent_calls
        case "openai":
            own = dialect_of(URL(channel.base_url)).max_concurrent_calls
        case _:
            own = None
    return channel.concurrency if channel.concurrency is not None else own


def load_tables(settings: Settings) -> tuple[ModelTable, Mapping[str, ModelTable]]:
    """Return the table of models as clients name them, and those of the providers. Raises SettingsError."""
    kinds = dict.fromkeys((settings.provider, *(channel.provider for channel in channels_of(settings).all)))
    tables = {kind: load_table(kind, settings.models_file) for kind in kinds}
    if not settings.file_channels:
        return tables[settings.provider], tables
    return ChannelModelTable(channels_of(settings), tables, settings.provider), tables


def create_provider(
    settings: Settings, channel: Channel, key: ChannelKey, session: aiohttp.ClientSession, table: ModelTable
) -> Provider:
    """Return the provider of one key of a channel. table: of the provider."""

    def input_field(model: str) -> InputField:
        row = table.find(model)
        return (row.images_as if row else None) or input_field_by_name(model)

    timeout_s, url, secret = settings.upstream_timeout_s, channel.base_url, key.secret
    if create := _JOB_APIS.get(channel.provider):
        return create(session, api_key=secret, base_url=url, timeout_s=timeout_s, channel=channel.name)
    created: Provider
    match channel.provider:
        case "together":
            created = TogetherProvider(
                session, api_key=secret, base_url=url, timeout_s=timeout_s, input_field=input_field
            )
        case "openai" if is_chat_address(url):
            created = ChatImagesProvider(
                session, name="openai", base_url=url, api_key=secret or None, timeout_s=timeout_s
            )
        case "openai":
            created = OpenAICompatibleProvider(session, base_url=url, api_key=secret or None, timeout_s=timeout_s)
        case "a1111":
            model = settings.default_model
            created = A1111Provider(session, base_url=url, timeout_s=timeout_s, default_model=model)
        case "gemini":
            shapes = shapes_of(table)
            created = create_gemini(session, api_key=secret, base_url=url, timeout_s=timeout_s, shapes_of=shapes)
        case "siliconflow":
            created = SiliconFlowProvider(session, api_key=secret, base_url=url, timeout_s=timeout_s)
        case _:
            created = SandboxProvider(settings.sandbox_delay_s)
    return created


def create_routes(
    settings: Settings,
    session: aiohttp.ClientSession,
    tables: Mapping[str, ModelTable],
    meter: Meter,
    on_refused: Callable[[str, str], None] = lambda _code, _key: None,
) -> Routes:
    """Return a route for each key of each channel. on_refused: see MeteredProvider."""
    channels, routes = channels_of(settings), []
    is_only = len(channels.all) == 1 and len(channels.all[0].keys) == 1
    for channel in channels.all:
        is_free, unknown = channel.provider == SANDBOX, settings.unknown_price_micro_usd
        table = tables[channel.provider]
        pricing = Pricing(table, is_free=is_free, unknown_micro_usd=unknown)
        for number, key in enumerate(channel.keys, 1):
            provider = create_provider(settings, channel, key, session, table)
            account = str(getattr(provider, "account", "")) or key_fingerprint(channel.base_url, key.secret)
            variable = key.source if key.source.startswith("env:") else ""
            description = ", ".join(filter(None, (variable, f"fingerprint {account[:8]}")))
            title = f"channel {channel.name}, key {number} ({description})"
            title = title if settings.file_channels else ""
            metered = MeteredProvider(provider, meter, on_refused=on_refused, key_name=title or None)
            base = None if is_only else provider.base_url
            routes.append(Route(channel, account, metered, pricing, key, title, base))
    return Routes(channels, routes, from_file=bool(settings.file_channels))


def create_permits(routes: Routes, slots: int, *, wall: Callable[[], float]) -> PermitLine:
    """Return the permits of calls: the pacing of the only key, or the router of all channels.

    slots: calls at once. Half of them may repeat a call that got no answer in time.
    """
    most_hung = max(slots // 2, 1)
    if only := routes.only:
        return Pacing(only, rate_per_min=only.channel.rate_per_min, wall=wall, most_hung=most_hung)
    return Router(routes, wall=wall, most_hung=most_hung)
