"""The documents name what exists: files, settings, routes, metrics, versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from imagegen.accounts.budget_watch import BudgetState
from imagegen.accounts.counts import Counts
from imagegen.metrics import SUBMITS, Meter, RecentRates
from imagegen.queue.monitor import BacklogSize, InstanceStatus
from imagegen.settings import PROVIDERS, setting_names
from imagegen.web.ops.prometheus import _MetricsCollector
from imagegen.web.ops.telemetry import ProviderLimits, Telemetry
from imagegen.web.routes import build_document

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_within_the_repository_resolves(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_document_names_only_files_that_exist(name: str) -> None:
    text = re.sub(r"```.*?```", "", read(name), flags=re.DOTALL)
    paths = [path for path in re.findall(r"`([\w./]+(?:/|\.py|\.lua|\.md))`", text) if "NAME" not in path]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "imagegen" / path).exists() or path == "operations.py", path


@pytest.mark.parametrize("name", ["docs/operations.md", "docs/api.md", "SECURITY.md"])
def test_a_document_names_only_settings_that_exist(name: str) -> None:
    others = {"ALL_PROXY", "REDIS_URL_FILE"}  # the first is not read, as the document states; files are any secret's
    others |= {"SSL_CERT_FILE", "SSL_CERT_DIR"}  # OpenSSL reads them
    named = set(re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=[^`]*)?`", read(name)))
    assert named - others <= set(setting_names())


def test_the_contract_names_each_route_of_the_openapi_document() -> None:
    named = {tuple(route.split(" ", 1)) for route in re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", read("docs/api.md"))}
    documented = {
        (method.upper(), path)
        for path, operations in build_document()["paths"].items()
        for method in operations
        if method in ("get", "post", "delete")
    }
    assert {(method, path.partition("?")[0]) for method, path in named} == documented


def test_the_contract_names_each_error_code_reason_and_task_error() -> None:
    schemas, text = build_document()["components"]["schemas"], read("docs/api.md")
    for code in schemas["TaskError"]["properties"]["code"]["enum"] + schemas["WaitReason"]["enum"]:
        assert f"`{code}`" in text, code


def test_both_readmes_have_the_same_figures_in_the_same_order() -> None:
    def figures(name: str, begin: str) -> list[list[str]]:
        rows = re.findall(r"^\| .*? \| ([^|]*) \| [^|]* \|$", read(name).partition(begin)[2], re.MULTILINE)
        return [re.findall(r"[0-9]+(?:[.,][0-9]+)*", row) for row in rows if re.search("[0-9]", row)]

    english = figures("README.md", "## Measured")
    assert len(english) > 20
    assert figures("README.zh-CN.md", "## 实测") == english


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_each_provider_has_its_row_in_a_readme(name: str) -> None:
    rows = re.findall(r"^\| `([a-z0-9]+)` \| ", read(name).partition("| `PROVIDER` |")[2], re.MULTILINE)
    assert set(rows) >= set(PROVIDERS)


@pytest.mark.parametrize("name", [".env.example", "channels.example.toml", "docs/operations.md"])
def test_each_provider_is_named_in_the_examples(name: str) -> None:
    assert [provider for provider in PROVIDERS if not re.search(rf"\b{provider}\b", read(name))] == []


def test_the_operations_page_lists_the_redis_keys() -> None:
    prefixes = set(re.findall(r'return f"\{\{\{self\.prefix\}\}\}:([a-z-]+)', read("imagegen/redis_client/keys.py")))
    listed = re.findall(r"`\{imagegen\}:([a-z-]+)", read("docs/operations.md").partition("**Keys.**")[2])
    assert len(prefixes) > 20
    assert prefixes == set(listed)


class _Nothing:
    """Backlog and budgets of an idle process."""

    instance = "one"

    def local_status(self) -> InstanceStatus:
        return InstanceStatus(
            in_flight=0, retrying=0, free=5, waiters=0, instances=1, redis_up=True, eviction_policy=""
        )

    def states(self) -> list[BudgetState]:
        return []


async def test_the_operations_page_describes_each_metric_and_no_other() -> None:
    nothing: Any = _Nothing()
    observed = Telemetry(
        Meter(),
        recent=RecentRates(Meter()),
        backlog=nothing,
        upstream=ProviderLimits(5, None, lambda: None),
        loops=lambda: ["reader"],
        max_queue=10,
        store_writable=lambda: True,
        key_accepted=lambda: True,
        budgets=nothing,
        spending=Counts(),
        paused_since=lambda: None,
        channels=tuple,
    )
    page = _MetricsCollector(observed, BacklogSize(0, 0.0))
    shipped = {f"{family.name}{'_total' * (family.type == 'counter')}" for family in page.collect()}
    shipped = {f"{name}_info" if name == "imagegen" else name for name in shipped}
    described = {
        name
        for row in re.findall(r"^\| (`imagegen_.*?) \|", read("docs/operations.md"), re.MULTILINE)
        for name in re.findall(r"`(imagegen_[a-z_]+)", row)
    }
    assert described == shipped


def test_the_operations_page_explains_each_kind_of_submit() -> None:
    (row,) = re.findall(r"^\| `imagegen_submits_total\{kind\}` \| (.*) \|$", read("docs/operations.md"), re.MULTILINE)
    assert [kind for kind in SUBMITS if f"`{kind.lower()}`" not in row] == []


def test_alerts_use_metrics_that_are_described() -> None:
    alerts = read("docs/operations.md").partition("## Alerts")[2].partition("## Log")[0]
    table = read("docs/operations.md").partition("## Metrics")[2].partition("## Alerts")[0]
    named = set(re.findall(r"imagegen_[a-z_]+", alerts))
    assert named
    assert not [name for name in named if f"`{name}" not in table]


def test_the_commit_hooks_have_the_versions_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", read("constraints.txt"), re.MULTILINE))
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "codespell", "zizmor"} == {hook["id"] for hook in hooks}
    for hook in hooks:
        for requirement in hook["additional_dependencies"]:
            name, _, version = requirement.partition("==")
            assert version
            assert pins.get(name, version) == version


def test_each_explained_log_line_exists_in_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "imagegen").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings continued on the next line
    table = read("docs/operations.md").partition("## Log")[2].partition("## Limits")[0]
    lines = [
        line for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for line in re.findall(r"`([^`]+)`", row)
    ]
    assert lines
    for line in lines:
        for part in re.split(r"…", line):
            assert part.strip(" ?:;") in source, line


def test_the_causes_of_readyz_are_explained() -> None:
    source, text = read("imagegen/app.py"), read("docs/operations.md")
    causes = re.findall(r'"([A-Za-z][^"]*)": (?:not |readiness|embedded)', source)
    assert len(causes) == 6
    for cause in causes:
        assert f"`{cause.partition('{')[0]}" in text, cause
