"""Emulated providers with jobs for tests, and an observer that records what a call reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from imagegen.emulator.job_emulator import JobEmulator, JobOptions
from imagegen.errors import UpstreamError
from imagegen.providers import job_polling
from imagegen.providers.job_api import JobApiProvider
from imagegen.providers.protocol import Call, Provider, Reply
from imagegen.tasks.provider_job import FailedPolls, JobHandle

E = TypeVar("E", bound=JobEmulator)


@asynccontextmanager
async def emulated(kind: type[E], **options: Any) -> AsyncIterator[E]:
    """Yield an emulator in this event loop, on a free loopback port; `options` are those of JobOptions."""
    emulator = kind(JobOptions(**{"image": "tiny", **options}))
    await emulator.start()
    try:
        yield emulator
    finally:
        await emulator.stop()


def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let polls follow each other at once."""
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "MAX_FAULT_DELAY_S", "MAX_RETRY_AFTER_S"):
        monkeypatch.setattr(job_polling, name, 0.02)
    monkeypatch.setattr(job_polling, "MIN_USELESS_S", 0.0)


@dataclass
class Recorder:
    """A call's observer. note: called when a job is accepted, before its first poll; noted: what it returned.

    on_wire: set once the request is sent.
    """

    note: Callable[[], object] = lambda: None
    handles: list[JobHandle] = field(default_factory=list)
    noted: list[object] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)
    failed: list[FailedPolls] = field(default_factory=list)
    sent_count: int = 0
    unread_count: int = 0
    on_wire: asyncio.Event = field(default_factory=asyncio.Event)

    def sending(self) -> None:
        return

    def sent(self) -> None:
        self.sent_count += 1
        self.on_wire.set()

    async def takes(self, _job: JobHandle) -> bool:
        return True

    async def accepted(self, handle: JobHandle) -> None:
        self.handles.append(handle)
        self.noted.append(self.note())

    def progress(self, fraction: float) -> None:
        self.parts.append(fraction)

    def polls_failed(self, polls: FailedPolls) -> None:
        self.failed.append(polls)

    def job_unread(self) -> None:
        self.unread_count += 1


async def made(
    provider: Provider, call: Call, note: Callable[[], object] = lambda: None
) -> tuple[Recorder, Reply | UpstreamError]:
    """Make a call; return its observer, and its reply or error."""
    observer = Recorder(note)
    try:
        return observer, await provider.generate(call, observer)
    except UpstreamError as error:
        return observer, error


async def replied(provider: Provider, call: Call, note: Callable[[], object] = lambda: None) -> tuple[Recorder, Reply]:
    """Make a call that succeeds; return its observer and its reply."""
    observer, result = await made(provider, call, note)
    assert isinstance(result, Reply), result
    return observer, result


async def failed(provider: Provider, call: Call) -> tuple[Recorder, UpstreamError]:
    """Make a call that fails; return its observer and its error."""
    observer, result = await made(provider, call)
    assert isinstance(result, UpstreamError), result
    return observer, result


class _Stopped(Exception):
    """The process ends."""


async def begun_only(provider: JobApiProvider, call: Call) -> JobHandle:
    """Begin a job and stop before its first poll, as a process that dies does."""

    def stop() -> None:
        raise _Stopped

    observer = Recorder(stop)
    with pytest.raises(_Stopped):
        await provider.generate(call, observer)
    return observer.handles[0]
