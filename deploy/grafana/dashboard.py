"""Write the Grafana dashboard: one panel for each metric in the table of docs/operations.md.

    python deploy/grafana/dashboard.py

Import deploy/grafana/imagegen.json in Grafana (Dashboards, New, Import) and choose the Prometheus data source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("imagegen.json")

WIDTH, HEIGHT, COLUMNS = 8, 8, 24
"""Of a panel, and of the grid."""

ROWS = {
    "Tasks": r"submits|tasks_total|wait_|attempt_|takeovers|dead_letters|images?_|thumbnails",
    "Queue": r"queue|tasks|attempts|loops|waiters|instances|lines?",
    "Money and keys": r"budget|spent|saved|cost|usd|key|ledger|usage|alert|ambiguous|open_tasks|unauthorized",
    "Provider": r"upstream|channel|provider",
    "Redis and image store": r"redis|store",
    "HTTP": r"http|refused|cross",
    "Process": r"",
}
"""Rows with the beginnings of the names of their metrics, without `imagegen_`; the first match counts."""

OF_THE_QUEUE = ("queue_", "instances", "redis_commands_month_projected", "budget")
"""Beginnings of the gauges that each instance reports for all of them."""

RARE = r"takeovers|dead_letters|ambiguous|redis_records|redis_written|alerts|unauthorized|refused|spent|saved"
"""Beginnings of the counters that are shown as events in an hour, since their rate is nearly 0."""

UNITS = {"_seconds": "s", "_bytes": "bytes", "_usd": "currencyUSD", "_dollars": "currencyUSD"}

PROCESS = {
    "process_resident_memory_bytes": "Memory of the process.",
    "process_cpu_seconds_total": "Processor time, in seconds a second.",
    "process_open_fds": "Open file descriptors; the limit is process_max_fds.",
    "process_max_fds": "Limit of open file descriptors.",
}


class MetricRow(NamedTuple):
    """A row of the table. labels: of the metric."""

    name: str
    labels: tuple[str, ...]
    text: str


def metric_table() -> list[MetricRow]:
    """Return the rows of the table of metrics, with those of the process at the end."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.split("## Metrics\n", 1)[1].split("\n## ", 1)[0]
    rows = []
    for names, text in re.findall(r"^\| (`imagegen_.*?) \| (.*?) \|$", section, re.MULTILINE):
        for name, labels in re.findall(r"`(imagegen_\w+)(?:\{([\w,]+)\})?`", names):
            rows.append(MetricRow(name, tuple(filter(None, labels.split(","))), text.replace("`", "")))
    return rows + [MetricRow(name, (), text) for name, text in PROCESS.items()]


def row_of(metric: MetricRow) -> str:
    short = metric.name.removeprefix("imagegen_")
    if metric.name.startswith("process_"):
        return "Process"
    return next(title for title, pattern in ROWS.items() if re.match(pattern, short))


def queries(metric: MetricRow) -> Iterator[tuple[str, str]]:
    """Yield the expressions of a panel with their legends."""
    name, labels = metric.name, ", ".join(metric.labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    chosen = '{instance=~"$instance"}'
    if metric.text.startswith("histogram"):
        for quantile in ("0.5", "0.95", "0.99"):
            by = ", ".join(["le", *metric.labels])
            rate = f"sum by ({by}) (rate({name}_bucket{chosen}[$__rate_interval]))"
            yield f"histogram_quantile({quantile}, {rate})", f"p{float(quantile) * 100:g} {legend}".strip()
    elif re.match(RARE, name.removeprefix("imagegen_")):
        by = f" by ({labels})" if labels else ""
        yield f"sum{by} (increase({name}{chosen}[1h]))", legend or "in an hour"
    elif name.endswith("_total"):
        by = f" by ({labels})" if labels else ""
        yield f"sum{by} (rate({name}{chosen}[$__rate_interval]))", legend or "all instances"
    elif name.removeprefix("imagegen_").startswith(OF_THE_QUEUE):
        by = f" by ({labels})" if labels else ""
        yield f"max{by} ({name}{chosen})", legend or "all instances"
    else:
        by = ", ".join(["instance", *metric.labels])
        yield f"sum by ({by}) ({name}{chosen})", f"{{{{instance}}}} {legend}".strip()


def unit_of(metric: MetricRow) -> str:
    name = metric.name.removesuffix("_total")
    unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "short")
    if not metric.name.endswith("_total") or re.match(RARE, name.removeprefix("imagegen_")):
        return unit
    return {"short": "cps", "bytes": "Bps", "s": "short"}.get(unit, unit)


def panel(metric: MetricRow, number: int, x: int, y: int) -> dict[str, Any]:
    title = metric.name.removeprefix("imagegen_").removesuffix("_total").replace("_", " ")
    return {
        "id": number,
        "type": "timeseries",
        "title": title.capitalize(),
        "description": f"{metric.name}: {metric.text}",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit_of(metric), "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(queries(metric))
        ],
    }


def panels() -> Iterator[dict[str, Any]]:
    """Yield a row for each group, and its panels."""
    table, y, number = metric_table(), 0, 0
    for title in ROWS:
        group = [metric for metric in table if row_of(metric) == title]
        if not group:
            continue
        number += 1
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": grid}
        y += 1
        for index, metric in enumerate(group):
            number += 1
            line, column = divmod(index, COLUMNS // WIDTH)
            yield panel(metric, number, column * WIDTH, y + line * HEIGHT)
        y += -(-len(group) // (COLUMNS // WIDTH)) * HEIGHT


def dashboard() -> dict[str, Any]:
    instances = "label_values(imagegen_uptime_seconds, instance)"
    return {
        "uid": "imagegen",
        "title": "imagegen",
        "description": "Made by deploy/grafana/dashboard.py from the table of metrics in docs/operations.md.",
        "tags": ["imagegen"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "label": "Instance",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": {"query": instances, "refId": "instances"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": list(panels()),
    }


def as_text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(as_text(), encoding="utf-8")
