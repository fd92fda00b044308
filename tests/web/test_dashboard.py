"""Tests that the Grafana dashboard fits the metrics that a service exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import AS_ADMIN

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
UNUSED = {"process_virtual_memory_bytes", "process_start_time_seconds"}
"""Metrics that the library adds and no panel needs."""

SUFFIXES = {"counter": "_total", "histogram": "_bucket", "info": "_info"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "imagegen.json").read_text(encoding="utf-8")))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_dashboard_is_that_of_its_script(tmp_path: Path) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import dashboard; sys.stdout.write(dashboard.as_text())"
    made = subprocess.run([sys.executable, "-c", program, GRAFANA], capture_output=True, encoding="utf-8", check=True)
    assert made.stdout == (GRAFANA / "imagegen.json").read_text(encoding="utf-8"), "run deploy/grafana/dashboard.py"


async def test_each_metric_has_a_panel_and_each_query_a_metric_with_its_labels(
    service: Any, dashboard: dict[str, Any]
) -> None:
    answer = await service.post("/api/images/generate?wait=20", json={"prompt": "a fox", "width": 64, "height": 64})
    assert answer.status == 200
    text = await (await service.get("/metrics", headers=AS_ADMIN)).text()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}{SUFFIXES.get(family.type, '')}"
        labels.setdefault(name, set()).update(*(sample.labels for sample in family.samples))
        if not family.samples:
            labels[name].add("?")  # nothing of this kind has happened, so its labels are not shown
    queried = set()
    for expression in expressions(dashboard):
        (name,) = set(re.findall(r"\b(?:imagegen|process)_\w+", expression))
        queried.add(name)
        assert name in labels, expression
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert grouped - {"instance", "le"} <= labels[name] or "?" in labels[name], expression
    assert {name for name in labels if not name.startswith("python_")} - UNUSED == queried


def test_each_query_is_balanced_and_chooses_the_instances(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        assert expression.count("(") == expression.count(")")
        assert expression.count('{instance=~"$instance"}') == 1
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}


def test_no_panel_covers_another_and_each_has_its_number(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
