"""Owns the counting of paid calls: a provider around a provider."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from loguru import logger
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.metrics import Meter
from imagegen.providers.protocol import Call, CallWatcher, Provider, Reply

OK, ABANDONED = "ok", "abandoned"
"""Codes of calls without an error: answered; dropped because the task was cancelled or the service stops."""


KEY_SETTINGS = {"together": "TOGETHER_API_KEY", "openai": "OPENAI_API_KEY", "a1111": "A1111_URL"}
"""By provider: the setting with the key, for the operator who must act."""

_REFUSALS = {
    "upstream_auth": "The provider refuses the key of {}: {}",
    "upstream_billing": "The provider's account that belongs to the key of {} has no credit: {}",
}


class MeteredProvider:
    """Does what the other does, counts how each call ended and how long it took, and warns once of a refused key."""

    def __init__(self, provider: Provider, meter: Meter) -> None:
        self._provider = provider
        self._meter = meter
        self._warned: set[str] = set()

    @property
    def name(self) -> str:
        return self._provider.name

    @property
    def max_images_per_call(self) -> int:
        return self._provider.max_images_per_call

    @property
    def own_hosts(self) -> frozenset[str]:
        return self._provider.own_hosts

    @property
    def base_url(self) -> URL | None:
        return self._provider.base_url

    async def generate(self, call: Call, watcher: CallWatcher) -> Reply:
        began_at, code, ambiguous = monotonic(), ABANDONED, False
        try:
            reply = await self._provider.generate(call, watcher)
            code = OK
            if self._warned:
                self._warned.clear()
                logger.info("The provider accepts the key again")
        except UpstreamError as error:
            code, ambiguous = error.code, error.ambiguous
            if code in _REFUSALS:
                self._warn(error)
            raise
        finally:
            self._meter.called(code, monotonic() - began_at, ambiguous=ambiguous)
        return reply

    def _warn(self, error: UpstreamError) -> None:
        """One line for the operator, until the provider accepts a call again."""
        if error.code not in self._warned:
            self._warned.add(error.code)
            setting = KEY_SETTINGS.get(self.name, self.name)
            logger.warning(_REFUSALS[error.code], setting, error.upstream_detail)

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return await self._provider.models()

    async def close(self) -> None:
        await self._provider.close()
