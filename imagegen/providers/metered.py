"""Provider around a provider that counts the paid calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import monotonic

from loguru import logger
from yarl import URL

from imagegen.channels_file import credential_setting
from imagegen.errors import UpstreamError
from imagegen.formats import mask_quotes
from imagegen.metrics import Meter
from imagegen.providers.protocol import Call, CallObserver, Edits, Provider, Reply
from imagegen.providers.wrong_address import WrongAddress
from imagegen.tasks.provider_job import JobHandle

OK, ABANDONED = "ok", "abandoned"
"""Codes of calls without an error: answered; dropped because the task was cancelled or the service stops."""


WARN_AGAIN_S = 60.0

_REFUSALS = {
    "upstream_auth": "The provider refuses the key of {}: {}",
    "upstream_billing": "The provider's account that belongs to the key of {} has no credit: {}",
}


class MeteredProvider:
    """Provider that counts how each call of another one ended and how long it took, and warns once of a refused key.

    plain: the provider itself. on_refused: called with the error code and the setting of the key, with the warning.
    key_name: of the key for the operator; None for the setting of the provider.
    """

    def __init__(
        self,
        provider: Provider,
        meter: Meter,
        *,
        clock: Callable[[], float] = monotonic,
        on_refused: Callable[[str, str], None] = lambda _code, _setting: None,
        key_name: str | None = None,
    ) -> None:
        self.plain = provider
        self._meter = meter
        self._clock = clock
        self._on_refused = on_refused
        self._key_name = key_name
        self._warned_at: dict[str, float] = {}
        self._refusing: set[str] = set()

    @property
    def name(self) -> str:
        return self.plain.name

    @property
    def key_accepted(self) -> bool:
        """Whether no call was refused for its key or for lack of credit since one was accepted."""
        return not self._refusing

    @property
    def refusal(self) -> str | None:
        """Return the code of the refusal of the key, None while it is accepted."""
        return min(self._refusing, default=None)

    @property
    def max_images_per_call(self) -> int:
        return self.plain.max_images_per_call

    @property
    def images_inline(self) -> bool:
        return self.plain.images_inline

    @property
    def own_hosts(self) -> frozenset[str]:
        return self.plain.own_hosts

    @property
    def base_url(self) -> URL | None:
        return self.plain.base_url

    def edits(self, model: str) -> Edits | None:
        return self.plain.edits(model)

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        began_at, code, ambiguous = monotonic(), ABANDONED, False
        try:
            reply = await self.plain.generate(call, observer)
            code = OK
            if self._refusing:
                self._refusing.clear()
                logger.info("The provider accepts the key{} again", (self._key_name and f" of {self._key_name}") or "")
        except UpstreamError as error:
            code, ambiguous = error.code, error.ambiguous
            if code in _REFUSALS:
                self._warn(error, call)
            elif isinstance(error, WrongAddress):
                self._warn_of_address(error)
            raise
        finally:
            self._meter.observe_provider_call(code, monotonic() - began_at, ambiguous=ambiguous)
        return reply

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll a job. Polls are free, so they are not counted."""
        return await self.plain.resume(handle, observer)

    async def find(self, call: Call, sent_at: float) -> JobHandle | None:
        return await self.plain.find(call, sent_at)

    async def cancel(self, handle: JobHandle) -> bool | None:
        return await self.plain.cancel(handle)

    def _warn(self, error: UpstreamError, call: Call) -> None:
        """Warn the operator once until a call is accepted again, at most once a minute: one model may be refused."""
        code, now = error.code, self._clock()
        if code not in self._refusing and now - self._warned_at.get(code, -math.inf) >= WARN_AGAIN_S:
            self._refusing.add(code)
            self._warned_at[code] = now
            setting = self._key_name or credential_setting(self.name)
            detail = mask_quotes(error.upstream_detail, (call.request.prompt, call.request.negative_prompt))
            logger.warning(_REFUSALS[code], setting, detail)
            self._on_refused(code, setting)

    def _warn_of_address(self, error: WrongAddress) -> None:
        """Warn the operator at most once a minute."""
        if self._clock() - self._warned_at.get(error.code, -math.inf) >= WARN_AGAIN_S:
            self._warned_at[error.code] = self._clock()
            logger.warning(
                "The provider of {} can't be reached: {}", self._key_name or self.name, error.upstream_detail
            )

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return await self.plain.models()

    async def check_key(self) -> str | None:
        return await self.plain.check_key()

    async def close(self) -> None:
        await self.plain.close()
