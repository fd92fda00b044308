"""Tests of the layers, and of which modules use the environment, Redis, the HTTP client and the rate limiter."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest

pytestmark = pytest.mark.usefixtures("no_garbage_collections")

PACKAGE = Path(__file__).resolve().parent.parent / "imagegen"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # a package imports only from layers below its own
    {
        "backoff",
        "client",
        "decoding_limits",
        "did_you_mean",
        "disk_patience",
        "errors",
        "formats",
        "line_limit",
        "log_stream",
        "metrics",
        "port_protocols",
        "resolver",
        "setting_parsers",
        "standard_streams",
        "timer_line",
    },
    {"body_receiver", "byte_budget", "response_filter", "proxies", "redis_client", "secret_files", "turn_queue"},
    {"channels_file", "settings_file"},
    {"settings", "log", "ssrf", "supervisor", "tasks"},
    {"health_check", "providers", "images", "queue", "ratelimit", "own_addresses"},
    {"accounts", "history"},
    {"web", "worker"},
    {"account_parts", "board_parts", "channel_parts", "chosen_parts", "lifecycle", "memory_tuning", "start_checks"},
    {"doctor_probes"},
    {"command_redis", "doctor"},
    {"key_command", "usage_command"},
    {"app"},
    {"process"},
    {"generate_progress", "local_service", "output_files"},
    {"generate_command", "mcp_command"},
    {"cli"},
    {"__main__"},
]
HTTP_CLIENT = {"BaseConnector", "TCPConnector", "UnixConnector", "client", "connector", "request"}
IMPURE = {"aiohttp", "asyncio", "loguru", "os", "pathlib", "random", "redis", "secrets", "socket", "threading", "time"}


def package_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Return the dotted names that a file imports, and those it reads from a module (`os.environ`)."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = ".".join(["imagegen", *path.relative_to(PACKAGE).parts][: -node.level]) if node.level else ""
                yield from (".".join(filter(None, [base, node.module, alias.name])) for alias in node.names)
            case ast.Attribute(value=ast.Name(id=base), attr=name):
                yield f"{base}.{name}"


def users(*wanted: str) -> set[str]:
    """Return the files, without suffix, that import one of these names or a submodule."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in FILES
        for name in imports(path)
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in wanted)
    }


def package_names(files: set[str]) -> set[str]:
    return {file.split("/")[0] for file in files}


def test_imports_go_down_the_layers() -> None:
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    assert len(FILES) > 200
    for path in FILES:
        own = package_name(path)
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("imagegen.") else own
            if other in {own, "__version__"}:
                continue
            assert own not in {"client", "emulator", "__init__"}, f"{own} imports nothing of ours, but {name}"
            assert other in layer_of, f"{path}: {name} is in no layer"
            assert layer_of[other] < layer_of[own], f"{path} imports {name}"


def test_only_settings_reads_the_environment() -> None:
    assert users("os.environ", "os.environb", "os.getenv") <= {"settings"}
    assert users("dotenv") <= {"settings_file"}


def test_only_redis_client_imports_redis() -> None:
    assert package_names(users("redis")) == {"redis_client"}


def test_only_modules_with_outbound_calls_use_the_http_client() -> None:
    allowed = {
        "app",
        "channel_parts",
        "chosen_parts",
        "doctor_probes",
        "mcp_command",
        "ssrf",
        "body_receiver",
        "response_filter",
        "proxies",
        "providers",
        "images",
        "worker/webhooks",
    }
    names = {name for path in FILES for name in imports(path) if name.startswith("aiohttp.")}
    client = {name for name in names if (part := name.split(".")[1]).startswith("Client") or part in HTTP_CLIENT}
    assert {file for file in users(*client) if file not in allowed and file.split("/")[0] not in allowed} == set()


def test_one_file_imports_the_rate_limiter() -> None:
    assert len(users("aiohttplimiter")) <= 1


def test_tasks_are_pure() -> None:
    assert {file for file in users(*IMPURE) if file.startswith("tasks/")} == set()


def test_one_module_reads_the_task_id_of_a_path() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if re.search(r"""(?:match_info|info)(?:\[|\.get\()["']task_id""", path.read_text(encoding="utf-8"))
    }
    assert readers == {"web/lookup.py"}, "a handler finds the task of its client by web/lookup.py"


def test_no_file_of_tests_imports_another() -> None:
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    assert len(files) > 200
    found = {(path.name, name) for path in files for name in imports(path) if re.match(r"tests\.(\w+\.)*test_", name)}
    assert not found


def test_no_script_makes_the_name_of_a_key_itself() -> None:
    """Servers such as Dragonfly refuse a key that is not among KEYS."""
    scripts = sorted(PACKAGE.rglob("*.lua"))
    assert len(scripts) > 20
    assert not [script.name for script in scripts if re.search(r"(?m)^[^-\n]*KEYS\[[^]]*\] \.\.", script.read_text())]


def test_no_record_has_the_placeholder_of_another_kind_of_record_as_a_default() -> None:
    for path in FILES:
        if path.name != "__main__.py":
            importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    records = list(subclasses(msgspec.Struct))
    assert len(records) > 200
    assert not [
        each for each in records if any(isinstance(made, dataclasses.Field) for made in each.__struct_defaults__)
    ]


def subclasses(kind: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)
