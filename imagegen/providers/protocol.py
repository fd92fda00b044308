"""Interface of every provider: one paid call in, images or one `UpstreamError` out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.tasks.image import GivenImage
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import MAX_IMAGES, GenerationRequest


class InputImage(Struct, frozen=True):
    """Bytes of an image that a request starts from; each call of `read` yields all of them, in pieces."""

    content_type: str
    size_bytes: int
    read: Callable[[], AsyncGenerator[bytes, None]]

    async def read_all(self) -> bytes:
        """Return the bytes in one piece."""
        return b"".join([piece async for piece in self.read()])


class Edits(Struct, frozen=True):
    """Input images that a provider takes for a model.

    max_images: of one request, without the mask. mask: whether it takes one. links: whether it takes http(s) addresses
    and fetches them itself.
    """

    max_images: int = MAX_IMAGES
    mask: bool = False
    links: bool = True


class Call(Struct, frozen=True):
    """One call to a provider, for a part of a task.

    count: images of this call, 1 to the provider's `max_images_per_call`.
    first_index: the place in the task of the call's first image.
    seed: the seed to send, None if the client gave none (`request.seed` is not to be sent itself).
    without: parameters (snake_case, as on Together's wire) to leave out because the model refused them.
    inputs: input images by their address or upload; those that are not here are sent as links.
    other_jobs: ids of provider jobs of the same task that other calls began.
    repeat: 0; for a task that is generated again a number that no earlier call had. Upstreams vary by themselves; the
        sandbox needs it.
    """

    request: GenerationRequest
    count: int
    first_index: int = 0
    seed: int | None = None
    without: frozenset[str] = frozenset()
    inputs: Mapping[str, InputImage] = msgspec.field(default_factory=dict)
    repeat: int = 0
    other_jobs: frozenset[str] = frozenset()

    def input(self, source: str) -> InputImage | str:
        """Return the bytes of an input image, or the link to send."""
        return self.inputs.get(source, source)

    def input_bytes(self, source: str) -> InputImage:
        """Return the bytes of an input image. Raises UpstreamError if there is only a link."""
        image = self.inputs.get(source)
        if image is None:
            raise UpstreamError("upstream_invalid_request", "this provider takes the bytes of input images only")
        return image


class UpstreamLimits(Struct, frozen=True):
    """The upstream's rate limit by its response headers; None if absent.

    remaining: calls left in the window; reset_s: seconds until the window ends.
    """

    remaining: float | None = None
    reset_s: float | None = None


class Reply(Struct, frozen=True):
    """The result of one call. `images` may hold fewer than requested, or none."""

    images: tuple[GivenImage, ...]
    limits: UpstreamLimits = UpstreamLimits()
    warnings: tuple[str, ...] = ()
    details: ReplyDetails | None = None


class CallObserver(Protocol):
    """Observer of the events of a call."""

    def sending(self) -> Awaitable[None] | None:
        """Return what is to be awaited on an open connection before the first byte of a paid call; None: nothing."""

    def sent(self) -> None:
        """Record that the request is on the wire: its headers and body were written."""

    async def accepted(self, handle: JobHandle) -> None:
        """Keep the handle of a provider job that the upstream has accepted. It returns once the handle is durable.

        The provider polls the job only after that.
        """

    async def takes(self, job: JobHandle) -> bool:
        """Return whether a job of the provider's list is this call's; False if another task has it, or may have it."""

    def progress(self, fraction: float) -> None:
        """Report the part of the call's work that is done, 0 to 1."""

    def polls_failed(self, polls: FailedPolls) -> None:
        """Report the last polls of the job in sequence if they failed, no polls after a good one; it may run on."""

    def job_unread(self) -> None:
        """Report that the state of the job has not been read for seconds: polls hang, fail, do not find it, or have an
        unknown word for its state; or that the job of a lost call has been searched for so long.
        """


class ForwardingObserver(Struct, frozen=True):
    """Observer of a call that reports every event to another one; a subclass changes some of them."""

    observer: CallObserver

    def sending(self) -> Awaitable[None] | None:
        return self.observer.sending()

    def sent(self) -> None:
        self.observer.sent()

    async def accepted(self, handle: JobHandle) -> None:
        await self.observer.accepted(handle)

    async def takes(self, job: JobHandle) -> bool:
        return await self.observer.takes(job)

    def progress(self, fraction: float) -> None:
        self.observer.progress(fraction)

    def polls_failed(self, polls: FailedPolls) -> None:
        self.observer.polls_failed(polls)

    def job_unread(self) -> None:
        self.observer.job_unread()


class Provider(Protocol):
    """An image service.

    name: part of a task's fingerprint (`together`, `sandbox`, `openai`, `fal`, …).
    max_images_per_call: images of one call at most.
    images_inline: whether responses hold the images themselves, or may do so, and not links.
    own_hosts: `host` or `host:port` of image links that may be fetched from addresses that are not public.
    base_url: against which relative image links are resolved; None if there are none.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_images_per_call(self) -> int: ...

    @property
    def images_inline(self) -> bool: ...

    @property
    def own_hosts(self) -> frozenset[str]: ...

    @property
    def base_url(self) -> URL | None: ...

    def edits(self, model: str) -> Edits | None:
        """Return the input images that it takes for this model, None if it takes none."""
        ...

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        """Make one call. Raises UpstreamError; a cancellation drops the connection at once.

        After `observer.accepted` it polls the job until it ends, as `resume` does.
        """
        ...

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll a job of an earlier call until it ends; never begin another one. It is cancelled when time is over.

        Raises UpstreamError once the job can have no image any more: it failed, or the upstream has forgotten it.
        """
        ...

    async def find(self, call: Call, sent_at: float) -> JobHandle | None:
        """Return the handle of the job that a call with a lost response began; None if it can't be identified.

        Only one exact match in a complete list of jobs counts. sent_at: Unix time before the call was sent.
        Raises UpstreamError if the list can't be read now.
        """
        ...

    async def cancel(self, handle: JobHandle) -> bool | None:
        """Request the end of a job. Return whether the upstream confirmed it; None if that is uncertain.

        False: it refused, for example because the job is over. None: it has no such request, or did not answer.
        """
        ...

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request without what a call does not carry; it is what a task's fingerprint is made of."""
        ...

    async def models(self) -> tuple[Mapping[str, object], ...]:
        """Return the models that it offers, each with at least `id`; none if it has no list."""
        ...

    async def check_key(self) -> str | None:
        """Check the key by a request that costs nothing. Raises UpstreamError if it is refused, or no answer comes.

        Return more of the answer, as ` and lists 12 models`; None if there is no such request.
        """
        ...

    async def close(self) -> None: ...


def count_of_models(models: Sequence[object]) -> str:
    """Return the words of a checked key for a list of models that was read with it."""
    return f" and lists {len(models)} models"


def forgotten_job() -> UpstreamError:
    """Return the error of a job that can't be found any more. It may have been paid, so it counts as ambiguous."""
    detail = "The provider does not find the job that it had accepted"
    return UpstreamError("upstream_error", detail, retryable=True, ambiguous=True)


def unreadable_input() -> UpstreamError:
    """Return the error of an input image with bytes that can't be read now; nothing was paid."""
    return UpstreamError("internal_error", "an input image could not be read", retryable=True)


class WithoutJobControl:
    """The part of a provider that can neither find a job without its handle nor cancel one, and leaves nothing open."""

    async def find(self, _call: Call, _sent_at: float) -> JobHandle | None:
        """Return None: there is no list of jobs."""
        return None

    async def cancel(self, _handle: JobHandle) -> bool | None:
        """Return None: there is no such request."""
        return None

    async def close(self) -> None:
        """Do nothing: the session belongs to the application."""


class WithoutJobs(WithoutJobControl):
    """The part of a provider that answers each call with images, never with a job."""

    async def resume(self, _handle: JobHandle, _observer: CallObserver) -> Reply:
        """Raise UpstreamError: the job is of another provider."""
        raise forgotten_job()
