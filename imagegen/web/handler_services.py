"""Services that the handlers share: one value, put into the application by the composition root."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from msgspec import Struct, field

from imagegen.accounts.ledger import Ledger
from imagegen.accounts.links import Links
from imagegen.channels_file import Channels
from imagegen.images.store import ImageStore
from imagegen.images.thumbnails import Thumbnails
from imagegen.own_addresses import OwnAddresses
from imagegen.providers.model_rules import ModelTable
from imagegen.queue.client_queue import ClientQueue
from imagegen.queue.feed import Feed
from imagegen.queue.lost_calls import LostCalls
from imagegen.queue.open_calls import OpenCalls
from imagegen.tasks.family import CountReusable, ReuseImages
from imagegen.tasks.submission import TaskIdentity
from imagegen.tasks.task import Task
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.web.http.forwarded import LinkBase
from imagegen.web.input_images import InputImages
from imagegen.web.openai.client_calls import ClientCalls
from imagegen.web.response_cache import ResponseCache

ListModels = Callable[[], Awaitable[tuple[Mapping[str, object], ...]]]
"""Requests the provider's models, each with at least `id`. Raises UpstreamError."""


class Readiness:
    """Readiness of this instance for traffic.

    causes: set by the app; returns why it should not, in words without secrets, nothing if it should.
    is_paused: returns whether claiming is paused; submits are accepted then.
    """

    def __init__(self, causes: Callable[[], Awaitable[list[str]]], is_paused: Callable[[], bool]) -> None:
        self.causes = causes
        self.is_paused = is_paused
        self.draining = False


class OpenAIOptions(Struct, frozen=True):
    """Options of `/v1`: the settings that begin with V1.

    reuse: `always` if equal calls are one task. max_wait_s: how long a client that never repeats is held.
    keepalive: it is sent spaces meanwhile. response_format: form of the images if the client names none.
    """

    reuse: str
    max_wait_s: float
    keepalive: bool
    response_format: str | None


class Services(Struct, frozen=True):
    """Services of the handlers.

    max_attempts: shown in views. models: published rows of models. channels: which serve them.
    list_models: requests those that the provider offers. fallbacks: models that are called if another is not available.
    reuse_images, count_reusable: of tasks that differ only in `n`.
    private_webhooks: webhooks may be anywhere, and plain http. signing: of those without a secret of their own.
    own: where we listen. shares_tasks: equal requests of all API keys are one task.
    """

    queue: ClientQueue
    lost_calls: LostCalls
    open_calls: OpenCalls
    ledger: Ledger
    feed: Feed
    store: ImageStore
    inputs: InputImages
    thumbnails: Thumbnails
    identity: TaskIdentity
    links: Links
    readiness: Readiness
    link_base: LinkBase
    max_attempts: int
    models: ModelTable
    channels: Channels
    list_models: ListModels
    fallbacks: tuple[str, ...]
    reuse_images: ReuseImages
    count_reusable: CountReusable
    private_webhooks: bool
    shares_tasks: bool
    signing: OperatorSecret
    openai: OpenAIOptions
    own: OwnAddresses
    calls: ClientCalls = field(default_factory=ClientCalls)
    response_cache: ResponseCache = field(default_factory=ResponseCache)

    def serves_here(self, model: str) -> bool:
        """Return whether a channel of this instance serves a model, or a fallback for it."""
        return any(map(self.channels.serving, (model, *self.fallbacks)))

    def with_notices(self, task: Task) -> Task:
        """Return the task with a warning if its model ends soon or has ended."""
        return self.models.with_notices(task, self.queue.clock())


SERVICES = web.AppKey("services", Services)
