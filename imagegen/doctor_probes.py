"""Probes of `imagegen doctor` beyond the settings: disk, bucket, provider key, clocks, public address. None is paid."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from msgspec import Struct
from yarl import URL

from imagegen import disk_patience
from imagegen.channel_parts import create_routes, load_tables
from imagegen.channels_file import KINDS, SANDBOX, credential_setting
from imagegen.chosen_parts import NO_CAP_BYTES, bucket_of
from imagegen.disk_patience import answer_soon
from imagegen.errors import SettingsError, StoreUnavailable, UpstreamError
from imagegen.formats import parse_http_date
from imagegen.images.s3 import S3BlobStore
from imagegen.images.store_health import describe
from imagegen.metrics import Meter
from imagegen.proxies import Proxies, ProxyConnector
from imagegen.resolver import Resolver
from imagegen.settings import Settings
from imagegen.worker.call_routes import Route

PROBE_BYTES = 2**20
LOW_BYTES = 256 * 2**20
"""Free space of the data folder that an operator must look at."""

PUBLIC_TIMEOUT_S = 10.0
MAX_PUBLIC_BYTES = 64 * 1024

CLOCK_TOLERANCE_S = 5.0
MAX_CLOCK_ERROR_S = 300.0
"""Receivers refuse webhooks that are further off: https://www.standardwebhooks.com"""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Finding(Struct, frozen=True):
    """One result. fatal: the service can't do its work with it."""

    text: str
    fatal: bool = False


class ClockReading(Struct, frozen=True):
    """Clock of another machine. ahead_s: seconds before this machine's clock."""

    source: str
    ahead_s: float


class Probed(Struct):
    """Results of probes. notes: the parts that are in order, for the operator to read."""

    findings: list[Finding] = []
    notes: list[str] = []
    clocks: list[ClockReading] = []

    def add(self, other: Probed) -> None:
        """Add the results of another probe."""
        self.findings += other.findings
        self.notes += other.notes
        self.clocks += other.clocks


def check_disk(settings: Settings) -> list[Finding]:
    """Return what keeps the data folder from taking images: a disk that hangs, is full, or will be soon."""
    try:
        return answer_soon(lambda: list(_check_answering_disk(settings)))
    except TimeoutError:
        folder = settings.data_dir.absolute()
        remedy = "start that server, or mount the folder again"
        text = f"{folder} does not answer within {disk_patience.ANSWER_S:g} s, as a network mount without its server"
        return [Finding(f"DATA_DIR: {text}; {remedy}", fatal=True)]


def _check_answering_disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.absolute()
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if error.errno in _FULL:
            remedy = "free space there, or set another DATA_DIR; a smaller IMAGE_STORE_MAX_BYTES keeps less"
            yield Finding(f"DATA_DIR: the disk of {folder} is full ({error.strerror}); {remedy}", fatal=True)
        elif folder.is_dir():  # else the check of the folder has found it
            remedy = "check the disk and its mount"
            yield Finding(f"DATA_DIR: {folder} can't be written to ({error.strerror}); {remedy}", fatal=True)
        return
    finally:
        if probe.exists():
            probe.unlink()
    if free < LOW_BYTES:
        cap_mib = settings.image_store_max_bytes >> 20
        yield Finding(
            f"DATA_DIR: {folder} has {free >> 20} MiB free, and images may take {cap_mib} MiB; free space, or lower "
            "IMAGE_STORE_MAX_BYTES"
        )


async def probe_bucket(settings: Settings) -> Probed:
    """List, write, read and delete in the bucket, as the start does; only list where another store saves the images."""
    if (bucket := bucket_of(settings)) is None:
        return Probed()
    saves = settings.image_store == "s3"
    try:
        store = S3BlobStore(bucket, max_bytes=NO_CAP_BYTES, life_s=math.inf)
        try:
            await (store.start() if saves else store.start_reading())
        finally:
            await store.close()
    except SettingsError as error:
        return Probed([Finding(str(error), fatal=saves)])
    except StoreUnavailable as error:
        remedy = "check S3_ENDPOINT with its scheme (https:// or http://), the network, and whether the service runs"
        text = f"the bucket {bucket.name} can't be used now ({describe(error.__cause__ or error)})"
        return Probed([Finding(f"S3_ENDPOINT: {text}; {remedy}", fatal=saves)])
    return Probed(notes=[f"bucket: {bucket.name} {'takes images' if saves else 'can be listed'}"])


async def probe_provider(settings: Settings) -> Probed:
    """Check each key of each channel by a request that costs nothing."""
    total, clocks = Probed(), list[ClockReading]()
    proxies = Proxies(settings.http_proxy, settings.https_proxy, settings.no_proxy)
    async with _session(proxies, clocks) as session:
        routes = create_routes(settings, session, load_tables(settings)[1], Meter())
        for probed in await asyncio.gather(*map(_probe_key, routes.all)):
            total.add(probed)
        await routes.close()
    total.clocks = clocks[:1]
    return total


async def _probe_key(route: Route) -> Probed:
    name = route.channel.provider
    if name == SANDBOX:
        return Probed(notes=["provider: the sandbox, which needs no key"])
    try:
        note = await route.provider.check_key()
    except UpstreamError as error:
        return _judged(route, error)
    where = route.title or f"provider: {name}"
    if note is None:
        return Probed(notes=[f"{where}: not checked, since every request with its key costs money; make one image"])
    return Probed(notes=[f"{where} accepts the key{note}"])


def _judged(route: Route, error: UpstreamError) -> Probed:
    """Return the finding of a key that was not accepted."""
    name, detail = route.channel.provider, error.upstream_detail
    key = route.title or credential_setting(name)
    address = f"{key}, base_url" if route.title else KINDS[name].url_setting
    match error.code:
        case "upstream_auth":
            remedy = "set a key that is valid for this address, or renew it at the provider"
            return Probed([Finding(f"{key}: the provider refuses the key ({detail}); {remedy}", fatal=True)])
        case "upstream_billing":
            remedy = "add credit to the account at the provider"
            return Probed([Finding(f"{key}: the account has no credit ({detail}); {remedy}", fatal=True)])
    if error.status is None:
        remedy = f"check {address} with its scheme (https:// or http://), the network and HTTPS_PROXY"
        return Probed([Finding(f"{address}: {detail}; {remedy}", fatal=True)])
    if error.status in {404, 405, 501}:
        note = f"{key}: the provider has no list of models, so the key can't be checked without a paid call"
        return Probed([Finding(f"{note}; make one image to check it")])
    remedy = "try again later, or look at the provider's status page"
    return Probed([Finding(f"{address}: the provider answers HTTP {error.status} ({detail}); {remedy}")])


async def probe_public_url(settings: Settings) -> Probed:
    """Call this service by its public address."""
    if settings.public_url is None:
        return Probed()
    url, clocks = URL(f"{settings.public_url.rstrip('/')}/api/health"), list[ClockReading]()
    proxies = Proxies(settings.http_proxy, settings.https_proxy, settings.no_proxy)
    try:
        async with (
            asyncio.timeout(PUBLIC_TIMEOUT_S),
            _session(proxies, clocks) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            status, target = response.status, response.headers.get("Location", "")
            is_ours = status == 200 and _is_health(await response.content.read(MAX_PUBLIC_BYTES))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return Probed([Finding(f"PUBLIC_URL: {settings.public_url} can't be reached: {_loss(error)}")])
    if is_ours:
        return Probed(notes=[f"public address: {settings.public_url} leads to this service"], clocks=clocks[:1])
    if 300 <= status < 400:
        text = f"redirects to {target}; set PUBLIC_URL to the address that serves without a redirect"
    elif status in {502, 503, 504}:
        text = f"answers HTTP {status}: its proxy does not reach the service; start the service, or check the proxy"
    else:
        text = f"is answered by another server (HTTP {status}); set PUBLIC_URL to the address of this service"
    return Probed([Finding(f"PUBLIC_URL: {settings.public_url} {text}")])


def check_clocks(clocks: Sequence[ClockReading]) -> Iterator[Finding]:
    """Yield a finding if this machine's clock differs from others: webhooks, signed links and S3 depend on it."""
    wrong = [clock for clock in clocks if abs(clock.ahead_s) > CLOCK_TOLERANCE_S]
    if not wrong:
        return
    compared = " and ".join(
        f"{abs(clock.ahead_s):.0f} s {'behind' if clock.ahead_s > 0 else 'ahead of'} that of {clock.source}"
        for clock in wrong
    )
    agree = [clock.source for clock in clocks if clock not in wrong]
    text = f"the clock of this machine is {compared}"
    if agree:
        text += f", and agrees with that of {' and '.join(agree)}, so the other one is wrong"
    worst_s = max(abs(clock.ahead_s) for clock in wrong)
    effect = "webhooks and S3 are refused, and links expire too early or too late"
    remedy = "set it by NTP (timedatectl set-ntp true), or restart a virtual machine that was asleep"
    yield Finding(f"clock: {text}: {effect}; {remedy}", fatal=worst_s >= MAX_CLOCK_ERROR_S)


@asynccontextmanager
async def _session(proxies: Proxies, clocks: list[ClockReading]) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session that notes the clock of each server by its Date header."""

    async def on_end(_session: Any, _context: Any, params: aiohttp.TraceRequestEndParams) -> None:
        sent_at = parse_http_date(params.response.headers.get("Date"))
        if sent_at is not None:
            clocks.append(ClockReading(params.url.host or "the provider", sent_at - time.time()))

    trace, resolver = aiohttp.TraceConfig(), Resolver()
    trace.on_request_end.append(on_end)
    try:
        async with aiohttp.ClientSession(
            connector=ProxyConnector(proxies, resolver=resolver),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        ) as session:
            yield session
    finally:
        await resolver.close()


def _is_health(body: bytes) -> bool:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and value.get("success") is True and "timestamp" in value


def _loss(error: Exception) -> str:
    """Return why there is no answer, and what to do."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "its name is not found; add it to DNS, or correct PUBLIC_URL"
        case aiohttp.ClientSSLError() | aiohttp.ClientConnectorCertificateError():
            return "its certificate is not valid for this name; renew it, or correct PUBLIC_URL"
        case TimeoutError():
            return f"no answer within {PUBLIC_TIMEOUT_S:g} s; open its port in the firewall, or correct PUBLIC_URL"
        case _:
            return "no connection; start the service and its proxy, open the port, or correct PUBLIC_URL"
