"""Input images of an attempt: found, and where the provider needs bytes fetched, before its first paid call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import closing
from functools import partial
from io import FileIO

from msgspec import Struct, field

from imagegen.errors import DownloadFailed, ImageRejected, QueueUnavailable, StoreUnavailable, UpstreamError
from imagegen.images.fetch import ImageFetcher
from imagegen.images.spool import Spool
from imagegen.images.store import OpenedImage, VerifiedImage, in_file_thread
from imagegen.images.uploads import Uploads
from imagegen.providers.protocol import Edits, InputImage, unreadable_input
from imagegen.queue.claim import Claim
from imagegen.ssrf import blocked_cause
from imagegen.tasks.image import ImageLink
from imagegen.tasks.request import UPLOAD_PREFIX, GenerationRequest
from imagegen.worker.input_fetches import InputFetches

FETCH_TIMEOUT_S = 60.0
"""For all links of a task together."""

UNAVAILABLE_RETRY_S = 5.0
"""Until the inputs are opened again if Redis or the store did not answer."""


class InputOpener(Struct, frozen=True):
    """Parts that the input images of all attempts need. spool: holds what `fetcher` returns."""

    uploads: Uploads
    fetcher: ImageFetcher
    spool: Spool
    fetches: InputFetches = field(default_factory=InputFetches)


class AttemptInputs:
    """Input images of one attempt; close it after use."""

    def __init__(self, opener: InputOpener, request: GenerationRequest, claim: Claim) -> None:
        self._opener = opener
        self._claim = claim
        self._sources = request.image_sources
        self._opened: dict[str, InputImage] = {}
        self._fetched: list[VerifiedImage] = []

    async def open(self, edits: Edits | None) -> Mapping[str, InputImage]:
        """Return the images that the provider needs as bytes.

        Raises UpstreamError for an unusable one, SlowInputs if they take long, and QueueUnavailable or
        StoreUnavailable if one can't be read now, before anything is paid.
        """
        sources = [source for source in dict.fromkeys(self._sources) if source not in self._opened]
        for source in sources:
            if source.startswith(UPLOAD_PREFIX):
                self._opened[source] = await self._find(self._opener.uploads, source)
        links = [source for source in sources if not source.startswith(UPLOAD_PREFIX)]
        if links and not (edits is not None and edits.links):
            fetch_all = partial(_fetch_all, self._opener, links)
            key, claim, discard = (self._claim.task.id, *links), self._claim, self._opener.spool.discard
            images = await self._opener.fetches.images(key, fetch_all, discard, lambda: not claim.lost)
            self._fetched += images
            for link, image in zip(links, images, strict=True):
                self._opened[link] = InputImage(image.content_type, image.size_bytes, partial(_read_fetched, image))
        return self._opened

    def close(self) -> None:
        """Remove the fetched images."""
        for image in self._fetched:
            self._opener.spool.discard(image)

    async def _find(self, uploads: Uploads, upload_id: str) -> InputImage:
        upload = await uploads.describe(upload_id)
        if upload is None:
            raise _gone(upload_id)
        return InputImage(upload.content_type, upload.size_bytes, lambda: _read_upload(uploads, upload_id))


async def _fetch_all(opener: InputOpener, links: Sequence[str]) -> Sequence[VerifiedImage]:
    images: list[VerifiedImage] = []
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            for link in links:
                images.append(await _fetch(opener.fetcher, link))  # noqa: PERF401 - those before a failure are discarded
    except BaseException as error:
        for image in images:
            opener.spool.discard(image)
        if isinstance(error, TimeoutError):
            raise _unusable(f"The input images did not come within {FETCH_TIMEOUT_S:g} s", retryable=True) from error
        raise
    return images


async def _fetch(fetcher: ImageFetcher, link: str) -> VerifiedImage:
    try:
        return await fetcher.fetch(ImageLink(link), age_s=math.inf)
    except ImageRejected as error:
        refused = error.__cause__ is not None and blocked_cause(error.__cause__) is not None
        advice = "; send the image itself, as an upload or a data: URI" if refused else ""
        raise _unusable(error.detail + advice) from error
    except DownloadFailed as error:
        raise _unusable(f"The input image can't be fetched: {error.detail}", retryable=True) from error


async def _read_upload(uploads: Uploads, upload_id: str) -> AsyncGenerator[bytes, None]:
    """Yield the bytes; the upload is open only meanwhile, so that few of them are in memory."""
    try:
        opened = await uploads.open(upload_id)
    except (QueueUnavailable, StoreUnavailable) as error:
        raise unreadable_input() from error
    if opened is None:
        raise _gone(upload_id)
    async for piece in _read(opened):
        yield piece


async def _read_fetched(image: VerifiedImage) -> AsyncGenerator[bytes, None]:
    if image.path is None:
        yield image.data or b""
        return
    try:
        opened = OpenedImage(image.size_bytes, file=await in_file_thread(FileIO, image.path))
    except OSError as error:
        raise unreadable_input() from error
    async for piece in _read(opened):
        yield piece


async def _read(opened: OpenedImage) -> AsyncGenerator[bytes, None]:
    try:
        with closing(opened):
            async for piece in opened.read():
                yield piece
    except (OSError, StoreUnavailable) as error:
        raise unreadable_input() from error


def _unusable(detail: str, *, retryable: bool = False) -> UpstreamError:
    return UpstreamError("upstream_invalid_request", detail, retryable=retryable)


def _gone(upload_id: str) -> UpstreamError:
    return _unusable(f"The input image {upload_id[:20]}… is gone: upload it again")
