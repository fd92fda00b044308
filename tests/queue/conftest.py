"""Fixtures of the queue's tests that several files need."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from imagegen.queue import outbox as outbox_module
from tests.queue.embedded_servers import MakeProgram, Servers
from tests.support import logged


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(stack)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set a temporary folder of this test's own, with a name that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ig-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """Make a program in its own folder that prints a version and otherwise runs the shell line."""

    def make(name: str, version: str, line: str) -> Path:
        path = tmp_path / f"{name}-{version.rpartition('=')[2]}" / name
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version} sha=0" && exit 0\n{line}\n')
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    with logged("DEBUG", "{message}") as lines:
        yield lines


@pytest.fixture
def prompt_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let instances wait 0.3 s for a peer's reply about the webhooks that it delivers."""
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 0.3)
