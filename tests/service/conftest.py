"""Fixtures that run the real service, for a module or for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import KEY, RUN, Service
from tests.support import wait_for_one_day

StartService = Callable[..., Service]
"""`start(upstream.url, LEASE_SECONDS="2")`; without an upstream it is the sandbox. All share one DATA_DIR."""


def _services(folder: Path) -> Iterator[StartService]:
    with ExitStack() as stack:

        def start(
            upstream_url: str | None = None,
            *,
            ready: bool = True,
            allowed: tuple[str, ...] = (),
            home: Path = folder,
            program: Path = RUN,
            **settings: str,
        ) -> Service:
            count = len(list(home.glob("instance*")))
            keyed = {"TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream_url} if upstream_url else {}
            everything = {"DATA_DIR": str(home / "data")} | keyed | settings
            service = Service(home / f"instance{count}", everything, allowed, program)
            stack.callback(service.end)
            return service.start(ready=ready)

        yield start


@pytest.fixture(autouse=True)
def _one_day() -> None:
    """Let a test begin and end on one day."""
    wait_for_one_day(45.0)


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    """Start services for one test; end each afterwards and check its log."""
    yield from _services(tmp_path)


@pytest.fixture(scope="module")
def start_for_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Start services for a whole module; end each afterwards and check its log."""
    yield from _services(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def upstream() -> Iterator[EmulatorProcess]:
    with EmulatorProcess("--image", "png") as upstream:
        yield upstream
