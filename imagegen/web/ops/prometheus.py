"""Route of the Prometheus metrics: GET /metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from imagegen import __version__
from imagegen.metrics import REQUEST_BOUNDS_S, Histogram, Meter
from imagegen.providers.channel_counts import ChannelStatus, errors_by_code
from imagegen.queue.monitor import BacklogSize, InstanceStatus
from imagegen.tasks.cost import dollars
from imagegen.web.ops.telemetry import ProviderLimits, Telemetry

_UNAUTHORIZED = 401

ALL_KEYS = "(all)"
"""Label of the budget of all clients together; no key has this name."""


_PAUSES = 9
"""Pause after a text is made, as a multiple of the time that this took."""

_KNOWN_TYPE = re.compile(
    r"[\w/+*.-]+(;(version=(0\.0\.[14]|1\.0\.0)|charset=utf-8|escaping=[a-z0-9-]+|q=[01](\.\d{0,3})?))*", re.ASCII
)
"""Part of an Accept header that the library may read: it fails on a version that is no number, and repeats any."""


async def get_metrics(request: web.Request) -> web.Response:
    """Return the metrics as Prometheus text, or as OpenMetrics if the client accepts it."""
    text, content_type = await request.app[SCRAPES].text(request.headers.get(hdrs.ACCEPT, ""))
    return web.Response(body=text, headers={hdrs.CONTENT_TYPE: content_type})


class Scrapes:
    """Texts of the metrics. Clients that wait at the same time share one, and all take a tenth of the time at most."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._due: dict[str, asyncio.Task[bytes]] = {}
        self._free_at_s = 0.0

    async def text(self, accept: str) -> tuple[bytes, str]:
        """Return the text, made after this call, and its type. accept: an Accept header."""
        known = [part for part in accept.split(",") if _KNOWN_TYPE.fullmatch(part.replace(" ", ""))]
        encode, content_type = choose_encoder(",".join(known))
        if content_type not in self._due:
            self._due[content_type] = asyncio.create_task(self._make(content_type, encode))
        return await asyncio.shield(self._due[content_type]), content_type

    async def _make(self, content_type: str, encode: Callable[[CollectorRegistry], bytes]) -> bytes:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(self._free_at_s - loop.time(), 0.0))
        del self._due[content_type]  # later clients need newer values
        waiting = await self._telemetry.backlog.waiting()
        began_at_s = loop.time()
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_MetricsCollector(self._telemetry, waiting))
        text = encode(registry)
        self._free_at_s = loop.time() + _PAUSES * (loop.time() - began_at_s)
        return text


SCRAPES = web.AppKey("scrapes", Scrapes)


class _MetricsCollector(Collector):
    """Collector of the current values."""

    def __init__(self, telemetry: Telemetry, waiting: BacklogSize) -> None:
        self._telemetry = telemetry
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        telemetry, meter = self._telemetry, self._telemetry.meter
        yield InfoMetricFamily("imagegen", "This process.", {"version": __version__})
        yield _gauge("uptime_seconds", "Since the start of this process.", meter.uptime_s)
        loops = "Loops that live; the process ends with any of them."
        yield _fill(_gauges("loops", loops, "loop"), telemetry.loops_by_kind())
        yield _gauge("asyncio_tasks", "Tasks of the event loop, one a connection among them.", _count_tasks())
        yield from _tasks(meter)
        yield from _queue(self._waiting, telemetry.backlog.local_status())
        paused = telemetry.paused_since() is not None
        yield _gauge("claiming_paused", "Whether claiming is paused on all instances.", paused)
        yield from _upstream(meter, telemetry.upstream)
        yield _gauge("store_writable", "Whether images can be saved.", telemetry.store_writable())
        yield _gauge("provider_key_accepted", "Whether the provider accepts the key.", telemetry.key_accepted())
        yield from _channels(telemetry.channels())
        yield from _accounts(meter)
        yield from _money(telemetry)
        yield from _redis(meter)
        yield from _http(meter)


def _count_tasks() -> int:
    """Return the number of tasks without the one that counts."""
    return len(asyncio.all_tasks()) - 1


def _tasks(meter: Meter) -> Iterator[Metric]:
    submits = _counters("submits", "Submits by what they met; a hit without its images is a miss too.", "kind")
    yield _fill(submits, {kind.lower(): count for kind, count in meter.submits.items()})
    tasks = _counters("tasks", "Tasks that became final here.", "state", "code", "model")
    for key, count in meter.tasks.items():
        tasks.add_metric(key, count)
    yield tasks
    wait_text = "From the submit to the start of the first attempt."
    yield HistogramMetricFamily("imagegen_wait_seconds", wait_text, _buckets(meter.waits), meter.waits.total)
    yield _histograms("attempt_seconds", "From an attempt's start to its outcome.", "outcome", meter.attempts)
    yield _counter("takeovers", "Tasks taken over because their lease was not renewed.", meter.takeovers)
    yield _counter("dead_letters", "Entries that could not be read.", meter.dead_letters)
    yield _counter("images", "Images of completed tasks.", meter.images)
    yield _counter("image_bytes", "Bytes of completed images that are stored.", meter.image_bytes)
    yield _counter("thumbnails", "Thumbnails that were made.", meter.thumbnails)


def _queue(waiting: BacklogSize, local: InstanceStatus) -> Iterator[Metric]:
    yield _gauge("queue_depth", "Tasks that no instance claimed yet.", waiting.depth)
    yield _gauge("lines", "Lines of clients for tasks beyond FAIR_WINDOW, in memory here.", local.lines)
    yield _gauge("line_tasks", "Tasks that wait in lines of clients.", local.line_tasks)
    yield _gauge("open_tasks", "Unfinished tasks that were submitted or run here.", local.open_tasks)
    yield _gauge("queue_oldest_age_seconds", "How long the first of them has waited.", waiting.oldest_age_s)
    yield _gauge("attempts_in_flight", "Attempts that run here.", local.in_flight)
    yield _gauge("tasks_retrying", "Tasks held here that wait for their next attempt.", local.retrying)
    yield _gauge("loops_free", "Slots here that wait for a task.", local.free)
    yield _gauge("waiters", "Clients here that wait for a change of a task.", local.waiters)
    yield _gauge("instances", "Instances on this queue, as this one sees them.", local.instances)
    yield _gauge("redis_up", "Whether Redis can be used.", local.redis_up)


def _upstream(meter: Meter, rules: ProviderLimits) -> Iterator[Metric]:
    calls = _counters("upstream_calls", "Calls to the provider by how they ended.", "code")
    yield _fill(calls, {code: histogram.count for code, histogram in meter.calls.items()})
    yield _histograms("upstream_call_seconds", "How long calls to the provider took.", "code", meter.calls)
    yield _counter("ambiguous_calls", "Calls that may have been paid for without a result.", meter.ambiguous)
    yield _gauge("upstream_concurrency", "Calls that may run at once.", rules.concurrency)
    yield _gauge("upstream_blocked_seconds", "Until the provider may be called again.", rules.blocked_s)


def _channels(statuses: Sequence[ChannelStatus]) -> Iterator[Metric]:
    calls = _counters("channel_calls", "Calls by channel, key and how they ended.", "channel", "key", "code")
    usable = _gauges("channel_key_usable", "1 if the key takes calls, 0 if it cools or is out.", "channel", "key")
    in_flight = _gauges("channel_in_flight", "Calls that run in a channel.", "channel")
    resting = _gauges("channel_resting", "1 if the channel takes no calls now.", "channel")
    spent = _counters("channel_spent_usd", "US dollars of the calls of a channel.", "channel")
    for status in statuses:
        for key in status.keys:
            names, errors = (status.name, key.id), key.counts.errors
            ended_well = key.counts.calls - errors.total()
            for code, count in {"ok": ended_well, **errors_by_code(key.counts)}.items():
                calls.add_metric((*names, code), count)
            usable.add_metric(names, key.state == "healthy")
        in_flight.add_metric((status.name,), status.totals.in_flight)
        resting.add_metric((status.name,), status.state != "healthy")
        spent.add_metric((status.name,), dollars(status.totals.spent))
    yield from (calls, usable, in_flight, resting, spent)


def _accounts(meter: Meter) -> Iterator[Metric]:
    alerts = _counters("alerts", "Alerts by type, and whether they were delivered to ALERT_WEBHOOK.", "type", "outcome")
    for key, count in meter.alerts.items():
        alerts.add_metric(key, count)
    yield alerts
    refused = sum(histogram.count for (_, _, status), histogram in meter.requests.items() if status == _UNAUTHORIZED)
    yield _counter("unauthorized", "Requests without a valid key or token.", refused)


def _money(telemetry: Telemetry) -> Iterator[Metric]:
    spending = telemetry.spending
    yield _counter("spent_usd", "US dollars of the calls of tasks that ended here.", dollars(spending.spent))
    taken_back = dollars(telemetry.meter.taken_back_micro_usd)
    yield _counter("spent_taken_back_usd", "US dollars of spent_usd that were not paid in the end.", taken_back)
    saved = _counters("saved_usd", "US dollars that hits and joins have saved here.", "by")
    by = {"cache": dollars(spending.saved_by_cache), "coalescing": dollars(spending.saved_by_coalescing)}
    yield _fill(saved, by)
    limit = _gauges("budget_limit_usd", "Limits of today's budgets in US dollars.", "key")
    used = _gauges(
        "budget_used_usd",
        "US dollars reserved and charged in today's budgets, as last seen here.",
        "key",
    )
    left = _gauges("budget_left_usd", "US dollars that are left of today's budgets.", "key")
    for state in telemetry.budgets.states():
        for gauge, amount in ((limit, state.limit), (used, state.used), (left, state.left)):
            gauge.add_metric((state.key or ALL_KEYS,), dollars(amount))
    yield from (limit, used, left)


def _redis(meter: Meter) -> Iterator[Metric]:
    yield _fill(_counters("redis_commands", "Redis commands, those inside of scripts too.", "purpose"), meter.commands)
    yield _counter("redis_records_vanished", "Records of tasks that Redis lost before their time.", meter.vanished)
    written_back = _counters("redis_written_back", "Tasks that Redis had lost and that were written back.", "state")
    yield _fill(written_back, meter.written_back)
    projected = "Redis commands in 30 days at the rate so far."
    yield _gauge("redis_commands_month_projected", projected, meter.commands_a_month)


def _http(meter: Meter) -> Iterator[Metric]:
    answered = _counters("http_requests", "HTTP requests answered.", "method", "route", "status")
    took = HistogramMetricFamily("imagegen_http_request_seconds", "Time to the answer.", labels=("method", "route"))
    by_route: dict[tuple[str, str], Histogram] = {}
    for (method, route, status), histogram in meter.requests.items():
        answered.add_metric((method, route, str(status)), histogram.count)
        by_route.setdefault((method, route), Histogram(REQUEST_BOUNDS_S)).add(histogram)
    for key, histogram in by_route.items():
        took.add_metric(key, _buckets(histogram), histogram.total)
    yield answered
    yield took
    yield _gauge("http_requests_open", "HTTP requests not answered yet.", meter.open_requests)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"imagegen_{name}", text, value)


def _gauges(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"imagegen_{name}", text, labels=labels)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"imagegen_{name}", text, value)


def _counters(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"imagegen_{name}", text, labels=labels)


def _fill(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _histograms(name: str, text: str, label: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"imagegen_{name}", text, labels=(label,))
    for key, histogram in histograms.items():
        family.add_metric((key,), _buckets(histogram), histogram.total)
    return family


def _buckets(histogram: Histogram) -> Sequence[tuple[str, float]]:
    """Return cumulative buckets, as Prometheus counts them."""
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
