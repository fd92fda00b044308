"""Services that the handlers share: one value, put into the application by the composition root; and their caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from aiohttp import web
from msgspec.structs import replace

from imagegen.accounts.ledger import Ledger
from imagegen.accounts.links import Links
from imagegen.channels_file import SANDBOX, Channels
from imagegen.images.store import ImageStore
from imagegen.images.thumbnails import Thumbnails
from imagegen.own_addresses import OwnAddresses
from imagegen.providers.model_rules import ModelTable
from imagegen.queue.change_relay import Feed
from imagegen.queue.client_queue import ClientQueue, Submission
from imagegen.queue.lost_calls import LostCalls
from imagegen.tasks.cost import Cost
from imagegen.tasks.family import CountReusable, RequestFamily, ReuseImages
from imagegen.tasks.request import GenerationRequest, fingerprint, request_digest
from imagegen.tasks.task import Task
from imagegen.tasks.validation import Adjust
from imagegen.tasks.webhook import Webhook
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.web.api.serializers import TaskLinks
from imagegen.web.http.forwarded import TrustedHops, base_url, path_prefix
from imagegen.web.input_images import InputImages
from imagegen.web.openai.client_calls import ClientCalls

MAX_SUBMISSIONS, MAX_BODY_BYTES = 1_000, 1_000

MAX_BYTES = 4 * 2**20
_ENTRY_BYTES = 500
"""Memory of one entry without its body."""


Owner = tuple[str, str, str | None]
"""Of a submission: name of the API key that sends it, and the scope of its task."""


class SubmissionCache:
    """Cache of up to `MAX_SUBMISSIONS` submissions by their owner and the client's body of up to `MAX_BODY_BYTES`.

    Each has the units of its request. Without the owner, a client's body would lead to the task of another client that
    has its own.
    """

    def __init__(self) -> None:
        self._submissions: OrderedDict[tuple[Owner, bytes], tuple[Submission, int]] = OrderedDict()

    def get(self, owner: Owner, raw: bytes) -> tuple[Submission, int] | None:
        return self._submissions.get((owner, raw))

    def put(self, owner: Owner, raw: bytes, submission: Submission, units: int) -> None:
        if len(raw) <= MAX_BODY_BYTES:
            self._submissions[owner, raw] = submission, units
            if len(self._submissions) > MAX_SUBMISSIONS:
                self._submissions.popitem(last=False)


class ResponseKey(NamedTuple):
    """Key of a response of one task.

    kind: name of the route's response. base: of its links. viewer: what else of the client it depends on.
    """

    kind: str
    task_id: str
    base: str
    language: str
    viewer: str = ""


class ResponseCache:
    """Cache of rendered responses for finished tasks, up to `MAX_BYTES`, least recently used first out.

    A task never changes, another object takes its place: so a body holds for the very object that it was made of.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[ResponseKey, tuple[Task, bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, key: ResponseKey, task: Task) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None or entry[0] is not task:
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def put(self, key: ResponseKey, task: Task, body: bytes) -> None:
        """Cache the body of a finished task; not one made by orjson, which would keep 4 KiB alive."""
        self._forget(self._entries.pop(key, None))
        self._entries[key] = task, body
        self._bytes += _size(task, body)
        while self._bytes > MAX_BYTES:
            self._forget(self._entries.popitem(last=False)[1])

    def _forget(self, entry: tuple[Task, bytes] | None) -> None:
        if entry is not None:
            self._bytes -= _size(*entry)


def _size(task: Task, body: bytes) -> int:
    """Return the bytes of an entry: it keeps its task alive too."""
    return _ENTRY_BYTES + len(task.request_json) + len(body)


ListModels = Callable[[], Awaitable[tuple[Mapping[str, object], ...]]]
"""Requests the provider's models, each with at least `id`. Raises UpstreamError."""


async def _no_models() -> tuple[Mapping[str, object], ...]:
    return ()


def _unchanged(request: GenerationRequest) -> GenerationRequest:
    return request


def _unknown_cost(_request: GenerationRequest, _most: int | None = None) -> Cost:
    return Cost()


@dataclass(frozen=True, slots=True)
class TaskIdentity:
    """How a request becomes a task id. secret: see fingerprint.

    provider: of the default model. provider_of: returns that of a model, as its canonical form has it; None if all
    models have the same one.

    adjust: fits a request to its model, see validation.parse; None if no model's limits are checked.
    sent_request: returns the part of a request that the provider is sent, which alone decides the id.
    estimate: returns what all images of a request cost, by the channels that a limit in micro-dollars allows.
    """

    provider: str
    default_model: str
    aliases: Mapping[str, str]
    secret: str | None
    adjust: Adjust | None = None
    sent_request: Callable[[GenerationRequest], GenerationRequest] = _unchanged
    estimate: Callable[[GenerationRequest, int | None], Cost] = _unknown_cost
    provider_of: Callable[[str], str] | None = None

    def submission(
        self, request: GenerationRequest, scope: str | None, webhooks: tuple[Webhook, ...] = (), client: str = ""
    ) -> Submission:
        """Return the submission for a request.

        scope: name of the key that owns the task, None if tasks are shared. client: name of the key that submits it.
        """
        sent = self.sent_request(request)
        provider = self.provider if self.provider_of is None else self.provider_of(request.model)
        canonical = sent.canonical(provider, scope)
        task_id = fingerprint(canonical, self.secret)
        family = RequestFamily(sent, provider, scope, self.secret)
        digest, stored, cost = request_digest(canonical), request.to_json(), self.estimate(request, None)
        is_sandbox = provider == SANDBOX
        return Submission(task_id, digest, request.model, stored, webhooks, family, client, scope, cost, is_sandbox)

    def resubmission(self, task: Task, webhooks: tuple[Webhook, ...]) -> Submission:
        """Return the submission for the request of a task; under other settings than now it belongs to no family."""
        submission = self.submission(GenerationRequest.from_json(task.request_json), task.scope, webhooks, task.client)
        if submission.task_id == task.id:
            return submission
        return replace(submission, task_id=task.id, digest=task.digest, request_json=task.request_json, family=None)


class Readiness:
    """Whether this instance should get traffic.

    causes: set by the app; returns why it should not, in words without secrets, nothing if it should.
    is_paused: returns whether claiming is paused; submits are accepted then.
    """

    def __init__(
        self, causes: Callable[[], Awaitable[list[str]]], is_paused: Callable[[], bool] = lambda: False
    ) -> None:
        self.causes = causes
        self.is_paused = is_paused
        self.draining = False


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """How `/v1` answers: the settings that begin with V1.

    reuse: `always` if equal calls are one task. max_wait_s: how long a client that never repeats is held.
    keepalive: it is sent spaces meanwhile. response_format: form of the images if the client names none.
    """

    reuse: str = "retries"
    max_wait_s: float = 300.0
    keepalive: bool = False
    response_format: str | None = None


@dataclass(frozen=True, slots=True)
class Services:
    """max_attempts: shown in views. trusted_hops, public_url: see `forwarded.base_url`.

    models: published rows of models. channels: which serve them.
    list_models: requests those that the provider offers. fallbacks: models that
    are called if another is not available.
    reuse_images, count_reusable: of tasks that differ only in `n`.
    private_webhooks: webhooks may be anywhere, and plain http. signing: of those without a secret of their own.
    own: where we listen. shares_tasks: equal requests of all API keys are one task.
    """

    queue: ClientQueue
    lost_calls: LostCalls
    ledger: Ledger
    feed: Feed
    store: ImageStore
    inputs: InputImages
    thumbnails: Thumbnails
    identity: TaskIdentity
    links: Links
    readiness: Readiness
    public_url: str | None
    trusted_hops: TrustedHops
    max_attempts: int
    models: ModelTable
    channels: Channels
    list_models: ListModels = _no_models
    fallbacks: tuple[str, ...] = ()
    reuse_images: ReuseImages | None = None
    count_reusable: CountReusable | None = None
    private_webhooks: bool = False
    shares_tasks: bool = False
    signing: OperatorSecret = field(default_factory=OperatorSecret)
    openai: OpenAIOptions = field(default_factory=OpenAIOptions)
    calls: ClientCalls = field(default_factory=ClientCalls)
    own: OwnAddresses = field(default_factory=OwnAddresses)
    submission_cache: SubmissionCache = field(default_factory=SubmissionCache)
    response_cache: ResponseCache = field(default_factory=ResponseCache)

    def with_notices(self, task: Task) -> Task:
        """Return the task with a warning if its model ends soon or has ended."""
        return self.models.with_notices(task, self.queue.clock())

    def base_url(self, request: web.Request) -> str:
        return base_url(request, self.public_url, self.trusted_hops)

    def task_links(self, request: web.Request) -> TaskLinks:
        """Return the links of tasks for a client."""
        return TaskLinks(self.base_url(request), self.links)

    def local_url(self, request: web.Request, path: str) -> str:
        """Return the link to one of our paths without scheme and host (for `Location`)."""
        return path_prefix(request, self.public_url, self.trusted_hops) + path


SERVICES = web.AppKey("context", Services)
