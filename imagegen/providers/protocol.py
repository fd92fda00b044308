"""Interface of every provider: one paid call in, images or one `UpstreamError` out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct
from yarl import URL

from imagegen.tasks.image import GivenImage
from imagegen.tasks.request import GenerationRequest


class Call(Struct, frozen=True):
    """One call to a provider, for a part of a task.

    count: images of this call, 1 to the provider's `max_images_per_call`.
    first_index: the place in the task of the call's first image.
    seed: the seed to send, None where the client gave none (`request.seed` is not to be sent itself).
    without: parameters (snake_case, as on Together's wire) to leave out because the model refused them.
    """

    request: GenerationRequest
    count: int
    first_index: int = 0
    seed: int | None = None
    without: frozenset[str] = frozenset()


class UpstreamLimits(Struct, frozen=True):
    """The upstream's rate limit by its response headers; None if absent.

    limit_per_s: calls a second; remaining: calls left in the window; reset_s: seconds until the window ends.
    """

    limit_per_s: float | None = None
    remaining: float | None = None
    reset_s: float | None = None


class Reply(Struct, frozen=True):
    """The result of one call. `images` may hold fewer than requested, or none."""

    images: tuple[GivenImage, ...]
    limits: UpstreamLimits = UpstreamLimits()
    warnings: tuple[str, ...] = ()


class CallObserver(Protocol):
    """Observer of the events of a call."""

    def sent(self) -> None:
        """The request is on the wire (its headers and body were written)."""

    def progress(self, fraction: float) -> None:
        """Report the part of the call's work that is done, 0 to 1."""


class Provider(Protocol):
    """An image service.

    name: part of a task's fingerprint (`together`, `sandbox`, `openai`, `a1111`).
    max_images_per_call: images of one call at most.
    own_hosts: `host` or `host:port` of image links that may be fetched from addresses that are not public.
    base_url: against which relative image links are resolved; None if there are none.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_images_per_call(self) -> int: ...

    @property
    def own_hosts(self) -> frozenset[str]: ...

    @property
    def base_url(self) -> URL | None: ...

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        """Makes one call. Raises UpstreamError; a cancellation drops the connection at once."""
        ...

    async def models(self) -> tuple[Mapping[str, object], ...]:
        """The models it offers, each with at least `id`; empty if it has no list."""
        ...

    async def close(self) -> None: ...
