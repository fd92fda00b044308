"""Input images of requests: `data:` URIs become uploads, and uploads are kept until their task has ended."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import replace
from pydantic.alias_generators import to_camel, to_snake

from imagegen.errors import ApiError, FieldError, InvalidRequest, UnsupportedImage
from imagegen.formats import printable
from imagegen.images.store import VerifiedImage
from imagegen.images.uploads import Uploads, upload_id_of, upload_not_found
from imagegen.tasks.request import UPLOAD_PREFIX, GenerationRequest
from imagegen.tasks.validation import MAX_KEY_CHARS
from imagegen.web.http.body import ReceivedBody, decoded

NEEDED_LONGER_S = 60.0
"""A task may end this long after its deadline."""

_DATA_URI = re.compile(r"data:image/[^,]{1,200};base64,", re.IGNORECASE)
_PIECE_CHARS = 256 * 1024

_SOURCE_FIELDS = ("image_url", "reference_images", "mask")

IsKnown = Callable[[GenerationRequest], Awaitable[bool]]


def api_name(field_name: str) -> str:
    """Return the name of a field under `/api`."""
    name, bracket, place = field_name.partition("[")
    return to_camel(name) + bracket + place


class InputImages(Struct, frozen=True):
    """Input images of submitted requests.

    task_life_s: the longest time from a submit to the end of its task. clock: Unix time.
    """

    uploads: Uploads
    task_life_s: float
    clock: Callable[[], float]

    async def store_images(
        self,
        request: GenerationRequest,
        fields: Mapping[str, Any],
        body: ReceivedBody,
        *,
        scope: str | None = None,
        is_known: IsKnown | None = None,
        spell: Callable[[str], str] = api_name,
    ) -> GenerationRequest:
        """Return the request with an upload in place of each `data:` URI; all its uploads are kept for its task.

        Args:
            fields: of the client that the request was made from.
            scope: name of the client's key if each key has its own uploads.
            is_known: returns whether a task of this request needs no upload any more.
            spell: returns the client's name of one of our fields.

        Raises:
            UploadNotFound, UnsupportedImage, ImageTooLarge, BodyTooLarge: before anything is stored.
            InvalidRequest: an image is in a field that takes none.
            StoreUnavailable, QueueUnavailable: nothing can be stored now.
        """
        if not request.image_sources:
            _check_places(fields, request, body, spell)
            return request
        resolver = _SourceResolver(self.uploads, body, spell, scope)
        try:
            resolved = await resolver.resolve(request)
            _check_places(fields, resolved, body, spell)
            missing = await resolver.missing(resolved)
            if missing is not None:
                if is_known is not None and await is_known(resolved):
                    return resolved
                raise upload_not_found(spell(missing))
            for image in resolver.images.values():
                await self.uploads.store(image, scope)
            await self._keep(resolved)
            return resolved
        finally:
            for image in resolver.own:
                self.uploads.discard(image)

    async def identify(
        self, request: GenerationRequest, body: ReceivedBody, *, scope: str | None = None
    ) -> GenerationRequest:
        """Return the request as `store_images` does, but store and keep nothing.

        Raises UploadNotFound, UnsupportedImage, ImageTooLarge, BodyTooLarge, StoreUnavailable, QueueUnavailable.
        """
        if not request.image_sources:
            return request
        resolver = _SourceResolver(self.uploads, body, api_name, scope)
        try:
            resolved = await resolver.resolve(request)
            missing = await resolver.missing(resolved)
            if missing is not None:
                raise upload_not_found(api_name(missing))
            return resolved
        finally:
            for image in resolver.own:
                self.uploads.discard(image)

    async def keep_again(self, request_json: bytes) -> None:
        """Keep the uploads of a stored request, for a retry. Raises UploadNotFound, and as `store_images`."""
        try:
            request = GenerationRequest.from_json(request_json)
        except ValueError:  # of another version; the attempt fails if it can't run
            return
        for name, source in _sources(request):
            if source.startswith(UPLOAD_PREFIX) and await self.uploads.describe(source) is None:
                raise upload_not_found(api_name(name))
        await self._keep(request)

    async def _keep(self, request: GenerationRequest) -> None:
        if ids := [source for source in request.image_sources if source.startswith(UPLOAD_PREFIX)]:
            await self.uploads.keep(ids, self.clock() + self.task_life_s + NEEDED_LONGER_S)


@dataclass(slots=True)
class _SourceResolver:
    """Replacement of the image sources of one request by uploads.

    images: to store, by upload id; own: those of them that only this request has.
    """

    uploads: Uploads
    body: ReceivedBody
    spell: Callable[[str], str]
    scope: str | None
    images: dict[str, VerifiedImage] = field(default_factory=dict)
    own: list[VerifiedImage] = field(default_factory=list)

    async def resolve(self, request: GenerationRequest) -> GenerationRequest:
        sources = {name: await self._resolve(name, source) for name, source in _sources(request)}
        images = tuple(source for name, source in sources.items() if name.startswith("reference_images"))
        return replace(
            request,
            image_url=sources.get("image_url"),
            reference_images=images or None,
            mask=sources.get("mask"),
        )

    async def missing(self, request: GenerationRequest) -> str | None:
        """Return the field of the first upload that is unknown or expired."""
        for name, source in _sources(request):
            if (
                source.startswith(UPLOAD_PREFIX)
                and source not in self.images
                and await self.uploads.find(source, self.scope) is None
            ):
                return name
        return None

    async def _resolve(self, name: str, source: str) -> str:
        """Return what to store in place of an input image."""
        if (refusal := self.body.refusals.get(source)) is not None:
            with self._named(name):
                raise refusal
        if (cut := self.body.images.get(source)) is not None:
            self.images[source] = cut
        if source[:5].lower() != "data:":
            return source
        with self._named(name):
            image = await self.uploads.receive(decoded(_base64_of(source)))
        self.own.append(image)
        place = upload_id_of(image)
        self.images[place] = image
        return place

    def _named(self, name: str) -> AbstractContextManager[None]:
        return _details_of(self.spell(name))


@contextmanager
def _details_of(client_name: str) -> Iterator[None]:
    """Let the errors of an image name the field that it is in."""
    try:
        yield
    except ApiError as error:
        error.details = tuple(FieldError(client_name, detail.message) for detail in error.details)
        raise


def _sources(request: GenerationRequest) -> Iterator[tuple[str, str]]:
    """Yield the fields with input images, by name and place, and their values."""
    if request.image_url is not None:
        yield "image_url", request.image_url
    for index, source in enumerate(request.reference_images or ()):
        yield f"reference_images[{index}]", source
    if request.mask is not None:
        yield "mask", request.mask


async def _base64_of(uri: str) -> AsyncIterator[bytes]:
    """Yield the text of a `data:` URI behind its head. Raises UnsupportedImage if it is no base64."""
    head = _DATA_URI.match(uri[:256])
    if head is None:
        raise UnsupportedImage(details=[FieldError("file", "it must be data:image/…;base64, and the image in base64")])
    for at in range(head.end(), len(uri), _PIECE_CHARS):
        yield uri[at : at + _PIECE_CHARS].encode()


def _check_places(
    fields: Mapping[str, Any], resolved: GenerationRequest, body: ReceivedBody, spell: Callable[[str], str]
) -> None:
    """Raise InvalidRequest for an image in a field that takes none, with the name of that field."""
    if not body.images and not body.refusals:
        return
    sent = orjson.dumps(fields)
    for place in (*body.images, *body.refusals):
        if sent.count(place.encode()) > resolved.image_sources.count(place):
            others = (name for name in fields if to_snake(name) not in _SOURCE_FIELDS)
            holder = next((name for name in others if place.encode() in orjson.dumps(fields[name])), "body")
            rule = (
                f"an image may only be in {', '.join(map(spell, _SOURCE_FIELDS[:-1]))} and {spell(_SOURCE_FIELDS[-1])}"
            )
            raise InvalidRequest(details=[FieldError(printable(holder, MAX_KEY_CHARS), rule)])
