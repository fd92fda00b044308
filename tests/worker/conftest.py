"""Scripted provider, image saver in memory, and pools with both on the real queue."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Generic

import pytest
from typing_extensions import TypeVar

from imagegen.channels_file import Channel, Channels
from imagegen.errors import UpstreamError
from imagegen.images.store import Describe, VerifiedImage
from imagegen.images.store_health import StoreHealth
from imagegen.metrics import Meter
from imagegen.providers.metered import MeteredProvider
from imagegen.providers.model_rules import ModelTable, Pricing
from imagegen.providers.protocol import Call, CallObserver, Edits, Provider, Reply, WithoutJobs
from imagegen.queue import outbox as outbox_module
from imagegen.queue.claim import Claim
from imagegen.tasks.image import GivenImage, ImageBytes, ImageLink, PaidImage, StoredImage
from imagegen.tasks.request import GenerationRequest, fingerprint, request_digest
from imagegen.tasks.retry import Outcome, RetryPolicy
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task, TaskError
from imagegen.tasks.validation import parse as parse_fields
from imagegen.tasks.webhook_signing import OperatorSecret
from imagegen.worker.attempt import AttemptRunner
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.circuit_breaker import BreakerConfig
from imagegen.worker.dead_models import DeadModels
from imagegen.worker.pacing import Pacing
from imagegen.worker.payments import PaymentRules
from imagegen.worker.pool import Pool
from imagegen.worker.unserved import OtherInstances
from imagegen.worker.webhooks import WebhookDispatcher, WebhookSender, webhook_session
from tests.conftest import Instance, MakeInstance
from tests.support import LoopTime
from tests.worker.webhook_service import SECRET, Receiver, StartWebhookInstance, WebhookInstance, body_of, receiving

TEMPO = BreakerConfig(probe_s=0.1, longest_s=0.4, step_s=0.02)

Step = Reply | Exception | Callable[[Call], Awaitable[Reply]]


def images(count: int = 1, **changes: Any) -> Reply:
    return Reply(tuple(ImageBytes(b"picture") for _ in range(count)), **changes)


def links(count: int = 1, host: str = "images.example.com", **changes: Any) -> Reply:
    return Reply(tuple(ImageLink(f"https://{host}/{number}") for number in range(count)), **changes)


def fault(status: int, **changes: Any) -> UpstreamError:
    """Return the error that a provider raises for an upstream's status."""
    code = {429: "upstream_rate_limited", 503: "upstream_overloaded"}.get(status, "upstream_error")
    return UpstreamError(code, f"HTTP {status}", retryable=True, status=status, **changes)


def refused() -> UpstreamError:
    return UpstreamError("upstream_error", "no connection", retryable=True)


def loss() -> UpstreamError:
    return UpstreamError("upstream_timeout", "no answer", retryable=True, ambiguous=True)


def no_model(name: str = "") -> UpstreamError:
    return UpstreamError("model_not_available", f"Unable to access model {name}", status=404)


@dataclass
class ScriptedProvider(WithoutJobs):
    """Provider that plays `steps` in order, then `default`, and records every call."""

    steps: list[Step] = field(default_factory=list)
    default: Step | None = None
    name: str = "scripted"
    max_images_per_call: int = 4
    images_inline: bool = True
    own_hosts: frozenset[str] = frozenset()
    base_url: None = None
    editable: Edits | None = field(default_factory=Edits)
    calls: list[Call] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        self.calls.append(call)
        self.times.append(asyncio.get_running_loop().time())
        step = self.steps.pop(0) if self.steps else self.default
        self.running += 1
        self.most = max(self.most, self.running)
        watcher.sent()
        try:
            if step is None:
                return images(call.count)
            if isinstance(step, Exception):
                raise step
            return step if isinstance(step, Reply) else await step(call)
        finally:
            self.running -= 1

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def edits(self, model: str) -> Edits | None:
        return self.editable

    async def models(self) -> tuple[Mapping[str, object], ...]:
        return ()

    async def check_key(self) -> str | None:
        return None

    async def close(self) -> None:
        """Do nothing."""

    @property
    def seeds(self) -> list[int | None]:
        return [call.seed for call in self.calls]

    @property
    def models_called(self) -> list[str]:
        return [call.request.model for call in self.calls]


@dataclass
class MemoryImageSaver:
    """Image saver that stores nothing; raises `faults` in fetches and `store_faults` in saves first."""

    faults: list[Exception | None] = field(default_factory=list)
    store_faults: list[Exception | None] = field(default_factory=list)
    fetched: list[GivenImage] = field(default_factory=list)
    described: list[tuple[str, str]] = field(default_factory=list)
    found: list[StoredImage] = field(default_factory=list)
    held: int = 0
    health: StoreHealth = field(default_factory=lambda: StoreHealth("memory"))

    @property
    def writable(self) -> bool:
        return self.health.writable

    async def wait_writable(self, within_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.health.wait_writable(), within_s)

    def passthrough(self, _index: int, _image: GivenImage, _seed: int | None) -> StoredImage | None:
        """Return None, so that all images go through `fetch` and `save`."""
        return None

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        assert age_s >= 0
        self.fetched.append(image)
        if self.faults and (error := self.faults.pop(0)):
            raise error
        self.held += 1
        return VerifiedImage("image/png", 10, 8, 8, "a" * 64, b"a picture!")

    async def save(
        self, _task_id: str, index: int, image: VerifiedImage, seed: int | None, describe: Describe
    ) -> StoredImage:
        self.described.append(describe(image, seed))
        if self.store_faults and (error := self.store_faults.pop(0)):
            raise error
        return image.stored_at(index, seed=seed)

    async def find(self, _task_id: str, since_s: float) -> list[StoredImage]:
        assert since_s > 0
        return self.found

    def discard(self, _image: VerifiedImage) -> None:
        self.held -= 1

    async def extend_expiry(self, _task_id: str, _images: Sequence[StoredImage]) -> None:
        """Do nothing."""


def urls(given: Iterable[GivenImage | PaidImage]) -> list[str]:
    """Return the links of images that came as links."""
    return [image.url for image in given if isinstance(image, ImageLink | PaidImage)]


def failure(task: Task) -> TaskError:
    """Return the error of a task that has failed."""
    assert task.error is not None
    return task.error


UNPRICED = Pricing(ModelTable((), "scripted", date(2026, 1, 1)))


def metered(provider: Provider | None = None) -> MeteredProvider:
    """Return a provider as routes have it; by default one that returns images."""
    return MeteredProvider(provider or ScriptedProvider(), Meter())


def only_route(provider: Provider, pricing: Pricing = UNPRICED) -> Route:
    """Return the route of a provider that is the only one."""
    return Route(Channel("scripted", "scripted"), "", metered(provider), pricing)


def submission(prompt: object = "a", **fields: object) -> Submission:
    request = parse_fields({"prompt": str(prompt), **fields}, default_model="m", aliases={})
    canonical = request.canonical("scripted", None)
    return Submission(fingerprint(canonical, None), request_digest(canonical), request.model, request.to_json())


AnyProvider = TypeVar("AnyProvider", bound=ScriptedProvider, default=ScriptedProvider)
AnyOutcome = TypeVar("AnyOutcome", bound=Outcome)


class WorkerHarness(Generic[AnyProvider]):
    """One instance with its provider, image saver and pool."""

    def __init__(self, instance: Instance, provider: AnyProvider, **rules: Any) -> None:
        policy = RetryPolicy(rules.pop("max_attempts", 3), rules.pop("base_s", 0.02))
        self.instance, self.provider, self.image_saver = instance, provider, MemoryImageSaver()
        self.route = only_route(provider, rules.pop("pricing", UNPRICED))
        self._ahead_s, self._jumped_s, self._loop_time = 0.0, 0.0, LoopTime()
        self.pacing = Pacing(
            self.route,
            rate_per_min=rules.pop("rate_per_min", None),
            breaker_config=rules.pop("tempo", TEMPO),
            clock=lambda: time.monotonic() + self._ahead_s,
            wall=self.wall,
            most_hung=rules.pop("most_hung", math.inf),
        )
        self.attempts = AttemptRunner(
            instance.worker_queue,
            Routes(Channels([self.route.channel]), [self.route]),
            self.image_saver,
            AttemptLimits(
                policy,
                rules.pop("deadline_s", 600.0),
                rules.pop("fallback_models", ()),
                rules.pop("job_wait_s", 600.0),
                after_jumps=lambda unix_s: unix_s + self._jumped_s,
            ),
            self.pacing,
            PaymentRules(rules.pop("limits_of_slots", lambda _slots: ())),
            inputs=rules.pop("inputs", None),
            clock=self.wall,
            dead=DeadModels(self.pacing, OtherInstances(lambda: instance.notifier.alone)),
        )
        self.pool = Pool(
            instance.worker_queue,
            self.attempts,
            self.pacing,
            result_ttl_s=60.0,
            clock=self.wall,
        )
        self.pacing.on_release = self.pool.parking.wake
        assert not rules

    def wall(self) -> float:
        """Return the Unix time of this harness."""
        return time.time() + self._ahead_s

    def jump(self, seconds: float) -> None:
        """Let the server's clock jump ahead; all tasks were submitted before."""
        self._ahead_s += seconds
        self._jumped_s += seconds

    async def pass_time(self, seconds: float) -> None:
        """Let seconds pass at once for attempts, permits and the event loop, fewer than a call of Redis may take."""
        self._ahead_s += seconds
        await self._loop_time.move(seconds)

    async def drain(self, within_s: float) -> None:
        """Drain the pool as a shutdown of the service does."""
        self.pool.quiet()
        await self.pool.wait_idle(within_s)
        await self.pool.stop()

    async def submit(self, prompt: object = "a", **fields: object) -> str:
        return (await self.instance.client_queue.submit(submission(prompt, **fields))).task.id

    async def claim(self, prompt: object = "a", **fields: object) -> Claim:
        """Submit a task and claim it without the pool."""
        await self.submit(prompt, **fields)
        return await self.instance.claim()

    async def run(self, claim: Claim, kind: type[AnyOutcome]) -> AnyOutcome:
        """Run an attempt without the pool; return its outcome, which is of a kind."""
        outcome = await self.attempts.run(claim)
        assert isinstance(outcome, kind), outcome
        return outcome

    def task(self, task_id: str) -> Task:
        """Return the task from the cache of this instance."""
        cache = self.instance.task_cache
        task = cache.live.get(task_id) or cache.finished(task_id)
        assert task is not None
        return task

    async def finished(self, *task_ids: str, within_s: float = 30.0) -> list[Task]:
        deadline = time.monotonic() + within_s
        while not all(self.task(task_id).state.is_final for task_id in task_ids):
            assert time.monotonic() < deadline, [self.task(i) for i in task_ids][:3]
            await asyncio.sleep(0.005)
        return [self.task(task_id) for task_id in task_ids]


MakeHarness = Callable[..., WorkerHarness]


@pytest.fixture
async def make_harness(make_instance: MakeInstance) -> AsyncIterator[MakeHarness]:
    """`make_harness(*steps, default=…, pool=True, slots=…, **rules)`: a running pool by default."""
    made: list[WorkerHarness] = []

    def make(
        *steps: Step, default: Step | None = None, per_call: int = 4, pool: bool = True, slots: int = 5, **rules: Any
    ) -> WorkerHarness:
        provider = ScriptedProvider(list(steps), default, max_images_per_call=per_call)
        harness = WorkerHarness(make_instance(slots=slots), provider, **rules)
        if pool:
            harness.pool.start()
        made.append(harness)
        return harness

    yield make
    for harness in made:
        await harness.drain(0.0)


@pytest.fixture
def prompt_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let instances wait 0.05 s for a peer's reply about the webhooks that it delivers."""
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 0.05)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return a running receiver of webhooks."""
    async with receiving(Receiver()) as receiver:
        yield receiver


@pytest.fixture
async def start(make_instance: MakeInstance) -> AsyncIterator[StartWebhookInstance]:
    """`await start(secret=…, delays_s=…, delivers=…)`: an instance that delivers webhooks."""
    async with AsyncExitStack() as stack:

        async def start(
            *,
            secret: str | None = SECRET,
            delays_s: tuple[float, ...] = (0.05,) * 5,
            timeout_s: float = 20.0,
            delivers: bool = True,
            clock: Callable[[], float] = time.time,
            **rules: Any,
        ) -> WebhookInstance:
            session = await stack.enter_async_context(webhook_session(private=True))
            instance = make_instance(**rules)
            sender = WebhookSender(session, body_of, OperatorSecret(secret), allow_private=True, timeout_s=timeout_s)
            deliveries = WebhookDispatcher(instance.parts.outbox, sender, delays_s=delays_s, clock=clock)
            service = WebhookInstance(instance, deliveries, delivers=delivers)
            stack.push_async_callback(service.crash)
            return service

        yield start
