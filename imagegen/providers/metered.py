"""Owns the counting of paid calls: a provider around a provider."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from imagegen.errors import UpstreamError
from imagegen.metrics import Meter
from imagegen.providers.protocol import Call, CallWatcher, Provider, Reply

OK, ABANDONED = "ok", "abandoned"
"""Codes of calls without an error: answered; dropped because the task was cancelled or the service stops."""


class MeteredProvider:
    """Does what the other does, and counts how each call ended and how long it took."""

    def __init__(self, provider: Provider, meter: Meter) -> None:
        self._provider = provider
        self._meter = meter

    @property
    def name(self) -> str:
        return self._provider.name

    @property
    def max_images_per_call(self) -> int:
        return self._provider.max_images_per_call

    @property
    def own_hosts(self) -> frozenset[str]:
        return self._provider.own_hosts

    async def generate(self, call: Call, watcher: CallWatcher) -> Reply:
        began_at, code, ambiguous = monotonic(), ABANDONED, False
        try:
            reply = await self._provider.generate(call, watcher)
            code = OK
        except UpstreamError as error:
            code, ambiguous = error.code, error.ambiguous
            raise
        finally:
            self._meter.called(code, monotonic() - began_at, ambiguous=ambiguous)
        return reply

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return await self._provider.models()

    async def close(self) -> None:
        await self._provider.close()
